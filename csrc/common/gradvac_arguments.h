// What a call for GradVac's coefficients reads from torch's tensors.
#pragma once

#include "common/rows.h"
#include "common/solvers/gradvac.h"

namespace fastmtl {

struct GradVacArguments {
  solvers::GradVac method;
  const double* gram;  // [T, T]
  int num_tasks;
  const int64_t* order;  // [T, num_visits]
  int64_t num_visits;
  const double* targets;  // [T, T]
  double *out, *new_targets;
};

// The tensors must outlive what is returned.
inline GradVacArguments read_gradvac(const Tensor& gram, const Tensor& order, const Tensor& targets, double beta,
                                     bool always, double rounding, Tensor& out, Tensor& new_targets) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(gram.dim() == 2 && gram.size(0) >= 1 && gram.size(0) <= kMaxTasks,
                  "fastmtl: the Gram matrix must be [T, T], T from 1 to 128");
  const int64_t T = gram.size(0);
  auto check = [&](const Tensor& x, const char* what) {
    STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == T && x.size(1) == T && dtype_of(x) == DType::f64 && x.is_contiguous(),
                    "fastmtl: ", what, " must be a contiguous [T, T] float64 tensor");
  };
  check(gram, "the Gram matrix");
  check(targets, "the targets");
  check(out, "the result");
  check(new_targets, "the new targets");
  STD_TORCH_CHECK(
      order.dim() == 2 && order.size(0) == T && order.scalar_type() == ScalarType::Long && order.is_contiguous(),
      "fastmtl: the order must be a contiguous [T, K] int64 tensor");
  return {{beta, always, rounding},
          static_cast<const double*>(gram.const_data_ptr()),
          static_cast<int>(T),
          static_cast<const int64_t*>(order.const_data_ptr()),
          order.size(1),
          static_cast<const double*>(targets.const_data_ptr()),
          static_cast<double*>(out.mutable_data_ptr()),
          static_cast<double*>(new_targets.mutable_data_ptr())};
}

}  // namespace fastmtl
