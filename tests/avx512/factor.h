// A thin factor as the kernels of low rank take it.
#pragma once

#include <cmath>

#include "suite.h"

namespace kernel_check {

// A factor [N, K] packed as linear_dense's, and its numbers.
struct Factor {
  const int64_t outputs, inputs, steps;
  std::vector<double> dense;
  Floats packed;

  static int64_t packed_steps(DType dtype, int64_t inputs) {
    return dtype == DType::kBFloat16 ? (inputs + 1) / 2 * 2 : inputs;
  }

  Factor(DType dtype, int64_t outputs, int64_t inputs, Random& random)
      : outputs(outputs),
        inputs(inputs),
        steps(packed_steps(dtype, inputs)),
        dense(outputs * inputs),
        packed(dtype, (outputs + 15) / 16 * steps * 16) {
    packed.fill([&](int64_t at) {
      const int64_t panel = at / (steps * 16), inside = at % (steps * 16);
      const bool pairs = dtype == DType::kBFloat16;
      const int64_t k = pairs ? inside / 32 * 2 + inside % 2 : inside / 16;
      const int64_t n = panel * 16 + (pairs ? inside % 32 / 2 : inside % 16);
      return n < outputs && k < inputs ? random.normal() / std::sqrt(inputs) : 0.0;
    });
    for (int64_t n = 0; n < outputs; ++n) {
      for (int64_t k = 0; k < inputs; ++k) {
        const int64_t panel = n / 16 * steps * 16, side = n % 16;
        const int64_t at = dtype == DType::kBFloat16 ? panel + k / 2 * 32 + side * 2 + k % 2
                                                     : panel + k * 16 + side;
        dense[n * inputs + k] = packed.at(at);
      }
    }
  }

  std::vector<double> times(const double* row) const {
    std::vector<double> made(outputs);
    for (int64_t n = 0; n < outputs; ++n) {
      for (int64_t k = 0; k < inputs; ++k) made[n] += row[k] * dense[n * inputs + k];
    }
    return made;
  }
};

}  // namespace kernel_check
