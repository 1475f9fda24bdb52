// Rows of tables of codes, summed. Built once per instruction set.
#include "cpu/embedding_grouped_kernel.h"
#include "cpu/simd/bytes.h"

namespace filbert {
namespace FILBERT_ISA {
namespace {

typedef uint8_t Bytes __attribute__((vector_size(kLanes), aligned(1), may_alias));

// kLanes bytes as numbers.
FILBERT_INLINE VecF load_codes(const uint8_t* p) {
  return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const Bytes*>(p), VecI),
                                 VecF);
}

// One row of a table.
struct Entry {
  const uint8_t* codes;
  float scale;
  bool halves;  // 4 bits

  Entry(const CodeTable& table, int64_t row, int64_t width)
      : codes(nullptr), scale(__builtin_nanf("")), halves(table.bits == 4) {
    const int64_t id = table.ids[row];
    const bool there = id >= 0 && id < table.entries;
    codes = table.codes + (there ? id : 0) * (halves ? (width + 1) / 2 : width);
    if (there) scale = table.scale[id];
  }

  float at(int64_t i) const {
    return halves ? scale * static_cast<float>((codes[i / 2] >> (i % 2 * 4) & 15) - 8)
                  : scale * static_cast<float>(codes[i] - 128);
  }
  // Numbers i and following of a whole vector.
  FILBERT_INLINE VecF vector(int64_t i) const {
    if (!halves) return (load_codes(codes + i) - 128.0f) * scale;
    uint8_t apart[kLanes];
    for (int l = 0; l < kLanes / 2; ++l) {
      const uint8_t byte = codes[i / 2 + l];
      apart[2 * l] = byte & 15;
      apart[2 * l + 1] = byte >> 4;
    }
    return (load_codes(apart) - 8.0f) * scale;
  }
};

template <typename T>
void sum_rows(const EmbeddingGroupedArgs& args, int64_t begin, int64_t end) {
  const int64_t width = args.outputs;
  for (int64_t r = begin; r < end; ++r) {
    T* out = static_cast<T*>(args.out) + r * width;
    const Entry first(args.tables[0], r, width);
    const bool two = args.tables[1].ids, three = args.tables[2].ids;
    const Entry second = two ? Entry(args.tables[1], r, width) : first;
    const Entry third = three ? Entry(args.tables[2], r, width) : first;
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
      VecF sum = rounded(first.vector(i));
      if (two) sum += rounded(second.vector(i));
      if (three) sum += rounded(third.vector(i));
      store(out + i, sum);
    }
    if (i < width) {
      float last[kLanes] = {};
      for (int64_t l = 0; l < width - i; ++l) {
        // Not in one expression: no fused multiply-add, as above.
        volatile float one = first.at(i + l);
        last[l] = one;
        if (two) one = second.at(i + l), last[l] += one;
        if (three) one = third.at(i + l), last[l] += one;
      }
      store_first(out + i, load(last), width - i);
    }
  }
}

void sum_range(const EmbeddingGroupedArgs& args, int64_t begin, int64_t end) {
  args.dtype == DType::kFloat32 ? sum_rows<float>(args, begin, end)
                                : sum_rows<bf16>(args, begin, end);
}

}  // namespace

const EmbeddingGroupedKernel embedding_grouped = {sum_range};

}  // namespace FILBERT_ISA
}  // namespace filbert
