// LayerNorm(x + bias + residual), a row at a time. Built once per instruction set.
//
// Memory is read once and written once: the sum is kept as float32 in a scratch row that stays in
// L1, where the mean, then the variance about that mean, then the result are taken from it. A row
// is read to its end before it is written, so the result may take the place of x.
#include "cpu/norm_residual_kernel.h"
#include "cpu/simd/quantize.h"
#include "cpu/simd/simd.h"

namespace filbert {
namespace FILBERT_ISA {
namespace {

// Calls body(i, 0) and body(i, 1) in turn for the vectors of [0, n), so that sums can be kept in
// two independent chains.
template <typename Body>
FILBERT_INLINE void by_twos(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    body(i, 0);
    body(i + kLanes, 1);
  }
  if (i < n) body(i, 0);
}

template <typename T>
struct Row {
  const T* x;
  const T* residual;  // or null
  T* out;
  float* sum;         // scratch, like the next three of whole vectors, zero past the width
  const float* bias;  // or null
  const float* weight;
  const float* beta;
  int64_t width;
  int64_t whole;  // the part of width that whole vectors cover
  float eps;

  // Writes x + bias + residual to scratch and returns its mean.
  FILBERT_INLINE float add_up() const {
    VecF total[2] = {};
    by_twos(whole, [&](int64_t i, int chain) {
      VecF s = load(x + i);
      if (bias) s += load(bias + i);
      if (residual) s += load(residual + i);
      store(sum + i, s);
      total[chain] += s;
    });
    if (const int64_t rest = width - whole) {
      VecF s = load_first(x + whole, rest);
      if (bias) s += load(bias + whole);
      if (residual) s += load_first(residual + whole, rest);
      store(sum + whole, s);
      total[0] += s;
    }
    return reduce_add(total[0] + total[1]) / static_cast<float>(width);
  }

  // Variance about `mean`, which is corrected by what its own rounding left: with a mean much
  // larger than the spread, the first pass alone is off by a visible part of the spread.
  FILBERT_INLINE float variance(float& mean) const {
    VecF squares[2] = {}, left[2] = {};
    by_twos(whole, [&](int64_t i, int chain) {
      const VecF d = load(sum + i) - mean;
      squares[chain] = d * d + squares[chain];
      left[chain] += d;
    });
    float more_squares = 0, more_left = 0;
    for (int64_t i = whole; i < width; ++i) {
      const float d = sum[i] - mean;
      more_squares += d * d;
      more_left += d;
    }
    const float n = static_cast<float>(width);
    const float shift = (reduce_add(left[0] + left[1]) + more_left) / n;
    const float about_first = (reduce_add(squares[0] + squares[1]) + more_squares) / n;
    mean += shift;
    if (about_first == __builtin_inff()) return about_first;  // the squares overflowed
    return about_first > shift * shift ? about_first - shift * shift : 0.0f;
  }

  // With kKeep the results take the place of the sum, too.
  template <bool kKeep>
  FILBERT_INLINE void write(float mean, float rstd) const {
    const auto at = [&](int64_t i) {
      const VecF value = (load(sum + i) - mean) * rstd * load(weight + i) + load(beta + i);
      if (kKeep) store(sum + i, value);
      return value;
    };
    for (int64_t i = 0; i < whole; i += kLanes) store(out + i, at(i));
    if (whole < width) store_first(out + whole, at(whole), width - whole);
  }
};

// The vector operands are used by every row: widened once, and padded to whole vectors.
template <typename T>
const float* widen(const void* from, int64_t width, float*& scratch) {
  if (!from) return nullptr;
  float* to = scratch;
  const T* p = static_cast<const T*>(from);
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) store(to + i, load(p + i));
  if (i < width) {
    store(to + i, load_first(p + i, width - i));
    i += kLanes;
  }
  scratch += i;
  return to;
}

template <typename T>
void rows(const NormResidualArgs& args, int64_t begin, int64_t end, float* scratch) {
  Row<T> row{};
  row.width = args.width;
  row.whole = args.width - args.width % kLanes;
  row.eps = args.eps;
  row.bias = widen<T>(args.bias, args.width, scratch);
  row.weight = widen<T>(args.weight, args.width, scratch);
  row.beta = widen<T>(args.beta, args.width, scratch);
  row.sum = scratch;
  for (int64_t r = begin; r < end; ++r) {
    row.x = static_cast<const T*>(args.x) + r * args.x_row;
    if (args.residual) row.residual = static_cast<const T*>(args.residual) + r * args.residual_row;
    row.out = static_cast<T*>(args.out) + r * args.out_row;
    float mean = row.add_up();
    const float variance = row.variance(mean);
    const float rstd = 1.0f / __builtin_sqrtf(variance + args.eps);
    if (args.codes.codes) {
      row.template write<true>(mean, rstd);
      const RowScale by =
          quantize_row(row.sum, args.width, args.codes.codes + r * args.codes.codes_row);
      args.codes.scale[r] = by.scale;
      args.codes.zero[r] = by.zero;
    } else {
      row.template write<false>(mean, rstd);
    }
  }
}

// The sum of a row, and bias, weight and beta, each rounded up to whole vectors.
int64_t scratch_bytes(const NormResidualArgs& args) {
  return 4 * (args.width + kLanes) * static_cast<int64_t>(sizeof(float));
}

void norm_rows(const NormResidualArgs& args, int64_t begin, int64_t end, void* scratch) {
  float* floats = static_cast<float*>(scratch);
  args.dtype == DType::kFloat32 ? rows<float>(args, begin, end, floats)
                                : rows<bf16>(args, begin, end, floats);
}

}  // namespace

const NormResidualKernel norm_residual = {scratch_bytes, norm_rows};

}  // namespace FILBERT_ISA
}  // namespace filbert
