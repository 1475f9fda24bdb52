// The lower plane of two, where it has few ones: the places of exact zeros in rows of signs (code 1
// of 0, 1, 2), which rows of floats nearly never have. Words that are not 0 are listed once for all
// outputs of a task, and only these are counted.
#pragma once

#include "cpu/linear_binary/block.h"

namespace filbert {
namespace FILBERT_ISA {
namespace {

struct SparsePlane {
  uint16_t* words;  // [kBinaryRows][W]: which words of a row are not 0
  int32_t* counts;  // [kBinaryRows]: how many
  int64_t row_words;
  bool used;

  // Whatever the codes mean, results are the same; two planes are where it may be worth a look.
  static bool wanted(const LinearBinaryArgs& args) { return args.planes == 2; }
  static int64_t bytes(const LinearBinaryArgs& args) {
    const int64_t all = kBinaryRows * (args.row_words * 2 + 4);
    return wanted(args) ? (all + 63) / 64 * 64 : 0;
  }

  SparsePlane(const Block& block, char* memory)
      : words(reinterpret_cast<uint16_t*>(memory + kBinaryRows * 4)),
        counts(reinterpret_cast<int32_t*>(memory)),
        row_words(block.args.row_words),
        used(wanted(block.args)) {
    for (int64_t r = 0; used && r < block.rows; ++r) {
      const uint32_t* row = block.row(r, 0);
      uint16_t* list = words + r * row_words;
      int32_t count = 0;
      for (int64_t w = 0; w < row_words; ++w) {
        list[count] = static_cast<uint16_t>(w);  // overwritten, if this word is 0
        count += row[w] != 0;
      }
      counts[r] = count;
    }
  }

  // Whether to count the words of these rows one by one, which costs two or three times as much for
  // each as a tile of rows.
  bool few(int64_t first, int64_t rows, int plane) const {
    if (!used || plane != 0) return false;
    int64_t all = 0;
    for (int64_t r = first; r < first + rows; ++r) all += counts[r];
    return 3 * all <= rows * row_words;
  }

  // counts_out = 2 * counts_out + the plane's counts.
  void add(const Block& block, int64_t first, int64_t rows, int32_t* counts_out) const {
    const uint32_t* weight[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const int lane = v * kLanes;
      weight[v] = block.tile(lane / kTileOutputs) + lane % kTileOutputs;
    }
    for (int64_t r = first; r < first + rows; ++r) {
      const uint32_t* row = block.row(r, 0);
      const uint16_t* list = words + r * row_words;
      int32_t* to = counts_out + r * kColumns;
      for (int v = 0; v < kVectors; ++v) {
        VecI sum = 2 * load(to + v * kLanes);
        for (int32_t i = 0; i < counts[r]; ++i) {
          sum += popcount(broadcast(row[list[i]]) & load(weight[v] + list[i] * kTileWords));
        }
        store(to + v * kLanes, sum);
      }
    }
  }
};

}  // namespace
}  // namespace FILBERT_ISA
}  // namespace filbert
