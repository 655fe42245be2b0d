// GradVac: the T x T problem, alone or as a step that changes the targets.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <vector>

#include "common/gradvac_arguments.h"
#include "cpu/gradients/visits.h"

namespace fastmtl::cpu {
namespace {

// rows are independent; below this many tasks waking threads costs more than the rows
constexpr int kParallelTasks = 96;

// Coefficients and new targets, [T, T] each. Absent tasks have zeros where others have cosines.
void solve(const GradVacArguments& p, const int64_t* order, double* out, double* new_targets) {
  const int T = p.num_tasks;
  std::vector<double> lengths(T), cosines(static_cast<size_t>(T) * T);
  for (int t = 0; t < T; ++t) lengths[t] = solvers::takes_part(p.present, t) ? std::sqrt(p.gram.at(t, t)) : 0.0;
  for (int i = 0; i < T; ++i)
    for (int t = 0; t < T; ++t)
      if (solvers::takes_part(p.present, i) && solvers::takes_part(p.present, t))
        cosines[i * T + t] = solvers::cosine(p.gram.at(i, t), lengths[i], lengths[t]);
  auto range = [&](int64_t first, int64_t last) {
    std::vector<double> product(T);
    for (int64_t i = first; i < last; ++i)
      solvers::gradvac_row(p.method, cosines.data(), lengths.data(), T, static_cast<int>(i),
                           order + i * p.order.num_visits, p.order.num_visits, p.targets + i * T, new_targets + i * T,
                           out + i * T, product.data());
  };
  if (T >= kParallelTasks) torch::stable::parallel_for(0, T, 8, range);
  else range(0, T);
}

void gradvac_op(Tensor gram, Tensor order, Tensor targets, double beta, bool always, double rounding, Tensor out,
                Tensor new_targets) {
  const GradVacArguments p = read_gradvac(gram, order, targets, beta, always, rounding, out, new_targets);
  solve(p, p.order.visits, p.out, p.new_targets);
}

void gradvac_step_op(Tensor gram, Tensor targets, const std::optional<Tensor>& order, int64_t key,
                     const std::optional<Tensor>& state, const std::optional<Tensor>& present, double beta, bool always,
                     bool mean, double rounding, Tensor weights) {
  const GradVacArguments p =
      read_gradvac_step(gram, targets, order, key, state, present, beta, always, mean, rounding, weights);
  const int T = p.num_tasks;
  std::vector<int64_t> room;
  std::vector<double> c(static_cast<size_t>(T) * T), moved(c.size());
  solve(p, Orders(p.order, 1).of_call(0, T, room), c.data(), moved.data());
  auto here = [&](int t) { return solvers::takes_part(p.present, t); };
  int count = 0;
  for (int i = 0; i < T; ++i) count += here(i);
  bool finite = true;
  for (int t = 0; t < T; ++t) {
    double sum = 0.0;
    for (int i = 0; i < T; ++i)
      if (here(i)) sum += c[i * T + t];
    p.weights[t] = !here(t) ? 0.0 : p.mean ? sum / count : sum;
    finite = finite && std::isfinite(p.weights[t]);
  }
  for (int i = 0; i < T && finite; ++i)
    for (int t = 0; t < T; ++t)
      if (here(i) && here(t)) p.kept[i * T + t] = moved[i * T + t];
}

}  // namespace
}  // namespace fastmtl::cpu

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  m.impl("_gradvac_coefficients", TORCH_BOX(&fastmtl::cpu::gradvac_op));
  m.impl("_gradvac_step", TORCH_BOX(&fastmtl::cpu::gradvac_step_op));
}
