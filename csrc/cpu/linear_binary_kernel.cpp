// +-1 weights times bit planes: outputs lie across the lanes, so nothing is ever summed across
// them. How the counts popcount(row & weight) are made is in count_by_words.h and count_by_table.h.

#include "cpu/linear_binary_kernel.h"
#include "cpu/linear_binary/count_by_table.h"
#include "cpu/linear_binary/count_by_words.h"
#include "cpu/simd/bits.h"

namespace filbert {
namespace FILBERT_ISA {
namespace {

#if FILBERT_COUNT_BY_TABLE
// Below this many rows, taking the weights apart for the lookups costs more than it saves.
constexpr int64_t kFewestTableRows = 5;
bool by_table(const LinearBinaryArgs& args) {
  return args.rows >= kFewestTableRows && args.row_words > 0;
}
#else
bool by_table(const LinearBinaryArgs&) { return false; }
int64_t table_scratch(const LinearBinaryArgs&) { return 0; }
void prepare_rows(const Block&, const SparsePlane&, uint8_t*) {}
void count_by_table(const Block&, const SparsePlane&, uint8_t*, int32_t*) {}
#endif

// What belongs to the outputs of a block, padded to whole vectors.
struct Channels {
  alignas(64) int32_t constant[kColumns] = {};  // low * totals
  // Edges of the bits, each set only where it is given (and none for numbers). Padding: INT32_MAX
  // (from) and INT32_MIN (below), so its bits are 0.
  alignas(64) int32_t threshold[kColumns];
  alignas(64) int32_t until[kColumns];
  alignas(64) int32_t lower[kColumns];
  alignas(64) int32_t lower_until[kColumns];
  alignas(64) float alpha[kColumns] = {};
  alignas(64) float bias[kColumns] = {};
  int n;

  Channels(const LinearBinaryArgs& args, int64_t column) {
    const int64_t left = args.outputs - column;
    n = left < kColumns ? static_cast<int>(left) : kColumns;
    for (int i = 0; i < n; ++i) {
      constant[i] = args.low * args.totals[column + i];
      if (args.alpha) alpha[i] = args.alpha[column + i];
      if (args.bias) bias[i] = args.bias[column + i];
    }
    if (!args.threshold) return;
    take(args.threshold, column, INT32_MAX, threshold);
    if (args.until) take(args.until, column, INT32_MIN, until);
    if (args.lower) take(args.lower, column, INT32_MAX, lower);
    if (args.lower_until) take(args.lower_until, column, INT32_MIN, lower_until);
  }

  void take(const int32_t* from, int64_t column, int32_t past, int32_t* to) {
    for (int i = 0; i < kColumns; ++i) to[i] = i < n ? from[column + i] : past;
  }

  // dot = step * (2 P - sum) + low * total; step is 1 or 2, so 2 * step is a shift by it
  FILBERT_INLINE VecI dot(const LinearBinaryArgs& args, const int32_t* counts, int32_t sum,
                          int v) const {
    return (load(counts + v * kLanes) << args.step) - args.step * sum + load(constant + v * kLanes);
  }
};

void write_bits(const Block& block, const Channels& channels, const int32_t* counts) {
  constexpr int kParts = 32 / kLanes;  // vectors of a word's lanes
  const LinearBinaryArgs& args = block.args;
  const int64_t out_words = (args.outputs + 31) / 32, plane = args.rows * out_words;
  const bool two = planes_out(args) == 2;
  for (int64_t r = 0; r < block.rows; ++r) {
    const int32_t sum = args.sums[block.row_begin + r];
    uint32_t* out = args.out_words + (block.row_begin + r) * out_words + block.column / 32;
    for (int w = 0; 32 * w < channels.n; ++w) {
      VecI dot[kParts];
      for (int i = 0; i < kParts; ++i) {
        dot[i] = channels.dot(args, counts + r * kColumns, sum, w * kParts + i);
      }
      const auto from = [&](const int32_t* edge) {
        return word_of(
            [&](int i) { return (VecI)(dot[i] >= load(edge + (w * kParts + i) * kLanes)); });
      };
      const auto below = [&](const int32_t* edge) {
        return word_of(
            [&](int i) { return (VecI)(dot[i] < load(edge + (w * kParts + i) * kLanes)); });
      };
      const uint32_t start = from(channels.threshold);
      const uint32_t upper = args.until ? start | below(channels.until) : start;
      if (!two) {
        out[w] = upper;
        continue;
      }
      uint32_t lower = args.lower ? from(channels.lower) : start;
      if (args.lower_until) lower |= below(channels.lower_until);
      out[w] = upper ^ lower;
      out[w + plane] = upper & lower;
    }
  }
}

template <typename T>
void write_numbers(const Block& block, const Channels& channels, const int32_t* counts) {
  const LinearBinaryArgs& args = block.args;
  const bool add_residual = args.residual && !args.norm_weight;  // else the LayerNorm adds it
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t row = block.row_begin + r;
    const int32_t sum = args.sums[row];
    const float scale = args.scale ? args.scale[row] : 1.0f;
    T* out = static_cast<T*>(args.out) + row * args.outputs + block.column;
    const T* residual = static_cast<const T*>(args.residual);
    if (add_residual) residual += row * args.residual_row + block.column;
    for (int v = 0; v * kLanes < channels.n; ++v) {
      const int lane = v * kLanes, left = channels.n - lane;
      const VecI dot = channels.dot(args, counts + r * kColumns, sum, v);
      VecF y = __builtin_convertvector(dot, VecF) * load(channels.alpha + lane);
      y = y * scale + load(channels.bias + lane);
      if (left >= kLanes) {
        if (add_residual) y += load(residual + lane);
        store(out + lane, y);
      } else {
        if (add_residual) y += load_first(residual + lane, left);
        store_first(out + lane, y, left);
      }
    }
  }
}

int64_t scratch_bytes(const LinearBinaryArgs& args) {
  return kBinaryRows * kColumns * static_cast<int64_t>(sizeof(int32_t)) + SparsePlane::bytes(args) +
         (by_table(args) ? table_scratch(args) : 0);
}

void run_block(const LinearBinaryArgs& args, int64_t row_begin, int64_t row_end,
               int64_t block_begin, int64_t block_end, void* scratch) {
  int32_t* counts = static_cast<int32_t*>(scratch);
  char* behind = reinterpret_cast<char*>(counts + kBinaryRows * kColumns);
  Block block{args, row_begin, row_end - row_begin, 0};
  const SparsePlane sparse(block, behind);
  uint8_t* counting = reinterpret_cast<uint8_t*>(behind + SparsePlane::bytes(args));
  const bool table = by_table(args);
  if (table) prepare_rows(block, sparse, counting);
  for (int64_t b = block_begin; b < block_end; ++b) {
    block.column = b * kColumns;
    const Channels channels(args, block.column);
    table ? count_by_table(block, sparse, counting, counts) : count_by_words(block, sparse, counts);
    if (args.threshold) {
      write_bits(block, channels, counts);
    } else if (args.dtype == DType::kFloat32) {
      write_numbers<float>(block, channels, counts);
    } else {
      write_numbers<bf16>(block, channels, counts);
    }
  }
}

}  // namespace

const LinearBinaryKernel linear_binary = {scratch_bytes, run_block};

}  // namespace FILBERT_ISA
}  // namespace filbert
