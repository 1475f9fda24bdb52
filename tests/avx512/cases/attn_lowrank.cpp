// Attention over latents: factors of whole matrices, of groups and of single heads, each dtype of
// the factors, and lengths around every tile.
#include "args/attn_lowrank.h"

#include <deque>

#include "factor.h"
#include "suite.h"

namespace kernel_check {
namespace {

struct Side {
  int64_t rank, begin, groups;
};

struct Shape {
  DType dtype, weight;
  int64_t heads, dim;
  Side sides[3];
  std::vector<int64_t> lengths;
};

// Each head's [D, R], one after the other.
struct Heads {
  std::deque<Factor> each;
  Floats packed;

  Heads(const Shape& s, const Side& side, Random& random)
      : packed(s.weight,
               s.heads * ((s.dim + 15) / 16 * 16) * Factor::packed_steps(s.weight, side.rank)) {
    for (int64_t h = 0; h < s.heads; ++h) each.emplace_back(s.weight, s.dim, side.rank, random);
    const int64_t count = packed.count() / s.heads;
    packed.fill([&](int64_t at) { return each[at / count].packed.at(at % count); });
  }
};

void run(Suite& suite, const Shape& s) {
  Random random(s.heads * 131 + s.dim);
  int64_t rows = 0, width = 0;
  for (int64_t length : s.lengths) rows += length;
  for (const Side& side : s.sides) width = std::max(width, side.begin + side.groups * side.rank);
  const Heads factors[] = {
      {s, s.sides[0], random}, {s, s.sides[1], random}, {s, s.sides[2], random}};
  const int64_t columns = s.heads * s.dim;
  Floats latent(s.dtype, rows * width), bias(s.dtype, 3 * columns), out(s.dtype, rows * columns);
  latent.fill([&](int64_t) { return random.normal(); });
  bias.fill([&](int64_t) { return random.normal(); });
  Array<int32_t> cu(s.lengths.size() + 1);
  cu[0] = 0;
  for (size_t i = 0; i < s.lengths.size(); ++i) cu[i + 1] = cu[i] + s.lengths[i];
  filbert::AttnLowRankArgs args{};
  args.dtype = s.dtype;
  args.weight_dtype = s.weight;
  args.latent = latent.data();
  filbert::HeadFactors* const sides[] = {&args.query, &args.key, &args.value};
  for (int i = 0; i < 3; ++i) {
    *sides[i] = {factors[i].packed.data(),
                 static_cast<const char*>(bias.data()) + i * columns * filbert::size_of(s.dtype),
                 s.sides[i].begin,
                 s.sides[i].rank,
                 s.sides[i].groups,
                 s.sides[i].rank};
  }
  args.cu = cu.data();
  args.out = out.data();
  args.latent_row = width;
  args.rows = rows;
  args.sequences = s.lengths.size();
  args.heads = s.heads;
  args.dim = s.dim;
  args.scale = 0.25f;
  const std::vector<double> wide = latent.values();
  std::vector<double> made[3];  // [T, H, D]
  for (int i = 0; i < 3; ++i) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t h = 0; h < s.heads; ++h) {
        const Side& side = s.sides[i];
        const int64_t column = side.begin + h / (s.heads / side.groups) * side.rank;
        const std::vector<double> head = factors[i].each[h].times(&wide[r * width + column]);
        for (int64_t d = 0; d < s.dim; ++d) {
          made[i].push_back(head[d] + bias.at(i * columns + h * s.dim + d));
        }
      }
    }
  }
  std::vector<double> exact(rows * columns);
  for (size_t n = 0; n < s.lengths.size(); ++n) {
    for (int64_t q = cu[n]; q < cu[n + 1]; ++q) {
      for (int64_t h = 0; h < s.heads; ++h) {
        double total = 0;
        for (int64_t k = cu[n]; k < cu[n + 1]; ++k) {
          double score = 0;
          for (int64_t d = 0; d < s.dim; ++d) {
            score += made[0][q * columns + h * s.dim + d] * made[1][k * columns + h * s.dim + d];
          }
          const double weight = std::exp(0.25 * score);
          total += weight;
          for (int64_t d = 0; d < s.dim; ++d) {
            exact[q * columns + h * s.dim + d] += weight * made[2][k * columns + h * s.dim + d];
          }
        }
        for (int64_t d = 0; d < s.dim; ++d) exact[q * columns + h * s.dim + d] /= total;
      }
    }
  }
  suite.run("heads " + std::to_string(s.heads) + " of " + std::to_string(s.dim),
            {near("out", out, exact, columns, columns)}, [&] { filbert::attn_lowrank_cpu(args); });
}

void cases(Suite& suite) {
  const DType f32 = DType::kFloat32, bf16 = DType::kBFloat16;
  for (const auto& [rows, weight] : {std::pair{f32, f32}, {f32, bf16}, {bf16, bf16}}) {
    run(suite, {rows, weight, 3, 16, {{17, 0, 1}, {17, 0, 1}, {17, 0, 1}}, {1, 0, 33, 7}});
    run(suite, {rows, weight, 4, 20, {{5, 0, 2}, {1, 10, 1}, {9, 11, 4}}, {12, 2}});
  }
}

const Cases registered("attn_lowrank", cases);

}  // namespace
}  // namespace kernel_check
