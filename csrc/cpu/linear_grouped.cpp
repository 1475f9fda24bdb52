// Deals a grouped product to the threads, with what precedes it, rows to codes, and what follows
// it, LayerNorm and codes of the result, while a block of rows is in the cache.
#include "cpu/linear_grouped_kernel.h"

#include "cpu/gemm/deal.h"
#include "cpu/norm_residual_kernel.h"
#include "cpu/quantize_rows_kernel.h"

namespace filbert {
namespace {

// Rows of a block: many, since a part of a panel is unpacked once for all of them; few enough that
// the sums of a strip stay in L1, and the block's float32 results, where only their codes are
// wanted, in L2.
constexpr int64_t kMostRows = 96;
constexpr int64_t kWideBytes = 640 * 1024;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Rows of codes in working memory. Rows lie 64 bytes more than whole units apart, so that they
// share no cache set.
int64_t codes_row(const LinearGroupedArgs& args) {
  return round_up(args.inputs, kGroupedUnit) + 64;
}
int64_t code_bytes(const LinearGroupedArgs& args, int64_t rows) {
  return round_up(rows * (codes_row(args) + 8), 64);
}
QuantizedRows codes_in(const LinearGroupedArgs& args, int64_t rows, void* memory) {
  char* at = static_cast<char*>(memory);
  return {reinterpret_cast<uint8_t*>(at) + rows * 8, reinterpret_cast<float*>(at),
          reinterpret_cast<int32_t*>(at) + rows, codes_row(args)};
}

// From numbers to codes: of x, and of results.
QuantizeRowsArgs codes_of_x(const LinearGroupedArgs& args, const QuantizedRows& out) {
  QuantizeRowsArgs quantize{};
  quantize.dtype = args.dtype;
  quantize.x = args.x;
  quantize.x_row = args.x_row;
  quantize.rows = args.rows;
  quantize.width = args.inputs;
  quantize.out = out;
  return quantize;
}
QuantizeRowsArgs codes_of_results(const LinearGroupedArgs& args, const float* wide) {
  QuantizeRowsArgs quantize{};
  quantize.dtype = DType::kFloat32;
  quantize.x = wide;
  quantize.x_row = quantize.width = args.outputs;
  quantize.rows = args.rows;
  quantize.out = args.out_codes;
  return quantize;
}

QuantizedRows from(const QuantizedRows& rows, int64_t first) {
  return {rows.codes + first * rows.codes_row, rows.scale + first, rows.zero + first,
          rows.codes_row};
}

NormResidualArgs norm_of(const LinearGroupedArgs& args) {
  NormResidualArgs norm = norm_of_output(args);
  norm.codes = args.out_codes;
  return norm;
}

}  // namespace

FILBERT_CHOOSE(LinearGroupedKernel, linear_grouped, FILBERT_BYTE_COPIES(linear_grouped))

void linear_grouped_cpu(const LinearGroupedArgs& args) {
  const LinearGroupedKernel& kernel = chosen_linear_grouped();
  const bool norm = args.norm_weight, codes_only = args.out_codes.codes && !norm;
  int64_t most = kMostRows;
  if (codes_only) {
    const int64_t fit = kWideBytes / (args.outputs * static_cast<int64_t>(sizeof(float)));
    most =
        std::clamp(fit / kernel.tile_rows, int64_t{2}, most / kernel.tile_rows) * kernel.tile_rows;
  }
  const ProductDeal deal(args.rows, (args.outputs + kGroupedPanel - 1) / kGroupedPanel,
                         args.rows * args.outputs * args.inputs, most, kernel.tile_rows);
  const NormResidualKernel& layer_norm = chosen_norm_residual();
  const QuantizeRowsKernel& quantize = chosen_quantize_rows();
  const int64_t own = kernel.scratch(args, deal.block_rows);
  if (deal.shares == 1) {
    const int64_t codes = args.x ? code_bytes(args, deal.block_rows) : 0;
    const int64_t wide = codes_only ? deal.block_rows * args.outputs * 4 : 0;
    const int64_t after = norm ? layer_norm.scratch(norm_of(args)) : 0;
    const int64_t bytes = std::max(own + codes + wide, after);
    deal.run(bytes, [&](int64_t begin, int64_t end, int64_t panel_begin, int64_t panel_end,
                        void* scratch) {
      char* const memory = static_cast<char*>(scratch) + own;
      GroupedBlock block{{}, nullptr, begin, end, panel_begin, panel_end};
      if (args.x) {
        block.codes = codes_in(args, end - begin, memory);
        QuantizeRowsArgs rows = codes_of_x(args, from(block.codes, -begin));
        quantize.rows(rows, begin, end);
      } else {
        block.codes = from(args.codes, begin);
      }
      if (codes_only) block.wide = reinterpret_cast<float*>(memory + codes);
      kernel.block(args, block, scratch);
      if (norm) layer_norm.rows(norm_of(args), begin, end, scratch);
      if (codes_only) {
        quantize.rows(codes_of_results(args, block.wide - begin * args.outputs), begin, end);
      }
    });
    return;
  }
  // Few rows, whose outputs are shared: what all of a row is needed for comes before and after.
  thread_local Scratch shared;
  const int64_t codes = args.x ? code_bytes(args, args.rows) : 0;
  const int64_t wide = codes_only ? args.rows * args.outputs * 4 : 0;
  char* const memory = static_cast<char*>(shared.at_least(codes + wide));
  QuantizedRows rows = args.codes;
  if (args.x) {
    rows = codes_in(args, args.rows, memory);
    quantize_rows_cpu(codes_of_x(args, rows));
  }
  float* const results = codes_only ? reinterpret_cast<float*>(memory + codes) : nullptr;
  deal.run(own,
           [&](int64_t begin, int64_t end, int64_t panel_begin, int64_t panel_end, void* scratch) {
             kernel.block(args,
                          {from(rows, begin), results ? results + begin * args.outputs : nullptr,
                           begin, end, panel_begin, panel_end},
                          scratch);
           });
  if (norm) norm_residual_cpu(norm_of(args));
  if (codes_only) quantize_rows_cpu(codes_of_results(args, results));
  shared.trim();
}

}  // namespace filbert
