// Rows to bits and to codes: ties, signed zeros, what is no number, scales of every kind.
#include "args/pack_bits.h"

#include <cmath>
#include <memory>

#include "suite.h"

namespace kernel_check {
namespace {

using filbert::Ties;

constexpr int64_t kWidths[] = {1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 130, 258};

// Many ties with halves, and rows that are constant.
void fill_awkward(Floats& x, int64_t rows, int64_t row) {
  x.fill([random = Random(row)](int64_t) mutable { return std::round(random.normal() * 4) / 2; });
  x.set(0, -0.0);
  const int64_t width = x.count() - (rows - 1) * row;
  for (int64_t c = 0; c < width; ++c) {
    x.set(row + c, 0);
    x.set(2 * row + c, 1.5);
  }
  const double odd[] = {NAN, HUGE_VAL, -HUGE_VAL, -0.0};
  for (int64_t c = 0; c < width && c < 4; ++c) x.set((rows - 1) * row + c, odd[c]);
}

struct Problem {
  int64_t rows, width, row;
  Floats x;
  filbert::PackBitsArgs args{};
  std::unique_ptr<Floats> threshold, scale;

  Problem(DType dtype, int64_t rows, int64_t width, int64_t gap = 0)
      : rows(rows), width(width), row(width + gap), x(dtype, (rows - 1) * row + width) {
    fill_awkward(x, rows, row);
    args.x = x.data();
    args.dtype = dtype;
    args.rows = rows;
    args.width = width;
    args.x_row = row;
  }

  void run(Suite& suite, const std::string& name) {
    const int64_t planes = filbert::planes_of(args);
    Array<uint32_t> words(planes * rows * filbert::bit_words(width));
    Array<int32_t> sums(rows);
    Array<float> scale_out(rows);
    args.words = words.data();
    args.sums = sums.data();
    args.scale_out = args.bits ? scale_out.data() : nullptr;
    std::vector<Result> results = {bits("words", words), bits("sums", sums)};
    if (args.bits) results.push_back(bits("scale", scale_out));
    suite.run(name + ", width " + std::to_string(width), std::move(results),
              [&] { filbert::pack_bits_cpu(args); });
  }

  void set_threshold() {
    threshold = std::make_unique<Floats>(DType::kFloat32, width);
    threshold->fill(
        [random = Random(3)](int64_t) mutable { return std::round(random.normal() * 2) / 2; });
    args.threshold = static_cast<const float*>(threshold->data());
  }

  void set_codes(int bits, int low, const std::vector<float>& scales) {
    args.bits = bits;
    args.low = low;
    if (scales.empty()) return;
    scale = std::make_unique<Floats>(DType::kFloat32, rows);
    scale->fill([&](int64_t r) { return scales[r]; });
    args.scale = static_cast<const float*>(scale->data());
  }
};

void cases(Suite& suite) {
  for (DType dtype : kDTypes) {
    for (int64_t width : kWidths) {
      for (Ties ties : {Ties::kBelow, Ties::kAbove, Ties::kExact}) {
        for (bool given : {false, true}) {
          Problem problem(dtype, 5, width);
          problem.args.ties = ties;
          if (given) problem.set_threshold();
          problem.run(suite, given ? "bits by thresholds" : "bits");
        }
      }
      for (int bits : {2, 4, 8}) {
        for (int low : {-(1 << (bits - 1)), 0, 3}) {
          Problem own(dtype, 5, width);
          own.set_codes(bits, low, {});
          own.run(suite, "codes");
          Problem given(dtype, 5, width);
          given.set_codes(bits, low, {0.5f, 0.25f, 0.0f, 2.0f, 0.7f});
          given.run(suite, "codes of a given scale");
        }
      }
    }
    Problem strided(dtype, 5, 70, 13);
    strided.run(suite, "strided rows");
    Problem any(dtype, 5, 120);
    any.x.fill([](int64_t i) { return (i % 120 - 60) * 0.35 * (i / 120 == 1 ? 1e-39 : 1); });
    any.set_codes(8, -128, {0.7f, 1e-39f, -0.3f, NAN, INFINITY});
    any.run(suite, "any scale");
  }
}

const Cases registered("pack_bits", cases);

}  // namespace
}  // namespace kernel_check
