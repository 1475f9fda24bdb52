// Float attention: every height of a register tile and number of keys, every head size, key blocks
// and their edges, biases and windows, scores that are huge, infinite or no number.
#include "args/attn_varlen.h"

#include <cmath>
#include <memory>

#include "suite.h"

namespace kernel_check {
namespace {

struct Shape {
  DType dtype;
  std::vector<int> lengths_q;
  std::vector<int> lengths_k = {};  // none: those of the queries
  int64_t heads = 2, dim = 32;
  int64_t orphans = 0;  // rows of no sequence
  int64_t gap = 0;      // elements between rows
  bool heads_first = false;
};

struct Problem {
  const Shape shape;
  const std::vector<int> lengths_k;
  const int64_t rows_q, rows_k;
  Floats q, k, v;
  Array<int32_t> cu_q, cu_k;
  Array<float> slopes, key_bias;
  std::vector<double> wide_q, wide_k, wide_v;  // q, k and v once more, for the float64 answer
  filbert::AttnVarlenArgs args{};

  static int64_t total(const std::vector<int>& lengths, int64_t orphans) {
    for (int length : lengths) orphans += length;
    return orphans;
  }
  int64_t row_stride() const {
    return shape.heads_first ? shape.dim + shape.gap : shape.heads * shape.dim + shape.gap;
  }
  int64_t head_stride(int64_t rows) const {
    return shape.heads_first ? rows * row_stride() : shape.dim;
  }
  int64_t extent(int64_t rows) const {
    return (rows - 1) * row_stride() + (shape.heads - 1) * head_stride(rows) + shape.dim;
  }

  explicit Problem(const Shape& s)
      : shape(s),
        lengths_k(s.lengths_k.empty() ? s.lengths_q : s.lengths_k),
        rows_q(total(s.lengths_q, s.orphans)),
        rows_k(total(lengths_k, s.orphans)),
        q(s.dtype, extent(rows_q)),
        k(s.dtype, extent(rows_k)),
        v(s.dtype, extent(rows_k)),
        cu_q(s.lengths_q.size() + 1),
        cu_k(s.lengths_q.size() + 1),
        slopes(s.heads),
        key_bias(rows_k) {
    Random random(rows_q + s.dim);
    for (Floats* one : {&q, &k, &v}) one->fill([&](int64_t) { return random.normal(); });
    slopes.fill([](int64_t h) { return 0.5f / (1 << 2 * h); });
    key_bias.fill([&](int64_t i) {  // the first sequence sees nothing at all
      const bool hidden = i % 5 == 0 || i < lengths_k[0];
      return hidden ? -INFINITY : static_cast<float>(random.normal());
    });
    cu_q[0] = cu_k[0] = 0;
    for (size_t i = 0; i < s.lengths_q.size(); ++i) {
      cu_q[i + 1] = cu_q[i] + s.lengths_q[i];
      cu_k[i + 1] = cu_k[i] + lengths_k[i];
    }
    args.dtype = s.dtype;
    args.q = q.data();
    args.k = k.data();
    args.v = v.data();
    args.cu_q = cu_q.data();
    args.cu_k = cu_k.data();
    args.q_row = args.k_row = args.v_row = row_stride();
    args.q_head = head_stride(rows_q);
    args.k_head = args.v_head = head_stride(rows_k);
    args.out_row = s.heads * s.dim;
    args.out_head = s.dim;
    args.rows_q = rows_q;
    args.rows_k = rows_k;
    args.sequences = static_cast<int64_t>(s.lengths_q.size());
    args.heads = s.heads;
    args.dim = s.dim;
    args.window_left = args.window_right = -1;
    args.scale = 1 / std::sqrt(static_cast<float>(s.dim));
  }

