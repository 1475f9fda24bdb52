// LayerNorm(x + bias + residual): every width up to a few vectors, and numbers that lose digits.
#include "args/norm_residual.h"

#include <cmath>
#include <memory>

#include "suite.h"

namespace kernel_check {
namespace {

struct Shape {
  DType dtype;
  int64_t rows, width;
  bool bias = true, residual = true;
  bool in_place = false;
  int64_t gap = 0;  // between rows
  float eps = 1e-5f;
};

struct Problem {
  const Shape shape;
  Floats x, bias, residual, weight, beta, out;
  filbert::NormResidualArgs args{};

  static int64_t strided(const Shape& s) { return (s.rows - 1) * (s.width + s.gap) + s.width; }

  explicit Problem(const Shape& s)
      : shape(s),
        x(s.dtype, strided(s)),
        bias(s.dtype, s.width),
        residual(s.dtype, strided(s)),
        weight(s.dtype, s.width),
        beta(s.dtype, s.width),
        out(s.dtype, s.rows * s.width) {
    Random random(s.width);
    for (Floats* one : {&x, &bias, &residual, &weight, &beta}) {
      one->fill([&](int64_t) { return random.normal(); });
    }
    args.dtype = s.dtype;
    args.x = x.data();
    args.bias = s.bias ? bias.data() : nullptr;
    args.residual = s.residual ? residual.data() : nullptr;
    args.weight = weight.data();
    args.beta = beta.data();
    args.out = s.in_place ? x.data() : out.data();
    args.x_row = args.residual_row = s.width + s.gap;
    args.out_row = s.in_place ? args.x_row : s.width;
    args.rows = s.rows;
    args.width = s.width;
    args.eps = s.eps;
  }

  std::vector<double> exact() const {
    std::vector<double> all;
    for (int64_t r = 0; r < shape.rows; ++r) {
      std::vector<double> row;
      double mean = 0, variance = 0;
      for (int64_t c = 0; c < shape.width; ++c) {
        row.push_back(x.at(r * args.x_row + c) + (shape.bias ? bias.at(c) : 0) +
                      (shape.residual ? residual.at(r * args.residual_row + c) : 0));
        mean += row.back() / shape.width;
      }
      for (double value : row) variance += (value - mean) * (value - mean) / shape.width;
      for (int64_t c = 0; c < shape.width; ++c) {
        all.push_back((row[c] - mean) / std::sqrt(variance + shape.eps) * weight.at(c) +
                      beta.at(c));
      }
    }
    return all;
  }

  void run(Suite& suite, const std::string& name) {
    Floats& result = shape.in_place ? x : out;
    suite.run(name, {near("out", result, exact(), shape.width, args.out_row)},
              [&] { filbert::norm_residual_cpu(args); });
  }
};

void cases(Suite& suite) {
  for (DType dtype : kDTypes) {
    for (int64_t width = 1; width <= 70; ++width) {
      Problem({dtype, 2, width}).run(suite, "width " + std::to_string(width));
    }
    for (int64_t width : {384, 1031}) {
      Problem({dtype, 3, width}).run(suite, "width " + std::to_string(width));
    }
    for (int absent = 0; absent < 4; ++absent) {
      Problem({dtype, 3, 45, (absent & 1) == 0, (absent & 2) == 0}).run(suite, "absent operands");
    }
    Problem({dtype, 5, 45, true, true, true, 3}).run(suite, "in place, strided rows");
    Problem({dtype, 5, 45, true, true, false, 7}).run(suite, "strided rows");

    Problem nan({dtype, 4, 70});
    nan.x.set(70 + 5, NAN);
    nan.run(suite, "a NaN row stays alone");

    Problem loose({dtype, 2, 24, false, false, false, 0, 1.0f});
    loose.x.fill([](int64_t i) { return i % 2 ? 0 : 1e-3; });
    loose.run(suite, "eps");

    Problem constant({dtype, 2, 24, false, false, false, 0, 1e-12f});
    constant.x.fill([](int64_t) { return 0; });
    constant.run(suite, "a constant row");
  }
  // One-pass variance cancels here; two passes keep the digits that the input has.
  Problem large({DType::kFloat32, 4, 519, false, false, false, 0, 1e-12f});
  large.x.fill([random = Random(7)](int64_t) mutable { return random.normal() * 1e-2 + 1000; });
  large.run(suite, "large mean, small variance");

  // The square is no float32: the variance is infinite, and the row is its beta.
  Problem limit({DType::kFloat32, 1, 40});
  limit.x.set(3, 3e38);
  suite.run("near the limit", {bits("out", limit.out)},
            [&] { filbert::norm_residual_cpu(limit.args); });
}

const Cases registered("norm_residual", cases);

}  // namespace
}  // namespace kernel_check
