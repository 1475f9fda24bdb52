// Rows by index, zeros where the index is no row: packing and, with the inverse index, unpacking.
// A warp copies a row, in the widest units that its size and its place allow.
#pragma once

#include "args/gather_rows.h"
#include "cuda/device/ptx.cuh"

namespace filbert {
namespace cuda {

constexpr int kGatherWarps = 8;  // of a block, each with a row of its own
constexpr int kInFlight = 3;  // loads before the first store; a row of 768 16-bit values is three

template <typename Unit>
__device__ __forceinline__ Unit load_unit(const Unit* from) {
  return *from;
}
template <>
__device__ __forceinline__ uint4 load_unit<uint4>(const uint4* from) {
  return load_16(from);
}
template <typename Unit>
__device__ __forceinline__ void store_unit(Unit* to, Unit value) {
  *to = value;
}
template <>
__device__ __forceinline__ void store_unit<uint4>(uint4* to, uint4 value) {
  store_16(to, value);
}

template <typename Unit>
__global__ void __launch_bounds__(32 * kGatherWarps)
    gather_rows_kernel(const __grid_constant__ GatherRowsArgs args) {
  const int64_t units = args.row_bytes / static_cast<int64_t>(sizeof(Unit));
  const int64_t warps = int64_t{gridDim.x} * kGatherWarps;
  for (int64_t row = blockIdx.x * kGatherWarps + threadIdx.x / 32; row < args.rows; row += warps) {
    const int64_t source = args.index[row];
    const bool valid = source >= 0 && source < args.x_rows;
    const Unit* from = reinterpret_cast<const Unit*>(static_cast<const char*>(args.x) +
                                                     (valid ? source : 0) * args.x_row_stride);
    Unit* to = reinterpret_cast<Unit*>(static_cast<char*>(args.out) + row * args.row_bytes);
    int64_t i = threadIdx.x % 32;
    for (; i + 32 * (kInFlight - 1) < units; i += 32 * kInFlight) {
      Unit held[kInFlight] = {};
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        if (valid) held[u] = load_unit(from + i + 32 * u);
      }
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) store_unit(to + i + 32 * u, held[u]);
    }
    for (; i < units; i += 32) store_unit(to + i, valid ? load_unit(from + i) : Unit{});
  }
}

}  // namespace cuda
}  // namespace filbert
