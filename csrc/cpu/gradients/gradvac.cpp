// GradVac: the T x T problem.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <vector>

#include "common/gradvac_arguments.h"

namespace fastmtl::cpu {
namespace {

// rows are independent; below this many tasks waking threads costs more than the rows
constexpr int kParallelTasks = 96;

void gradvac_op(Tensor gram, Tensor order, Tensor targets, double beta, bool always, double rounding, Tensor out,
                Tensor new_targets) {
  const GradVacArguments p = read_gradvac(gram, order, targets, beta, always, rounding, out, new_targets);
  const int T = p.num_tasks;
  std::vector<double> lengths(T), cosines(static_cast<size_t>(T) * T);
  for (int t = 0; t < T; ++t) lengths[t] = std::sqrt(p.gram[t * T + t]);
  for (int i = 0; i < T; ++i)
    for (int t = 0; t < T; ++t) cosines[i * T + t] = solvers::cosine(p.gram[i * T + t], lengths[i], lengths[t]);
  auto range = [&](int64_t first, int64_t last) {
    std::vector<double> product(T);
    for (int64_t i = first; i < last; ++i)
      solvers::gradvac_row(p.method, cosines.data(), lengths.data(), T, static_cast<int>(i), p.order + i * p.num_visits,
                           p.num_visits, p.targets + i * T, p.new_targets + i * T, p.out + i * T, product.data());
  };
  if (T >= kParallelTasks) torch::stable::parallel_for(0, T, 8, range);
  else range(0, T);
}

}  // namespace
}  // namespace fastmtl::cpu

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) { m.impl("_gradvac_coefficients", TORCH_BOX(&fastmtl::cpu::gradvac_op)); }
