// The innermost kernels of plain sums, once per vector level. They see plain pointers.
#pragma once

#include <cstdint>

namespace fastmtl::cpu {

// adds the sum of each of `runs` runs of `length` elements, one behind the other, to sum[run]; in float (double for
// f64) within kBlock elements
using RunSums = void (*)(const void* x, int64_t runs, int64_t length, double* sum);
// adds the sums of `columns` columns over `rows` rows without gaps between them to sum[column]; in float (double for
// f64) within kSumRows rows
using ColumnSums = void (*)(const void* x, int64_t rows, int64_t columns, double* sum);

constexpr int64_t kSumRows = 64;

struct SumKernels {  // by DType of x
  RunSums run_sums[4];
  ColumnSums column_sums[4];
};

}  // namespace fastmtl::cpu