  // The score of a query and a key of sequence s, both counted from its first.
  double score(int64_t s, int64_t head, int64_t i, int64_t j) const {
    const int64_t len_q = cu_q[s + 1] - cu_q[s], len_k = cu_k[s + 1] - cu_k[s];
    const int64_t distance = j - (i + len_k - len_q);
    if (args.window_left >= 0 && distance < -args.window_left) return -HUGE_VAL;
    if (args.window_right >= 0 && distance > args.window_right) return -HUGE_VAL;
    const double* query = &wide_q[(cu_q[s] + i) * args.q_row + head * args.q_head];
    const double* key = &wide_k[(cu_k[s] + j) * args.k_row + head * args.k_head];
    double sum = 0;
    for (int64_t d = 0; d < shape.dim; ++d) sum += query[d] * key[d];
    sum *= args.scale;
    if (args.alibi_slopes) sum -= double{slopes[head]} * std::llabs(distance);
    if (args.key_bias) sum += key_bias[cu_k[s] + j];
    return sum;
  }

  void exact(std::vector<double>& out, std::vector<double>& lse) {
    wide_q = q.values();
    wide_k = k.values();
    wide_v = v.values();
    out.assign(rows_q * shape.heads * shape.dim, 0.0);
    lse.assign(shape.heads * rows_q, -HUGE_VAL);
    for (int64_t s = 0; s < args.sequences; ++s) {
      for (int64_t i = 0; i < cu_q[s + 1] - cu_q[s]; ++i) {
        for (int64_t head = 0; head < shape.heads; ++head) {
          exact_row(s, head, i, &out[(cu_q[s] + i) * args.out_row + head * args.out_head],
                    lse[head * rows_q + cu_q[s] + i]);
        }
      }
    }
  }

  void exact_row(int64_t s, int64_t head, int64_t i, double* out, double& lse) const {
    std::vector<double> weights;
    double top = -HUGE_VAL, sum = 0;
    for (int64_t j = 0; j < cu_k[s + 1] - cu_k[s]; ++j) {
      weights.push_back(score(s, head, i, j));
      top = std::fmax(top, weights.back());
    }
    if (top == -HUGE_VAL) top = 0;  // a row that sees no key stays all zero
    for (double& weight : weights) sum += weight = std::exp(weight - top);
    if (sum == 0) return;
    lse = std::log(sum) + top;
    for (size_t j = 0; j < weights.size(); ++j) {
      const double* value = &wide_v[(cu_k[s] + j) * args.v_row + head * args.v_head];
      const double weight = weights[j] / sum;
      for (int64_t d = 0; d < shape.dim; ++d) out[d] += weight * value[d];
    }
  }

