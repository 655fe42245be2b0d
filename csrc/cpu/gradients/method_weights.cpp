// The weights of a method, from the Gram matrix alone: one thread works on it.
#include <torch/csrc/stable/library.h>

#include <memory>
#include <optional>

#include "common/rows.h"
#include "common/solvers/methods.h"

namespace fastmtl::cpu {
namespace {

// method: a `solvers::Kind`.
void method_weights_op(Tensor gram, int64_t method, const std::vector<double>& options, double rounding,
                       const std::optional<Tensor>& present, const std::optional<Tensor>& preferences, Tensor out) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(gram.dim() == 2 && gram.size(0) == gram.size(1) && gram.size(0) >= 1 && gram.size(0) <= kMaxTasks &&
                      dtype_of(gram) == DType::f64 && gram.is_contiguous(),
                  "fastmtl: the Gram matrix must be a contiguous [T, T] float64 tensor, T from 1 to 128");
  const int T = static_cast<int>(gram.size(0));
  STD_TORCH_CHECK(method >= 0 && method < solvers::kKinds, "fastmtl: no method has number ", method);
  STD_TORCH_CHECK(options.size() <= 2, "fastmtl: expected at most 2 options, got ", options.size());
  STD_TORCH_CHECK(!present.has_value() ||
                      (present->numel() == T && present->scalar_type() == ScalarType::Bool && present->is_contiguous()),
                  "fastmtl: the flags must be a contiguous [T] bool tensor");
  STD_TORCH_CHECK(!preferences.has_value() || (preferences->numel() == T && dtype_of(*preferences) == DType::f64 &&
                                               preferences->is_contiguous()),
                  "fastmtl: the preferences must be a contiguous [T] float64 tensor");
  STD_TORCH_CHECK(out.numel() == T && dtype_of(out) == DType::f64 && out.is_contiguous(),
                  "fastmtl: the weights must be a contiguous [T] float64 tensor");
  solvers::Request request{static_cast<solvers::Kind>(method), {0.0, 0.0}, rounding};
  for (size_t k = 0; k < options.size(); ++k) request.options[k] = options[k];
  const auto scratch = std::make_unique_for_overwrite<double[]>(solvers::scratch_size(T));
  solvers::solve(solvers::Alone{}, request, static_cast<const double*>(gram.const_data_ptr()), T,
                 present.has_value() ? static_cast<const uint8_t*>(present->const_data_ptr()) : nullptr,
                 preferences.has_value() ? static_cast<const double*>(preferences->const_data_ptr()) : nullptr,
                 scratch.get(), static_cast<double*>(out.mutable_data_ptr()));
}

}  // namespace
}  // namespace fastmtl::cpu

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) { m.impl("_method_weights", TORCH_BOX(&fastmtl::cpu::method_weights_op)); }
