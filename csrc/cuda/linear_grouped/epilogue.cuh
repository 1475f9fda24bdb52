// What linear_grouped makes of its integer sums.
#pragma once

#include "args/linear_grouped.h"
#include "cuda/device/activations.cuh"
#include "cuda/device/rows.cuh"

namespace filbert {
namespace cuda {

template <typename T>
__device__ __forceinline__ float load_number(const void* p, int64_t i) {
  return to_float(static_cast<const T*>(p)[i]);
}
__device__ __forceinline__ float load_number(DType dtype, const void* p, int64_t i) {
  if (dtype == DType::kFloat32) return load_number<float>(p, i);
  return dtype == DType::kBFloat16 ? load_number<bf16>(p, i) : load_number<fp16>(p, i);
}

// Writes results of four neighbouring outputs of a row.
struct GroupedWriter {
  const LinearGroupedArgs& args;
  const void* residual;  // or null: LayerNorm adds it itself
  DType out_dtype;       // of out: float32 where only codes are wanted

  __device__ __forceinline__ explicit GroupedWriter(const LinearGroupedArgs& args)
      : args(args),
        residual(args.norm_weight ? nullptr : args.residual),
        out_dtype(args.out_codes.codes && !args.norm_weight ? DType::kFloat32 : args.dtype) {}

  // By how much offsets of the weight change a sum: they take from each group what its codes add up
  // to.
  __device__ __forceinline__ int32_t offset_of(int64_t row, int output) const {
    const int32_t* offset =
        args.offset + output / kGroupedPanel * args.groups * kGroupedPanel + output % kGroupedPanel;
    const int32_t* sums = args.code_sums + row * args.groups;
    int32_t sum = 0;
    for (int g = 0; g < args.groups; ++g) sum += offset[g * kGroupedPanel] * sums[g];
    return sum;
  }

  // sums: of outputs from `output` on; by and zero: of the row's codes.
  __device__ __forceinline__ void operator()(int64_t row, int output, const int32_t (&sums)[4],
                                             float by, int32_t zero) const {
    if (row >= args.rows) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = output + i;
      if (n >= args.outputs) return;
      int32_t sum = sums[i] - zero * args.totals[n];
      if (args.offset) sum -= offset_of(row, n);
      float y = multiply_rn(multiply_rn(static_cast<float>(sum), by), args.scale[n]);
      if (args.bias) y += args.bias[n];
      y = out_dtype == DType::kFloat32 ? activated<float>(y, args.activation)
                                       : activated<bf16>(y, args.activation);
      if (residual) y += load_number(args.dtype, residual, row * args.residual_row + n);
      store(row * args.outputs + n, y);
    }
  }

  __device__ __forceinline__ void store(int64_t at, float y) const {
    if (out_dtype == DType::kFloat32) {
      static_cast<float*>(args.out)[at] = y;
    } else if (out_dtype == DType::kBFloat16) {
      static_cast<bf16*>(args.out)[at] = from_float<bf16>(y);
    } else {
      static_cast<fp16*>(args.out)[at] = from_float<fp16>(y);
    }
  }
};

// The multipliers of outputs 4 t .. 4 t + 3 of a panel, for one group.
__device__ __forceinline__ uint32_t multipliers_of(const LinearGroupedArgs& args, int panel,
                                                   int group, int place) {
  const uint8_t* from =
      args.multiplier + (int64_t{panel} * args.groups + group) * kGroupedPanel + place * 4;
  return *reinterpret_cast<const uint32_t*>(from);
}

}  // namespace cuda
}  // namespace filbert
