// GELU(x + bias) in place: every width up to a few vectors, every magnitude, what is no number.
#include "args/bias_gelu.h"

#include <cmath>

#include "suite.h"

namespace kernel_check {
namespace {

// x * Phi(x), or its tanh form as x * sigmoid(2u): neither loses the digits of a negative tail.
double gelu(double x, bool tanh_form) {
  if (!tanh_form) return 0.5 * x * std::erfc(-x * std::sqrt(0.5));
  const double u = std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x);
  return x / (1 + std::exp(-2 * u));
}

void run(Suite& suite, const std::string& name, Floats& x, int64_t rows, bool with_bias,
         bool tanh_form) {
  const int64_t width = x.count() / rows;
  Floats bias(x.dtype(), width);
  bias.fill([random = Random(1)](int64_t) mutable { return random.normal(); });
  filbert::BiasGeluArgs args{};
  args.dtype = x.dtype();
  args.x = x.data();
  args.bias = with_bias ? bias.data() : nullptr;
  args.rows = rows;
  args.width = width;
  args.tanh = tanh_form;
  std::vector<double> exact;
  for (int64_t i = 0; i < x.count(); ++i) {
    exact.push_back(gelu(x.at(i) + (with_bias ? bias.at(i % width) : 0), tanh_form));
  }
  suite.run(name + (tanh_form ? ", tanh" : ""), {near("x", x, exact)},
            [&] { filbert::bias_gelu_cpu(args); });
}

// GELU of what is far above zero is what it was, so that only the rounding of x + bias is left:
// every bit of it, at ties and beside them.
void run_rounding(Suite& suite, bool tanh_form) {
  const int64_t width = 512;
  Floats x(DType::kBFloat16, width), bias(DType::kBFloat16, width);
  x.fill([](int64_t i) { return 64 + i / 64 * 0.5; });
  bias.fill([](int64_t i) { return i % 64 / 64.0; });
  filbert::BiasGeluArgs args{};
  args.dtype = DType::kBFloat16;
  args.x = x.data();
  args.bias = bias.data();
  args.rows = 1;
  args.width = width;
  args.tanh = tanh_form;
  suite.run("rounding", {bits("x", x)}, [&] { filbert::bias_gelu_cpu(args); });
}

void cases(Suite& suite) {
  for (bool tanh_form : {false, true}) run_rounding(suite, tanh_form);
  for (DType dtype : kDTypes) {
    for (bool tanh_form : {false, true}) {
      for (int64_t width = 1; width <= 70; ++width) {
        Floats x(dtype, 3 * width);
        x.fill([random = Random(width)](int64_t) mutable { return 3 * random.normal(); });
        run(suite, "width " + std::to_string(width), x, 3, true, tanh_form);
      }
      // By stretches, since each is measured by its own largest value.
      for (int begin = -13; begin < 13; begin += 2) {
        Floats x(dtype, 257);
        x.fill([&](int64_t i) { return begin + i / 128.0; });
        run(suite, "from " + std::to_string(begin), x, 1, false, tanh_form);
      }
      for (double value : {HUGE_VAL, static_cast<double>(NAN), 0.0, -0.0, 1e30, -1e30, 1e-30, -40.0,
                           1e-4, 19.99, -19.99}) {
        Floats x(dtype, 2 * 19);
        x.fill([&](int64_t) { return value; });
        run(suite, "all " + std::to_string(value), x, 2, false, tanh_form);
      }
    }
  }
}

const Cases registered("bias_gelu", cases);

}  // namespace
}  // namespace kernel_check
