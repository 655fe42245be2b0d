// The weights of a method, from the Gram matrix alone: one thread works on it, or on each of several.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <memory>

#include "common/method_arguments.h"

namespace fastmtl::cpu {
namespace {

// fewer are solved before another thread has woken up
constexpr int64_t kGroupsAtOnce = 4;

void solve(const MethodArguments& p) {
  const int T = p.num_tasks;
  const solvers::Alone team;
  auto range = [&](int64_t first, int64_t last) {
    const auto scratch = std::make_unique_for_overwrite<double[]>(solvers::scratch_size(p.request.rows(T)));
    for (int64_t g = first; g < last; ++g) {
      double* out = p.out + g * T;
      solvers::solve(team, p.request, p.gram.of_group(g, T), T, p.present, p.preferences, scratch.get(), out);
      solvers::follow(team, p.request, T, p.present, out);
    }
  };
  if (p.num_groups == 1) range(0, 1);
  else torch::stable::parallel_for(0, p.num_groups, kGroupsAtOnce, range);
}

void method_weights_op(Tensor gram, int64_t method, const std::vector<double>& options, double rounding,
                       const std::optional<Tensor>& present, const std::optional<Tensor>& preferences,
                       const std::optional<Tensor>& per_task, Tensor out) {
  solve(read_method(gram, method, options, rounding, present, preferences, per_task, out));
}

void method_step_op(Tensor gram, const std::optional<Tensor>& also, int64_t method, const std::vector<double>& options,
                    double rounding, const std::optional<Tensor>& present, const std::optional<Tensor>& preferences,
                    const std::optional<Tensor>& per_task, const std::optional<Tensor>& vectors, double momentum,
                    std::optional<Tensor> kept, std::optional<Tensor> counted, std::optional<Tensor> average,
                    Tensor out) {
  StepTensors step{kept, counted, average};
  solve(read_step(gram, also, method, options, rounding, present, preferences, per_task, vectors, momentum, step, out));
}

}  // namespace
}  // namespace fastmtl::cpu

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  m.impl("_method_weights", TORCH_BOX(&fastmtl::cpu::method_weights_op));
  m.impl("_method_step", TORCH_BOX(&fastmtl::cpu::method_step_op));
}