  void run(Suite& suite, const std::string& name) {
    Floats out(shape.dtype, rows_q * shape.heads * shape.dim);
    Floats lse(DType::kFloat32, shape.heads * rows_q);
    args.out = out.data();
    args.lse = static_cast<float*>(lse.data());
    std::vector<double> exact_out, exact_lse;
    exact(exact_out, exact_lse);
    const char* type = shape.dtype == DType::kFloat32 ? ", float32" : ", bfloat16";
    suite.run(name + ", D " + std::to_string(shape.dim) + type,
              {near("out", out, exact_out), near("lse", lse, exact_lse)},
              [&] { filbert::attn_varlen_cpu(args); });
  }
};

void shapes(Suite& suite, DType dtype) {
  Shape every{dtype, {}, {}, 1, 16};
  for (int length = 1; length <= 40; ++length) every.lengths_q.push_back(length);
  Problem(every).run(suite, "every length");
  for (int64_t dim = 1; dim <= filbert::kAttnMaxDim; ++dim) {
    // All of a few vectors; then one below, at and above their multiples.
    const bool edge = dim % 32 <= 1 || dim % 32 == 31 || dim % 50 == 0;
    if (dim <= 40 || edge) Problem({dtype, {1, 6, 33}, {}, 2, dim}).run(suite, "head sizes");
  }
  for (int keys : {127, 128, 129, 257, 511, 512, 513, 1030}) {
    Problem({dtype, {2}, {keys}, 1, 16}).run(suite, "edges of sums and key blocks");
  }
  Problem({dtype, {5, 0, 1, 70, 17, 3}, {}, 3, 24, 3, 8}).run(suite, "ragged");
  Problem({dtype, {5, 0, 1, 70, 17, 3}, {}, 3, 13, 3, 1}).run(suite, "ragged, odd strides");
  Problem({dtype, {0, 0}, {}, 2, 16, 1}).run(suite, "all empty");
  Problem({dtype, {5, 33, 12}, {}, 2, 24, 0, 8, true}).run(suite, "one head after the other");
  Problem({dtype, {1, 7, 0, 33, 4}, {9, 3, 5, 70, 0}}).run(suite, "other keys than queries");
}

void features(Suite& suite, DType dtype) {
  const int windows[][2] = {{-1, 0}, {3, 5}, {0, 0}, {-1, -1}, {600, 0}};
  for (const auto& window : windows) {
    for (bool alibi : {false, true}) {
      for (bool biased : {false, true}) {
        Problem problem({dtype, {9, 30, 2}, {9, 41, 530}, 2, 16});
        problem.args.window_left = window[0];
        problem.args.window_right = window[1];
        problem.args.alibi_slopes = alibi ? problem.slopes.data() : nullptr;
        problem.args.key_bias = biased ? problem.key_bias.data() : nullptr;
        problem.run(suite, "biases and windows");
      }
    }
  }
  for (float scale : {0.0f, -0.3f, 2.0f}) {
    Problem problem({dtype, {30}, {}, 1, 16});
    problem.args.scale = scale;
    problem.run(suite, "any scale");
  }
}

void extremes(Suite& suite, DType dtype) {
  Problem large({dtype, {20, 30}, {}, 1, 16});
  for (Floats* one : {&large.q, &large.k}) {
    one->fill([random = Random(1)](int64_t) mutable { return 60 * random.normal(); });
  }
  large.args.scale = 1;
  large.run(suite, "scores of thousands");

  // Products and sums of small integers are exact, so that there is one largest score, however
  // large, and a scale that is no power of two.
  Problem huge({dtype, {25, 35}, {}, 2, 32});
  huge.q.fill([random = Random(1)](int64_t) mutable { return random.integer(-3, 3) * 0x1p30; });
  huge.k.fill([random = Random(2)](int64_t) mutable { return random.integer(-3, 3); });
  huge.run(suite, "scores of thousands of millions");

  Problem infinite({dtype, {8, 9, 16}, {}, 1, 16});
  infinite.q.fill([](int64_t i) { return i % 16 ? 0 : -HUGE_VAL; });
  infinite.k.fill([](int64_t) { return 1; });
  infinite.run(suite, "scores of -inf");

  Problem own({dtype, {10, 10}, {}, 1, 16});
  own.v.set(3 * 16 + 5, NAN);
  own.k.set(15 * 16, NAN);
  own.run(suite, "a NaN among its own");

  // Sequences, heads and gaps around full of NaN: whatever is read past an end shows.
  for (int64_t dim : {24, 27}) {
    Problem between({dtype, {7, 33, 12, 45, 3}, {}, 3, dim, 2, 5});
    for (Floats* one : {&between.q, &between.k, &between.v}) {
      for (int64_t i = 0; i < one->count(); ++i) {
        const int64_t row = i / between.row_stride(), head = i % between.row_stride() / dim;
        const bool kept = (row >= 7 && row < 40) || (row >= 52 && row < 97);
        if (!kept || head != 1) one->set(i, NAN);
      }
    }
    between.run(suite, "between NaN");
  }
}

void cases(Suite& suite) {
  for (DType dtype : kDTypes) {
    shapes(suite, dtype);
    features(suite, dtype);
    extremes(suite, dtype);
  }
}

const Cases registered("attn_varlen", cases);

}  // namespace
}  // namespace kernel_check
