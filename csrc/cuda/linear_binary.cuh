// A linear layer on one-bit weights and planes of one-bit inputs, on tensor cores: counts of common
// ones by mma.m16n8k256 (AND, popcount), exact in 32 bits.
//
// A block makes one tile of outputs. Inputs and weights come through shared memory in stages: 32
// words (1024 bits) of one plane of the tile's rows and of its outputs, the next one loading while
// this one is multiplied. Planes go from the highest down, and the sums double between two of them.
// BERT's 768 inputs are one stage, and then everything is loaded once and nothing is waited for
// twice.
//
// Fragments. Both operands are in their natural order in memory. A lane reads the weight words of
// outputs 2 g and 2 g + 1 (g its group) in one access of 8 bytes, as column g of two mma; so of 16
// neighbouring outputs lane t of a row's four holds numbers 4 t .. 4 t + 3 of the result: 16 bytes
// of float32, or four neighbouring bits.
#pragma once

#include "args/linear_binary.h"
#include "cuda/device/bit_rows.cuh"
#include "cuda/linear_binary/epilogue.cuh"
#include "cuda/linear_binary_plan.h"

namespace filbert {
namespace cuda {

constexpr int kChunkWords = static_cast<int>(kBinaryChunkWords);
constexpr int kTileWidth = static_cast<int>(kTileOutputs);  // outputs side by side in the weight

// How the warps of a block share its tile: kStrips times 16 rows and kColumns times 16 outputs
// each.
template <int kDown_, int kAcross_, int kStrips_, int kColumns_>
struct WarpTiling {
  static constexpr int kDown = kDown_, kAcross = kAcross_, kStrips = kStrips_, kColumns = kColumns_;
  static constexpr int kRows = kDown * kStrips * 16, kOutputs = kAcross * kColumns * kTileWidth;
  static constexpr int kThreads = kDown * kAcross * 32;
  static constexpr int kRowWords = kOutputs / 32;  // of a row of the tile when outputs are bits

  static constexpr bool is(const BinaryTileSize& size) {
    return size.rows == kRows && size.outputs == kOutputs && size.threads == kThreads;
  }
};
using LargeTiling = WarpTiling<2, 4, 4, 2>;
using SmallTiling = WarpTiling<1, 4, 2, 1>;
static_assert(LargeTiling::is(kBinaryLargeTile) && SmallTiling::is(kBinarySmallTile), "");

// Where things lie in one stage of shared memory: kChunkWords words for each row, and behind them
// for each output.
template <typename Tiling>
struct Stage {
  static constexpr int kRowBytes = kChunkWords * 4;
  static constexpr int kWeightTileBytes = kChunkWords * kTileWidth * 4;
  static constexpr int kBytes = (Tiling::kRows + Tiling::kOutputs) * kRowBytes;
  static_assert(kRowBytes == 128, "a row touches all banks once");
  uint32_t base;

  // Pieces of four words. XORed with the row, so that eight rows of one piece touch all banks.
  __device__ __forceinline__ uint32_t words(int row, int piece) const {
    return base + row * kRowBytes + (piece ^ row % 8) * 16;
  }
  // The weights of outputs 4 quarter .. 4 quarter + 3 of 16, for one word of K. Two such words fill
  // a line; every other line is turned by half, so that the 16 lanes of half a warp, four words of
  // K by four pairs of outputs, touch all banks.
  __device__ __forceinline__ uint32_t weights(int tile, int word, int quarter) const {
    return base + Tiling::kRows * kRowBytes + tile * kWeightTileBytes + word * (kTileWidth * 4) +
           (quarter ^ word / 2 % 2 * 2) * 16;
  }
};

// What a block multiplies. Everything about it is worked out again for each stage: kept in
// registers beside the counts it would be too much.
template <typename Tiling>
struct TileOperands {
  const LinearBinaryArgs& args;
  unsigned row_tile, output_tile;

