// PCGrad: the T x T problem, its gradient, the weights of several problems, and the fused Gram -> coefficients ->
// combine.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>

#include "common/method_arguments.h"
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
  OrderArguments order;
};

Problem read_problem(const Tensor& gram, const Tensor& order) {
  const int64_t T = read_num_tasks(gram);
  check_numbers(gram, T * T, "the entries of the Gram matrix");
  return {static_cast<int>(T), static_cast<const double*>(gram.const_data_ptr()),
          read_order(order, 0, std::nullopt, T)};
}

double* square(Tensor& out, int T) { return changed_numbers(out, int64_t{T} * T, "the results"); }

void coefficients_op(Tensor gram, Tensor order, bool include_self, Tensor out) {
  const Problem p = read_problem(gram, order);
  coefficients(p.gram, p.T, p.order.visits, p.order.num_visits, include_self, square(out, p.T));
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
    for (int64_t k = 0; k < p.order.num_visits; ++k) {
      const int64_t j = p.order.visits[i * p.order.num_visits + k];
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

void check_present(const std::vector<int64_t>& present, int T) {
  STD_TORCH_CHECK(present.empty() || static_cast<int>(present.size()) == T, "fastmtl: expected ", T, " flags");
}

// weights [T] of coefficients [T, T]; present: a flag per task, empty: all
void sum_rows(const double* c, int T, const std::vector<int64_t>& present, bool mean, double* weights) {
  auto here = [&](int t) { return present.empty() || present[t] != 0; };
  int count = 0;
  for (int i = 0; i < T; ++i) count += here(i);
  const double scale = mean ? 1.0 / count : 1.0;
  for (int t = 0; t < T; ++t) {
    double sum = 0.0;
    for (int i = 0; i < T; ++i)
      if (here(i)) sum += c[i * T + t];
    weights[t] = here(t) ? scale * sum : 0.0;
  }
}

// gram [L, T, T], weights [L, T]
void pcgrad_weights_op(Tensor gram, const std::optional<Tensor>& order, int64_t key, const std::optional<Tensor>& state,
                       bool include_self, const std::vector<int64_t>& present, bool mean, Tensor weights) {
  STD_TORCH_CHECK(gram.dim() == 3 && gram.size(1) == gram.size(2) && gram.size(1) >= 1 && gram.size(1) <= kMaxTasks &&
                      dtype_of(gram) == DType::f64 && gram.is_contiguous(),
                  "fastmtl: the Gram matrices must be a contiguous [L, T, T] float64 tensor, T from 1 to 128");
  const int64_t L = gram.size(0);
  const int T = static_cast<int>(gram.size(1));
  STD_TORCH_CHECK(weights.numel() == L * T && dtype_of(weights) == DType::f64 && weights.is_contiguous(),
                  "fastmtl: the weights must be a contiguous [L, T] float64 tensor");
  check_present(present, T);
  const Orders orders(read_order(order, key, state, T), L);
  const auto* m = static_cast<const double*>(gram.const_data_ptr());
  auto* w = static_cast<double*>(weights.mutable_data_ptr());
  auto solve = [&](int64_t first, int64_t last) {
    std::vector<int64_t> room;
    std::vector<double> c(static_cast<size_t>(T) * T);
    for (int64_t g = first; g < last; ++g) {
      const int64_t* visits = orders.of_call(g, T, room);
      coefficients(m + g * T * T, T, visits, orders.num_visits(), include_self, c.data());
      sum_rows(c.data(), T, present, mean, w + g * T);
    }
  };
  // small problems are solved before another thread has woken up; the rows of a single one are shared out
  const int64_t at_once = std::max<int64_t>(4096 / (int64_t{T} * T * T), 1);
  if (L == 1) solve(0, 1);
  else torch::stable::parallel_for(0, L, at_once, solve);
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
  check_present(present, T);
  STD_TORCH_CHECK(
      weights_out.numel() == num_out * T && dtype_of(weights_out) == DType::f64 && weights_out.is_contiguous(),
      "fastmtl: the weights must be a contiguous float64 tensor");
  const Orders orders(read_order(order, key, state, T), 1);
  std::vector<int64_t> room;
  const int64_t* visits = orders.of_call(0, T, room);
  const std::vector<double> m = gram(rows);
  write_gram(m, T, gram_out);
  std::vector<double> c(static_cast<size_t>(T) * T);
  coefficients(m.data(), T, visits, orders.num_visits(), include_self, c.data());
  double* w = static_cast<double*>(weights_out.mutable_data_ptr());
  if (project) std::copy(c.begin(), c.end(), w);
  else sum_rows(c.data(), T, present, mean, w);
  combine(w, num_out, rows);
}

}  // namespace

std::vector<double> pcgrad_weights(const std::vector<double>& gram, int T, int64_t key, bool include_self, bool mean) {
  const Orders orders(read_order(std::nullopt, key, std::nullopt, T), 1);
  std::vector<int64_t> room;
  const int64_t* visits = orders.of_call(0, T, room);
  std::vector<double> c(static_cast<size_t>(T) * T), weights(static_cast<size_t>(T));
  coefficients(gram.data(), T, visits, orders.num_visits(), include_self, c.data());
  sum_rows(c.data(), T, {}, mean, weights.data());
  return weights;
}

}  // namespace fastmtl::cpu

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  m.impl("_pcgrad_coefficients", TORCH_BOX(&fastmtl::cpu::coefficients_op));
  m.impl("_pcgrad_coefficients_backward", TORCH_BOX(&fastmtl::cpu::coefficients_backward_op));
  m.impl("_pcgrad_weights", TORCH_BOX(&fastmtl::cpu::pcgrad_weights_op));
  m.impl("_pcgrad", TORCH_BOX(&fastmtl::cpu::pcgrad_op));
}
