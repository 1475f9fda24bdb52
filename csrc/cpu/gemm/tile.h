// The register tile: C11 := A1 B1, C11 + A1 B1, or grow * C11 + A1 B1 for a few rows of A and a few
// vectors of columns of B, over any number of inner steps.
#pragma once

#include "cpu/gemm/step.h"

namespace filbert {
namespace FILBERT_ISA {
namespace {

enum class Into { kSet, kAdd, kGrow };

// Where B lies: kVectors vectors side by side in a panel that is kStride elements wide, and kPanels
// such panels, `panel` elements apart.
template <int kPanelCount, int kVectorsEach, int kStepStride>
struct PanelShape {
  static constexpr int kPanels = kPanelCount;
  static constexpr int kVectors = kVectorsEach;
  static constexpr int kStride = kStepStride;
};

// Lines that a tile asks to come to L2, one of each panel in every turn of its loop: at `at`,
// `panel` bytes apart, and `turn` bytes further the next time. Asked for all at once they would
// take every place that a core has for lines under way, and it would wait.
struct Ahead {
  const char* at;
  int64_t panel, turn;
};

// a: kRows rows of `inner` elements, a_row apart. c: kRows rows of the columns, c_row apart. With
// kGrow what c held is scaled by grow[row] first. The product is summed by itself before it is
// added, so that its rounding goes by its own size; its order is that of the inner steps, whatever
// the tile's height.
// kUnrolled steps share a turn of the loop. With kAhead a turn also asks for a line of what comes
// next.
template <typename Step, int kRows, typename Shape, Into kInto, int kUnrolled = 1,
          bool kAhead = false>
FILBERT_INLINE void multiply_tile(const typename Step::Element* a, int64_t a_row,
                                  const typename Step::Element* b, int64_t panel, int64_t inner,
                                  float* c, int64_t c_row, const float* grow, Ahead ahead = {}) {
  constexpr int kColumns = Shape::kPanels * Shape::kVectors;
  VecF sum[kRows][kColumns] = {};
  const auto add_step = [&](int64_t i) __attribute__((always_inline)) {
    typename Step::Vector step[kColumns];
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) {
      step[j] = Step::read(b + j / Shape::kVectors * panel + i * Shape::kStride +
                           j % Shape::kVectors * kLanes);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const typename Step::Vector element = Step::spread(a[r * a_row + i]);
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) {
        sum[r][j] = Step::multiply_add(element, step[j], sum[r][j]);
      }
    }
  };
  int64_t i = 0;
  for (; i + kUnrolled <= inner; i += kUnrolled) {
#pragma GCC unroll 8
    for (int u = 0; u < kUnrolled; ++u) add_step(i + u);
    if constexpr (kAhead) {
#pragma GCC unroll 8
      for (int p = 0; p < Shape::kPanels; ++p) {
        __builtin_prefetch(ahead.at + p * ahead.panel, 0, 2);
      }
      ahead.at += ahead.turn;
    }
  }
  if constexpr (kUnrolled > 1) {
    for (; i < inner; ++i) add_step(i);
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) {
      float* to = c + r * c_row + j * kLanes;
      if constexpr (kInto == Into::kAdd) {
        store(to, load(to) + sum[r][j]);
      } else if constexpr (kInto == Into::kGrow) {
        store(to, load(to) * grow[r] + sum[r][j]);
      } else {
        store(to, sum[r][j]);
      }
    }
  }
}

}  // namespace
}  // namespace FILBERT_ISA
}  // namespace filbert
