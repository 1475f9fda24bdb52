// Rows of numbers to rows of 8-bit codes: a pass for the range, a pass for the codes while the row
// lies in L1. Built once per instruction set.
#include "cpu/quantize_rows_kernel.h"
#include "cpu/simd/quantize.h"

namespace filbert {
namespace FILBERT_ISA {
namespace {

template <typename T>
void quantize(const QuantizeRowsArgs& args, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(args.x) + r * args.x_row;
    RowScale by = scale_of(range_of(x, args.width));
    // Given a scale, the range still says whether the row is finite.
    if (args.scale && by.scale == by.scale) by = {*args.scale, *args.zero};
    write_codes(x, args.width, by, args.out.codes + r * args.out.codes_row);
    args.out.scale[r] = by.scale;
    args.out.zero[r] = by.zero;
  }
}

void quantize_range(const QuantizeRowsArgs& args, int64_t begin, int64_t end) {
  args.dtype == DType::kFloat32 ? quantize<float>(args, begin, end)
                                : quantize<bf16>(args, begin, end);
}

}  // namespace

const QuantizeRowsKernel quantize_rows = {quantize_range};

}  // namespace FILBERT_ISA
}  // namespace filbert
