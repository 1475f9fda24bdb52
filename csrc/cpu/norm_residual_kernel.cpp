// LayerNorm(x + bias + residual), a row at a time. Built once per instruction set.
//
// Memory is read once and written once: the sum is kept as float32 in a scratch row that stays in
// L1, where the mean, then the variance about that mean, then the result are taken from it. A row
// is read to its end before it is written, so the result may take the place of x.
#include "args/norm_residual.h"
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace filbert {
namespace FILBERT_ISA {
namespace {

template <typename T>
struct Row {
  const T* x;
  const T* bias;      // or null
  const T* residual;  // or null
  const T* weight;
  const T* beta;
  T* out;
  float* sum;  // scratch, [width rounded up to vectors]
  int64_t width;
  float eps;

  template <typename Load>
  FILBERT_INLINE VecF sum_at(int64_t i, Load get) const {
    VecF total = get(x + i);
    if (bias) total += get(bias + i);
    if (residual) total += get(residual + i);
    return total;
  }

  // Writes x + bias + residual to scratch and returns its mean. Padding lanes are written as zero.
  FILBERT_INLINE float add_up() const {
    const int64_t whole = width - width % kLanes;
    VecF total = {};
    for (int64_t i = 0; i < whole; i += kLanes) {
      const VecF s = sum_at(i, [](const T* p) { return load(p); });
      store(sum + i, s);
      total += s;
    }
    if (whole < width) {
      const VecF s = sum_at(whole, [&](const T* p) { return load_first(p, width - whole); });
      store(sum + whole, s);
      total += s;
    }
    return reduce_add(total) / static_cast<float>(width);
  }

  // Variance about `mean`, which is corrected by what its own rounding left: with a mean much
  // larger than the spread, the first pass alone is off by a visible part of the spread.
  FILBERT_INLINE float variance(float& mean) const {
    const int64_t whole = width - width % kLanes;
    VecF squares = {}, left = {};
    for (int64_t i = 0; i < whole; i += kLanes) {
      const VecF d = load(sum + i) - mean;
      squares = d * d + squares;
      left += d;
    }
    float more_squares = 0, more_left = 0;
    for (int64_t i = whole; i < width; ++i) {
      const float d = sum[i] - mean;
      more_squares += d * d;
      more_left += d;
    }
    const float shift = (reduce_add(left) + more_left) / static_cast<float>(width);
    mean += shift;
    const float about_first = (reduce_add(squares) + more_squares) / static_cast<float>(width);
    return about_first > shift * shift ? about_first - shift * shift : 0.0f;
  }

  FILBERT_INLINE void write(float mean, float rstd) const {
    const int64_t whole = width - width % kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
      store(out + i, (load(sum + i) - mean) * rstd * load(weight + i) + load(beta + i));
    }
    if (const int64_t rest = width - whole) {
      const VecF gamma = load_first(weight + whole, rest), shift = load_first(beta + whole, rest);
      store_first(out + whole, (load(sum + whole) - mean) * rstd * gamma + shift, rest);
    }
  }
};

template <typename T>
void rows(const NormResidualArgs& args, int64_t begin, int64_t end, float* scratch) {
  Row<T> row{nullptr,
             static_cast<const T*>(args.bias),
             nullptr,
             static_cast<const T*>(args.weight),
             static_cast<const T*>(args.beta),
             nullptr,
             scratch,
             args.width,
             args.eps};
  for (int64_t r = begin; r < end; ++r) {
    row.x = static_cast<const T*>(args.x) + r * args.x_row;
    if (args.residual) row.residual = static_cast<const T*>(args.residual) + r * args.residual_row;
    row.out = static_cast<T*>(args.out) + r * args.out_row;
    float mean = row.add_up();
    const float variance = row.variance(mean);
    row.write(mean, 1.0f / __builtin_sqrtf(variance + args.eps));
  }
}

}  // namespace

const int vector_bytes = FILBERT_VECTOR_BYTES;
const bool bf16_pairs = FILBERT_BF16_PAIRS;

void norm_residual_rows(const NormResidualArgs& args, int64_t begin, int64_t end, float* row) {
  args.dtype == DType::kFloat32 ? rows<float>(args, begin, end, row)
                                : rows<bf16>(args, begin, end, row);
}

}  // namespace FILBERT_ISA
}  // namespace filbert
