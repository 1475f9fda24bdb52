// What becomes of a warp's sums.
#pragma once

#include "cuda/linear_grouped/epilogue.cuh"
#include "cuda/linear_grouped/stage.cuh"

namespace filbert {
namespace cuda {

// From fragments to results. A warp turns its sums of 16 rows at a time in shared memory, where no
// operand is left, so that neighbouring lanes write neighbouring outputs, and one rolled loop makes
// results of them: unrolled over the fragments, it was half a megabyte of code, and on an H200
// warps waited for instructions most of all. Where little follows the product there is a short way.
template <typename Tiling>
struct GroupedResults {
  static constexpr int kOutputs = Tiling::kColumns * static_cast<int>(kGroupedPanel);
  static constexpr int kLanes = kOutputs / 4;  // of a row, four outputs each
  static constexpr int kRowBytes = static_cast<int>(grouped_result_row(kOutputs));
  static constexpr int kWarpBytes = 16 * kRowBytes;
  static_assert(Tiling::kThreads / 32 * kWarpBytes == grouped_result_bytes(Tiling::size()), "");

  const LinearGroupedArgs& args;
  uint32_t base;  // the warp's part of shared memory
  int lane;

  __device__ __forceinline__ GroupedResults(const LinearGroupedArgs& args, uint32_t memory,
                                            int warp, int lane)
      : args(args), base(memory + warp * kWarpBytes), lane(lane) {}

  // sums: of the strips from `row` on and the columns from `panel` on.
  template <typename Sums>
  __device__ __forceinline__ void write(const Sums& sums, int64_t row, int panel) const {
    const int first = panel * static_cast<int>(kGroupedPanel) + lane % kLanes * 4;
    const GroupedWriter write(args);
#pragma unroll
    for (int s = 0; s < Tiling::kStrips; ++s) {
      __syncwarp();  // all lanes have read the last strip's
      turn(sums, s);
      // Read again for each strip: before, all registers hold sums.
      const GroupedColumns columns(args, first);
      const int64_t begin = row + s * 16;
      if (write.is_plain<fp16, false>(columns, DType::kFloat16)) {
        plain<fp16, false>(write, columns, begin);
      } else if (write.is_plain<bf16, false>(columns, DType::kBFloat16)) {
        plain<bf16, false>(write, columns, begin);
      } else if (write.is_plain<float, true>(columns, DType::kFloat32)) {
        plain<float, true>(write, columns, begin);  // codes will be made of them
      } else {
#pragma unroll 1
        for (int r = lane / kLanes; r < 16; r += kStep) {
          if (begin + r >= args.rows) break;
          const int64_t n = begin + r;
          write(n, columns, own(r), args.codes.scale[n], args.codes.zero[n]);
        }
      }
    }
  }

 private:
  static constexpr int kStep = 32 / kLanes;  // rows at a time

  __device__ __forceinline__ uint32_t at(int row, int output) const {
    return base + row * kRowBytes + output * 4;
  }
  // The four sums of a row that this lane makes results of.
  __device__ __forceinline__ Four<int32_t> own(int row) const {
    Four<int32_t> four;
    four.sixteen = load_shared_16(at(row, lane % kLanes * 4));
    return four;
  }

  template <typename Sums>
  __device__ __forceinline__ void turn(const Sums& sums, int strip) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int c = 0; c < Tiling::kColumns; ++c) {
        store_shared_16(at(half * 8 + lane / 4, c * static_cast<int>(kGroupedPanel) + lane % 4 * 4),
                        sums.four(strip, c, half));
      }
    }
    __syncwarp();
  }

  // Where little follows. Without an activation all rows' scales and zeros are asked for at once.
  template <typename T, bool kActivates>
  __device__ __forceinline__ void plain(const GroupedWriter& write, const GroupedColumns& columns,
                                        int64_t begin) const {
    const int left = at_most(args.rows - begin, 16), mine = lane / kLanes;
    if constexpr (kActivates) {
#pragma unroll 1
      for (int r = mine; r < left; r += kStep) {
        const float by = args.codes.scale[begin + r];
        write.plain<T, true>(begin + r, columns, own(r), by, args.codes.zero[begin + r]);
      }
    } else {
      float by[16 / kStep];
      int32_t zero[16 / kStep];
#pragma unroll
      for (int i = 0; i < 16 / kStep; ++i) {
        const bool there = mine + i * kStep < left;
        by[i] = there ? args.codes.scale[begin + mine + i * kStep] : 0.0f;
        zero[i] = there ? args.codes.zero[begin + mine + i * kStep] : 0;
      }
#pragma unroll
      for (int i = 0; i < 16 / kStep; ++i) {
        const int r = mine + i * kStep;
        if (r < left) write.plain<T, false>(begin + r, columns, own(r), by[i], zero[i]);
      }
    }
  }
};

}  // namespace cuda
}  // namespace filbert
