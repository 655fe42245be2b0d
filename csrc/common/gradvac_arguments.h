// What a call for GradVac's coefficients or weights reads from torch's tensors.
#pragma once

#include "common/method_arguments.h"
#include "common/order_arguments.h"
#include "common/solvers/gradvac.h"

namespace fastmtl {

struct GradVacArguments {
  solvers::GradVac method;
  solvers::Entries gram;
  int num_tasks;
  OrderArguments order;
  const double* targets;  // [T, T]
  // the coefficients and new targets, [T, T] each; of a step null
  double *out, *new_targets;
  // of a step: the weights [T] of the tasks that take part (null: all), and the targets, to be changed
  const uint8_t* present;
  bool mean;
  double *weights, *kept;
};

// The tensors must outlive what is returned.
inline GradVacArguments read_gradvac(const Tensor& gram, const Tensor& order, const Tensor& targets, double beta,
                                     bool always, double rounding, Tensor& out, Tensor& new_targets) {
  const int64_t T = read_num_tasks(gram);
  GradVacArguments read{{beta, always, rounding}, read_entries(gram, T), static_cast<int>(T)};
  read.order = read_order(order, 0, std::nullopt, T);
  read.targets = read_numbers(targets, T * T, "the targets");
  read.out = changed_numbers(out, T * T, "the coefficients");
  read.new_targets = changed_numbers(new_targets, T * T, "the new targets");
  return read;
}

inline GradVacArguments read_gradvac_step(const Tensor& gram, Tensor& targets, const std::optional<Tensor>& order,
                                          int64_t key, const std::optional<Tensor>& state,
                                          const std::optional<Tensor>& present, double beta, bool always, bool mean,
                                          double rounding, Tensor& weights) {
  const int64_t T = read_num_tasks(gram);
  GradVacArguments read{{beta, always, rounding}, read_entries(gram, T), static_cast<int>(T)};
  read.order = read_order(order, key, state, T);
  read.present = read_flags(present, T);
  read.mean = mean;
  read.weights = changed_numbers(weights, T, "the weights");
  read.targets = read.kept = changed_numbers(targets, T * T, "the targets");
  return read;
}

}  // namespace fastmtl
