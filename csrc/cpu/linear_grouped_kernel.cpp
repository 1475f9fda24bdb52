// Rows of 8-bit codes times a weight of a few bits. Built once per instruction set.
//
//   for strip of panels                     as wide as a tile
//     for part of Way::kUnits units         unpacked once into L1, for all rows of the block
//       for tile of rows                    sums in registers, exact
//     scale, bias, activation, residual     the strip goes out
//
// Sums are integers, so their order means nothing: every way to multiply, every instruction set and
// CUDA give the same. So do the results, where no activation follows: what is done to a sum is a
// handful of IEEE operations in one order.
#include "cpu/linear_grouped_kernel.h"
#include "cpu/gemm/epilogue.h"
#include "cpu/linear_grouped/multiply.h"

namespace filbert {
namespace FILBERT_ISA {
namespace {

constexpr int64_t kApart = 64;  // bytes between copied rows, so that they share no cache set

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

#if FILBERT_VNNI || !FILBERT_BYTE_CHAINS && FILBERT_VECTOR_BYTES == 64
using FewBits = Quads;  // the emulated copy takes the way of the widest vectors
using EightBits = Quads;
#elif FILBERT_BYTE_CHAINS
using FewBits = Chains;
using EightBits = Halves;
#else
using FewBits = Halves;
using EightBits = Halves;
#endif

// One function for each height, never inlined: inlined into a switch the sums are kept in memory.
template <typename Way, int kStep, int kTileRows, int kTilePanels, bool kScaled>
__attribute__((noinline)) void fixed_tile(const uint8_t* a, int64_t a_row, const Part& part,
                                          int32_t* sums) {
  Way::template tile<kStep, kTileRows, kTilePanels, kScaled>(a, a_row, part, sums);
}

template <typename Way, int kStep, int kTilePanels, bool kScaled>
void tile_of(int64_t height, const uint8_t* a, int64_t a_row, const Part& part, int32_t* sums) {
  switch (height) {
#define FILBERT_TILE(h)                                                      \
  case h:                                                                    \
    if constexpr (h <= Way::kRows) {                                         \
      fixed_tile<Way, kStep, h, kTilePanels, kScaled>(a, a_row, part, sums); \
    }                                                                        \
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

template <typename Way, int kBits>
struct Block {
  static constexpr int kPanels = Way::kPanels;
  // Two quads of 6 bits are a chain, eight of fewer bits are no more than one.
  static constexpr int kStep = kBits == 6 ? 2 : kQuads;

  const LinearGroupedArgs& args;
  uint8_t* numbers = nullptr;      // [panel][unit][quad]: a part of the panels
  int32_t* multipliers = nullptr;  // [panel][group][16], of that part
  int32_t* sums = nullptr;         // [row][column] of the strip
  float* scale = nullptr;          // [column]
  int32_t* totals = nullptr;       // [column]
  uint8_t* rows = nullptr;         // copied codes, or null
  int32_t* code_sums = nullptr;    // [row][group] where there are offsets, or null
  char* out = nullptr;             // where the results of the first row go
  int64_t out_row = 0, size = 0;   // bytes of a row and of an element there
  int64_t panel_end = 0;           // of the block

  static int64_t units_of(const LinearGroupedArgs& args) {
    return (args.inputs + kGroupedUnit - 1) / kGroupedUnit;
  }
  // Codes can be read where they lie if a row ends with a unit, and if rows do not share the sets
  // of the cache: strides of 2048 bytes or a multiple meet in two of 64 sets at most.
  static bool in_place(const LinearGroupedArgs& args, int64_t codes_row) {
    return Way::kCodeBytes == 1 && args.inputs % kGroupedUnit == 0 && codes_row % 2048 != 0;
  }
  static int64_t row_bytes(const LinearGroupedArgs& args) {
    return units_of(args) * kGroupedUnit * Way::kCodeBytes + kApart;
  }

  static int64_t layout(const LinearGroupedArgs& args, int64_t count, char* base, Block* block) {
    char* next = base;
    const auto carve = [&](int64_t bytes) {
      char* const at = next;
      next += round_up(bytes, 64);
      return at;
    };
    constexpr int64_t kNumbers = kPanels * Way::kUnits * kQuads * kQuadBytes * Way::kNumberBytes;
    char* const numbers_at = carve(kNumbers);
    char* const multipliers_at = carve(args.multiplier ? kPanels * Way::kUnits * kColumns * 4 : 0);
    char* const sums_at = carve(count * kPanels * kColumns * 4);
    char* const scale_at = carve(kPanels * kColumns * 4);
    char* const totals_at = carve(kPanels * kColumns * 4);
    char* const rows_at = carve(count * row_bytes(args));
    char* const code_sums_at = carve(args.offset ? count * args.groups * 4 : 0);
    if (block) {
      block->numbers = reinterpret_cast<uint8_t*>(numbers_at);
      block->multipliers = reinterpret_cast<int32_t*>(multipliers_at);
      block->sums = reinterpret_cast<int32_t*>(sums_at);
      block->scale = reinterpret_cast<float*>(scale_at);
      block->totals = reinterpret_cast<int32_t*>(totals_at);
      block->rows = reinterpret_cast<uint8_t*>(rows_at);
      block->code_sums = reinterpret_cast<int32_t*>(code_sums_at);
    }
    return next - base;
  }

  // Codes as the way wants them, with zeros up to a whole unit.
  void copy_codes(const QuantizedRows& from, int64_t count) const {
    const int64_t whole = units_of(args) * kGroupedUnit, bytes = row_bytes(args);
    for (int64_t r = 0; r < count; ++r) {
      const uint8_t* codes = from.codes + r * from.codes_row;
      uint8_t* to = rows + r * bytes;
      if constexpr (Way::kCodeBytes == 1) {
        __builtin_memcpy(to, codes, args.inputs);
        __builtin_memset(to + args.inputs, 0, whole - args.inputs);
      } else {
        uint16_t* halves = reinterpret_cast<uint16_t*>(to);
        const auto write = [&](int64_t quad, const uint8_t* four) {
          halves[4 * quad] = four[0];
          halves[4 * quad + 1] = four[2];
          halves[4 * quad + 2] = four[1];
          halves[4 * quad + 3] = four[3];
        };
        int64_t k = 0;
        for (; k + 4 <= args.inputs; k += 4) write(k / 4, codes + k);
        for (; k < whole; k += 4) {
          uint8_t last[4] = {};
          for (int64_t i = k; i < args.inputs && i < k + 4; ++i) last[i - k] = codes[i];
          write(k / 4, last);
        }
      }
    }
  }

  void sum_codes(const QuantizedRows& from, int64_t count) const {
    const int64_t size = args.inputs / args.groups;
    for (int64_t r = 0; r < count; ++r) {
      const uint8_t* codes = from.codes + r * from.codes_row;
      for (int64_t g = 0; g < args.groups; ++g) {
        int32_t sum = 0;
        for (int64_t k = g * size; k < (g + 1) * size; ++k) sum += codes[k];
        code_sums[r * args.groups + g] = sum;
      }
    }
  }

  // The sums of `count` rows with kTilePanels panels from `panel` on.
  template <int kTilePanels, bool kScaled>
  void multiply(const uint8_t* a, int64_t a_row, int64_t count, int64_t panel) const {
    constexpr int64_t kUnitBytes = kBits * kGroupedUnitBytes;
    const int64_t units = units_of(args), tiles = (count + Way::kRows - 1) / Way::kRows;
    __builtin_memset(sums, 0, count * kTilePanels * kColumns * sizeof(int32_t));
    Part part{};
    part.numbers = numbers;
    part.panel_bytes = Way::kUnits * kQuads * kQuadBytes * Way::kNumberBytes;
    part.multipliers = multipliers;
    part.multiplier_panel = Way::kUnits * kColumns;
    part.chain_quads = 128 >> kBits;
    for (int64_t first = 0; first < units; first += Way::kUnits) {
      part.units = units - first < Way::kUnits ? units - first : Way::kUnits;
      part.group_units = kScaled ? units / args.groups : part.units;
      bool folded = false;
      if constexpr (kScaled) {
        uint8_t largest = 0;
        for (int p = 0; p < kTilePanels; ++p) {
          largest = unpack_multipliers(panel, p, first, part, largest);
        }
        folded = Way::kFolds && largest <= kMostInBytes<kBits>;
      }
      for (int p = 0; p < kTilePanels; ++p) {
        const uint8_t* from = args.weight + ((panel + p) * units + first) * kUnitBytes;
        uint8_t* to = numbers + p * part.panel_bytes;
        if (folded) {
          unpack_products<kBits>(from, part.units, multipliers + p * part.multiplier_panel,
                                 part.group_units, to);
        } else {
          Way::template unpack<kBits>(from, part.units, to);
        }
      }
      if (folded) part.group_units = part.units;
      const bool last = first + part.units == units;
      // What is unpacked next: the next part of these panels, or the first one of the next.
      const int64_t next_panel = last ? panel + kTilePanels : panel;
      const int64_t next_unit = last ? 0 : first + part.units;
      const int64_t next_units = last ? units : units - next_unit;
      const bool more = next_panel < panel_end;
      const uint8_t* next = args.weight + (next_panel * units + next_unit) * kUnitBytes;
      const int64_t bytes = (next_units < Way::kUnits ? next_units : Way::kUnits) * kUnitBytes;
      part.ahead_panel = more && next_panel + kTilePanels <= panel_end ? units * kUnitBytes : 0;
      for (int64_t t = 0; t < tiles; ++t) {
        // Rows are dealt out evenly: 16 rows are 6 + 5 + 5, and not 6 + 6 + 4.
        const int64_t begin = t * count / tiles, end = (t + 1) * count / tiles;
        if (last)
          claim(out + begin * out_row + panel * kColumns * size, end - begin, out_row,
                kTilePanels * kColumns * size);
        if (more) {
          look_ahead<kTilePanels>(part, next + t * bytes / tiles, bytes / tiles,
                                  Way::turns(part.units, end - begin));
        } else {
          part.ahead = numbers, part.ahead_turn = 0;
        }
        const uint8_t* codes = a + begin * a_row + first * kGroupedUnit * Way::kCodeBytes;
        int32_t* to = sums + begin * kTilePanels * kColumns;
        if (folded) {
          tile_of<Way, kStep, kTilePanels, false>(end - begin, codes, a_row, part, to);
        } else {
          tile_of<Way, kStep, kTilePanels, kScaled>(end - begin, codes, a_row, part, to);
        }
      }
    }
  }

  // Lets a tile of so many turns ask for `bytes` from `from` on. Lines that its turns would leap
  // over are asked for here.
  template <int kTilePanels>
  static FILBERT_INLINE void look_ahead(Part& part, const uint8_t* from, int64_t bytes,
                                        int64_t turns) {
    part.ahead = from;
    part.ahead_turn = turns ? (bytes + turns - 1) / turns : bytes;
    for (int64_t leapt = turns ? 64 : 0; leapt < part.ahead_turn; leapt += 64) {
      for (int p = 0; p < kTilePanels; ++p) {
        for (int64_t i = 0; i < (turns ? turns : 1); ++i) {
          __builtin_prefetch(from + p * part.ahead_panel + i * part.ahead_turn + leapt, 0, 2);
        }
      }
    }
  }

  // Asks for the lines of the result that are about to be written: while sums are made they come,
  // to be owned, from wherever they were.
  static FILBERT_INLINE void claim(const char* rows, int64_t count, int64_t row, int64_t bytes) {
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(rows + r * row + at, 1, 3);
    }
  }

  // Those of a part of a panel. Gives the largest of them and of `largest`.
  uint8_t unpack_multipliers(int64_t panel, int p, int64_t first_unit, const Part& part,
                             uint8_t largest) const {
    const int64_t first = first_unit / part.group_units;
    const uint8_t* from = args.multiplier + ((panel + p) * args.groups + first) * kColumns;
    int32_t* to = multipliers + p * part.multiplier_panel;
    const int64_t count = part.units / part.group_units * kColumns;
    for (int64_t i = 0; i < count; ++i) {
      to[i] = from[i] * Way::kOne;
      largest = from[i] > largest ? from[i] : largest;
    }
    return largest;
  }

  // Scale and total of the strip's outputs; 0 for those that are not there.
  void load_columns(int64_t column, int64_t columns) const {
    for (int64_t j = 0; j < kPanels * kColumns; ++j) {
      scale[j] = j < columns ? args.scale[column + j] : 0.0f;
      totals[j] = j < columns ? args.totals[column + j] : 0;
    }
  }

  template <typename T, typename Out>
  void run(const GroupedBlock& block, Out* out) {
    const int64_t count = block.row_end - block.row_begin;
    const uint8_t* a = block.codes.codes;
    int64_t a_row = block.codes.codes_row;
    if (!in_place(args, a_row)) {
      copy_codes(block.codes, count);
      a = rows;
      a_row = row_bytes(args);
    }
    if (args.offset) sum_codes(block.codes, count);
    this->out = reinterpret_cast<char*>(out);
    panel_end = block.panel_end;
    size = sizeof(Out);
    out_row = args.outputs * size;
    const T* residual = static_cast<const T*>(args.norm_weight ? nullptr : args.residual);
    const Epilogue<float, T, Out> finish{
        args.bias,         residual ? residual + block.row_begin * args.residual_row : nullptr,
        args.residual_row, out,
        args.outputs,      args.activation};
    for (int64_t panel = block.panel_begin; panel < block.panel_end;) {
      int taken = 1;
      if (kPanels == 1 || panel + 1 == block.panel_end) {
        args.multiplier ? multiply<1, true>(a, a_row, count, panel)
                        : multiply<1, false>(a, a_row, count, panel);
      } else {
        taken = kPanels;
        args.multiplier ? multiply<kPanels, true>(a, a_row, count, panel)
                        : multiply<kPanels, false>(a, a_row, count, panel);
      }
      const int64_t column = panel * kColumns, left = args.outputs - column;
      const int64_t columns = left < taken * kColumns ? left : taken * kColumns;
      load_columns(column, columns);
      finish(count, column, columns, [&](int64_t r) {
        return [this, &block, r, panel, own = sums + r * taken * kColumns,
                by = block.codes.scale[r], zero = block.codes.zero[r]](int64_t j) {
          VecI sum = load(own + j) - zero * load(totals + j);
          if (args.offset) sum -= offsets_of(panel, j, r);
          const VecF value = __builtin_convertvector(sum, VecF) * by;
          return rounded(rounded(value) * load(scale + j));
        };
      });
      panel += taken;
    }
  }

  // What the offsets of the weight take from the sums of row r.
  FILBERT_INLINE VecI offsets_of(int64_t panel, int64_t j, int64_t r) const {
    const int32_t* offset = args.offset + (panel + j / kColumns) * args.groups * kColumns;
    VecI sum = {};
    for (int64_t g = 0; g < args.groups; ++g) {
      sum += load(offset + g * kColumns + j % kColumns) * code_sums[r * args.groups + g];
    }
    return sum;
  }
};

// Calls body(Block{}) for the number of bits of a call.
template <typename Body>
FILBERT_INLINE auto with_bits(const LinearGroupedArgs& args, Body body) {
  switch (args.bits) {
    case 2:
      return body(Block<FewBits, 2>{args});
    case 3:
      return body(Block<FewBits, 3>{args});
    case 4:
      return body(Block<FewBits, 4>{args});
    case 6:
      return body(Block<FewBits, 6>{args});
    default:
      return body(Block<EightBits, 8>{args});
  }
}

int64_t scratch_bytes(const LinearGroupedArgs& args, int64_t rows) {
  return with_bits(
      args, [&](auto block) { return decltype(block)::layout(args, rows, nullptr, nullptr); });
}

void run_block(const LinearGroupedArgs& args, const GroupedBlock& of, void* scratch) {
  with_bits(args, [&](auto block) {
    decltype(block)::layout(args, of.row_end - of.row_begin, static_cast<char*>(scratch), &block);
    const int64_t first = of.row_begin * args.outputs;
    if (args.dtype == DType::kFloat32) {
      float* out = of.wide ? of.wide : static_cast<float*>(args.out) + first;
      block.template run<float>(of, out);
    } else if (of.wide) {
      block.template run<bf16>(of, of.wide);
    } else {
      block.template run<bf16>(of, static_cast<bf16*>(args.out) + first);
    }
  });
}

}  // namespace

const LinearGroupedKernel linear_grouped = {FewBits::kRows, scratch_bytes, run_block};

}  // namespace FILBERT_ISA
}  // namespace filbert
