// What a call for GradVac's coefficients or weights reads from torch's tensors.
#pragma once

#include "common/method_arguments.h"
#include "common/solvers/gradvac.h"

namespace fastmtl {

struct GradVacArguments {
  solvers::GradVac method;
  solvers::Entries gram;
  int num_tasks;
  bool draws;            // the order, from `key` and `state`, [2] or null, as PCGrad's
  const int64_t* order;  // [T, num_visits] otherwise
  int64_t num_visits;
  uint64_t key;
  int64_t* state;
  const uint8_t* present;  // null: all
  bool mean;
  double* targets;  // [T, T]
  // either the coefficients and new targets, [T, T] each, or the weights [T], and new targets in place of the old ones
  double *out, *new_targets, *weights;
};

inline const int64_t* read_visits(const Tensor& order, int64_t T) {
  STD_TORCH_CHECK(order.dim() == 2 && order.size(0) == T && order.is_contiguous() &&
                      order.scalar_type() == torch::headeronly::ScalarType::Long,
                  "fastmtl: the order must be a contiguous [T, K] int64 tensor");
  return static_cast<const int64_t*>(order.const_data_ptr());
}

// The tensors must outlive what is returned.
inline GradVacArguments read_gradvac(const Tensor& gram, const Tensor& order, const Tensor& targets, double beta,
                                     bool always, double rounding, Tensor& out, Tensor& new_targets) {
  const int64_t T = read_num_tasks(gram);
  GradVacArguments read{{beta, always, rounding}, read_entries(gram, T), static_cast<int>(T)};
  read.order = read_visits(order, T);
  read.num_visits = order.size(1);
  read.targets = const_cast<double*>(read_numbers(targets, T * T, "the targets"));  // which are not written
  read.out = changed_numbers(out, T * T, "the coefficients");
  read.new_targets = changed_numbers(new_targets, T * T, "the new targets");
  return read;
}

inline GradVacArguments read_gradvac_step(const Tensor& gram, Tensor& targets, const std::optional<Tensor>& order,
                                          int64_t key, std::optional<Tensor>& state,
                                          const std::optional<Tensor>& present, double beta, bool always, bool mean,
                                          double rounding, Tensor& weights) {
  const int64_t T = read_num_tasks(gram);
  GradVacArguments read{{beta, always, rounding}, read_entries(gram, T), static_cast<int>(T)};
  read.draws = !order.has_value();
  if (order.has_value()) {
    read.order = read_visits(*order, T);
    read.num_visits = order->size(1);
  } else {
    read.num_visits = T;
  }
  read.key = static_cast<uint64_t>(key);
  if (state.has_value()) {
    STD_TORCH_CHECK(
        state->numel() == 2 && state->is_contiguous() && state->scalar_type() == torch::headeronly::ScalarType::Long,
        "fastmtl: the state must be a contiguous [2] int64 tensor");
    read.state = static_cast<int64_t*>(state->mutable_data_ptr());
  }
  read.present = read_flags(present, T);
  read.mean = mean;
  read.targets = changed_numbers(targets, T * T, "the targets");
  read.weights = changed_numbers(weights, T, "the weights");
  return read;
}

}  // namespace fastmtl
