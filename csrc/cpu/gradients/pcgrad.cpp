// PCGrad: the T x T problem, its gradient, and the fused Gram -> coefficients -> combine.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>

#include "common/solvers.h"
#include "cpu/gradients/gram.h"
#include "cpu/gradients/visits.h"
#include "cpu/gradients/walk.h"

namespace fastmtl::cpu {
namespace {

// rows are independent; below this many tasks waking threads costs more than the rows
constexpr int kParallelTasks = 48;

template <class F>
void for_each_task(int T, const F& row) {
  auto range = [&](int64_t first, int64_t last) {
    std::vector<double> scratch(T);
    for (int64_t i = first; i < last; ++i) row(static_cast<int>(i), scratch.data());
  };
  if (T >= kParallelTasks) torch::stable::parallel_for(0, T, 8, range);
  else range(0, T);
}

void coefficients(const double* m, int T, const int64_t* order, int64_t num_visits, bool include_self, double* out) {
  for_each_task(T, [&](int i, double* product) {
    pcgrad_row(m, T, i, order + i * num_visits, num_visits, include_self, out + i * T, product);
  });
}

struct Problem {
  int T;
  const double* gram;
  const int64_t* order;
  int64_t num_visits;
};

Problem read_problem(const Tensor& gram, const Tensor& order) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(gram.dim() == 2 && gram.size(0) == gram.size(1) && gram.size(0) >= 1 && gram.size(0) <= kMaxTasks &&
                      dtype_of(gram) == DType::f64 && gram.is_contiguous(),
                  "fastmtl: the Gram matrix must be a contiguous [T, T] float64 tensor, T from 1 to 128");
  STD_TORCH_CHECK(order.dim() == 2 && order.size(0) == gram.size(0) && order.scalar_type() == ScalarType::Long &&
                      order.is_contiguous(),
                  "fastmtl: the order must be a contiguous [T, K] int64 tensor");
  return {static_cast<int>(gram.size(0)), static_cast<const double*>(gram.const_data_ptr()),
          static_cast<const int64_t*>(order.const_data_ptr()), order.size(1)};
}

double* square(Tensor& out, int T) {
  STD_TORCH_CHECK(out.numel() == T * T && dtype_of(out) == DType::f64 && out.is_contiguous(),
                  "fastmtl: the result must be a contiguous [T, T] float64 tensor");
  return static_cast<double*>(out.mutable_data_ptr());
}

void coefficients_op(Tensor gram, Tensor order, bool include_self, Tensor out) {
  const Problem p = read_problem(gram, order);
  coefficients(p.gram, p.T, p.order, p.num_visits, include_self, square(out, p.T));
}

// The visiting order as given, or drawn from a key and a state (key, counter), which is advanced.
std::vector<int64_t> read_order(const std::optional<Tensor>& order, int64_t key, const std::optional<Tensor>& state,
                                int T) {
  using torch::headeronly::ScalarType;
  if (order.has_value()) {
    STD_TORCH_CHECK(
        order->dim() == 2 && order->size(0) == T && order->is_contiguous() && order->scalar_type() == ScalarType::Long,
        "fastmtl: the order must be a contiguous [T, K] int64 tensor");
    const auto* visits = static_cast<const int64_t*>(order->const_data_ptr());
    return {visits, visits + order->numel()};
  }
  int64_t* words = nullptr;
  if (state.has_value()) {
    STD_TORCH_CHECK(state->numel() == 2 && state->is_contiguous() && state->scalar_type() == ScalarType::Long,
                    "fastmtl: the state must be a contiguous [2] int64 tensor");
    words = static_cast<int64_t*>(state->mutable_data_ptr());
  }
  return drawn_visits(static_cast<uint64_t>(key), words, T);
}

// The weights alone, of tasks that all take part.
void weights_op(Tensor gram, const std::optional<Tensor>& order, int64_t key, std::optional<Tensor> state,
                bool include_self, bool mean, Tensor out) {
  const int T = static_cast<int>(gram.size(0));
  const std::vector<int64_t> visits = read_order(order, key, state, T);
  STD_TORCH_CHECK(gram.numel() == T * T && T >= 1 && T <= kMaxTasks && dtype_of(gram) == DType::f64 &&
                      gram.is_contiguous() && out.numel() == T && dtype_of(out) == DType::f64 && out.is_contiguous(),
                  "fastmtl: expected a contiguous [T, T] float64 matrix, and [T] float64 weights");
  std::vector<double> c(static_cast<size_t>(T) * T);
  coefficients(static_cast<const double*>(gram.const_data_ptr()), T, visits.data(),
               static_cast<int64_t>(visits.size()) / T, include_self, c.data());
  auto* w = static_cast<double*>(out.mutable_data_ptr());
  for (int t = 0; t < T; ++t) {
    double sum = 0.0;
    for (int i = 0; i < T; ++i) sum += c[i * T + t];
    w[t] = mean ? sum / T : sum;
  }
}

// Gradient with respect to the Gram matrix: the steps of each row are replayed, then undone.
void coefficients_backward_op(Tensor grad, Tensor gram, Tensor order, bool include_self, Tensor out) {
  const Problem p = read_problem(gram, order);
  const int T = p.T;
  const double* m = p.gram;
  double* grad_gram = square(out, T);
  const double* grad_rows = square(grad, T);
  std::fill(grad_gram, grad_gram + T * T, 0.0);
  struct Step {
    int j;
    double d;
  };
  std::vector<Step> steps;
  std::vector<double> c(T), product(T), grad_c(T);
  for (int i = 0; i < T; ++i) {
    steps.clear();
    for (int t = 0; t < T; ++t) {
      c[t] = t == i;
      product[t] = m[i * T + t];
      grad_c[t] = grad_rows[i * T + t];
    }
    for (int64_t k = 0; k < p.num_visits; ++k) {
      const int64_t j = p.order[i * p.num_visits + k];
      STD_TORCH_CHECK(j >= 0 && j < T, "fastmtl: order entry ", j, " out of range for ", T, " tasks");
      if (j == i && !include_self) continue;
      const double d = product[j], norm = m[j * T + j];
      if (!(d < 0) || norm == 0) continue;
      steps.push_back({static_cast<int>(j), d});
      c[j] -= d / norm;
      for (int t = 0; t < T; ++t) product[t] -= d / norm * m[j * T + t];
    }
    for (size_t s = steps.size(); s-- > 0;) {
      const auto [j, d] = steps[s];
      const double norm = m[j * T + j];
      const double grad_d = -grad_c[j] / norm;
      c[j] += d / norm;  // the row before this step
      grad_gram[j * T + j] += grad_c[j] * d / (norm * norm);
      for (int t = 0; t < T; ++t) {
        grad_gram[t * T + j] += grad_d * c[t];
        grad_c[t] += grad_d * m[t * T + j];
      }
    }
  }
}

void pcgrad_op(const std::vector<Tensor>& tensors, const std::vector<int64_t>& index, int64_t num_tasks,
               int64_t num_params, const std::optional<Tensor>& order, int64_t key, const std::optional<Tensor>& state,
               bool include_self, const std::vector<int64_t>& present, bool mean, const std::vector<Tensor>& out,
               Tensor gram_out, Tensor weights_out) {
  const Rows rows = read_rows(tensors, index, num_tasks, num_params, out);
  const int T = rows.num_tasks;
  const bool project = weights_out.dim() == 2;
  const int64_t num_out = project ? T : 1;
  for (const Param& p : rows.params)
    STD_TORCH_CHECK(static_cast<int64_t>(p.out.size()) == num_out, "fastmtl: expected ", num_out,
                    " outputs a parameter, got ", p.out.size());
  STD_TORCH_CHECK(present.empty() || static_cast<int>(present.size()) == T, "fastmtl: expected ", T, " flags");
  STD_TORCH_CHECK(
      weights_out.numel() == num_out * T && dtype_of(weights_out) == DType::f64 && weights_out.is_contiguous(),
      "fastmtl: the weights must be a contiguous float64 tensor");
  const std::vector<int64_t> visits = read_order(order, key, state, T);
  const std::vector<double> m = gram(rows);
  write_gram(m, T, gram_out);
  std::vector<double> c(static_cast<size_t>(T) * T);
  coefficients(m.data(), T, visits.data(), static_cast<int64_t>(visits.size()) / T, include_self, c.data());
  double* w = static_cast<double*>(weights_out.mutable_data_ptr());
  if (project) {
    std::copy(c.begin(), c.end(), w);
  } else {
    auto here = [&](int t) { return present.empty() || present[t] != 0; };
    int count = 0;
    for (int i = 0; i < T; ++i) count += here(i);
    const double scale = mean ? 1.0 / count : 1.0;
    for (int t = 0; t < T; ++t) {
      double sum = 0.0;
      for (int i = 0; i < T; ++i)
        if (here(i)) sum += c[i * T + t];
      w[t] = here(t) ? scale * sum : 0.0;
    }
  }
  combine(w, num_out, rows);
}

}  // namespace
}  // namespace fastmtl::cpu

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  m.impl("_pcgrad_coefficients", TORCH_BOX(&fastmtl::cpu::coefficients_op));
  m.impl("_pcgrad_weights", TORCH_BOX(&fastmtl::cpu::weights_op));
  m.impl("_pcgrad_coefficients_backward", TORCH_BOX(&fastmtl::cpu::coefficients_backward_op));
  m.impl("_pcgrad", TORCH_BOX(&fastmtl::cpu::pcgrad_op));
}
