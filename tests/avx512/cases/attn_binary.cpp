// Attention over bits: every length up to a few words of keys, every head size, scores that tie,
// thresholds that nothing reaches.
#include "args/attn_binary.h"

#include <cmath>

#include "suite.h"

namespace kernel_check {
namespace {

using filbert::Ties;

struct Shape {
  std::vector<int> lengths;
  int64_t heads, dim;
  int64_t orphans = 2;  // rows of no sequence
  int64_t gap = 0;      // words between rows
};

struct Problem {
  int64_t rows, words, row;
  Array<uint32_t> q, k, v;
  Array<int32_t> cu, threshold;
  Array<int64_t> table;
  filbert::AttnBinaryArgs args{};

  static int64_t rows_of(const Shape& s) {
    int64_t sum = s.orphans;
    for (int length : s.lengths) sum += length;
    return sum;
  }
  static int64_t extent(const Shape& s) {
    const int64_t words = s.heads * s.dim / 32;
    return (rows_of(s) - 1) * (words + s.gap) + words;
  }

  explicit Problem(const Shape& s)
      : rows(rows_of(s)),
        words(s.heads * s.dim / 32),
        row(words + s.gap),
        q(extent(s)),
        k(extent(s)),
        v(extent(s)),
        cu(s.lengths.size() + 1),
        threshold(s.heads * s.dim),
        table(s.dim + 1) {
    Random random(rows);
    for (auto* one : {&q, &k, &v}) one->fill([&](int64_t) { return random.word(); });
    threshold.fill([&](int64_t) { return static_cast<int32_t>(random.integer(-3, 3)); });
    const double scale = 0.9 / std::sqrt(static_cast<double>(s.dim));
    table.fill([&](int64_t m) { return std::llround(0x1p40 * std::exp(-2 * scale * m)); });
    cu[0] = 0;
    for (size_t i = 0; i < s.lengths.size(); ++i) cu[i + 1] = cu[i] + s.lengths[i];
    args.q = q.data();
    args.k = k.data();
    args.v = v.data();
    args.cu = cu.data();
    args.rows = rows;
    args.sequences = static_cast<int64_t>(s.lengths.size());
    args.heads = s.heads;
    args.dim = s.dim;
    args.q_row = args.k_row = args.v_row = row;
  }

  void run(Suite& suite, const std::string& name) {
    Array<uint32_t> out(filbert::planes_of(args.ties) * rows * words);
    Array<int32_t> sums(rows);
    args.words = out.data();
    args.sums = sums.data();
    suite.run(name + ", D " + std::to_string(args.dim), {bits("words", out), bits("sums", sums)},
              [&] { filbert::attn_binary_cpu(args); });
  }

  void run_all(Suite& suite, const std::string& name) {
    for (Ties ties : {Ties::kBelow, Ties::kAbove, Ties::kExact}) {
      args.ties = ties;
      args.threshold = ties == Ties::kBelow ? nullptr : threshold.data();
      for (bool choose_zeros : {false, true}) {
        args.choose_zeros = choose_zeros;
        run(suite, name);
      }
    }
    args.table = table.data();
    for (double half : {0.001, 0.02, 0.25}) {
      args.half = half;
      run(suite, name + ", softmax");
    }
  }
};

void cases(Suite& suite) {
  for (int64_t dim : {32, 64, 96, 128}) {
    Problem({{5, 0, 1, 33, 17, 64}, 2, dim}).run_all(suite, "ragged");
  }
  Shape every{{}, 1, 32};
  for (int length = 1; length <= 40; ++length) every.lengths.push_back(length);
  Problem(every).run_all(suite, "every length");
  Problem({{130}, 1, 64, 0}).run_all(suite, "one sequence");
  Problem({{19, 40}, 3, 64, 2, 5}).run_all(suite, "strided rows");

  // Orthogonal queries and keys: every score is 0, so the policies are all that decides.
  Problem tied({{40}, 1, 64});
  tied.q.fill([](int64_t) { return ~0u; });
  tied.k.fill([](int64_t i) { return i % 2 ? 0u : ~0u; });
  tied.run_all(suite, "every score ties");

  for (int32_t reach : {INT32_MIN, INT32_MAX}) {
    Problem beyond({{40}, 1, 64, 0});
    beyond.threshold.fill([&](int64_t) { return reach; });
    beyond.run_all(suite, "thresholds beyond reach");
  }
}

const Cases registered("attn_binary", cases);

}  // namespace
}  // namespace kernel_check
