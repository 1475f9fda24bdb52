#include "args/embedding_grouped.h"

#include "torch/shared/binary.h"
#include "torch/shared/capacity.h"
#include "torch/shared/dtypes.h"
#include "torch/shared/text.h"

namespace filbert {
namespace {

constexpr const char* kOp = "embedding_grouped";

// One table's operands, all or none of them.
struct Table {
  const char *ids_name, *codes_name, *scale_name;
  const std::optional<Tensor>& ids;
  const std::optional<Tensor>& codes;
  const std::optional<Tensor>& scale;

  void check_all(const Tensor& like, int64_t rows, int64_t width, CodeTable& table) const {
    const bool all = ids.has_value() == codes.has_value() && ids.has_value() == scale.has_value();
    check(all, kOp, ids_name, "some of ids, codes and scale", "all or none",
          "the table as a whole");
    if (!ids) return;
    check_vector_of(*ids, ScalarType::Long, rows, like, kOp, ids_name);
    check_same_device(*codes, like, kOp, codes_name);
    check_type(*codes, ScalarType::Byte, kOp, codes_name);
    const bool halves = codes->dim() == 2 && codes->size(1) == (width + 1) / 2 && width > 1;
    const bool fits =
        codes->dim() == 2 && codes->is_contiguous() && (halves || codes->size(1) == width);
    check(fits, kOp, codes_name, *codes, "a contiguous [V, N], or [V, ceil(N / 2)] of 4 bits",
          "pack_table of the [V, N] table");
    table.entries = codes->size(0);
    table.bits = halves ? 4 : 8;
    check_vector_of(*scale, ScalarType::Float, table.entries, like, kOp, scale_name);
    if (kOnGpu) return;
    const int64_t* id = static_cast<const int64_t*>(ids->const_data_ptr());
    for (int64_t r = 0; r < rows; ++r) {
      if (id[r] >= 0 && id[r] < table.entries) continue;
      check(false, kOp, ids_name, id[r], ("0 to " + std::to_string(table.entries - 1)).c_str(),
            "the tokenizer of this model");
    }
  }

  void read(Call& call, CodeTable& table) const {
    if (!ids) return;
    table.ids = call.read<int64_t>(*ids);
    table.codes = call.read<uint8_t>(*codes);
    table.scale = call.read<float>(*scale);
  }
};

Tensor embedding_grouped(Tensor ids, Tensor codes, Tensor scale, int64_t width,
                         std::optional<Tensor> position_ids, std::optional<Tensor> position_codes,
                         std::optional<Tensor> position_scale, std::optional<Tensor> type_ids,
                         std::optional<Tensor> type_codes, std::optional<Tensor> type_scale,
                         std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias,
                         double eps, StringHandle dtype_text) {
  const std::string dtype = take_text(dtype_text);
  EmbeddingGroupedArgs args{};
  args.dtype = dtype_named(dtype, kOp);
  const ScalarType type = scalar_type_of(args.dtype);
  args.rows = ids.dim() == 1 ? ids.size(0) : -1;
  args.outputs = width;
  args.eps = static_cast<float>(eps);
  check(width >= 0, kOp, "width", width, "0 or more", "the N of the [V, N] table");
  const std::optional<Tensor> own_ids(ids), own_codes(codes), own_scale(scale);
  const Table tables[] = {
      {"ids", "codes", "scale", own_ids, own_codes, own_scale},
      {"type_ids", "type_codes", "type_scale", type_ids, type_codes, type_scale},
      {"position_ids", "position_codes", "position_scale", position_ids, position_codes,
       position_scale}};
  for (int i = 0; i < EmbeddingGroupedArgs::kTables; ++i) {
    tables[i].check_all(ids, args.rows, width, args.tables[i]);
  }
  check(norm_weight.has_value() == norm_bias.has_value(), kOp, "norm_weight and norm_bias",
        "one of them", "both or none", "zeros for norm_bias");
  if (norm_weight) {
    check_vector_of(*norm_weight, type, width, ids, kOp, "norm_weight");
    check_vector_of(*norm_bias, type, width, ids, kOp, "norm_bias");
  }
  Tensor out = empty_rows(ids, args.rows, width, type);
  if (args.rows == 0 || width == 0) return out;
  Call call(ids);
  for (int i = 0; i < EmbeddingGroupedArgs::kTables; ++i) tables[i].read(call, args.tables[i]);
  args.norm_weight = norm_weight ? call.read(*norm_weight) : nullptr;
  args.norm_bias = norm_bias ? call.read(*norm_bias) : nullptr;
  args.out = call.write(out);
  FILBERT_RUN(embedding_grouped, args, call);
  call.finish();
  return out;
}

}  // namespace
}  // namespace filbert

FILBERT_LIBRARY_IMPL(m) { m.impl("embedding_grouped", TORCH_BOX(&filbert::embedding_grouped)); }
