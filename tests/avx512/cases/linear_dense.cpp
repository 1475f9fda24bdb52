// Rows times a packed dense weight: every tail of rows, inputs and outputs, each weight dtype, and
// what follows the product.
#include "args/linear_dense.h"

#include <cmath>
#include <memory>

#include "suite.h"

namespace kernel_check {
namespace {

using filbert::Activation;

struct Shape {
  DType dtype, weight;
  int64_t rows, inputs, outputs;
  Activation activation = Activation::kNone;
  bool bias = true, residual = false, norm = false;
  int64_t gap = 0;  // between rows of x
};

// A normal float16 of random bits, and its value.
uint16_t half(Random& random) {
  return static_cast<uint16_t>((random.word() & 0x83ffu) |
                               static_cast<uint32_t>(random.integer(8, 14)) << 10);
}
double value_of(uint16_t bits) {
  const double size = std::ldexp(1024 + (bits & 0x3ff), (bits >> 10 & 31) - 25);
  return bits & 0x8000 ? -size : size;
}

double activated(double v, Activation activation) {
  switch (activation) {
    case Activation::kGelu:
      return 0.5 * v * std::erfc(-v * std::sqrt(0.5));
    case Activation::kGeluTanh:
      return v / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
    case Activation::kRelu:
      return v < 0 ? 0 : v;
    case Activation::kSilu:
      return v / (1 + std::exp(-v));
    case Activation::kNone:
      break;
  }
  return v;
}

struct Problem {
  const Shape shape;
  int64_t steps, panels;
  std::vector<double> dense;  // [N, K]
  Floats x, bias, residual, norm_weight, norm_bias, out;
  Guarded weight;
  filbert::LinearDenseArgs args{};

  static int64_t packed_steps(const Shape& s) {
    return s.weight == DType::kBFloat16 ? (s.inputs + 1) / 2 * 2 : s.inputs;
  }

  explicit Problem(const Shape& s)
      : shape(s),
        steps(packed_steps(s)),
        panels((s.outputs + 15) / 16),
        dense(s.outputs * s.inputs),
        x(s.dtype, (s.rows - 1) * (s.inputs + s.gap) + s.inputs),
        bias(s.dtype, s.outputs),
        residual(s.dtype, s.rows * s.outputs),
        norm_weight(s.dtype, s.outputs),
        norm_bias(s.dtype, s.outputs),
        out(s.dtype, s.rows * s.outputs),
        weight(panels * steps * 16 * filbert::size_of(s.weight)) {
    Random random(s.inputs * 131 + s.outputs);
    for (Floats* one : {&x, &bias, &residual, &norm_weight, &norm_bias}) {
      one->fill([&](int64_t) { return random.normal(); });
    }
    Floats numbers(s.weight == DType::kFloat16 ? DType::kFloat32 : s.weight, 1);
    for (int64_t n = 0; n < panels * 16; ++n) {
      for (int64_t k = 0; k < steps; ++k) {
        const bool inside = n < s.outputs && k < s.inputs;
        const int64_t panel = n / 16 * steps * 16, side = n % 16;
        unsigned char* to = weight.begin();
        double value = 0;
        if (s.weight == DType::kFloat16) {
          const uint16_t bits = inside ? half(random) : 0;
          __builtin_memcpy(to + 2 * (panel + k * 16 + side), &bits, 2);
          if (inside) value = value_of(bits);
        } else {
          numbers.set(0, inside ? random.normal() : 0);
          value = numbers.at(0);
          const int64_t at = s.weight == DType::kFloat32
                                 ? 4 * (panel + k * 16 + side)
                                 : 2 * (panel + k / 2 * 32 + side * 2 + k % 2);
          __builtin_memcpy(to + at, numbers.data(), filbert::size_of(s.weight));
        }
        if (inside) dense[n * s.inputs + k] = value;
      }
    }
    args.dtype = s.dtype;
    args.weight_dtype = s.weight;
    args.x = x.data();
    args.weight = weight.begin();
    args.bias = s.bias ? bias.data() : nullptr;
    args.residual = s.residual ? residual.data() : nullptr;
    args.norm_weight = s.norm ? norm_weight.data() : nullptr;
    args.norm_bias = s.norm ? norm_bias.data() : nullptr;
    args.out = out.data();
    args.x_row = s.inputs + s.gap;
    args.residual_row = s.outputs;
    args.rows = s.rows;
    args.inputs = args.weight_inputs = s.inputs;
    args.outputs = s.outputs;
    args.activation = s.activation;
    args.eps = 1e-5f;
  }

  std::vector<double> exact() const {
    std::vector<double> all;
    for (int64_t r = 0; r < shape.rows; ++r) {
      std::vector<double> row;
      double mean = 0, variance = 0;
      for (int64_t n = 0; n < shape.outputs; ++n) {
        double sum = shape.bias ? bias.at(n) : 0;
        for (int64_t k = 0; k < shape.inputs; ++k) {
          sum += x.at(r * args.x_row + k) * dense[n * shape.inputs + k];
        }
        row.push_back(activated(sum, shape.activation) +
                      (shape.residual ? residual.at(r * shape.outputs + n) : 0));
        mean += row.back() / shape.outputs;
      }
      for (double v : row) variance += (v - mean) * (v - mean) / shape.outputs;
      for (int64_t n = 0; n < shape.outputs; ++n) {
        all.push_back(shape.norm
                          ? (row[n] - mean) / std::sqrt(variance + 1e-5) * norm_weight.at(n) +
                                norm_bias.at(n)
                          : row[n]);
      }
    }
    return all;
  }

  void run(Suite& suite, const std::string& name) {
    suite.run(name, {near("out", out, exact(), shape.outputs, shape.outputs)},
              [&] { filbert::linear_dense_cpu(args); });
  }
};

void cases(Suite& suite) {
  const DType f32 = DType::kFloat32, f16 = DType::kFloat16, bf16 = DType::kBFloat16;
  const DType pairs[][2] = {{f32, f32}, {f32, f16}, {f32, bf16}, {bf16, bf16}};
  for (const auto& [rows, weight] : pairs) {
    for (int64_t count = 1; count <= 26; ++count) {
      Problem({rows, weight, count, 37, 40}).run(suite, "rows " + std::to_string(count));
    }
    for (int64_t outputs = 1; outputs <= 82; outputs += 3) {
      Problem({rows, weight, 2, 20, outputs}).run(suite, "outputs " + std::to_string(outputs));
    }
    for (int64_t inputs : {0, 1, 2, 3, 15, 127, 128, 129, 255, 256, 257, 512, 600}) {
      for (int64_t count : {1, 5}) {
        Problem({rows, weight, count, inputs, 70}).run(suite, "inputs " + std::to_string(inputs));
      }
    }
    for (Activation activation : {Activation::kNone, Activation::kGelu, Activation::kGeluTanh,
                                  Activation::kRelu, Activation::kSilu}) {
      for (bool norm : {false, true}) {
        Problem({rows, weight, 3, 30, 45, activation, true, true, norm}).run(suite, "epilogue");
        Problem({rows, weight, 3, 30, 45, activation, false, false, norm}).run(suite, "epilogue");
      }
    }
    Problem({rows, weight, 5, 45, 33, Activation::kNone, true, false, false, 7})
        .run(suite, "strided rows");
  }
}

const Cases registered("linear_dense", cases);

}  // namespace
}  // namespace kernel_check
