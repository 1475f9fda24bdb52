// +-1 weights times bit planes: every height of a register tile, sums about to overflow, bits out
// at their thresholds, numbers out through every part of the epilogue.
#include "args/linear_binary.h"

#include <cmath>
#include <memory>

#include "suite.h"

namespace kernel_check {
namespace {

struct Codes {
  int planes, step, low;
};
// +-1, {0, 1}, ternary, unsigned and signed codes, a zero point.
constexpr Codes kCodes[] = {{1, 2, -1}, {1, 1, 0},    {2, 1, -1},  {2, 1, 0},
                            {4, 1, -8}, {8, 1, -128}, {8, 1, -117}};

struct Problem {
  int64_t rows, features, outputs, row_words;
  Codes codes;
  Array<uint32_t> words, weight;
  Array<int32_t> sums, totals;
  std::vector<int64_t> dots;  // [rows * outputs], exact
  filbert::LinearBinaryArgs args{};

  enum Draw { kChance, kAllOnes, kFewLow };  // kFewLow: plane 0 has few words that are not 0

  Problem(int64_t rows, int64_t features, int64_t outputs, Codes codes, Draw draw = kChance)
      : rows(rows),
        features(features),
        outputs(outputs),
        row_words((features + 31) / 32),
        codes(codes),
        words(codes.planes * rows * row_words),
        weight((outputs + 15) / 16 * row_words * 16),
        sums(rows),
        totals(outputs) {
    Random random(rows + features + outputs);
    const auto valid = [&](int64_t w) {
      return 32 * w + 32 <= features ? ~0u : (1u << features % 32) - 1;
    };
    const auto word = [&] { return draw == kAllOnes ? ~0u : random.word(); };
    words.fill([&](int64_t i) {
      const bool empty = draw == kFewLow && i < rows * row_words && random.integer(0, 7) > 0;
      return empty ? 0 : word() & valid(i % row_words);
    });
    weight.fill([&](int64_t i) {
      const int64_t output = i / (16 * row_words) * 16 + i % 16;
      return output < outputs ? word() & valid(i / 16 % row_words) : 0;
    });
    sums.fill([&](int64_t t) { return static_cast<int32_t>(count(t, -1)); });
    totals.fill([&](int64_t n) {
      int64_t ones = 0;
      for (int64_t w = 0; w < row_words; ++w) ones += __builtin_popcount(weight_word(n, w));
      return static_cast<int32_t>(2 * ones - features);
    });
    for (int64_t t = 0; t < rows; ++t) {
      for (int64_t n = 0; n < outputs; ++n) {
        dots.push_back(codes.step * (2 * count(t, n) - sums[t]) + int64_t{codes.low} * totals[n]);
      }
    }
    args.words = words.data();
    args.sums = sums.data();
    args.weight = weight.data();
    args.totals = totals.data();
    args.rows = rows;
    args.outputs = outputs;
    args.row_words = row_words;
    args.plane_stride = rows * row_words;
    args.row_stride = row_words;
    args.planes = codes.planes;
    args.step = codes.step;
    args.low = codes.low;
  }

  uint32_t weight_word(int64_t n, int64_t w) const {
    return weight[(n / 16 * row_words + w) * 16 + n % 16];
  }
  // The sum of a row's codes, or of those where the weight of output n is 1.
  int64_t count(int64_t t, int64_t n) const {
    int64_t sum = 0;
    for (int64_t p = 0; p < codes.planes; ++p) {
      for (int64_t w = 0; w < row_words; ++w) {
        const uint32_t word = words[(p * rows + t) * row_words + w];
        sum += int64_t{__builtin_popcount(n < 0 ? word : word & weight_word(n, w))} << p;
      }
    }
    return sum;
  }
  std::string name(const char* what) const {
    return std::string(what) + ", " + std::to_string(rows) + " x " + std::to_string(features) +
           " x " + std::to_string(outputs) + ", planes " + std::to_string(codes.planes);
  }

  // Edges of bits: ties in one row, chance in the others, what is never and what is always reached.
  Array<int32_t>& fill_edges(Array<int32_t>& edges, int64_t of_row, int64_t shift) const {
    return edges.fill([&](int64_t n) {
      const int64_t tie = dots[of_row % rows * outputs + n] + shift;
      return n % 7 == 5 ? INT32_MIN : n % 7 == 6 ? INT32_MAX : static_cast<int32_t>(tie);
    });
  }

  // `edges` says which of until (1), lower (2) and lower_until (4) there are.
  void run_bits(Suite& suite, int edges = 0) {
    Array<int32_t> threshold(outputs), until(outputs), lower(outputs), lower_until(outputs);
    filbert::LinearBinaryArgs call = args;
    call.threshold = fill_edges(threshold, 0, 0).data();
    if (edges & 1) call.until = fill_edges(until, 1, 0).data();
    if (edges & 2) call.lower = fill_edges(lower, 0, -2).data();
    if (edges & 4) call.lower_until = fill_edges(lower_until, 2, 1).data();
    Array<uint32_t> out(filbert::planes_out(call) * rows * ((outputs + 31) / 32));
    Array<int32_t> out_sums(rows);
    call.out_words = out.data();
    call.out_sums = out_sums.data();
    suite.run(name("bits") + ", edges " + std::to_string(edges),
              {bits("words", out), bits("sums", out_sums)},
              [&] { filbert::linear_binary_cpu(call); });
  }

