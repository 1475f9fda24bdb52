#include "args/gather_rows.h"

#include "torch/shared/device.h"

namespace filbert {
namespace {

constexpr const char* kOp = "gather_rows";

Tensor gather_rows(Tensor x, Tensor index) {
  check_same_device(index, x, kOp, "index");
  check(x.dim() == 2 && (x.size(1) < 2 || x.stride(1) == 1), kOp, "x", x,
        "[R, N] with contiguous rows", "tensor.flatten(1).contiguous()");
  check(index.dim() == 1 && (index.size(0) < 2 || index.stride(0) == 1), kOp, "index", index,
        "a contiguous [T]", "index.contiguous()");
  if (index.scalar_type() != ScalarType::Long) {
    check(false, kOp, "dtype of index", torch::headeronly::toString(index.scalar_type()), "int64",
          "index.long()");
  }
  const int64_t size = static_cast<int64_t>(x.element_size());
  GatherRowsArgs args{};
  args.rows = index.size(0);
  args.x_rows = x.size(0);
  args.row_bytes = x.size(1) * size;
  args.x_row_stride = x.stride(0) * size;
  Tensor out = torch::stable::new_empty(x, {args.rows, x.size(1)});
  if (args.rows == 0 || args.row_bytes == 0) return out;
  Call call(x);
  args.x = call.read(x);
  args.index = call.read<int64_t>(index);
  args.out = call.write(out);
  FILBERT_RUN(gather_rows, args, call);
  call.finish();
  return out;
}

}  // namespace
}  // namespace filbert

FILBERT_LIBRARY_IMPL(m) { m.impl("gather_rows", TORCH_BOX(&filbert::gather_rows)); }
