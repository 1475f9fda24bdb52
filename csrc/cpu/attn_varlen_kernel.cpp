// Attention of some query rows of some heads of one sequence. Built once per instruction set.
//
// K and V of a head are packed once into panels of kTileCols columns, so that both products
// S = Q K^T and O = P V run through one register-tiled multiply with unit-stride operands. Query
// rows go in blocks of a few register tiles; keys in blocks of kKeyBlock, with the running maximum
// and sum of the online softmax between them. Most sequences fit one key block, and then it is a
// plain softmax. bfloat16 is widened while packing, or kept as pairs where the processor multiplies
// pairs.
#include "cpu/attn_varlen_kernel.h"
#include "cpu/gemm/tile.h"
#include "cpu/simd/simd.h"

namespace filbert {
namespace FILBERT_ISA {
namespace {

constexpr int64_t kKeyBlock = 512;  // P of a query block stays within L2, a key block of V too
constexpr int64_t kBlockRows = kTileRows * (kTileRows > 6 ? 2 : 4);
constexpr int64_t kMaxDim = kAttnMaxDim;
constexpr float kMinusInf = -__builtin_inff();

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The longest chain of additions. One chain of 512 has a few times the rounding error of four
// chains of 128 and their sum, which is about what libraries for dense products compute.
constexpr int64_t kSumSteps = 128;

// A row of a panel is kTileCols wide, whatever part of it is used.
template <int kVectors>
using Columns = PanelShape<1, kVectors, kTileCols>;

// One operand of a product: rows of `inner` elements, `row` elements apart.
template <typename Mul>
struct Rows {
  const typename Mul::Element* at;
  int64_t row;
  int64_t count;
};

// The other: panels of kTileCols columns, `size` elements apart.
template <typename Mul>
struct Panels {
  const typename Mul::Element* at;
  int64_t size;
  int64_t columns;  // in all panels together; the last panel's tail vector is skipped if unused
};

// The product of any number of rows and columns, in one chain of additions. Rows are dealt out
// evenly over register tiles, so that 16 rows are 6 + 5 + 5 and not 6 + 6 + 4 with a starved last
// tile. Each row's sum has one order, whatever the tile's height, so results do not depend on how
// rows are grouped.
template <typename Mul, bool kAdd>
void multiply_chain(const Rows<Mul>& a, const Panels<Mul>& b, int64_t inner, float* c,
                    int64_t c_row, const float* grow) {
  constexpr Into kInto = kAdd ? Into::kGrow : Into::kSet;
  const int64_t tiles = (a.count + kTileRows - 1) / kTileRows;
  for (int64_t column = 0; column < b.columns; column += kTileCols) {
    const auto* panel = b.at + column / kTileCols * b.size;
    const bool half = b.columns - column <= kLanes;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t begin = t * a.count / tiles, height = (t + 1) * a.count / tiles - begin;
      const auto* a_tile = a.at + begin * a.row;
      float* c_tile = c + begin * c_row + column;
      const float* grow_tile = kAdd ? grow + begin : nullptr;
      switch (half ? -height : height) {
#define FILBERT_TILE(h)                                                                           \
  case h:                                                                                         \
    if constexpr (h <= kTileRows) {                                                               \
      multiply_tile<Mul, h, Columns<kTileVectors>, kInto>(a_tile, a.row, panel, 0, inner, c_tile, \
                                                          c_row, grow_tile);                      \
    }                                                                                             \
    break;                                                                                        \
  case -h:                                                                                        \
    if constexpr (h <= kTileRows) {                                                               \
      multiply_tile<Mul, h, Columns<1>, kInto>(a_tile, a.row, panel, 0, inner, c_tile, c_row,     \
                                               grow_tile);                                        \
    }                                                                                             \
    break;
        FILBERT_TILE(1)
        FILBERT_TILE(2)
        FILBERT_TILE(3)
        FILBERT_TILE(4)
        FILBERT_TILE(5)
        FILBERT_TILE(6)
        FILBERT_TILE(7)
        FILBERT_TILE(8)
        FILBERT_TILE(9)
        FILBERT_TILE(10)
        FILBERT_TILE(11)
        FILBERT_TILE(12)
#undef FILBERT_TILE
      }
    }
  }
}

constexpr float kOnes[kBlockRows] = {
#define FILBERT_SIX 1, 1, 1, 1, 1, 1
    FILBERT_SIX, FILBERT_SIX, FILBERT_SIX, FILBERT_SIX
#undef FILBERT_SIX
};
static_assert(kBlockRows == 24, "all of kOnes are ones");

// The same, as chains of at most kSumSteps of equal length, and with `grow` as multiply_tile adds.
template <typename Mul>
FILBERT_INLINE void multiply(const Rows<Mul>& a, const Panels<Mul>& b, int64_t inner, float* c,
                             int64_t c_row, const float* grow) {
  const int64_t chains = inner <= kSumSteps ? 1 : (inner + kSumSteps - 1) / kSumSteps;
  for (int64_t chain = 0, step = 0, next; chain < chains; ++chain, step = next) {
    next = chain + 1 < chains ? (chain + 1) * inner / chains : inner;
    const Rows<Mul> rows{a.at + step, a.row, a.count};
    const Panels<Mul> panels{b.at + step * kTileCols, b.size, b.columns};
    if (chain > 0 || grow) {
      multiply_chain<Mul, true>(rows, panels, next - step, c, c_row, chain > 0 ? kOnes : grow);
    } else {
      multiply_chain<Mul, false>(rows, panels, next - step, c, c_row, nullptr);
    }
  }
}

// ---- packing
// -------------------------------------------------------------------------------------

typedef uint32_t Quad __attribute__((vector_size(16), may_alias));
typedef uint32_t QuadUnaligned __attribute__((vector_size(16), aligned(2), may_alias));

// out[j][0..3] = in[0..3][j] for a 4x4 block of 32-bit elements. Rows of `in` are `in_row` bytes
// apart, rows of `out` so many elements.
FILBERT_INLINE void transpose_4x4(const char* in, int64_t in_row, uint32_t* out, int64_t out_row) {
  const Quad r0 = *reinterpret_cast<const QuadUnaligned*>(in);
  const Quad r1 = *reinterpret_cast<const QuadUnaligned*>(in + in_row);
  const Quad r2 = *reinterpret_cast<const QuadUnaligned*>(in + 2 * in_row);
  const Quad r3 = *reinterpret_cast<const QuadUnaligned*>(in + 3 * in_row);
  const Quad low01 = __builtin_shufflevector(r0, r1, 0, 4, 1, 5);
  const Quad high01 = __builtin_shufflevector(r0, r1, 2, 6, 3, 7);
  const Quad low23 = __builtin_shufflevector(r2, r3, 0, 4, 1, 5);
  const Quad high23 = __builtin_shufflevector(r2, r3, 2, 6, 3, 7);
  *reinterpret_cast<QuadUnaligned*>(out) = __builtin_shufflevector(low01, low23, 0, 1, 4, 5);
  *reinterpret_cast<QuadUnaligned*>(out + out_row) =
      __builtin_shufflevector(low01, low23, 2, 3, 6, 7);
  *reinterpret_cast<QuadUnaligned*>(out + 2 * out_row) =
      __builtin_shufflevector(high01, high23, 0, 1, 4, 5);
  *reinterpret_cast<QuadUnaligned*>(out + 3 * out_row) =
      __builtin_shufflevector(high01, high23, 2, 3, 6, 7);
}

// How many rows of kTileCols a panel of pack_transposed has; those past `elements` hold anything.
constexpr int64_t panel_rows(int64_t elements) { return round_up(elements, 4); }

// Panels of columns: panel[key / kTileCols][element][key % kTileCols] = rows[key][element], with
// elements of 32 bits (a float, or a bfloat16 pair) and zero columns past the last key. Nothing is
// read but the `row_bytes` of each row, which may end within a pair: its other half is zero.
void pack_transposed(const void* rows, int64_t row_stride_bytes, int64_t keys, int64_t row_bytes,
                     uint32_t* panels) {
  const int64_t elements = (row_bytes + 3) / 4, padded = panel_rows(elements);
  const bool odd = row_bytes % 4 != 0 || elements < 4;  // no block of whole elements at its end
  for (int64_t key = 0; key < round_up(keys, kTileCols); key += 4) {
    uint32_t* column = panels + key / kTileCols * kTileCols * padded + key % kTileCols;
    const char* in = static_cast<const char*>(rows) + key * row_stride_bytes;
    int64_t stride = row_stride_bytes;
    uint32_t copy[4 * kMaxDim];
    if (odd || key + 4 > keys) {  // the rows past the last key belong to somebody else
      __builtin_memset(copy, 0, 4 * padded * sizeof(uint32_t));
      for (int64_t r = 0; r < 4 && key + r < keys; ++r) {
        __builtin_memcpy(copy + r * padded, in + r * stride, row_bytes);
      }
      in = reinterpret_cast<const char*>(copy);
      stride = padded * static_cast<int64_t>(sizeof(uint32_t));
    }
    int64_t e = 0;
    for (; e + 4 <= elements; e += 4) {
      transpose_4x4(in + e * 4, stride, column + e * kTileCols, kTileCols);
    }
    if (e < elements) {  // the last block ends where the row does, over some of the one before it
      if (!odd) e = elements - 4;
      transpose_4x4(in + e * 4, stride, column + e * kTileCols, kTileCols);
    }
  }
}

// Starts loading one row of a head; harmless wherever it points.
template <typename T>
FILBERT_INLINE void prefetch_row(const T* row, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 64 / sizeof(T)) __builtin_prefetch(row + d);
}

// kLanes or fewer leading elements of p, zero past n (which may be 0 or negative).
template <typename T>
FILBERT_INLINE VecF load_upto(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : n > 0 ? load_first(p, n) : VecF{};
}

// ---- one head of one sequence
// --------------------------------------------------------------------

// Everything a task keeps in its scratch memory. T is the tensors' type, Mul the way to multiply.
template <typename T, typename Mul>
struct Head {
  using Element = typename Mul::Element;
  static constexpr bool kPairs = Mul::kSteps == 2;

