#include "cpu/attn_binary_kernel.h"

#include <cstring>

#include "cpu/pack_bits_kernel.h"
#include "cpu/threads/tasks.h"

namespace filbert {
namespace {

// Sums of codes, and zeros for the rows of no sequence.
void finish_rows(const AttnBinaryArgs& args) {
  const PackBitsKernel& bits = chosen_pack_bits();
  const int64_t words = args.heads * args.dim / 32, planes = planes_of(args.ties);
  const int64_t covered = args.cu[args.sequences];
  for (int64_t p = 0; p < planes; ++p) {
    std::memset(args.words + (p * args.rows + covered) * words, 0,
                (args.rows - covered) * words * sizeof(uint32_t));
  }
  for_rows(args.rows, words * 4, [&](int64_t begin, int64_t end) {
    bits.sum_planes(args.words + begin * words, args.rows * words, planes, end - begin, words,
                    args.sums + begin);
  });
}

}  // namespace

FILBERT_CHOOSE(AttnBinaryKernel, attn_binary, FILBERT_BIT_COPIES(attn_binary))

void attn_binary_cpu(const AttnBinaryArgs& args) {
  const AttnBinaryKernel& kernel = chosen_attn_binary();
  int64_t longest = 0, pairs = 0;
  for (int64_t s = 0; s < args.sequences; ++s) {
    const int64_t length = args.cu[s + 1] - args.cu[s];
    longest = std::max(longest, length);
    pairs += length * length * args.heads;
  }
  // Heads are handed out one by one, since sequences differ in length.
  constexpr int64_t kPairsPerShare = 1 << 14;  // tens of microseconds of work
  const int64_t hands = std::min(thread_count(), pairs / kPairsPerShare + 1);
  for_tasks(args.sequences * args.heads, hands, kernel.scratch(args, longest),
            [&](int64_t task, void* scratch) {
              const int64_t sequence = task / args.heads;
              if (args.cu[sequence + 1] == args.cu[sequence]) return;
              kernel.head(args, sequence, task % args.heads, scratch);
            });
  finish_rows(args);
}

}  // namespace filbert