  __device__ __forceinline__ explicit TileOperands(const LinearBinaryArgs& args) : args(args) {
    const unsigned across = divided_up(args.outputs, Tiling::kOutputs);
    row_tile = blockIdx.x / across;
    output_tile = blockIdx.x % across;
  }

  __device__ __forceinline__ int row() const { return row_tile * Tiling::kRows; }
  __device__ __forceinline__ int output() const { return output_tile * Tiling::kOutputs; }
  __device__ __forceinline__ int chunks() const { return divided_up(args.row_words, kChunkWords); }
  // Words of a chunk, and the steps of 256 bits they fill.
  __device__ __forceinline__ int words(int chunk) const {
    return at_most(args.row_words - chunk * kChunkWords, kChunkWords);
  }
  __device__ __forceinline__ int steps(int chunk) const { return (words(chunk) + 7) / 8; }

  // Starts copying one chunk of one plane, and zeros for what pads it to whole steps.
  __device__ __forceinline__ void fetch(const Stage<Tiling>& to, int plane, int chunk) const {
    fetch_inputs(to, plane, chunk);
    fetch_weights(to, chunk);
  }

 private:
  __device__ __forceinline__ void fetch_inputs(const Stage<Tiling>& to, int plane,
                                               int chunk) const {
    // A thread stays in one column of pieces, and in rows that lie alike: two additions a piece.
    constexpr int kPieces = kChunkWords / 4, kStep = Tiling::kThreads / kPieces;
    static_assert(kStep % 8 == 0, "the permutation repeats every eight rows");
    const unsigned thread = thread_read_anew();
    const int piece = thread % kPieces, inside = words(chunk) - piece * 4;
    if (piece >= 2 * steps(chunk)) return;
    const int rows = at_most(args.rows - row(), Tiling::kRows);
    const uint32_t* readable =
        args.words + plane * args.plane_stride + row() * args.row_stride + chunk * kChunkWords;
    const bool whole = reinterpret_cast<uintptr_t>(args.words) % 16 == 0 &&
                       (args.row_words | args.row_stride | args.plane_stride) % 4 == 0;
    const int first = thread / kPieces;
    uint32_t target = to.words(first, piece);
    const uint32_t* from = readable + first * args.row_stride + piece * 4;
    const auto for_rows = [&](auto fetch_four) {
      for (int r = first; r < Tiling::kRows; r += kStep) {
        fetch_four(target, from, r < rows ? inside : 0, readable);
        target += kStep * Stage<Tiling>::kRowBytes;
        from += kStep * args.row_stride;
      }
    };
    whole ? for_rows(fetch_piece) : for_rows(fetch_words);
  }

  __device__ __forceinline__ void fetch_weights(const Stage<Tiling>& to, int chunk) const {
    // A thread stays at one word of K and one quarter of 16 outputs.
    constexpr int kQuarters = kTileWidth / 4, kStep = Tiling::kThreads / (kQuarters * kChunkWords);
    static_assert(kStep > 0, "whole tiles at a time");
    const unsigned thread = thread_read_anew();
    const int quarter = thread % kQuarters, word = thread / kQuarters % kChunkWords;
    if (word >= 8 * steps(chunk)) return;
    const int sixteens = divided_up(at_most(args.outputs - output(), Tiling::kOutputs), kTileWidth);
    const int tiles = word < words(chunk) ? sixteens : 0;
    const uint32_t* readable =
        args.weight + output() * args.row_words + chunk * (kChunkWords * kTileWidth);
    int tile = thread / (kQuarters * kChunkWords);
    uint32_t target = to.weights(tile, word, quarter);
    const uint32_t* from = readable + (tile * args.row_words + word) * kTileWidth + quarter * 4;
    for (; tile < Tiling::kOutputs / kTileWidth; tile += kStep) {
      cp_async_16(target, tile < tiles ? from : readable, tile < tiles);
      target += kStep * Stage<Tiling>::kWeightTileBytes;
      from += kStep * args.row_words * kTileWidth;
    }
  }
};

// Of one warp: counts[strip][column][odd] are the fragments of the strip's rows with the even and
// the odd ones of 16 outputs.
template <typename Tiling>
struct WarpCounts {
  int32_t counts[Tiling::kStrips][Tiling::kColumns][2][4] = {};