  const AttnVarlenArgs& args;
  const AttnTask& task;
  int64_t head;               // the one at work
  int64_t q0, k0;             // first row of the sequence
  int64_t len_q, len_k;       // its lengths
  int64_t dim;                // D
  int64_t out_panels;         // panels of V's columns
  Element* k_panels;          // [len_k / kTileCols][panel_rows(D / kSteps)][kTileCols]
  Element* v_panels;          // [D / kTileCols][len_k / kSteps][kTileCols]
  Element* q_block;           // [kBlockRows][D / kSteps]
  float* scores;              // [kBlockRows][kKeyBlock]; turned into weights in place
  float* sums;                // [kBlockRows][D rounded up to panels]
  float row_max[kBlockRows];  // of the softmax so far
  float row_sum[kBlockRows];
  float row_grow[kBlockRows];  // what a new key block multiplies the old sums by

  static int64_t inner(int64_t n) { return (n + Mul::kSteps - 1) / Mul::kSteps; }

  static int64_t carve(int64_t bytes, char*& next) {
    next += round_up(bytes, 64);
    return bytes;
  }

  // Sizes every buffer; with `base` null it only counts.
  static int64_t layout(Head* head, char* base, int64_t len_k, int64_t dim) {
    const int64_t panels = round_up(dim, kTileCols) / kTileCols;
    char* next = base;
    char* const k_at = next;
    carve(round_up(len_k, kTileCols) * panel_rows(inner(dim)) * sizeof(Element), next);
    char* const v_at = next;
    carve(panels * kTileCols * inner(len_k) * sizeof(Element), next);
    char* const q_at = next;
    carve(kBlockRows * inner(dim) * sizeof(Element), next);
    char* const scores_at = next;
    carve(kBlockRows * kKeyBlock * sizeof(float), next);
    char* const sums_at = next;
    carve(kBlockRows * panels * kTileCols * sizeof(float), next);
    if (head) {
      head->out_panels = panels;
      head->k_panels = reinterpret_cast<Element*>(k_at);
      head->v_panels = reinterpret_cast<Element*>(v_at);
      head->q_block = reinterpret_cast<Element*>(q_at);
      head->scores = reinterpret_cast<float*>(scores_at);
      head->sums = reinterpret_cast<float*>(sums_at);
    }
    return next - base;
  }

