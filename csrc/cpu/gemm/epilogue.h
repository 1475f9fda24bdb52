// What follows a product: bias, activation and residual, on the way from a strip of sums to rows.
#pragma once

#include "args/activation.h"
#include "cpu/simd/activations.h"
#include "cpu/simd/simd.h"

namespace filbert {
namespace FILBERT_ISA {
namespace {

template <Activation kActivation>
FILBERT_INLINE VecF activated(VecF v) {
  if constexpr (kActivation == Activation::kGelu) return gelu_erf(v);
  if constexpr (kActivation == Activation::kGeluTanh) return gelu_tanh(v);
  if constexpr (kActivation == Activation::kRelu) return relu(v);
  if constexpr (kActivation == Activation::kSilu) return silu(v);
  return v;
}

// act(sum + bias) + residual.
template <typename Bias, typename Residual, typename Out>
struct Epilogue {
  const Bias* bias;          // or null
  const Residual* residual;  // of the first row, or null; LayerNorm adds it itself
  int64_t residual_row;
  Out* out;  // of the first row
  int64_t out_row;
  Activation activation;

  // Rows [0, count), outputs [column, column + columns). sums(r) says how row r's sums are read: it
  // gives a function of j to the vector of those of column + j and the lanes after it.
  template <typename Sums>
  FILBERT_INLINE void operator()(int64_t count, int64_t column, int64_t columns, Sums sums) const {
    switch (activation) {
      case Activation::kNone:
        return rows<Activation::kNone>(count, column, columns, sums);
      case Activation::kGelu:
        return rows<Activation::kGelu>(count, column, columns, sums);
      case Activation::kGeluTanh:
        return rows<Activation::kGeluTanh>(count, column, columns, sums);
      case Activation::kRelu:
        return rows<Activation::kRelu>(count, column, columns, sums);
      case Activation::kSilu:
        return rows<Activation::kSilu>(count, column, columns, sums);
    }
  }

  template <Activation kActivation, typename Sums>
  __attribute__((noinline)) void rows(int64_t count, int64_t column, int64_t columns,
                                      Sums sums) const {
    for (int64_t r = 0; r < count; ++r) {
      const auto sum = sums(r);
      const Residual* add = residual + r * residual_row;
      Out* to = out + r * out_row;
      for (int64_t j = 0; j < columns; j += kLanes) {
        const int64_t at = column + j, left = columns - j;
        VecF value = sum(j);
        if (left >= kLanes) {
          if (bias) value += load(bias + at);
          value = activated<kActivation>(value);
          if (residual) value += load(add + at);
          store(to + at, value);
        } else {
          if (bias) value += load_first(bias + at, left);
          value = activated<kActivation>(value);
          if (residual) value += load_first(add + at, left);
          store_first(to + at, value, left);
        }
      }
    }
  }
};

}  // namespace
}  // namespace FILBERT_ISA
}  // namespace filbert
