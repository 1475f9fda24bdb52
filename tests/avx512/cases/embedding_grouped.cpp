// Rows of tables of codes: one, two and three tables of 8 and 4 bits, every tail of a row.
#include "args/embedding_grouped.h"

#include <cmath>

#include "suite.h"

namespace kernel_check {
namespace {

constexpr int64_t kRows = 5, kEntries = 7;

struct Table {
  Array<int64_t> ids;
  Array<uint8_t> codes;
  Array<float> scale;
  int bits;

  Table(Random& random, int64_t width, int bits)
      : ids(kRows),
        codes(kEntries * (bits == 4 ? (width + 1) / 2 : width)),
        scale(kEntries),
        bits(bits) {
    ids.fill([&](int64_t) { return random.integer(0, kEntries - 1); });
    codes.fill([&](int64_t) { return static_cast<uint8_t>(random.word() >> 9); });
    scale.fill([&](int64_t) { return static_cast<float>(random.normal()); });
  }
  filbert::CodeTable view() const {
    return {ids.data(), codes.data(), scale.data(), kEntries, bits};
  }
};

void cases(Suite& suite) {
  for (DType dtype : kDTypes) {
    for (int64_t width = 1; width <= 70; width += width < 36 ? 1 : 11) {
      for (int bits : {4, 8}) {
        if (bits == 4 && width == 1) continue;  // one byte either way
        Random random(width);
        const Table one(random, width, bits), two(random, width, 8), three(random, width, bits);
        Floats out(dtype, kRows * width);
        for (int count = 1; count <= 3; ++count) {
          filbert::EmbeddingGroupedArgs args{};
          args.dtype = dtype;
          args.tables[0] = one.view();
          if (count > 1) args.tables[1] = two.view();
          if (count > 2) args.tables[2] = three.view();
          args.out = out.data();
          args.rows = kRows;
          args.outputs = width;
          suite.run("width " + std::to_string(width), {kernel_check::bits("out", out)},
                    [&] { filbert::embedding_grouped_cpu(args); });
        }
      }
    }
  }
}

const Cases registered("embedding_grouped", cases);

}  // namespace
}  // namespace kernel_check
