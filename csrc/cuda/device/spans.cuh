// Which rows belong to a sequence, from offsets that nobody has looked at.
#pragma once

#include <cstdint>

#include "cuda/device/arithmetic.cuh"

namespace filbert {
namespace cuda {

// Rows of one sequence. Nobody has read the offsets on the host, so they are made to rise from 0
// and end within the tensor here: wrong ones give wrong results and touch nothing else.
struct Span {
  int begin;
  int length;
};

__device__ __forceinline__ Span span_of(const int32_t* cu, int sequence, int64_t rows) {
  const int most = static_cast<int>(rows);
  const int begin = sequence == 0 ? 0 : clamped(cu[sequence], most);
  return {begin, larger(begin, clamped(cu[sequence + 1], most)) - begin};
}

// The query rows that no sequence owns, as one more sequence.
__device__ __forceinline__ Span rows_past_end(const int32_t* cu, int sequences, int64_t rows) {
  const int most = static_cast<int>(rows);
  const int begin = sequences == 0 ? 0 : clamped(cu[sequences], most);
  return {begin, most - begin};
}

}  // namespace cuda
}  // namespace filbert
