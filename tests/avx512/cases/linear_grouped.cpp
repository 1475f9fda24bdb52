// Rows of codes times a weight of a few bits: every number of bits, every tail of rows, inputs and
// outputs, groups and offsets, the largest sums there are.
#include "args/linear_grouped.h"

#include <cmath>

#include "suite.h"

namespace kernel_check {
namespace {

using filbert::Activation;

struct Shape {
  int bits;
  int64_t rows, inputs, outputs;
  int64_t group = 0;  // inputs of one, or 0: all
  bool offsets = false, extreme = false, numbers = false, codes_out = false;
  DType dtype = DType::kFloat32;
};

struct Problem {
  const Shape s;
  int64_t panels, units, groups;
  Array<uint8_t> weight, codes, multiplier, out_codes;
  Array<float> scale, row_scale, bias, out_scale;
  Array<int32_t> totals, offset, row_zero, out_zero;
  Floats x, out, residual;
  filbert::LinearGroupedArgs args{};

  explicit Problem(const Shape& shape)
      : s(shape),
        panels((s.outputs + 15) / 16),
        units((s.inputs + 31) / 32),
        groups(s.group ? s.inputs / s.group : 1),
        weight(panels * units * 64 * s.bits),
        codes(s.rows * s.inputs),
        multiplier(panels * groups * 16),
        out_codes(s.rows * s.outputs),
        scale(s.outputs),
        row_scale(s.rows),
        bias(s.outputs),
        out_scale(s.rows),
        totals(s.outputs),
        offset(panels * groups * 16),
        row_zero(s.rows),
        out_zero(s.rows),
        x(s.dtype, s.rows * s.inputs),
        out(s.dtype, s.rows * s.outputs),
        residual(s.dtype, s.rows * s.outputs) {
    Random random(s.inputs * 131 + s.outputs * 7 + s.bits);
    const auto byte = [&](int64_t) { return static_cast<uint8_t>(random.integer(0, 255)); };
    // Any bytes are codes; with `extreme` all are the highest, which is all ones.
    weight.fill(
        [&](int64_t) { return s.extreme ? 255 : static_cast<uint8_t>(random.word() >> 9); });
    codes.fill([&](int64_t i) { return s.extreme ? 255 : byte(i); });
    multiplier.fill([&](int64_t) {
      return s.extreme ? 255 >> (s.bits / 2) : static_cast<uint8_t>(random.integer(0, s.offsets ? 9 : 99));
    });
    offset.fill([&](int64_t) { return static_cast<int32_t>(random.integer(-50, 50)); });
    scale.fill([&](int64_t) { return static_cast<float>(random.normal() / 256); });
    row_scale.fill([&](int64_t) { return static_cast<float>(random.normal() / 64); });
    bias.fill([&](int64_t) { return static_cast<float>(random.normal()); });
    totals.fill([&](int64_t) { return static_cast<int32_t>(random.integer(-900, 900)); });
    row_zero.fill([&](int64_t) { return static_cast<int32_t>(random.integer(0, 255)); });
    for (Floats* one : {&x, &residual}) one->fill([&](int64_t) { return random.normal(); });
    args.dtype = s.dtype;
    if (s.numbers) {
      args.x = x.data();
      args.x_row = s.inputs;
    } else {
      args.codes = {codes.data(), row_scale.data(), row_zero.data(), s.inputs};
    }
    args.weight = weight.data();
    args.scale = scale.data();
    args.totals = totals.data();
    args.multiplier = s.group ? multiplier.data() : nullptr;
    args.offset = s.offsets ? offset.data() : nullptr;
    args.bias = bias.data();
    args.rows = s.rows;
    args.inputs = s.inputs;
    args.outputs = s.outputs;
    args.groups = groups;
    args.bits = s.bits;
    if (s.codes_out) {
      args.out_codes = {out_codes.data(), out_scale.data(), out_zero.data(), s.outputs};
    } else {
      args.out = out.data();
      args.residual = residual.data();
      args.residual_row = s.outputs;
    }
  }

  // Without an activation all copies give the same bits.
  void run(Suite& suite, const std::string& name) {
    const std::string whole = name + ", " + std::to_string(s.bits) + " bits, " +
                              std::to_string(s.rows) + "x" + std::to_string(s.inputs) + "x" +
                              std::to_string(s.outputs);
    std::vector<Result> results = {bits("out", out)};
    if (s.codes_out) {
      results = {bits("codes", out_codes), bits("scale", out_scale), bits("zero", out_zero)};
    }
    suite.run(whole, std::move(results), [&] { filbert::linear_grouped_cpu(args); });
  }
};

void cases(Suite& suite) {
  for (int bits : {2, 3, 4, 6, 8}) {
    for (int64_t rows = 1; rows <= 26; ++rows) Problem({bits, rows, 37, 40}).run(suite, "rows");
    for (int64_t outputs = 1; outputs <= 70; outputs += 3) {
      Problem({bits, 2, 40, outputs}).run(suite, "outputs");
    }
    for (int64_t inputs : {1, 2, 3, 4, 5, 31, 32, 33, 63, 64, 127, 128, 129, 511, 512, 513, 700}) {
      Problem({bits, 3, inputs, 33}).run(suite, "inputs");
    }
    for (int64_t group : {0, 32, 64, 128}) {
      for (bool offsets : {false, true}) {
        Problem({bits, 5, 640, 40, group, offsets}).run(suite, "groups");
        Problem({bits, 1, 384, 20, group, offsets}).run(suite, "groups");
      }
      Problem({bits, 3, 1024, 33, group, false, true}).run(suite, "the largest sums");
    }
    for (DType dtype : kDTypes) {
      Problem numbers({bits, 9, 100, 40, 0, false, false, true, false, dtype});
      numbers.run(suite, "rows of numbers");
      Problem codes({bits, 9, 64, 70, 32, false, false, true, true, dtype});
      codes.run(suite, "codes of the result");
    }
  }
}

const Cases registered("linear_grouped", cases);

}  // namespace
}  // namespace kernel_check
