// What a call for a method's weights reads from torch's tensors.
#pragma once

#include <optional>

#include "common/rows.h"
#include "common/solvers/methods.h"

namespace fastmtl {

struct MethodArguments {
  solvers::Request request;
  const double* gram;
  int num_tasks;
  const uint8_t* present;     // null: all
  const double* preferences;  // null: all equal
  double* out;
  int num_groups;  // problems that have all but `gram` and `out` in common
};

// method: a `solvers::Kind`. The tensors must outlive what is returned.
inline MethodArguments read_method(const Tensor& gram, int64_t method, const std::vector<double>& options,
                                   double rounding, const std::optional<Tensor>& present,
                                   const std::optional<Tensor>& preferences, const std::optional<Tensor>& per_task,
                                   Tensor& out) {
  using torch::headeronly::ScalarType;
  const int64_t dims = gram.dim();
  STD_TORCH_CHECK((dims == 2 || (dims == 3 && gram.size(0) >= 1)) && gram.size(dims - 2) == gram.size(dims - 1) &&
                      gram.size(dims - 1) >= 1 && gram.size(dims - 1) <= kMaxTasks && dtype_of(gram) == DType::f64 &&
                      gram.is_contiguous(),
                  "fastmtl: the Gram matrix must be a contiguous [T, T] or [L, T, T] float64 tensor, T from 1 to 128");
  const int T = static_cast<int>(gram.size(dims - 1)), L = dims == 2 ? 1 : static_cast<int>(gram.size(0));
  STD_TORCH_CHECK(method >= 0 && method < solvers::kKinds, "fastmtl: no method has number ", method);
  STD_TORCH_CHECK(options.size() <= solvers::kMostOptions, "fastmtl: expected at most ", solvers::kMostOptions,
                  " options, got ", options.size());
  STD_TORCH_CHECK(!present.has_value() ||
                      (present->numel() == T && present->scalar_type() == ScalarType::Bool && present->is_contiguous()),
                  "fastmtl: the flags must be a contiguous [T] bool tensor");
  STD_TORCH_CHECK(!preferences.has_value() || (preferences->numel() == T && dtype_of(*preferences) == DType::f64 &&
                                               preferences->is_contiguous()),
                  "fastmtl: the preferences must be a contiguous [T] float64 tensor");
  STD_TORCH_CHECK(!per_task.has_value() ||
                      (per_task->numel() == T && dtype_of(*per_task) == DType::f64 && per_task->is_contiguous()),
                  "fastmtl: the numbers by task must be a contiguous [T] float64 tensor");
  STD_TORCH_CHECK(out.numel() == int64_t{L} * T && dtype_of(out) == DType::f64 && out.is_contiguous(),
                  "fastmtl: the weights must be a contiguous [T] or [L, T] float64 tensor");
  MethodArguments read{{static_cast<solvers::Kind>(method), {}, rounding},
                       static_cast<const double*>(gram.const_data_ptr()),
                       T,
                       nullptr,
                       nullptr,
                       static_cast<double*>(out.mutable_data_ptr()),
                       L};
  for (size_t k = 0; k < options.size(); ++k) read.request.options[k] = options[k];
  if (present.has_value()) read.present = static_cast<const uint8_t*>(present->const_data_ptr());
  if (preferences.has_value()) read.preferences = static_cast<const double*>(preferences->const_data_ptr());
  if (per_task.has_value()) read.request.per_task = static_cast<const double*>(per_task->const_data_ptr());
  return read;
}

}  // namespace fastmtl
