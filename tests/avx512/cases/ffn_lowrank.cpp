// A feed-forward part of low-rank factors: enough rows that it goes by blocks, in each dtype of the
// factors, with an inner width of several parts and tails everywhere.
#include "args/ffn_lowrank.h"

#include <cmath>

#include "factor.h"
#include "suite.h"

namespace kernel_check {
namespace {

using filbert::Activation;

struct Shape {
  DType dtype, weight;
  int64_t rows, inputs, rank, inner, other, outputs;
  bool norm = false;
};

void run(Suite& suite, const Shape& s) {
  Random random(s.inner * 131 + s.rank);
  const Factor a(s.weight, s.rank, s.inputs, random), b(s.weight, s.inner, s.rank, random);
  const Factor c(s.weight, s.other, s.inner, random), d(s.weight, s.outputs, s.other, random);
  Floats x(s.dtype, s.rows * s.inputs), up_bias(s.dtype, s.inner), down_bias(s.dtype, s.outputs);
  Floats residual(s.dtype, s.rows * s.outputs), gamma(s.dtype, s.outputs), beta(s.dtype, s.outputs);
  Floats out(s.dtype, s.rows * s.outputs);
  for (Floats* one : {&x, &up_bias, &down_bias, &residual, &gamma, &beta}) {
    one->fill([&](int64_t) { return random.normal(); });
  }
  filbert::FfnLowRankArgs args{};
  args.dtype = s.dtype;
  args.weight_dtype = s.weight;
  args.x = x.data();
  args.up = {a.packed.data(), b.packed.data(), up_bias.data(), s.rank, s.rank};
  args.down = {c.packed.data(), d.packed.data(), down_bias.data(), s.other, s.other};
  args.residual = residual.data();
  args.norm_weight = s.norm ? gamma.data() : nullptr;
  args.norm_bias = s.norm ? beta.data() : nullptr;
  args.out = out.data();
  args.x_row = args.inputs = s.inputs;
  args.residual_row = args.outputs = s.outputs;
  args.rows = s.rows;
  args.inner = s.inner;
  args.activation = Activation::kGelu;
  args.eps = 1e-5f;
  std::vector<double> exact;
  for (int64_t r = 0; r < s.rows; ++r) {
    std::vector<double> row(s.inputs);
    for (int64_t k = 0; k < s.inputs; ++k) row[k] = x.at(r * s.inputs + k);
    std::vector<double> wide = b.times(a.times(row.data()).data());
    for (int64_t n = 0; n < s.inner; ++n) {
      const double v = wide[n] + up_bias.at(n);
      wide[n] = 0.5 * v * std::erfc(-v * std::sqrt(0.5));
    }
    std::vector<double> made = d.times(c.times(wide.data()).data());
    double mean = 0, variance = 0;
    for (int64_t n = 0; n < s.outputs; ++n) {
      made[n] += down_bias.at(n) + residual.at(r * s.outputs + n);
      mean += made[n] / s.outputs;
    }
    for (double v : made) variance += (v - mean) * (v - mean) / s.outputs;
    for (int64_t n = 0; n < s.outputs; ++n) {
      const double normal = (made[n] - mean) / std::sqrt(variance + 1e-5);
      exact.push_back(s.norm ? normal * gamma.at(n) + beta.at(n) : made[n]);
    }
  }
  suite.run("inner " + std::to_string(s.inner) + ", ranks " + std::to_string(s.rank) + " and " +
                std::to_string(s.other),
            {near("out", out, exact, s.outputs, s.outputs)},
            [&] { filbert::ffn_lowrank_cpu(args); });
}

void cases(Suite& suite) {
  const DType f32 = DType::kFloat32, bf16 = DType::kBFloat16;
  for (const auto& [rows, weight] : {std::pair{f32, f32}, {f32, bf16}, {bf16, bf16}}) {
    run(suite, {rows, weight, 50, 20, 17, 150, 19, 33});
    run(suite, {rows, weight, 101, 9, 1, 129, 40, 16, true});
    run(suite, {rows, weight, 48, 16, 32, 30, 7, 5});
    run(suite, {rows, weight, 3, 20, 17, 40, 19, 33, true});  // one product after the other
  }
}

const Cases registered("ffn_lowrank", cases);

}  // namespace
}  // namespace kernel_check
