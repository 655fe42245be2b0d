#pragma once

#include "rows.h"

namespace fastmtl::cpu {

// T x T, float64, row-major, symmetric
std::vector<double> gram(const Rows& rows);

// out[k] of every parameter = sum_t weights[k * T + t] * row t; walks backwards, so that what a preceding gram()
// left in the cache is read first
void combine(const double* weights, int64_t num_out, const Rows& rows);

}  // namespace fastmtl::cpu
