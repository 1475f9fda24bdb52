#include "args/attn_binary.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>

#include "cpu/dispatch/kernels.h"
#include "cpu/threads/parallel.h"

namespace filbert {
namespace {

// Sums of codes, and zeros for the rows of no sequence.
void finish_rows(const AttnBinaryArgs& args, const BinaryKernels& kernels) {
  const int64_t words = args.heads * args.dim / 32, planes = planes_of(args.ties);
  const int64_t covered = args.cu[args.sequences];
  for (int64_t p = 0; p < planes; ++p) {
    std::memset(args.words + (p * args.rows + covered) * words, 0,
                (args.rows - covered) * words * sizeof(uint32_t));
  }
  constexpr int64_t kWordsPerShare = 16384;
  parallel_for(args.rows, kWordsPerShare / words + 1, [&](int64_t begin, int64_t end) {
    kernels.sum_planes(args.words + begin * words, args.rows * words, planes, end - begin, words,
                       args.sums + begin);
  });
}

}  // namespace

void attn_binary_cpu(const AttnBinaryArgs& args) {
  const BinaryKernels& kernels = cpu_kernels().binary;
  int64_t longest = 0, pairs = 0;
  for (int64_t s = 0; s < args.sequences; ++s) {
    const int64_t length = args.cu[s + 1] - args.cu[s];
    longest = std::max(longest, length);
    pairs += length * length * args.heads;
  }
  const int64_t scratch = kernels.attn_binary_scratch(args, longest);
  // Heads are handed out one by one, since sequences differ in length.
  constexpr int64_t kPairsPerShare = 1 << 14;  // tens of microseconds of work
  const int64_t tasks = args.sequences * args.heads;
  const int64_t workers = std::min({thread_count(), tasks, pairs / kPairsPerShare + 1});
  std::atomic<int64_t> next{0};
  parallel_for(workers, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<char[]> memory(new char[scratch + 64]);
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t task = next++; task < tasks; task = next++) {
        const int64_t sequence = task / args.heads;
        if (args.cu[sequence + 1] == args.cu[sequence]) continue;
        kernels.attn_binary_head(args, sequence, task % args.heads, memory.get());
      }
    }
  });
  finish_rows(args, kernels);
}

}  // namespace filbert
