// The weights of a method, from the Gram matrix alone: one thread works on it.
#include <torch/csrc/stable/library.h>

#include <memory>

#include "common/method_arguments.h"

namespace fastmtl::cpu {
namespace {

void solve(const MethodArguments& p) {
  const auto scratch = std::make_unique_for_overwrite<double[]>(solvers::scratch_size(p.request.rows(p.num_tasks)));
  const solvers::Alone team;
  solvers::solve(team, p.request, p.gram, p.num_tasks, p.present, p.preferences, scratch.get(), p.out);
  solvers::follow(team, p.request, p.num_tasks, p.present, p.out);
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