  __device__ __forceinline__ void double_all() {
#pragma unroll
    for (int s = 0; s < Tiling::kStrips; ++s) {
#pragma unroll
      for (int c = 0; c < Tiling::kColumns; ++c) {
#pragma unroll
        for (int i = 0; i < 8; ++i) counts[s][c][i / 4][i % 4] *= 2;
      }
    }
  }

  // Adds `steps` steps of 256 bits; `row` and `tile` are the warp's first. kSparse: strips without
  // a one are left out.
  template <bool kSparse>
  __device__ __forceinline__ void multiply(const Stage<Tiling>& stage, int row, int tile, int steps,
                                           const BitLane& lane) {
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      uint2 low[Tiling::kColumns], high[Tiling::kColumns];  // words t and t + 4 of two outputs
#pragma unroll
      for (int c = 0; c < Tiling::kColumns; ++c) {
        const uint32_t at =
            stage.weights(tile + c, step * 8 + lane.place, lane.group / 2) + lane.group % 2 * 8;
        low[c] = load_shared_8(at);
        high[c] = load_shared_8(at + 4 * kTileWidth * 4);  // four words on: turned the same way
      }
#pragma unroll
      for (int s = 0; s < Tiling::kStrips; ++s) {
        uint32_t a[4];
        ldmatrix_x4(a, stage.words(row + s * 16 + lane.id % 16, step * 2 + lane.id / 16));
        if (kSparse && __ballot_sync(0xffffffffu, (a[0] | a[1] | a[2] | a[3]) != 0) == 0) continue;
#pragma unroll
        for (int c = 0; c < Tiling::kColumns; ++c) {
          mma_b1_256(counts[s][c][0], a, low[c].x, high[c].x);
          mma_b1_256(counts[s][c][1], a, low[c].y, high[c].y);
        }
      }
    }
  }

  // Output 4 t + i of 16, for the strip's row g + 8 half.
  __device__ __forceinline__ int at(int strip, int column, int half, int i) const {
    return counts[strip][column][i % 2][half * 2 + i / 2];
  }
};

// A warp's outputs of a row: half a word or a whole one.
template <int kSixteens>
struct WordOf {
  using Type = uint16_t;
};
template <>
struct WordOf<2> {
  using Type = uint32_t;
};
template <typename Word>
__device__ __forceinline__ void join_word(char* at, uint32_t ones, bool joined) {
  Word* to = reinterpret_cast<Word*>(at);
  *to = static_cast<Word>(joined ? *to | ones : ones);
}

// Bits: 16 outputs are half a word. Lane t has four of them, for each of the warp's rows; two
// rounds of exchange with its neighbours leave it whole words of a quarter of the rows, which wait
// in shared memory until the other warps' are there. Each edge of the bits goes this way, one after
// the other, and is joined with those before it where it waits.
template <typename Tiling>
__device__ __forceinline__ void write_tile(const LinearBinaryArgs& args, int row, int output,
                                           const WarpCounts<Tiling>& counts, int, int,
                                           const BitLane&, Bit) {
  constexpr int kPlaneBytes = Tiling::kRows * (Tiling::kOutputs / 8);
  using Terms = TileTerms<Tiling, true>;
  // [2][kRows][kOutputs / 8] bytes where stages were: upper bits, lower bits
  char* memory = shared_memory() + Terms::kBytes;
  const bool two = planes_out(args) == 2;
#pragma unroll 1
  for (int number = 0; number < BitEdge::kCount; ++number) {
    const BitEdge edge(args, number);
    if (!edge.limits) continue;
    // The lane's place is worked out again for each edge: kept, it would be too much beside the
    // counts.
    const unsigned thread = thread_read_anew();
    const int group = thread % 32 / 4, place = thread % 4;
    const int warp_row = thread / 32 / Tiling::kAcross * Tiling::kStrips * 16;
    const int warp_tile = thread / 32 % Tiling::kAcross * Tiling::kColumns;
    uint32_t bits[Tiling::kStrips][2] = {};
#pragma unroll
    for (int c = 0; c < Tiling::kColumns; ++c) {
      const int first = (warp_tile + c) * kTileWidth + place * 4;
      int limit[4], column[4];
      Terms::read(column, Terms::columns(), first);
#pragma unroll
      for (int i = 0; i < 4; ++i) limit[i] = edge.limit(args, output + first + i, column[i]);
#pragma unroll
      for (int s = 0; s < Tiling::kStrips; ++s) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const RowTerm term(2 * args.step,
                             Terms::rows()[warp_row + s * 16 + half * 8 + group].minus);
          uint32_t four = 0;
#pragma unroll
          for (int i = 3; i >= 0; --i) {
            four = four << 1 | term.reaches(counts.at(s, c, half, i), limit[i]);
          }
          bits[s][half] |= four << (c * kTileWidth + place * 4);
        }
      }
    }

