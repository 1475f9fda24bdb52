// Rows to 8-bit codes: every tail of a row, ranges of every kind, a given scale.
#include "args/quantize_rows.h"

#include <cmath>

#include "suite.h"

namespace kernel_check {
namespace {

void run(Suite& suite, const std::string& name, Floats& x, int64_t rows, int64_t width, int64_t row,
         bool given) {
  Array<uint8_t> codes(rows * width);
  Array<float> scale(rows), scale_in(1);
  Array<int32_t> zero(rows), zero_in(1);
  scale_in[0] = 0.03f;
  zero_in[0] = 77;
  filbert::QuantizeRowsArgs args{};
  args.dtype = x.dtype();
  args.x = x.data();
  args.scale = given ? scale_in.data() : nullptr;
  args.zero = given ? zero_in.data() : nullptr;
  args.out = {codes.data(), scale.data(), zero.data(), width};
  args.x_row = row;
  args.rows = rows;
  args.width = width;
  suite.run(name + ", width " + std::to_string(width),
            {bits("codes", codes), bits("scale", scale), bits("zero", zero)},
            [&] { filbert::quantize_rows_cpu(args); });
}

void cases(Suite& suite) {
  for (DType dtype : kDTypes) {
    for (int64_t width = 1; width <= 140; width += width < 70 ? 1 : 7) {
      Floats x(dtype, 3 * width);
      x.fill([random = Random(width)](int64_t) mutable { return random.normal(); });
      run(suite, "rows", x, 3, width, width, false);
      run(suite, "a given scale", x, 3, width, width, true);
    }
    const int64_t width = 83, row = 90;
    Floats x(dtype, 7 * row + width);
    x.fill([random = Random(1)](int64_t) mutable { return std::round(random.normal() * 4) / 2; });
    for (int64_t k = 0; k < width; ++k) {
      x.set(row + k, 0);
      x.set(2 * row + k, 1 + x.at(k) / 9);
      x.set(3 * row + k, k == 5 ? 1e-39 : 0);
      x.set(4 * row + k, k % 2 ? 3.3e38 : -3.3e38);
    }
    x.set(5 * row + width - 1, NAN);
    x.set(6 * row, HUGE_VAL);
    x.set(7 * row + 40, -HUGE_VAL);
    run(suite, "any range", x, 8, width, row, false);
    run(suite, "any range, a given scale", x, 8, width, row, true);
  }
}

const Cases registered("quantize_rows", cases);

}  // namespace
}  // namespace kernel_check
