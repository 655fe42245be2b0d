// Pareto MTL: the problem of the task gradients and of the gradients of constraints between the losses.
#pragma once

#include "common/solvers/team.h"

namespace fastmtl::solvers {

// vectors: [K, T], preference vectors of length 1; the constraints are `(u_k - u_index) . losses <= 0`. state: whether
// the second phase has begun, and how many steps the first one took.
struct Pareto {
  const double* vectors = nullptr;
  int num_vectors = 0, index = 0;
  const double* losses = nullptr;
  double most_start_steps = INFINITY;
  double *started = nullptr, *start_steps = nullptr;
};

// The rows that the problem is of, as sums of task gradients: those of the tasks, then those of the constraints.
struct ParetoRows {
  Pareto method;
  int T;
  const uint8_t* present;

  FASTMTL_HOST_DEVICE bool has_task(int t) const { return takes_part(present, t); }
  FASTMTL_HOST_DEVICE double at(int row, int t) const {
    if (!has_task(t)) return 0.0;
    if (row < T) return row == t ? 1.0 : 0.0;
    return method.vectors[(row - T) * T + t] - method.vectors[method.index * T + t];
  }
};

// The rows that take part: of the first phase the constraints that are violated alone. started: out. Begins with a
// sync.
template <class Team>
FASTMTL_HOST_DEVICE Members active_rows(const Team& team, const ParetoRows& rows, bool& started) {
  const Pareto& method = rows.method;
  team.sync();
  const Members violated = team.members(rows.T + method.num_vectors, [&](int row) {
    if (row < rows.T) return false;
    double sum = 0.0;
    for (int t = 0; t < rows.T; ++t)
      if (rows.has_task(t)) sum += rows.at(row, t) * method.losses[t];
    return sum > 0;
  });
  started = *method.started > 0 || violated.count() == 0 || *method.start_steps >= method.most_start_steps;
  team.sync();
  return team.members(rows.T + method.num_vectors,
                      [&](int row) { return row < rows.T ? started && rows.has_task(row) : violated.has(row); });
}

// The rows' Gram matrix into m, [n, n], by way of `between`, [n, T]; which[i]: the row that is i-th. Ends with a sync.
template <class Team>
FASTMTL_HOST_DEVICE void gram_of_rows(const Team& team, const ParetoRows& rows, const Entries& gram, const int* which,
                                      int n, Matrix between, Matrix m) {
  for (int i = team.row(); i < n; i += Team::kRows)
    for (int t = team.column(); t < rows.T; t += Team::kColumns) {
      double sum = 0.0;
      for (int s = 0; s < rows.T && rows.has_task(t); ++s)
        if (rows.has_task(s)) sum += rows.at(which[i], s) * gram.at(s, t);
      between[i][t] = sum;
    }
  team.sync();
  each_entry(team, n, [&](int i, int k) {
    if (i > k) return;
    double sum = 0.0;
    for (int t = 0; t < rows.T; ++t) sum += between[i][t] * rows.at(which[k], t);
    m[i][k] = m[k][i] = sum;
  });
  team.sync();
}

}  // namespace fastmtl::solvers