  // Rows of one head lie a whole token apart, where no hardware prefetcher follows. The next head's
  // row is next to this one's, so each row that is packed asks for its neighbour.
  const T* q_row(int64_t row) const {
    return static_cast<const T*>(args.q) + (q0 + row) * args.q_row + head * args.q_head;
  }
  const T* k_row(int64_t key) const {
    return static_cast<const T*>(args.k) + (k0 + key) * args.k_row + head * args.k_head;
  }
  const T* v_row(int64_t key) const {
    return static_cast<const T*>(args.v) + (k0 + key) * args.v_row + head * args.v_head;
  }

  void pack_keys() {
    for (int64_t key = 0; key < len_k; ++key) prefetch_row(k_row(key) + args.k_head, dim);
    if constexpr (kPairs || sizeof(T) == 4) {
      // Rows already hold 32-bit elements: floats, or pairs side by side.
      pack_transposed(k_row(0), args.k_row * sizeof(T), len_k, dim * sizeof(T),
                      reinterpret_cast<uint32_t*>(k_panels));
    } else {
      // Widen a panel's rows first; the score buffer is still free (kTileCols x D fits it).
      for (int64_t first = 0; first < len_k; first += kTileCols) {
        const int64_t here = len_k - first < kTileCols ? len_k - first : kTileCols;
        for (int64_t key = 0; key < here; ++key) {
          const T* row = k_row(first + key);
          for (int64_t d = 0; d < dim; d += kLanes)
            store(scores + key * kMaxDim + d, load_upto(row + d, dim - d));
        }
        pack_transposed(scores, kMaxDim * sizeof(float), here, dim * sizeof(float),
                        reinterpret_cast<uint32_t*>(k_panels + first * panel_rows(dim)));
      }
    }
  }

