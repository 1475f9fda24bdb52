// Attention over bits. Keys lie across the lanes when a query chooses among them, and dimensions
// lie across the lanes when it adds up what it chose, so that both end as words of bits.

#include "cpu/attn_binary_kernel.h"
#include "cpu/simd/bits.h"

namespace filbert {
namespace FILBERT_ISA {
namespace {

constexpr int kParts = 32 / kLanes;  // vectors of a word's 32 lanes

// One head of one sequence, and its keys and values laid out for the lanes.
struct Head {
  const AttnBinaryArgs& args;
  int64_t first, length;  // rows of the sequence
  int64_t head;
  uint32_t* keys;    // [D / 32][key_words * 32]: word w of every key
  uint32_t* values;  // [key_words][D]: one dimension of 32 keys in a word
  uint32_t* chosen;  // [key_words]: the keys a query chose
  int32_t* misses;   // [key_words * 32]: how many bits of a key differ from the query's
  int64_t key_words;

  int64_t head_words() const { return args.dim / 32; }
  const uint32_t* row(const uint32_t* of, int64_t stride, int64_t i) const {
    return of + (first + i) * stride + head * head_words();
  }
};

// Turns a 32 x 32 matrix of bits around its diagonal: by blocks of 16, 8, 4, 2 and 1.
FILBERT_INLINE void transpose_bits(uint32_t (&m)[32]) {
  uint32_t mask = 0x0000ffffu;
  for (int step = 16; step > 0; step /= 2, mask ^= mask << step) {
    for (int i = 0; i < 32; i = (i + step + 1) & ~step) {
      const uint32_t swapped = (m[i] >> step ^ m[i + step]) & mask;
      m[i] ^= swapped << step;
      m[i + step] ^= swapped;
    }
  }
}

// Keys and values of one head. Rows past the sequence are zero, and masked wherever they count.
void lay_out(const Head& h) {
  for (int64_t w = 0; w < h.head_words(); ++w) {
    uint32_t* keys = h.keys + w * h.key_words * 32;
    for (int64_t j = 0; j < h.length; ++j) keys[j] = h.row(h.args.k, h.args.k_row, j)[w];
    for (int64_t j = h.length; j < h.key_words * 32; ++j) keys[j] = 0;
    for (int64_t b = 0; b < h.key_words; ++b) {
      uint32_t block[32];
      for (int j = 0; j < 32; ++j) {
        const int64_t key = 32 * b + j;
        block[j] = key < h.length ? h.row(h.args.v, h.args.v_row, key)[w] : 0;
      }
      transpose_bits(block);
      for (int d = 0; d < 32; ++d) h.values[b * h.args.dim + 32 * w + d] = block[d];
    }
  }
}

// Differing bits of one query and the kLanes keys from `key` on.
FILBERT_INLINE VecI differing(const Head& h, const uint32_t* query, int64_t key) {
  VecI sum = {};
  for (int64_t w = 0; w < h.head_words(); ++w) {
    sum += popcount(broadcast(query[w]) ^ load(h.keys + w * h.key_words * 32 + key));
  }
  return sum;
}

// Which bits of the last word of keys are keys.
FILBERT_INLINE uint32_t valid_keys(const Head& h, int64_t word) {
  const int64_t left = h.length - 32 * word;
  return left >= 32 ? ~0u : (1u << left) - 1;
}

// Boolean attention: S = D - 2 differing > 0, or >= 0. Returns how many keys are chosen.
int32_t choose_positive(const Head& h, const uint32_t* query) {
  const VecI limit = broadcast(static_cast<int32_t>(h.args.dim / 2) + h.args.choose_zeros);
  int32_t count = 0;
  for (int64_t w = 0; w < h.key_words; ++w) {
    const uint32_t word =
        word_of([&](int i) { return (VecI)(differing(h, query, 32 * w + i * kLanes) < limit); });
    h.chosen[w] = word & valid_keys(h, w);
    count += __builtin_popcount(h.chosen[w]);
  }
  return count;
}

// Thresholded softmax. The weight of a key depends only on how far it is from the best one, and
// falls with it, so that the choice is again a limit on the differing bits.
int32_t choose_by_table(const Head& h, const uint32_t* query) {
  const AttnBinaryArgs& args = h.args;
  for (int64_t j = 0; j < h.length; j += kLanes) store(h.misses + j, differing(h, query, j));
  int32_t best = h.misses[0];
  for (int64_t j = 1; j < h.length; ++j) best = h.misses[j] < best ? h.misses[j] : best;
  int64_t total = 0;
  for (int64_t j = 0; j < h.length; ++j) total += args.table[h.misses[j] - best];
  const double least = args.half * static_cast<double>(total);
  int32_t limit = best;
  while (limit - best <= args.dim && static_cast<double>(args.table[limit - best]) > least) ++limit;
  int32_t count = 0;
  for (int64_t w = 0; w < h.key_words; ++w) {
    const uint32_t word = word_of(
        [&](int i) { return (VecI)(load(h.misses + 32 * w + i * kLanes) < broadcast(limit)); });
    h.chosen[w] = word & valid_keys(h, w);
    count += __builtin_popcount(h.chosen[w]);
  }
  return count;
}

// The context of a query, compared with its thresholds: sum of +-1 values over the chosen keys
// = 2 popcount(chosen & value) - popcount(chosen), one dimension in each lane.
void write_context(const Head& h, int64_t query, int32_t count) {
  const AttnBinaryArgs& args = h.args;
  const int64_t row_words = args.heads * h.head_words(), plane = args.rows * row_words;
  for (int64_t w = 0; w < h.head_words(); ++w) {
    VecI context[kParts];
    for (int i = 0; i < kParts; ++i) context[i] = broadcast(-count);
    for (int64_t b = 0; b < h.key_words; ++b) {
      const VecU chosen = broadcast(h.chosen[b]);
      const uint32_t* values = h.values + b * args.dim + 32 * w;
      for (int i = 0; i < kParts; ++i) {
        context[i] += 2 * popcount(chosen & load(values + i * kLanes));
      }
    }
    VecI threshold[kParts] = {};
    if (args.threshold) {
      for (int i = 0; i < kParts; ++i) {
        threshold[i] = load(args.threshold + h.head * args.dim + 32 * w + i * kLanes);
      }
    }
    uint32_t above = 0, not_below = 0;
    if (args.ties != Ties::kAbove) {
      above = word_of([&](int i) { return (VecI)(context[i] > threshold[i]); });
    }
    if (args.ties != Ties::kBelow) {
      not_below = word_of([&](int i) { return (VecI)(context[i] >= threshold[i]); });
    }
    uint32_t* out = args.words + (h.first + query) * row_words + h.head * h.head_words() + w;
    if (args.ties == Ties::kExact) {  // codes 0, 1 and 2
      out[0] = not_below & ~above;
      out[plane] = above;
    } else {
      out[0] = above | not_below;
    }
  }
}

int64_t scratch_bytes(const AttnBinaryArgs& args, int64_t length) {
  const int64_t key_words = (length + 31) / 32;
  return key_words * (32 * (args.dim / 32) + args.dim + 1 + 32) * 4;
}

void run_head(const AttnBinaryArgs& args, int64_t sequence, int64_t head, void* scratch) {
  Head h{args,    args.cu[sequence], args.cu[sequence + 1] - args.cu[sequence],
         head,    nullptr,           nullptr,
         nullptr, nullptr,           0};
  h.key_words = (h.length + 31) / 32;
  h.keys = static_cast<uint32_t*>(scratch);
  h.values = h.keys + h.key_words * args.dim;
  h.misses = reinterpret_cast<int32_t*>(h.values + h.key_words * args.dim);
  h.chosen = reinterpret_cast<uint32_t*>(h.misses + h.key_words * 32);
  lay_out(h);
  for (int64_t i = 0; i < h.length; ++i) {
    const uint32_t* query = h.row(args.q, args.q_row, i);
    const int32_t count = args.table ? choose_by_table(h, query) : choose_positive(h, query);
    write_context(h, i, count);
  }
}

}  // namespace

const AttnBinaryKernel attn_binary = {scratch_bytes, run_head};

}  // namespace FILBERT_ISA
}  // namespace filbert
