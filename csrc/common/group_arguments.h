// What calls for groups of parameters check of torch's arguments.
#pragma once

#include "common/groups.h"
#include "common/rows.h"

namespace fastmtl {

// L of a result [L, T, T]
inline int64_t check_group_grams(const Tensor& out, int64_t num_tasks) {
  const DType dtype = dtype_of(out);
  STD_TORCH_CHECK(out.dim() == 3 && out.size(0) >= 1 && out.size(1) == num_tasks && out.size(2) == num_tasks &&
                      out.is_contiguous() && (dtype == DType::f32 || dtype == DType::f64),
                  "fastmtl: the Gram matrices must be a contiguous [L, T, T] float32 or float64 tensor");
  return out.size(0);
}

// the group of each of the n parameters
inline void check_groups(const std::vector<int64_t>& groups, int64_t num_params, int64_t num_groups) {
  STD_TORCH_CHECK(static_cast<int64_t>(groups.size()) == num_params, "fastmtl: expected the groups of ", num_params,
                  " parameters, got ", groups.size());
  for (int64_t g : groups)
    STD_TORCH_CHECK(g >= 0 && g < num_groups, "fastmtl: expected groups in 0..", num_groups - 1, ", got ", g);
}

}  // namespace fastmtl
