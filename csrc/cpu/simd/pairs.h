// The innermost kernels of the products with `W + s Delta` of bfloat16 numbers, by dot products of pairs, for levels
// and processors that have such products. A panel is [pairs][kPanel][2]: two steps of the sum side by side, for as many
// results as a panel of tiles.h has. Subnormal numbers count as zero, in what is multiplied and in the sums.
#pragma once

#include <cstdint>

#include "cpu/simd/tiles.h"

namespace fastmtl::cpu {

struct Ahead;

// A block of weights `W + s Delta` as it lies: `rows` rows, `stride` numbers apart, of which `columns` are read. w
// null: zero, d null: nothing added.
struct WeightBlock {
  const void* w;
  const void* d;
  float gate;
  int64_t stride, rows, columns;
};

// Makes the weights of a block, rounded once, into a panel; what lacks to a whole pair is zero. Across: results are
// rows of the weight, at most kPanel, and sums run along its columns; down: the other way round.
using WeightPanel = void (*)(const WeightBlock& block, uint32_t* panel);

// panel of rows of bfloat16 numbers, from column `from`: results are columns, sums run along the rows
using RowPanel = void (*)(const uint16_t* const* rows, int64_t num_rows, int64_t from, int64_t columns,
                          uint32_t* panel);

// out[i * kPanel + v] = sum_p <pair p of a[i], panel[p][v]> for v < lanes (to a multiple of 16), or += with `add`; a's
// pairs lie `step` pairs apart. num_a <= kTall. `ahead` is fetched in step with the work.
using MultiplyPairs = void (*)(const uint16_t* const* a, int64_t step, int num_a, const uint32_t* panel,
                               int64_t num_pairs, int64_t lanes, float* out, bool add, const Ahead& ahead);

// target[k] = row[k] + bias[k] in bfloat16, rounded once; bias may be null
using NarrowRow = void (*)(const float* row, const float* bias, int64_t length, uint16_t* target);

struct PairTiles {
  WeightPanel across[4], down[4];  // by DType of the weights; none for f64
  RowPanel rows;
  MultiplyPairs multiply;
  NarrowRow narrow;
};

}  // namespace fastmtl::cpu
