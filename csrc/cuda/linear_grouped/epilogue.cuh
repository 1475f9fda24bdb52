// What linear_grouped makes of its integer sums.
#pragma once

#include "args/linear_grouped.h"
#include "cuda/device/activations.cuh"
#include "cuda/device/arithmetic.cuh"
#include "cuda/device/rows.cuh"

namespace filbert {
namespace cuda {

// What four neighbouring outputs add to their sums; 0 past the last one.
struct GroupedColumns {
  int first, count;  // of which so many are there, 0 to 4
  float scale[4], bias[4];
  int32_t totals[4];

  __device__ __forceinline__ GroupedColumns(const LinearGroupedArgs& args, int first)
      : first(first), count(at_most(static_cast<int>(args.outputs) - first, 4)) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool there = i < count;
      scale[i] = there ? args.scale[first + i] : 0.0f;
      bias[i] = there && args.bias ? args.bias[first + i] : -0.0f;  // which leaves -0 as it is
      totals[i] = there ? args.totals[first + i] : 0;
    }
  }
};

// Writes results of four neighbouring outputs of a row.
struct GroupedWriter {
  const LinearGroupedArgs& args;
  const void* residual;  // or null: LayerNorm adds it itself
  DType out_dtype;       // of out: float32 where only codes are wanted

  __device__ __forceinline__ explicit GroupedWriter(const LinearGroupedArgs& args)
      : args(args),
        residual(args.norm_weight ? nullptr : args.residual),
        out_dtype(args.out_codes.codes && !args.norm_weight ? DType::kFloat32 : args.dtype) {}

  // Whether plain() may be called for these columns, where T is dtype: nothing but an activation
  // follows the bias, if kActivates, and four results are stored at a time.
  template <typename T, bool kActivates>
  __device__ __forceinline__ bool is_plain(const GroupedColumns& columns, DType dtype) const {
    return columns.count == 4 && out_dtype == dtype && !residual && !args.offset &&
           (args.activation != Activation::kNone) == kActivates &&
           by_fours<T>(args.out, args.outputs);
  }
  template <typename T, bool kActivates>
  __device__ __forceinline__ void plain(int64_t row, const GroupedColumns& columns,
                                        const Four<int32_t>& sums, float by, int32_t zero) const {
    float y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] = number(less(sums, zero, columns, i), by, columns, i);
    if constexpr (kActivates) activate(y);
    Four<T> four;
#pragma unroll
    for (int i = 0; i < 4; ++i) four.values[i] = from_float<T>(y[i]);
    four.store(static_cast<T*>(args.out) + row * args.outputs + columns.first);
  }

  // sums: of the columns' outputs; by and zero: of the row's codes.
  __device__ __forceinline__ void operator()(int64_t row, const GroupedColumns& columns,
                                             const Four<int32_t>& sums, float by,
                                             int32_t zero) const {
    if (row >= args.rows || columns.count <= 0) return;
    int32_t own[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) own[i] = less(sums, zero, columns, i);
    if (args.offset) take_offsets(row, columns.first, own);
    float y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] = number(own[i], by, columns, i);
    if (args.activation != Activation::kNone) activate(y);
    if (residual) {
      switch (args.dtype) {
        case DType::kFloat32:
          add_residual<float>(row, columns, y);
          break;
        case DType::kBFloat16:
          add_residual<bf16>(row, columns, y);
          break;
        default:
          add_residual<fp16>(row, columns, y);
      }
    }
    switch (out_dtype) {
      case DType::kFloat32:
        return store<float>(row, columns, y);
      case DType::kBFloat16:
        return store<bf16>(row, columns, y);
      default:
        return store<fp16>(row, columns, y);
    }
  }

 private:
  static constexpr int kPanel = static_cast<int>(kGroupedPanel);

  __device__ __forceinline__ static int32_t less(const Four<int32_t>& sums, int32_t zero,
                                                 const GroupedColumns& columns, int i) {
    return sums.values[i] - zero * columns.totals[i];
  }
  __device__ __forceinline__ static float number(int32_t sum, float by,
                                                 const GroupedColumns& columns, int i) {
    return multiply_rn(multiply_rn(static_cast<float>(sum), by), columns.scale[i]) +
           columns.bias[i];
  }

  // Offsets of the weight take from each group what its codes add up to. They are there for whole
  // panels.
  __device__ __forceinline__ void take_offsets(int64_t row, int first, int32_t (&sums)[4]) const {
    const int32_t* offset =
        args.offset + int64_t{first / kPanel} * args.groups * kPanel + first % kPanel;
    const int32_t* of_codes = args.code_sums + row * args.groups;
#pragma unroll 1
    for (int g = 0; g < args.groups; ++g) {
      Four<int32_t> four;
      four.load(offset + g * kPanel);
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i] -= four.values[i] * of_codes[g];
    }
  }

  __device__ __forceinline__ void activate(float (&y)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      y[i] = out_dtype == DType::kFloat32 ? activated<float>(y[i], args.activation)
                                          : activated<bf16>(y[i], args.activation);
    }
  }

  template <typename T>
  __device__ __forceinline__ void add_residual(int64_t row, const GroupedColumns& columns,
                                               float (&y)[4]) const {
    const T* from = static_cast<const T*>(residual) + row * args.residual_row + columns.first;
    Four<T> four{};
    if (columns.count == 4 && by_fours<T>(residual, args.residual_row)) {
      four.load(from);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i < columns.count) four.values[i] = from[i];
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] += to_float(four.values[i]);
  }

  template <typename T>
  __device__ __forceinline__ void store(int64_t row, const GroupedColumns& columns,
                                        const float (&y)[4]) const {
    T* to = static_cast<T*>(args.out) + row * args.outputs + columns.first;
    Four<T> four;
#pragma unroll
    for (int i = 0; i < 4; ++i) four.values[i] = from_float<T>(y[i]);
    if (columns.count == 4 && by_fours<T>(args.out, args.outputs)) return four.store(to);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < columns.count) to[i] = four.values[i];
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