  void run_numbers(Suite& suite, DType dtype, bool scaled, bool with_residual, bool norm) {
    Random random(5);
    const auto vector = [&](DType type, int64_t n, double size) {
      auto made = std::make_unique<Floats>(type, n);
      made->fill([&](int64_t) { return size * random.normal(); });
      return made;
    };
    const int64_t gap = 3;
    const auto alpha = vector(DType::kFloat32, outputs, 0.05);
    const auto bias = vector(DType::kFloat32, outputs, 1);
    const auto scale = vector(DType::kFloat32, rows, 1);
    const auto residual = vector(dtype, (rows - 1) * (outputs + gap) + outputs, 1);
    const auto gamma = vector(dtype, outputs, 1), beta = vector(dtype, outputs, 1);
    Floats out(dtype, rows * outputs);
    filbert::LinearBinaryArgs call = args;
    call.dtype = dtype;
    call.alpha = static_cast<const float*>(alpha->data());
    call.bias = scaled ? static_cast<const float*>(bias->data()) : nullptr;
    call.scale = scaled ? static_cast<const float*>(scale->data()) : nullptr;
    call.residual = with_residual ? residual->data() : nullptr;
    call.residual_row = outputs + gap;
    call.norm_weight = norm ? gamma->data() : nullptr;
    call.norm_bias = norm ? beta->data() : nullptr;
    call.eps = 1e-5f;
    call.out = out.data();
    std::vector<double> exact;
    for (int64_t t = 0; t < rows; ++t) {
      std::vector<double> row;
      double mean = 0, variance = 0;
      for (int64_t n = 0; n < outputs; ++n) {
        double y = alpha->at(n) * dots[t * outputs + n];
        if (scaled) y = y * scale->at(t) + bias->at(n);
        if (with_residual) y += residual->at(t * call.residual_row + n);
        row.push_back(y);
        mean += y / outputs;
      }
      for (double y : row) variance += (y - mean) * (y - mean) / outputs;
      for (int64_t n = 0; n < outputs; ++n) {
        const double y = (row[n] - mean) / std::sqrt(variance + call.eps);
        exact.push_back(norm ? y * gamma->at(n) + beta->at(n) : row[n]);
      }
    }
    suite.run(name(norm ? "normalized numbers" : "numbers"), {near("out", out, exact)},
              [&] { filbert::linear_binary_cpu(call); });
  }

  void run(Suite& suite) {
    run_bits(suite);
    run_numbers(suite, DType::kFloat32, false, false, false);
    run_numbers(suite, DType::kBFloat16, true, true, false);
  }
};

void cases(Suite& suite) {
  // Heights of register tiles, with as many outputs; row_words up to where bytes would overflow.
  for (int64_t rows = 1; rows <= 26; ++rows) {
    Problem(rows, 40 * rows, 3 * rows + 1, kCodes[rows % 7]).run(suite);
  }
  for (const Codes& codes : kCodes) {
    Problem(3, 31, 17, codes).run(suite);
    Problem(7, 300, 130, codes).run(suite);
  }
  for (int edges = 1; edges < 8; ++edges) {
    for (int64_t outputs : {1, 31, 33, 64, 77, 130}) {
      Problem(5, 100, outputs, kCodes[0]).run_bits(suite, edges);
    }
    Problem(9, 300, 70, kCodes[2], Problem::kFewLow).run_bits(suite, edges);
  }
  // A plane that is nearly empty, and one that is.
  for (int64_t rows : {1, 4, 5, 14, 30}) {
    Problem(rows, 300, 70, kCodes[2], Problem::kFewLow).run(suite);
    Problem(rows, 20, 33, kCodes[2], Problem::kFewLow).run(suite);
  }
  Problem(131, 33, 70, kCodes[0]).run(suite);  // more than one block of rows
  for (int64_t features : {0, 1, 32, 224, 225, 256}) {
    Problem(6, features, 65, kCodes[2]).run(suite);
  }
  for (bool scaled : {false, true}) {
    for (bool residual : {false, true}) {
      for (DType dtype : kDTypes) {
        for (bool norm : {false, true}) {
          Problem(5, 100, 77, kCodes[0]).run_numbers(suite, dtype, scaled, residual, norm);
        }
      }
    }
  }
  // The longest rows, all ones: no count overflows. Few rows and many are counted in two ways.
  for (int64_t rows : {1, 5}) Problem(rows, 65504, 1, {1, 2, -1}, Problem::kAllOnes).run(suite);
  Problem(5, 65504, 1, {8, 1, -128}, Problem::kAllOnes).run_bits(suite);

  // A plane of a larger tensor: words and rows of which only some are read.
  Problem whole(8, 256, 33, kCodes[0]);
  filbert::LinearBinaryArgs part = whole.args;
  part.rows = 4;
  part.row_stride = 2 * whole.row_words;
  Floats alpha(DType::kFloat32, 33), out(DType::kFloat32, 4 * 33);
  alpha.fill([](int64_t) { return 1; });
  Array<int32_t> sums(4);
  sums.fill([&](int64_t t) { return whole.sums[2 * t]; });
  std::vector<double> exact;
  for (int64_t i = 0; i < 4 * 33; ++i) exact.push_back(whole.dots[i / 33 * 2 * 33 + i % 33]);
  part.sums = sums.data();
  part.alpha = static_cast<const float*>(alpha.data());
  part.out = out.data();
  suite.run("every other row", {near("out", out, exact)},
            [&] { filbert::linear_binary_cpu(part); });
}

const Cases registered("linear_binary", cases);

}  // namespace
}  // namespace kernel_check
