// Deals rows to the threads; LayerNorm follows while a few of them are in L1.
#include "cpu/embedding_grouped_kernel.h"

#include "cpu/norm_residual_kernel.h"
#include "cpu/threads/tasks.h"

namespace filbert {
namespace {

constexpr int64_t kRowsAtOnce = 4;

}  // namespace

FILBERT_CHOOSE(EmbeddingGroupedKernel, embedding_grouped, FILBERT_COPIES(embedding_grouped))

void embedding_grouped_cpu(const EmbeddingGroupedArgs& args) {
  constexpr int64_t kElementBytes = 8;  // what an element costs
  const EmbeddingGroupedKernel& kernel = chosen_embedding_grouped();
  const NormResidualKernel& layer_norm = chosen_norm_residual();
  const NormResidualArgs norm = norm_of_output(args);
  const int64_t bytes = args.norm_weight ? layer_norm.scratch(norm) : 0;
  for_rows(args.rows, args.outputs * kElementBytes, bytes,
           [&](int64_t begin, int64_t end, void* scratch) {
             if (!args.norm_weight) return kernel.rows(args, begin, end);
             for (int64_t r = begin; r < end; r += kRowsAtOnce) {
               const int64_t last = std::min(r + kRowsAtOnce, end);
               kernel.rows(args, r, last);
               layer_norm.rows(norm, r, last, scratch);
             }
           });
}

}  // namespace filbert
