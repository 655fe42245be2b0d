// The weights of a method, from the Gram matrix alone: one thread works on it, or on each of several.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <memory>

#include "common/method_arguments.h"

namespace fastmtl::cpu {
namespace {

// fewer are solved before another thread has woken up
constexpr int64_t kGroupsAtOnce = 4;

void method_weights_op(Tensor gram, int64_t method, const std::vector<double>& options, double rounding,
                       const std::optional<Tensor>& present, const std::optional<Tensor>& preferences,
                       const std::optional<Tensor>& per_task, Tensor out) {
  const MethodArguments p = read_method(gram, method, options, rounding, present, preferences, per_task, out);
  const int T = p.num_tasks;
  auto solve = [&](int64_t first, int64_t last) {
    const auto scratch = std::make_unique_for_overwrite<double[]>(solvers::scratch_size(T));
    for (int64_t g = first; g < last; ++g)
      solvers::solve(solvers::Alone{}, p.request, p.gram + g * T * T, T, p.present, p.preferences, scratch.get(),
                     p.out + g * T);
  };
  if (p.num_groups == 1) solve(0, 1);
  else torch::stable::parallel_for(0, p.num_groups, kGroupsAtOnce, solve);
}

}  // namespace
}  // namespace fastmtl::cpu

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) { m.impl("_method_weights", TORCH_BOX(&fastmtl::cpu::method_weights_op)); }
