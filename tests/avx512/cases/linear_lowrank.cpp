// A product of two factors: blocks of rows, and few rows, in each dtype of the factors.
#include "args/linear_lowrank.h"

#include "factor.h"
#include "suite.h"

namespace kernel_check {
namespace {

void run(Suite& suite, DType dtype, DType weight, int64_t rows, int64_t inputs, int64_t rank,
         int64_t outputs) {
  Random random(rows * 31 + rank);
  const Factor a(weight, rank, inputs, random), b(weight, outputs, rank, random);
  Floats x(dtype, rows * inputs), bias(dtype, outputs), residual(dtype, rows * outputs);
  Floats out(dtype, rows * outputs);
  for (Floats* one : {&x, &bias, &residual}) {
    one->fill([&](int64_t) { return random.normal(); });
  }
  filbert::LinearLowRankArgs args{};
  args.dtype = dtype;
  args.weight_dtype = weight;
  args.x = x.data();
  args.factors = {a.packed.data(), b.packed.data(), bias.data(), rank, rank};
  args.residual = residual.data();
  args.out = out.data();
  args.x_row = args.inputs = inputs;
  args.residual_row = args.outputs = outputs;
  args.rows = rows;
  args.activation = filbert::Activation::kNone;
  const std::vector<double> wide = x.values();
  std::vector<double> exact;
  for (int64_t r = 0; r < rows; ++r) {
    const std::vector<double> made = b.times(a.times(&wide[r * inputs]).data());
    for (int64_t n = 0; n < outputs; ++n) {
      exact.push_back(made[n] + bias.at(n) + residual.at(r * outputs + n));
    }
  }
  suite.run("rows " + std::to_string(rows) + ", rank " + std::to_string(rank),
            {near("out", out, exact, outputs, outputs)},
            [&] { filbert::linear_lowrank_cpu(args); });
}

void cases(Suite& suite) {
  const DType f32 = DType::kFloat32, bf16 = DType::kBFloat16;
  for (const auto& [rows, weight] : {std::pair{f32, f32}, {f32, bf16}, {bf16, bf16}}) {
    run(suite, rows, weight, 101, 20, 17, 33);
    run(suite, rows, weight, 48, 9, 1, 16);
    run(suite, rows, weight, 3, 20, 140, 5);
  }
}

const Cases registered("linear_lowrank", cases);

}  // namespace
}  // namespace kernel_check
