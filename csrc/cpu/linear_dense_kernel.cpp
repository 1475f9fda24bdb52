// Rows times a packed weight, with what follows the product. Built once per instruction set.
//
// A block of rows goes over all its panels before the next one. For each strip of panels the block
// of inner steps is the outer loop and the row tiles the inner one, so that a part of a panel is
// used by every tile while it lies near:
//
//   for strip of kGemmPanels panels          weights come once for each block of rows
//     for block of kBlockSteps inner steps   16 bit weights are widened here, into L1
//       for tile of kGemmRows rows           sums in registers, added to the strip in L1
//     bias, activation, residual             the strip goes out
//
// The contract: a sum has one order. Inner steps go in blocks of kBlockSteps from the first; within
// a block they are one chain, and blocks are added in their order. So a row's result is bitwise the
// same for any number of rows, at any place, in any tile, and however the work is dealt out.
#include "cpu/linear_dense_kernel.h"
#include "cpu/gemm/epilogue.h"
#include "cpu/gemm/shape.h"
#include "cpu/gemm/tile.h"
#include "cpu/simd/half.h"
#include "cpu/simd/simd.h"

namespace filbert {
namespace FILBERT_ISA {
namespace {

using Tile = PanelShape<kGemmPanels, kPanelVectors, kPanelCols>;
using OnePanel = PanelShape<1, kPanelVectors, kPanelCols>;
using OneRow = PanelShape<kOneRowPanels, kPanelVectors, kPanelCols>;

constexpr int64_t kApart = 16;  // elements between copied rows, so that they share no cache set

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// ---- weights: how panels of each dtype become the elements of a step

// float32, used where it lies.
struct Float32Weight {
  using Step = Single;
  using Stored = float;
  static constexpr bool kInPlace = true;
};

// 16 bits, widened to float32.
struct Float16Weight {
  using Step = Single;
  using Stored = uint16_t;
  static constexpr bool kInPlace = false;
  static FILBERT_INLINE void widen(const Stored* from, int64_t first, int64_t steps, float* to) {
    from += first * kPanelCols;
    for (int64_t i = 0; i < steps * kPanelCols; i += kLanes) store(to + i, load_half(from + i));
  }
};

// Pairs of inner steps side by side: the even step is the low half of 32 bits.
struct BFloat16Weight {
  using Step = Single;
  using Stored = uint32_t;
  static constexpr bool kInPlace = false;
  static FILBERT_INLINE void widen(const Stored* from, int64_t first, int64_t steps, float* to) {
    from += first / 2 * kPanelCols;  // blocks begin at even steps
    for (int64_t i = 0; i < steps; i += 2) {
      for (int v = 0; v < kPanelVectors; ++v) {
        const VecU pair = *reinterpret_cast<const VecUUnaligned*>(from + v * kLanes);
        store(to + v * kLanes, (VecF)(pair << 16));
        store(to + kPanelCols + v * kLanes, (VecF)(pair & 0xffff0000u));
      }
      from += kPanelCols;
      to += 2 * kPanelCols;
    }
  }
};

#if FILBERT_BF16_PAIRS
// The same, multiplied as pairs.
struct PairWeight {
  using Step = Pair;
  using Stored = uint32_t;
  static constexpr bool kInPlace = true;
};
#endif

// ---- tiles

// One function for each height, never inlined: inlined into a switch the sums are kept in memory.
template <typename Step, int kRows, typename Shape, Into kInto>
__attribute__((noinline)) void fixed_tile(const typename Step::Element* a, int64_t a_row,
                                          const typename Step::Element* b, int64_t panel,
                                          int64_t inner, float* c, int64_t c_row, Ahead ahead) {
  multiply_tile<Step, kRows, Shape, kInto, kGemmUnrolled, true>(a, a_row, b, panel, inner, c, c_row,
                                                                nullptr, ahead);
}

template <typename Step, typename Shape, Into kInto>
void tile_of(int64_t height, const typename Step::Element* a, int64_t a_row,
             const typename Step::Element* b, int64_t panel, int64_t inner, float* c, int64_t c_row,
             Ahead ahead) {
  switch (height) {
#define FILBERT_TILE(h)                                                              \
  case h:                                                                            \
    if constexpr (h <= kGemmRows && (h == 1 || Shape::kPanels <= kGemmPanels)) {     \
      fixed_tile<Step, h, Shape, kInto>(a, a_row, b, panel, inner, c, c_row, ahead); \
    }                                                                                \
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

// ---- a block of rows and panels

template <typename T, typename Weight>
struct Block {
  using Step = typename Weight::Step;
  using Element = typename Step::Element;
  using Stored = typename Weight::Stored;
  static constexpr int64_t kStep = Step::kSteps;
  // Inner steps that one stored element holds: bfloat16 lies in pairs.
  static constexpr int64_t kPerStored = __is_same(Stored, uint32_t) ? 2 : 1;

  const LinearDenseArgs& args;
  Element* rows;   // copied rows, or null
  float* widened;  // a block of steps of the strip's panels
  float* strip;
  int64_t stored;         // elements of a panel of the weight
  int64_t row_begin = 0;  // of the block

  static int64_t steps_of(int64_t inner) { return (inner + kStep - 1) / kStep; }
  static int64_t stored_panel(const LinearDenseArgs& args) {
    return (args.weight_inputs + kPerStored - 1) / kPerStored * kPanelCols;
  }

  // Rows can be read where they lie, if they hold the elements of a step and do not share the sets
  // of the cache: strides of 2048 bytes or a multiple meet in two of 64 sets at most.
  static bool in_place(const LinearDenseArgs& args) {
    if (sizeof(T) != 4 || kStep != 1) return false;
    return args.x_row * static_cast<int64_t>(sizeof(T)) % 2048 != 0;
  }

  static int64_t row_stride(const LinearDenseArgs& args) { return steps_of(args.inputs) + kApart; }

  static int64_t layout(const LinearDenseArgs& args, int64_t count, char* base, Block* block) {
    char* next = base;
    const auto carve = [&](int64_t bytes) {
      char* const at = next;
      next += round_up(bytes, 64);
      return at;
    };
    char* const strip_at = carve(count * kOneRowPanels * kPanelCols * sizeof(float));
    char* const widened_at =
        carve(Weight::kInPlace ? 0 : kBlockSteps * kOneRowPanels * kPanelCols * sizeof(float));
    char* const rows_at = carve(
        in_place(args) ? 0 : count * row_stride(args) * static_cast<int64_t>(sizeof(Element)));
    if (block) {
      block->strip = reinterpret_cast<float*>(strip_at);
      block->widened = reinterpret_cast<float*>(widened_at);
      block->rows = in_place(args) ? nullptr : reinterpret_cast<Element*>(rows_at);
    }
    return next - base;
  }

  // Copies rows as elements of a step; the half of a last pair that is missing becomes 0.
  void copy_rows(int64_t begin, int64_t end) {
    const int64_t stride = row_stride(args), inputs = args.inputs;
    for (int64_t r = begin; r < end; ++r) {
      const T* from = static_cast<const T*>(args.x) + r * args.x_row;
      Element* to = rows + (r - begin) * stride;
      if constexpr (kStep == 2) {
        if (inputs % 2) to[inputs / 2] = 0;
        __builtin_memcpy(to, from, inputs * sizeof(T));
      } else {
        int64_t i = 0;
        for (; i + kLanes <= inputs; i += kLanes) store(to + i, load(from + i));
        for (; i < inputs; ++i) to[i] = to_float(from[i]);
      }
    }
  }

  // How tile t of `tiles` asks for its share of the next block of steps in `turns` turns. Lines
  // that its turns would leap over are asked for here.
  template <int kPanels>
  static FILBERT_INLINE Ahead ahead_of(const Stored* next, int64_t stored, int64_t t, int64_t tiles,
                                       int64_t turns) {
    constexpr int64_t kBytes = kBlockSteps / kPerStored * kPanelCols * sizeof(Stored);
    const char* at = reinterpret_cast<const char*>(next) + t * kBytes / tiles;
    const int64_t panel = stored * sizeof(Stored), turn = (kBytes / tiles + turns - 1) / turns;
    for (int64_t leapt = 64; leapt < turn; leapt += 64) {
      for (int p = 0; p < kPanels; ++p) {
        for (int64_t i = 0; i < turns; ++i) {
          __builtin_prefetch(at + p * panel + i * turn + leapt, 0, 2);
        }
      }
    }
    return {at, panel, turn};
  }

  // Asks for the lines of the result that rows [begin, end) are about to be written to: while sums
  // are made they come, to be owned, from wherever they were.
  FILBERT_INLINE void claim(int64_t begin, int64_t end, int64_t panel, int64_t panels) const {
    const int64_t bytes = panels * kPanelCols * static_cast<int64_t>(sizeof(T));
    for (int64_t r = begin; r < end; ++r) {
      const T* out = static_cast<const T*>(args.out) + r * args.outputs + panel * kPanelCols;
      for (int64_t at = 0; at < bytes; at += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(out) + at, 1, 3);
      }
    }
  }

  // What a block of inner steps, `first` and those after it, gives rows [0, count) with panels from
  // `panel` on: the sums, or added to them. a: of the block. next: the part of the weight that is
  // asked for meanwhile, or null.
  template <typename Shape>
  void multiply_steps(const Element* a, int64_t a_row, int64_t count, int64_t panel, int64_t first,
                      Into into, float* sums, const Stored* next, bool last) const {
    constexpr int64_t kCols = Shape::kPanels * kPanelCols;
    const int64_t tiles = (count + kGemmRows - 1) / kGemmRows;
    const int64_t left = args.inputs - first;
    const int64_t inner = left < kBlockSteps ? left : kBlockSteps, steps = steps_of(inner);
    const Stored* at = static_cast<const Stored*>(args.weight) + panel * stored;
    const Element* b;
    int64_t b_panel;
    if constexpr (Weight::kInPlace) {
      b = reinterpret_cast<const Element*>(at) + first / kStep * kPanelCols;
      b_panel = stored;
    } else {
      b_panel = kBlockSteps * kPanelCols;
      for (int p = 0; p < Shape::kPanels; ++p) {
        Weight::widen(at + p * stored, first, inner, widened + p * b_panel);
      }
      b = widened;
    }
    const int64_t turns = (steps + kGemmUnrolled - 1) / kGemmUnrolled;
    for (int64_t t = 0; t < tiles; ++t) {
      const Ahead ahead = next ? ahead_of<Shape::kPanels>(next, stored, t, tiles, turns)
                               : Ahead{reinterpret_cast<const char*>(b), 0, 0};
      // Rows are dealt out evenly: 16 rows are 6 + 5 + 5, and not 6 + 6 + 4.
      const int64_t begin = t * count / tiles, end = (t + 1) * count / tiles;
      if (last) claim(row_begin + begin, row_begin + end, panel, Shape::kPanels);
      const Element* a_tile = a + begin * a_row;
      float* c = sums + begin * kCols;
      if (into == Into::kSet) {
        tile_of<Step, Shape, Into::kSet>(end - begin, a_tile, a_row, b, b_panel, steps, c, kCols,
                                         ahead);
      } else {
        tile_of<Step, Shape, Into::kAdd>(end - begin, a_tile, a_row, b, b_panel, steps, c, kCols,
                                         ahead);
      }
    }
  }

  // The sums of rows [0, count) with panels from `panel` on, into the strip.
  template <typename Shape>
  void multiply(const Element* a, int64_t a_row, int64_t count, int64_t panel, int64_t panels_end) {
    const Stored* at = static_cast<const Stored*>(args.weight) + panel * stored;
    if (args.inputs == 0) {
      __builtin_memset(strip, 0, count * Shape::kPanels * kPanelCols * sizeof(float));
    }
    for (int64_t first = 0; first < args.inputs; first += kBlockSteps) {
      // What comes next is fetched while this is multiplied: a panel is one stream of memory, but
      // hardware prefetchers stop at every page of it, and between panels.
      const bool last = first + kBlockSteps >= args.inputs;
      const Stored* next =
          at + (last ? Shape::kPanels * stored : (first + kBlockSteps) / kPerStored * kPanelCols);
      if (last && panel + Shape::kPanels >= panels_end) next = nullptr;
      multiply_steps<Shape>(a + first / kStep, a_row, count, panel, first,
                            first == 0 ? Into::kSet : Into::kAdd, strip, next, last);
    }
  }

  // Rows as elements of a step, where they lie or copied.
  const Element* rows_from(int64_t begin, int64_t end, int64_t& stride) {
    if (!rows) {
      stride = args.x_row;
      return reinterpret_cast<const Element*>(args.x) + begin * args.x_row;
    }
    copy_rows(begin, end);
    stride = row_stride(args);
    return rows;
  }

  // Adds the products of one block of inner steps, which are all that the rows have, to sums that
  // stay between calls: [strip of panels][row][output].
  void add(int64_t count, Into into, float* sums) {
    const int64_t panels = (args.outputs + kPanelCols - 1) / kPanelCols;
    int64_t a_row;
    const Element* a = rows_from(0, count, a_row);
    for (int64_t panel = 0; panel < panels;) {
      const int64_t taken = panel + kGemmPanels <= panels ? kGemmPanels : 1;
      float* const to = sums + panel * kPanelCols * count;
      const Stored* next = panel + taken >= panels
                               ? nullptr
                               : static_cast<const Stored*>(args.weight) + (panel + taken) * stored;
      if (taken == kGemmPanels) {
        multiply_steps<Tile>(a, a_row, count, panel, 0, into, to, next, false);
      } else {
        multiply_steps<OnePanel>(a, a_row, count, panel, 0, into, to, next, false);
      }
      panel += taken;
    }
  }

  // Such sums to rows of results.
  void store_sums(int64_t count, const float* sums) const {
    const int64_t panels = (args.outputs + kPanelCols - 1) / kPanelCols;
    const T* residual = static_cast<const T*>(args.norm_weight ? nullptr : args.residual);
    const Epilogue<T, T, T> finish{
        static_cast<const T*>(args.bias), residual,     args.residual_row,
        static_cast<T*>(args.out),        args.outputs, args.activation};
    for (int64_t panel = 0; panel < panels;) {
      const int64_t taken = panel + kGemmPanels <= panels ? kGemmPanels : 1;
      const int64_t column = panel * kPanelCols, left = args.outputs - column;
      const int64_t columns = left < taken * kPanelCols ? left : taken * kPanelCols;
      finish(count, column, columns, [&](int64_t r) {
        return [own = sums + column * count + r * taken * kPanelCols](int64_t j) {
          return load(own + j);
        };
      });
      panel += taken;
    }
  }

  void run(int64_t first_row, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
    row_begin = first_row;
    const int64_t count = row_end - row_begin;
    int64_t a_row;
    const Element* a = rows_from(row_begin, row_end, a_row);
    const T* residual = static_cast<const T*>(args.norm_weight ? nullptr : args.residual);
    const Epilogue<T, T, T> finish{static_cast<const T*>(args.bias),
                                   residual ? residual + row_begin * args.residual_row : nullptr,
                                   args.residual_row,
                                   static_cast<T*>(args.out) + row_begin * args.outputs,
                                   args.outputs,
                                   args.activation};
    for (int64_t panel = panel_begin; panel < panel_end;) {
      int64_t taken = 1;
      if (count == 1 && panel + kOneRowPanels <= panel_end) {
        taken = kOneRowPanels;
        multiply<OneRow>(a, a_row, 1, panel, panel_end);
      } else if (panel + kGemmPanels <= panel_end) {
        taken = kGemmPanels;
        multiply<Tile>(a, a_row, count, panel, panel_end);
      } else {
        multiply<OnePanel>(a, a_row, count, panel, panel_end);
      }
      const int64_t column = panel * kPanelCols, left = args.outputs - column;
      const int64_t columns = left < taken * kPanelCols ? left : taken * kPanelCols;
      finish(count, column, columns, [&](int64_t r) {
        return [sums = strip + r * taken * kPanelCols](int64_t j) { return load(sums + j); };
      });
      panel += taken;
    }
  }
};

// Calls body(T{}, Weight{}) for the dtypes of a call.
template <typename Body>
FILBERT_INLINE auto with_types(const LinearDenseArgs& args, Body body) {
  if (args.dtype == DType::kFloat32) {
    if (args.weight_dtype == DType::kFloat16) return body(float{}, Float16Weight{});
    if (args.weight_dtype == DType::kBFloat16) return body(float{}, BFloat16Weight{});
    return body(float{}, Float32Weight{});
  }
#if FILBERT_BF16_PAIRS
  return body(bf16{}, PairWeight{});
#else
  return body(bf16{}, BFloat16Weight{});
#endif
}

int64_t block_rows(const LinearDenseArgs& args) {
  return gemm_block_rows(args.inputs * static_cast<int64_t>(sizeof(float)));
}

int64_t scratch_bytes(const LinearDenseArgs& args, int64_t rows) {
  return with_types(args, [&](auto t, auto w) {
    return Block<decltype(t), decltype(w)>::layout(args, rows, nullptr, nullptr);
  });
}

// Calls body(block) with the working memory in its place.
template <typename Body>
void with_block(const LinearDenseArgs& args, int64_t rows, void* scratch, Body body) {
  with_types(args, [&](auto t, auto w) {
    using Of = Block<decltype(t), decltype(w)>;
    Of block{args, nullptr, nullptr, nullptr, Of::stored_panel(args)};
    Of::layout(args, rows, static_cast<char*>(scratch), &block);
    body(block);
  });
}

void run_block(const LinearDenseArgs& args, int64_t row_begin, int64_t row_end, int64_t panel_begin,
               int64_t panel_end, void* scratch) {
  with_block(args, row_end - row_begin, scratch,
             [&](auto& block) { block.run(row_begin, row_end, panel_begin, panel_end); });
}

void add(const LinearDenseArgs& args, int64_t rows, bool begin, float* sums, void* scratch) {
  with_block(args, rows, scratch,
             [&](auto& block) { block.add(rows, begin ? Into::kSet : Into::kAdd, sums); });
}

void store_sums(const LinearDenseArgs& args, int64_t rows, const float* sums) {
  with_types(args, [&](auto t, auto w) {
    using Of = Block<decltype(t), decltype(w)>;
    Of{args, nullptr, nullptr, nullptr, 0}.store_sums(rows, sums);
  });
}

}  // namespace

const LinearDenseKernel linear_dense = {kGemmRows, kBlockSteps, block_rows, scratch_bytes,
                                        run_block, add,         store_sums};

}  // namespace FILBERT_ISA
}  // namespace filbert
