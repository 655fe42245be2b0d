#pragma once

#include "common/rows.h"

namespace fastmtl::cpu {

// T x T, float64, row-major, symmetric
std::vector<double> gram(const Rows& rows);

// into a float32 or float64 tensor
void write_gram(const std::vector<double>& m, int64_t num_tasks, Tensor& out);

// out[k] of every parameter = sum_t weights[k * T + t] * row t
void combine(const double* weights, int64_t num_out, const Rows& rows);

// PCGrad's weights of a Gram matrix, in the order that a key alone draws.
std::vector<double> pcgrad_weights(const std::vector<double>& gram, int num_tasks, int64_t key, bool include_self,
                                   bool mean);

}  // namespace fastmtl::cpu