    // Of both halves of a strip keep one, by the lane's lower bit; of two strips keep one, by the
    // upper.
    const int lower = place % 2, upper = place / 2;
    uint32_t merged[Tiling::kStrips];
#pragma unroll
    for (int s = 0; s < Tiling::kStrips; ++s) {
      const uint32_t kept = lower ? bits[s][1] : bits[s][0],
                     given = lower ? bits[s][0] : bits[s][1];
      merged[s] = kept | __shfl_xor_sync(0xffffffffu, given, 1);
    }
#pragma unroll
    for (int s = 0; s < Tiling::kStrips; s += 2) {
      const uint32_t kept = upper ? merged[s + 1] : merged[s],
                     given = upper ? merged[s] : merged[s + 1];
      const uint32_t all = edge.ones(kept | __shfl_xor_sync(0xffffffffu, given, 2));
      const int at = warp_row + (s + upper) * 16 + lower * 8 + group;
      char* to = memory + at * (Tiling::kOutputs / 8) + warp_tile * (kTileWidth / 8);
      using Word = typename WordOf<Tiling::kColumns>::Type;
      if (edge.upper) join_word<Word>(to, all, edge.below);
      if (two && edge.lower) join_word<Word>(to + kPlaneBytes, all, edge.below);
    }
  }
  __syncthreads();  // the words of the tile are there

  const int64_t row_words = divided_up(args.outputs, 32), plane = args.rows * row_words;
  const int first = output / 32;
  for (int at = threadIdx.x; at < Tiling::kRows * Tiling::kRowWords; at += Tiling::kThreads) {
    const int r = row + at / Tiling::kRowWords, word = first + at % Tiling::kRowWords;
    if (r >= args.rows || word >= row_words) continue;
    uint32_t* to = args.out_words + r * row_words + word;
    const uint32_t upper = reinterpret_cast<const uint32_t*>(memory)[at];
    if (two) {
      const uint32_t lower = reinterpret_cast<const uint32_t*>(memory + kPlaneBytes)[at];
      to[0] = code_plane(upper, lower, 0);
      to[plane] = code_plane(upper, lower, 1);
    } else {
      to[0] = upper;
    }
  }
}

// Numbers: four neighbouring ones of a row at a time.
template <typename Tiling, typename T>
__device__ __forceinline__ void write_tile(const LinearBinaryArgs& args, int row, int output,
                                           const WarpCounts<Tiling>& counts, int warp_row,
                                           int warp_tile, const BitLane& lane, T) {
  using Terms = TileTerms<Tiling, false>;
  const NumberWriter<T> writer(args);
#pragma unroll
  for (int c = 0; c < Tiling::kColumns; ++c) {
    const int first = (warp_tile + c) * kTileWidth + lane.place * 4;
    float alpha[4], bias[4];
    int column[4];
    Terms::read(column, Terms::columns(), first);
    Terms::read(alpha, Terms::alphas(), first);
    Terms::read(bias, Terms::biases(), first);
    const NumberTerms<4> terms(alpha, bias, column);
#pragma unroll
    for (int s = 0; s < Tiling::kStrips; ++s) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = warp_row + s * 16 + half * 8 + lane.group;
        const typename Terms::Row own = Terms::rows()[r];
        const RowTerm term(2 * args.step, own.minus);
        float values[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          values[i] = terms(i, term(counts.at(s, c, half, i)), own.scale);
        }
        writer.write(row + r, output + first, values);
      }
    }
  }
}

