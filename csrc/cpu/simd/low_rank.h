// The innermost kernels of low-rank deltas, once per vector level. They see rows, each `length` elements side by side,
// and tables of S (float, or double for f64): [rank][stride], whose rows have room and zeros up to whole vectors.
#pragma once

#include <cstdint>

namespace fastmtl::cpu {

// a table's rows are padded to a multiple of this: one AVX-512 vector of floats
constexpr int64_t kTablePad = 16;

// z[m * z_stride + r] = <x_m, table_r>
using ShrinkRows = void (*)(const void* const* rows, int count, int64_t length, const void* table, int64_t stride,
                            int rank, void* z, int64_t z_stride);

// y_m += sum_r c[m * c_stride + r] * table_r
using ExpandRows = void (*)(void* const* rows, int count, int64_t length, const void* table, int64_t stride, int rank,
                            const void* c, int64_t c_stride);

// sums_r += sum_m c[m * c_stride + r] * x_m
using CollectRows = void (*)(const void* const* rows, int count, int64_t length, const void* c, int64_t c_stride,
                             int rank, void* sums, int64_t stride);

struct LowRank {  // by DType of the rows
  ShrinkRows shrink[4];
  ExpandRows expand[4];
  CollectRows collect[4];
};

}  // namespace fastmtl::cpu