  void pack_values() {
    const int64_t steps = inner(len_k);
    for (int64_t key = 0; key < len_k; ++key) prefetch_row(v_row(key) + args.v_head, dim);
    for (int64_t p = 0; p < out_panels; ++p) {
      Element* panel = v_panels + p * steps * kTileCols;
      for (int64_t s = 0; s < steps; ++s) {
        for (int64_t j = 0; j < kTileCols; j += kLanes) {
          const int64_t d = p * kTileCols + j;
          Element* to = panel + s * kTileCols + j;
          if constexpr (kPairs) {
            const VecF even = load_upto(v_row(2 * s) + d, dim - d);
            const VecF odd = 2 * s + 1 < len_k ? load_upto(v_row(2 * s + 1) + d, dim - d) : VecF{};
            *reinterpret_cast<VecUUnaligned*>(to) = (VecU)odd | ((VecU)even >> 16);
          } else {
            store(to, load_upto(v_row(s) + d, dim - d));
          }
        }
      }
    }
  }

  void load_queries(int64_t first, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = q_row(first + r);
      prefetch_row(row + args.q_head, dim);
      Element* to = q_block + r * inner(dim);
      if constexpr (kPairs) {
        to[inner(dim) - 1] = 0;  // the half that an odd row lacks
        __builtin_memcpy(to, row, dim * sizeof(T));
      } else {
        int64_t d = 0;
        for (; d + kLanes <= dim; d += kLanes) store(to + d, load(row + d));
        for (; d < dim; ++d) to[d] = to_float(row[d]);
      }
    }
  }

  // scores[r][0, keys) = scores * scale + every bias, for the features that plain attention lacks.
  void add_biases(int64_t first_row, int64_t rows, int64_t first_key, int64_t keys) {
    const float slope = args.alibi_slopes ? args.alibi_slopes[head] : 0.0f;
    for (int64_t r = 0; r < rows; ++r) {
      float* row = scores + r * kKeyBlock;
      const int64_t place =
          first_row + r + len_k - len_q;  // where this query stands among the keys
      for (int64_t j = 0; j < keys; ++j) {
        const int64_t distance = first_key + j - place;
        float s = row[j] * args.scale;
        if (args.alibi_slopes) s -= slope * static_cast<float>(distance < 0 ? -distance : distance);
        if (args.key_bias) s += args.key_bias[k0 + first_key + j];
        const bool hidden = (args.window_left >= 0 && distance < -args.window_left) ||
                            (args.window_right >= 0 && distance > args.window_right);
        row[j] = hidden ? kMinusInf : s;
      }
    }
  }

  // Scores of a key block become weights; row_max, row_sum and row_grow move on. `scale` is what
  // the scores still have to be multiplied by, positive. The maximum is taken and subtracted before
  // that: the largest score's exponent is then exactly 0, however large the scores are.
  void softmax(int64_t rows, int64_t keys, float scale, bool first_block) {
    const int64_t whole = keys - keys % kLanes;
    const VecI tail = lane_index() < static_cast<int32_t>(keys - whole);
    for (int64_t r = 0; r < rows; ++r) {
      float* row = scores + r * kKeyBlock;
      if (whole < keys) {  // columns past the last key must not count
        const VecF s = load(row + whole);
        store(row + whole, tail ? s : broadcast(kMinusInf));
      }
      VecF top = broadcast(kMinusInf);
      for (int64_t j = 0; j < keys; j += kLanes) top = max(load(row + j), top);
      float row_top = reduce_max(top);
      const float before = first_block ? kMinusInf : row_max[r];
      if (before > row_top) row_top = before;
      // A row that has seen no key yet has nothing to subtract (-inf - -inf is NaN).
      const float shift = row_top == kMinusInf ? 0.0f : row_top;
      VecF total = {};
      for (int64_t j = 0; j < keys; j += kLanes) {
        const VecF weight = exp_nonpositive((load(row + j) - shift) * scale);
        total += weight;
        if constexpr (kPairs) {
          store(reinterpret_cast<bf16*>(row) + j, weight);  // behind what is still to be read
        } else {
          store(row + j, weight);
        }
      }
      const float sum = reduce_add(total);
      const float grow =
          first_block ? 0.0f : to_scalar(exp_nonpositive(broadcast((before - shift) * scale)));
      row_grow[r] = grow;
      row_sum[r] = first_block ? sum : row_sum[r] * grow + sum;
      row_max[r] = row_top;
    }
  }