// One tile to a block. Out: Bit, or the type of the numbers.
template <typename Tiling, typename Out>
__global__ void __launch_bounds__(Tiling::kThreads, 512 / Tiling::kThreads)
    linear_binary_kernel(const __grid_constant__ LinearBinaryArgs args) {
  const BitLane lane;
  const TileOperands<Tiling> operands(args);
  using Terms = TileTerms<Tiling, is_bit<Out>>;
  const uint32_t memory = shared_address(shared_memory()) + Terms::kBytes;
  const auto stage_at = [memory](int number) {
    return Stage<Tiling>{memory + number % 2 * Stage<Tiling>::kBytes};
  };
  const int warp_row = lane.warp / Tiling::kAcross * Tiling::kStrips * 16;
  const int warp_tile = lane.warp % Tiling::kAcross * Tiling::kColumns;

  WarpCounts<Tiling> counts;
  const int chunks = operands.chunks(), top = args.planes - 1, stages = chunks * args.planes;
  int plane = top, chunk = 0;            // of the stage that is multiplied
  int next_plane = top, next_chunk = 0;  // of the one that is loaded
  const auto fetch_next = [&](int stage) {
    if (stage < stages) {
      operands.fetch(stage_at(stage), next_plane, next_chunk);
      if (++next_chunk == chunks) next_chunk = 0, --next_plane;
    }
    cp_async_commit();
  };
  fetch_next(0);
  Terms::load(args, operands.row(), operands.output());
  for (int stage = 0; stage < stages; ++stage) {
    fetch_next(stage + 1);
    cp_async_wait<1>();
    __syncthreads();  // this stage is there
    if (chunk == 0 && plane != top) counts.double_all();
    // The lower of two planes has a one where a sign is 0, which float rows nearly never have.
    if (args.planes == 2 && plane == 0) {
      counts.template multiply<true>(stage_at(stage), warp_row, warp_tile, operands.steps(chunk),
                                     lane);
    } else {
      counts.template multiply<false>(stage_at(stage), warp_row, warp_tile, operands.steps(chunk),
                                      lane);
    }
    if (++chunk == chunks) chunk = 0, --plane;
    __syncthreads();  // nobody reads it any more
  }
  cp_async_wait<0>();
  if (stages == 0) __syncthreads();  // without inputs nothing has waited for the terms
  write_tile<Tiling>(args, operands.row(), operands.output(), counts, warp_row, warp_tile, lane,
                     Out{});
}

// The sum of each row's codes: what the tiles of a row cannot know by themselves. A
// launch of its own, because the alternative, each tile adding its part, needs one too, to write
// the zeros that it adds to.
constexpr int kCountWarps = 8;
static __global__ void __launch_bounds__(32 * kCountWarps)
    linear_binary_sums_kernel(const __grid_constant__ LinearBinaryArgs args) {
  const int lane = threadIdx.x % 32;
  const int row_words = divided_up(args.outputs, 32);
  const int64_t warps = int64_t{gridDim.x} * kCountWarps;
  for (int64_t row = blockIdx.x * kCountWarps + threadIdx.x / 32; row < args.rows; row += warps) {
    int sum = 0;
    for (int p = 0; p < planes_out(args); ++p) {
      const uint32_t* words = args.out_words + (p * args.rows + row) * row_words;
      for (int w = lane; w < row_words; w += 32) sum += __popc(words[w]) << p;
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    if (lane == 0) args.out_sums[row] = sum;
  }
}

}  // namespace cuda
}  // namespace filbert
