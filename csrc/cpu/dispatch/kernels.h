// The CPU kernels as the rest of filbert sees them: one table per instruction set.
#pragma once

#include "args/attn_binary.h"
#include "args/attn_varlen.h"
#include "args/bias_gelu.h"
#include "args/gather_rows.h"
#include "args/linear_binary.h"
#include "args/linear_dense.h"
#include "args/norm_residual.h"
#include "args/pack_bits.h"

namespace filbert {

// One unit of attention work: some query rows of some heads of one sequence.
struct AttnTask {
  int32_t sequence;
  int32_t head_begin, head_end;
  int32_t q_begin, q_end;  // rows counted from the sequence's first
};

// One unit of work of linear_binary: that many rows and outputs.
constexpr int64_t kBinaryRows = 128;
constexpr int64_t kBinaryColumns = 64;

#define FILBERT_DECLARE_BINARY_KERNELS                                                       \
  void pack_bits_rows(const PackBitsArgs& args, int64_t begin, int64_t end);                 \
  int64_t linear_binary_scratch(const LinearBinaryArgs& args); /* bytes */                   \
  /* rows [row_begin, row_end), and outputs from kBinaryColumns * block_begin on */          \
  void linear_binary_block(const LinearBinaryArgs& args, int64_t row_begin, int64_t row_end, \
                           int64_t block_begin, int64_t block_end, void* scratch);           \
  int64_t attn_binary_scratch(const AttnBinaryArgs& args, int64_t length); /* bytes */       \
  void attn_binary_head(const AttnBinaryArgs& args, int64_t sequence, int64_t head,          \
                        void* scratch);                                                      \
  /* sums[r] = the sum of row r's codes, its planes `stride` words apart */                  \
  void sum_planes(const uint32_t* words, int64_t stride, int64_t planes, int64_t rows,       \
                  int64_t row_words, int32_t* sums);

// Each instruction set defines these in its own namespace (csrc/cpu/*_kernel.cpp).
#define FILBERT_DECLARE_KERNELS(isa)                                                        \
  namespace isa {                                                                           \
  int64_t attn_varlen_scratch(const AttnVarlenArgs& args, int64_t longest_k); /* bytes */   \
  void attn_varlen_task(const AttnVarlenArgs& args, const AttnTask& task, void* scratch);   \
  void norm_residual_rows(const NormResidualArgs& args, int64_t begin, int64_t end,         \
                          float* scratch);                                                  \
  void bias_gelu_rows(const BiasGeluArgs& args, int64_t begin, int64_t end);                \
  int64_t linear_dense_rows(const LinearDenseArgs& args);                  /* of a block */ \
  int64_t linear_dense_scratch(const LinearDenseArgs& args, int64_t rows); /* bytes */      \
  void linear_dense_block(const LinearDenseArgs& args, int64_t row_begin, int64_t row_end,  \
                          int64_t panel_begin, int64_t panel_end, void* scratch);           \
  FILBERT_DECLARE_BINARY_KERNELS                                                            \
  extern const int vector_bytes;                                                            \
  extern const bool bf16_pairs;                                                             \
  }

FILBERT_DECLARE_KERNELS(base)
FILBERT_DECLARE_KERNELS(avx2)
FILBERT_DECLARE_KERNELS(avx512)
FILBERT_DECLARE_KERNELS(avx512_bf16)
FILBERT_DECLARE_KERNELS(emulated)
namespace avx512_vpopcnt {  // these only; the rest is avx512's
FILBERT_DECLARE_BINARY_KERNELS
}

struct BinaryKernels {
  decltype(&base::pack_bits_rows) pack_bits_rows;
  decltype(&base::linear_binary_scratch) linear_binary_scratch;
  decltype(&base::linear_binary_block) linear_binary_block;
  decltype(&base::attn_binary_scratch) attn_binary_scratch;
  decltype(&base::attn_binary_head) attn_binary_head;
  decltype(&base::sum_planes) sum_planes;
};

struct CpuKernels {
  const char* isa;
  int vector_bytes;
  bool bf16_pairs;  // bfloat16 products two at a time
  decltype(&base::attn_varlen_scratch) attn_varlen_scratch;
  decltype(&base::attn_varlen_task) attn_varlen_task;
  decltype(&base::norm_residual_rows) norm_residual_rows;
  decltype(&base::bias_gelu_rows) bias_gelu_rows;
  decltype(&base::linear_dense_rows) linear_dense_rows;
  decltype(&base::linear_dense_scratch) linear_dense_scratch;
  decltype(&base::linear_dense_block) linear_dense_block;
  BinaryKernels binary;
};

#define FILBERT_EXPORT __attribute__((visibility("default")))

// The table in use: the best for this processor, or what FILBERT_CPU_ISA / select_isa asked for.
FILBERT_EXPORT const CpuKernels& cpu_kernels();

// Lets another instruction set take over; false if this build or processor has no such one.
FILBERT_EXPORT bool select_isa(const char* name);

// Runnable tables, best first; the emulated one comes last. Null-terminated.
FILBERT_EXPORT const CpuKernels* const* runnable_isas();

// Drivers: split one call into tasks and run them over the pool.
void attn_varlen_cpu(const AttnVarlenArgs& args);
void norm_residual_cpu(const NormResidualArgs& args);
void bias_gelu_cpu(const BiasGeluArgs& args);
void gather_rows_cpu(const GatherRowsArgs& args);
void pack_bits_cpu(const PackBitsArgs& args);
void linear_binary_cpu(const LinearBinaryArgs& args);
void linear_dense_cpu(const LinearDenseArgs& args);
void attn_binary_cpu(const AttnBinaryArgs& args);

}  // namespace filbert
