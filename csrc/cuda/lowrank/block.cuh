// The products of one block of rows with low-rank factors. Eight warps share a tile, four down and
// two across. Of the factors one piece is multiplied while the next one comes.
#pragma once

#include "cuda/device/activations.cuh"
#include "cuda/device/arithmetic.cuh"
#include "cuda/device/rows.cuh"
#include "cuda/ffn_lowrank_plan.h"
#include "cuda/lowrank/tile.cuh"

namespace filbert {
namespace cuda {

// Of a feed-forward part, or of one linear layer: its first factor is up.a, its second down.b, and
// the ranks are the same.
template <typename T, int kRows, int kColumns>
class LowRankBlock {
  static constexpr int kThreads = static_cast<int>(kLowRankThreads);
  static constexpr int kWide = static_cast<int>(kLowRankColumns);
  static constexpr int kStrips = kRows / 64;        // of 16 rows, of a warp
  static constexpr int kRankTiles = kColumns / 16;  // of 8 columns, of a warp
  static constexpr int kWideTiles = kWide / 16;
  using Narrow = LowRankTile<kColumns / 8>;  // rows as wide as the rank
  using Wide = LowRankTile<kWide / 8>;       // rows of 64 values
  static constexpr int kNarrowBytes = kRows * kColumns * 2, kWideBytes = kRows * kWide * 2;
  static constexpr int kPieceBytes = kWide * kColumns * 2;  // of a factor
  static_assert(kNarrowBytes + kWideBytes + 2 * kPieceBytes ==
                    low_rank_shared_bytes(kRows, kColumns),
                "");
  // The first product has two stages of rows and factor where later all of these are.
  static_assert(2 * (kWideBytes + kPieceBytes) <= low_rank_shared_bytes(kRows, kColumns), "");

  const FfnLowRankArgs& args;
  const uint32_t memory;
  const int64_t row;  // first of the block
  const int rows;     // of them that are there
  const int warp, lane;

 public:
  using Sums = float[kStrips][kRankTiles][4];

  __device__ __forceinline__ LowRankBlock(const FfnLowRankArgs& args, int64_t row)
      : args(args),
        memory(shared_address(shared_memory())),
        row(row),
        rows(at_most(args.rows - row, kRows)),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32) {}

  // p, from rows that are read once.
  __device__ __forceinline__ void to_rank() const {
    const int inputs = static_cast<int>(args.inputs), stride = padded(inputs);
    const T* x = static_cast<const T*>(args.x) + row * args.x_row;
    const T* a = static_cast<const T*>(args.up.a);
    const int stages = divided_up(inputs, kWide);
    const auto stage = [this](int i) { return memory + i % 2 * (kWideBytes + kPieceBytes); };
    const auto bring = [&](int i) {
      const int first = i * kWide;
      fetch<kThreads, kRows>(Wide{stage(i)}, x + first, args.x_row, rows, (inputs - first) / 8);
      fetch<kThreads, kColumns>(Wide{stage(i) + kWideBytes}, a + first, stride,
                                static_cast<int>(args.up.rank), (stride - first) / 8);
      cp_async_commit();
    };
    Sums sums = {};
    bring(0);
    for (int i = 0; i < stages; ++i) {
      cp_async_wait<0>();
      __syncthreads();  // this stage is there, and nobody reads the other one any more
      if (i + 1 < stages) bring(i + 1);
      multiply<T>(sums, Wide{stage(i)}, own_row(), Wide{stage(i) + kWideBytes}, rank_column(),
                  kWide / 16, lane);
    }
    __syncthreads();  // p lies where stages were
    store<T>(sums, narrow(), own_row(), rank_column(), lane, as_it_is);
  }

  // s, of inner columns from tile `begin` to `end`.
  __device__ __forceinline__ void through(Sums& sums, int begin, int end) const {
    const int inner = static_cast<int>(args.inner), stride = padded(inner);
    const int held = static_cast<int>(args.up.held), rank = static_cast<int>(args.up.rank);
    const T* bias = static_cast<const T*>(args.up.bias);
    const Activation activation = args.activation;
    const auto bring_up = [&](int tile) {
      const int first = tile * kWide;
      fetch<kThreads, kWide>(Narrow{piece(0)},
                             static_cast<const T*>(args.up.b) + int64_t{first} * held, held,
                             inner - first, held / 8);
      cp_async_commit();
    };
    const auto bring_down = [&](int tile) {
      const int first = tile * kWide;
      fetch<kThreads, kColumns>(Wide{piece(1)}, static_cast<const T*>(args.down.a) + first, stride,
                                static_cast<int>(args.down.rank), (stride - first) / 8);
      cp_async_commit();
    };
    if (begin < end) bring_up(begin);
    for (int tile = begin; tile < end; ++tile) {
      cp_async_wait<0>();
      __syncthreads();  // B_up and p are there; nobody reads t and A_down any more
      bring_down(tile);
      float made[kStrips][kWideTiles][4] = {};
      multiply<T>(made, narrow(), own_row(), Narrow{piece(0)}, wide_column(), divided_up(rank, 16),
                  lane);
      store<T>(made, wide(), own_row(), wide_column(), lane, [&](float sum, int column, int) {
        const int n = tile * kWide + column;
        if (bias && n < inner) sum += to_float(bias[n]);
        return activated<T>(sum, activation);
      });
      cp_async_wait<0>();
      __syncthreads();  // t and A_down are there; nobody reads B_up any more
      if (tile + 1 < end) bring_up(tile + 1);
      multiply<T>(sums, wide(), own_row(), Wide{piece(1)}, rank_column(), kWide / 16, lane);
    }
  }

