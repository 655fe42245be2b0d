// SDMGrad: a few steps of projected gradient descent on the simplex.
#pragma once

#include "common/solvers/team.h"

namespace fastmtl::solvers {

// x, moved to the nearest point of the simplex: `max(x - t, 0)` for the t at which they add up to 1. What is not above
// the t of all that are left is let go, until nothing is (Michelot 1986). All of it in differences from the largest, so
// that large numbers still add up to 1. Every member looks at all of x, which costs less than to ask the others.
template <class Team>
FASTMTL_HOST_DEVICE void project_on_simplex(const Team& team, double* x, int n) {
  team.sync();
  double largest = -INFINITY, least = -INFINITY;
  for (int i = 0; i < n; ++i) largest = std::fmax(largest, x[i]);
  for (int count = n + 1;;) {
    double sum = -1.0;
    int left = 0;
    for (int i = 0; i < n; ++i) {
      const double below = x[i] - largest;
      if (!(below > least)) continue;
      sum += below;
      left += 1;
    }
    if (left == count || left == 0) break;
    count = left;
    least = sum / left;
  }
  team.sync();
  for (int i = team.rank(); i < n; i += team.size()) x[i] = std::fmax(x[i] - largest - least, 0.0);
}

// p.m: of two independent batches, g_i . g'_k. p.out: in, the weights to start from; out, those after `steps` steps of
// descent with momentum along M (w + more wanted). rate: the length of a step where the mean of sqrt(max(M_ii, 0)) is
// 1; where it is 0 no step is made. wanted: p.weights, over their sum.
template <class Team, class Problem>
FASTMTL_HOST_DEVICE void sdmgrad(const Team& team, const Problem& p, double rate, double momentum, int steps,
                                 double more) {
  const int n = p.n;
  double mean = 0.0, total = 0.0;
  for (int i = 0; i < n; ++i) {
    mean += std::sqrt(std::fmax(p.m[i][i], 0.0)) / n;
    total += p.weights[i];
  }
  const double length = rate / mean / mean;
  for (int i = team.rank(); i < n; i += team.size()) p.v[i] = 0.0;
  project_on_simplex(team, p.out, n);
  for (int step = 0; step < steps && mean > 0; ++step) {
    for (int i = team.rank(); i < n; i += team.size()) p.x[i] = p.out[i] + more * (p.weights[i] / total);
    team.sync();
    for (int i = team.rank(); i < n; i += team.size()) {
      double sum = 0.0;
      for (int k = 0; k < n; ++k) sum += p.m[i][k] * p.x[k];
      p.v[i] = momentum * p.v[i] + sum;
      p.out[i] -= length * p.v[i];
    }
    project_on_simplex(team, p.out, n);
  }
}

}  // namespace fastmtl::solvers
