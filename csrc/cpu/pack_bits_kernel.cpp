// Rows of numbers to bit planes: compare (or round) a vector, and take its lanes' signs as bits.
#include "cpu/pack_bits_kernel.h"
#include "cpu/simd/bits.h"

namespace filbert {
namespace FILBERT_ISA {
namespace {

constexpr int kParts = 32 / kLanes;  // vectors of a word

// 32 elements from `column` on; those past the row's end read as `past`.
template <typename T>
struct Group {
  VecF part[kParts];

  FILBERT_INLINE Group(const T* row, int64_t column, int64_t width, float past) {
    if (column + 32 <= width) {
      for (int i = 0; i < kParts; ++i) part[i] = load(row + column + i * kLanes);
      return;
    }
    float lanes[32];
    for (int i = 0; i < 32; ++i) lanes[i] = column + i < width ? to_float(row[column + i]) : past;
    for (int i = 0; i < kParts; ++i) part[i] = load(lanes + i * kLanes);
  }
};

// Bits of one row by comparison; NaN, and what pads the row, compares false.
template <typename T>
void compare_row(const PackBitsArgs& args, int64_t r) {
  const int64_t words = bit_words(args.width), plane = args.rows * words;
  const T* row = static_cast<const T*>(args.x) + r * args.x_row;
  uint32_t* out = args.words + r * words;
  constexpr float kNaN = __builtin_nanf("");
  int32_t sum = 0;
  for (int64_t w = 0; w < words; ++w) {
    const Group<T> x(row, 32 * w, args.width, kNaN);
    VecF limit[kParts] = {};
    if (args.threshold) {
      const Group<float> given(args.threshold, 32 * w, args.width, 0.0f);
      for (int i = 0; i < kParts; ++i) limit[i] = given.part[i];
    }
    uint32_t above = 0, not_below = 0;
    if (args.ties != Ties::kAbove) {
      above = word_of([&](int i) { return (VecI)(x.part[i] > limit[i]); });
    }
    if (args.ties != Ties::kBelow) {
      not_below = word_of([&](int i) { return (VecI)(x.part[i] >= limit[i]); });
    }
    if (args.ties == Ties::kExact) {  // codes 0, 1 and 2
      out[w] = not_below & ~above;
      out[w + plane] = above;
      sum += __builtin_popcount(not_below) + __builtin_popcount(above);
    } else {
      out[w] = above | not_below;
      sum += __builtin_popcount(out[w]);
    }
  }
  args.sums[r] = sum;
}

// The largest finite magnitude of a row.
template <typename T>
float largest(const T* row, int64_t width) {
  constexpr float kInfinity = __builtin_inff();
  VecF best = {};
  for (int64_t c = 0; c < width; c += 32) {
    const Group<T> x(row, c, width, 0.0f);
    for (int i = 0; i < kParts; ++i) {
      const VecF magnitude = (VecF)((VecU)x.part[i] & 0x7fffffffu);
      best = max(magnitude < kInfinity ? magnitude : VecF{}, best);
    }
  }
  return reduce_max(best);
}

// Integer codes of one row, rounded half to even; NaN counts as 0.
template <typename T>
void quantise_row(const PackBitsArgs& args, int64_t r) {
  const int64_t words = bit_words(args.width), plane = args.rows * words;
  const T* row = static_cast<const T*>(args.x) + r * args.x_row;
  uint32_t* out = args.words + r * words;
  const float levels = static_cast<float>((1 << (args.bits - 1)) - 1);
  const float scale = args.scale ? args.scale[r] : largest(row, args.width) / levels;
  // A scale of 0, or so small that its reciprocal is none, makes every code that of 0.
  const float reciprocal = 1.0f / scale;
  const float inverse = __builtin_isfinite(reciprocal) ? reciprocal : 0.0f;
  const float low = static_cast<float>(args.low);
  const float high = low + static_cast<float>((1 << args.bits) - 1);
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  int32_t sum = 0;
  for (int64_t w = 0; w < words; ++w) {
    const Group<T> x(row, 32 * w, args.width, 0.0f);
    VecI codes[kParts];
    for (int i = 0; i < kParts; ++i) {
      const VecF level = x.part[i] * inverse;
      // The bounds are integers, so clamping first changes nothing and keeps the shift in range.
      const VecF bounded =
          min(max(level == level ? level : VecF{}, broadcast(low)), broadcast(high));
      codes[i] = (VecI)(bounded + kShift) - (VecI)broadcast(kShift) - args.low;
    }
    const int64_t left = args.width - 32 * w;
    const uint32_t valid = left >= 32 ? ~0u : (1u << left) - 1;
    for (int p = 0; p < args.bits; ++p) {
      const uint32_t word = word_of([&](int i) { return codes[i] << (31 - p); }) & valid;
      out[w + p * plane] = word;
      sum += __builtin_popcount(word) << p;
    }
  }
  args.sums[r] = sum;
  args.scale_out[r] = scale;
}

void pack_rows(const PackBitsArgs& args, int64_t begin, int64_t end) {
  const bool wide = args.dtype == DType::kFloat32;
  for (int64_t r = begin; r < end; ++r) {
    if (args.bits) {
      wide ? quantise_row<float>(args, r) : quantise_row<bf16>(args, r);
    } else {
      wide ? compare_row<float>(args, r) : compare_row<bf16>(args, r);
    }
  }
}

void sum_planes(const uint32_t* words, int64_t stride, int64_t planes, int64_t rows,
                int64_t row_words, int32_t* sums) {
  for (int64_t r = 0; r < rows; ++r) {
    int32_t sum = 0;
    for (int64_t p = 0; p < planes; ++p) {
      const uint32_t* plane = words + p * stride + r * row_words;
      for (int64_t w = 0; w < row_words; ++w) sum += __builtin_popcount(plane[w]) << p;
    }
    sums[r] = sum;
  }
}

}  // namespace

const PackBitsKernel pack_bits = {pack_rows, sum_planes};

}  // namespace FILBERT_ISA
}  // namespace filbert