  static FILBERT_INLINE float to_scalar(VecF v) { return v[0]; }

  void write_result(int64_t first, int64_t rows, float scale) {
    const int64_t width = out_panels * kTileCols;
    for (int64_t r = 0; r < rows; ++r) {
      T* out = static_cast<T*>(args.out) + (q0 + first + r) * args.out_row + head * args.out_head;
      const float* sum = sums + r * width;
      const bool seen = row_sum[r] != 0.0f;
      const float share = seen ? 1.0f / row_sum[r] : 0.0f;
      int64_t d = 0;
      for (; d + kLanes <= dim; d += kLanes) store(out + d, load(sum + d) * share);
      if (d < dim) store_first(out + d, load(sum + d) * share, dim - d);
      // The logarithm is one scalar per row: exactness is worth more than speed here.
      args.lse[head * args.rows_q + q0 + first + r] =
          seen ? __builtin_logf(row_sum[r]) + row_max[r] * scale : kMinusInf;
    }
  }

  void run() {
    const bool plain = !args.alibi_slopes && !args.key_bias && args.window_left < 0 &&
                       args.window_right < 0 && args.scale > 0.0f;
    const float scale = plain ? args.scale : 1.0f;  // add_biases has applied it otherwise
    const int64_t k_rows = panel_rows(inner(dim));
    pack_keys();
    pack_values();
    for (int64_t first = task.q_begin; first < task.q_end; first += kBlockRows) {
      const int64_t rows = task.q_end - first < kBlockRows ? task.q_end - first : kBlockRows;
      load_queries(first, rows);
      for (int64_t key = 0; key < len_k; key += kKeyBlock) {
        const int64_t keys = len_k - key < kKeyBlock ? len_k - key : kKeyBlock;
        multiply<Mul>({q_block, inner(dim), rows},
                      {k_panels + key * k_rows, k_rows * kTileCols, keys}, inner(dim), scores,
                      kKeyBlock, nullptr);
        if (!plain) add_biases(first, rows, key, keys);
        softmax(rows, keys, scale, key == 0);
        multiply<Mul>({reinterpret_cast<const Element*>(scores), kKeyBlock, rows},
                      {v_panels + inner(key) * kTileCols, inner(len_k) * kTileCols, dim},
                      inner(keys), sums, out_panels * kTileCols, key == 0 ? nullptr : row_grow);
      }
      write_result(first, rows, scale);
    }
  }
};

template <typename T, typename Mul>
void run_task(const AttnVarlenArgs& args, const AttnTask& task, void* scratch) {
  const int64_t q0 = args.cu_q[task.sequence], k0 = args.cu_k[task.sequence];
  const int64_t len_q = args.cu_q[task.sequence + 1] - q0,
                len_k = args.cu_k[task.sequence + 1] - k0;
  Head<T, Mul> work{args,    task,    0,       q0,      k0,      len_q, len_k, args.dim, 0,
                    nullptr, nullptr, nullptr, nullptr, nullptr, {},    {},    {}};
  Head<T, Mul>::layout(&work, static_cast<char*>(scratch), len_k, args.dim);
  for (work.head = task.head_begin; work.head < task.head_end; ++work.head) work.run();
}

#if FILBERT_BF16_PAIRS
using Bf16Mul = Pair;
#else
using Bf16Mul = Single;
#endif

static_assert(kTileCols * kMaxDim <= kBlockRows * kKeyBlock, "pack_keys borrows the score buffer");
static_assert(kKeyBlock % kTileCols == 0, "key blocks are whole panels");

int64_t scratch_bytes(const AttnVarlenArgs& args, int64_t longest_k) {
  if (args.dtype == DType::kFloat32)
    return Head<float, Single>::layout(nullptr, nullptr, longest_k, args.dim);
  return Head<bf16, Bf16Mul>::layout(nullptr, nullptr, longest_k, args.dim);
}

void run_any_task(const AttnVarlenArgs& args, const AttnTask& task, void* scratch) {
  args.dtype == DType::kFloat32 ? run_task<float, Single>(args, task, scratch)
                                : run_task<bf16, Bf16Mul>(args, task, scratch);
}

}  // namespace

const AttnVarlenKernel attn_varlen = {scratch_bytes, run_any_task};

}  // namespace FILBERT_ISA
}  // namespace filbert