  // Rounds s to where p was.
  __device__ __forceinline__ void keep(const Sums& sums) const {
    __syncthreads();  // nobody reads p any more
    store<T>(sums, narrow(), own_row(), rank_column(), lane, as_it_is);
  }
  // Leaves s as one of several.
  __device__ __forceinline__ void leave(const Sums& sums, int split) const {
    float* to = args.partial + (split * args.rows + row) * kColumns;
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = own_row() + s * 16 + half * 8 + lane / 4;
        if (r >= rows) continue;
#pragma unroll
        for (int t = 0; t < kRankTiles; ++t) {
          const float* two = sums[s][t] + half * 2;
          store_8(to + r * kColumns + rank_column() + t * 8 + lane % 4 * 2,
                  uint2{float_bits(two[0]), float_bits(two[1])});
        }
      }
    }
  }
  // Adds them up, to where p would be.
  __device__ __forceinline__ void gather(int splits) const {
    constexpr int kPieces = kColumns / 8;
    for (int i = threadIdx.x; i < kRows * kPieces; i += kThreads) {
      const int r = i / kPieces, piece = i % kPieces;
      uint32_t packed[4] = {};
      if (r < rows) {
        float total[kEight] = {};
        for (int split = 0; split < splits; ++split) {
          Eight<float> own;
          own.load(args.partial + (split * args.rows + row + r) * kColumns + piece * 8);
#pragma unroll
          for (int j = 0; j < kEight; ++j) total[j] += own[j];
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) packed[j] = pack2<T>(total[2 * j], total[2 * j + 1]);
      }
      store_shared_16(narrow().at(r, piece), uint4{packed[0], packed[1], packed[2], packed[3]});
    }
  }

  // out, from what is as wide as the rank.
  __device__ __forceinline__ void lift(Activation activation) const {
    const int outputs = static_cast<int>(args.outputs), held = static_cast<int>(args.down.held);
    const int rank = static_cast<int>(args.down.rank), tiles = divided_up(outputs, kWide);
    const T* bias = static_cast<const T*>(args.down.bias);
    const T* residual = static_cast<const T*>(args.norm_weight ? nullptr : args.residual);
    T* out = static_cast<T*>(args.out) + row * outputs;
    const auto bring = [&](int tile) {
      const int first = tile * kWide;
      fetch<kThreads, kWide>(Narrow{piece(tile % 2)},
                             static_cast<const T*>(args.down.b) + int64_t{first} * held, held,
                             outputs - first, held / 8);
      cp_async_commit();
    };
    __syncthreads();  // nobody reads pieces any more
    bring(0);
    for (int tile = 0; tile < tiles; ++tile) {
      cp_async_wait<0>();
      __syncthreads();  // B_down and s are there; nobody reads the other piece, nor results
      if (tile + 1 < tiles) bring(tile + 1);
      float made[kStrips][kWideTiles][4] = {};
      multiply<T>(made, narrow(), own_row(), Narrow{piece(tile % 2)}, wide_column(),
                  divided_up(rank, 16), lane);
      store<T>(made, wide(), own_row(), wide_column(), lane, [&](float sum, int column, int r) {
        const int n = tile * kWide + column;
        if (n >= outputs || r >= rows) return 0.0f;
        if (bias) sum += to_float(bias[n]);
        if (activation != Activation::kNone) sum = activated<T>(sum, activation);
        if (residual) sum += to_float(residual[(row + r) * args.residual_row + n]);
        return sum;
      });
      __syncthreads();  // results are there
      constexpr int kPieces = kWide / 8;
#pragma unroll
      for (int i = 0; i < kRows * kPieces / kThreads; ++i) {
        const int index = i * kThreads + threadIdx.x, r = index / kPieces, piece = index % kPieces;
        const int n = tile * kWide + piece * 8;
        if (r < rows && n < outputs) {
          store_16(out + int64_t{r} * outputs + n, load_shared_16(wide().at(r, piece)));
        }
      }
    }
  }

 private:
  // Rows of factors are padded to multiples of 16 values.
  static __device__ __forceinline__ int padded(int n) { return (n + 15) / 16 * 16; }
  static __device__ __forceinline__ float as_it_is(float sum, int, int) { return sum; }
  static __device__ __forceinline__ uint32_t float_bits(float x) {
    union {
      float number;
      uint32_t bits;
    } both = {x};
    return both.bits;
  }

  __device__ __forceinline__ Narrow narrow() const { return {memory}; }
  __device__ __forceinline__ Wide wide() const { return {memory + kNarrowBytes}; }
  __device__ __forceinline__ uint32_t piece(int i) const {
    return memory + kNarrowBytes + kWideBytes + i * kPieceBytes;
  }
  __device__ __forceinline__ int own_row() const { return warp / 2 * kStrips * 16; }
  __device__ __forceinline__ int rank_column() const { return warp % 2 * (kColumns / 2); }
  __device__ __forceinline__ int wide_column() const { return warp % 2 * (kWide / 2); }
};

}  // namespace cuda
}  // namespace filbert
