// SDMGrad and MoDo: weights that follow projected gradient descent on the simplex.
#pragma once

#include "common/solvers/team.h"

namespace fastmtl::solvers {

// x, moved to the nearest point of the simplex: `max(x - t, 0)` for the t at which they add up to 1. What is not above
// the t of all that are left is let go, until nothing is (Michelot 1986). All of it in differences from the largest, so
// that large numbers still add up to 1. Where one is not finite all are NaN. Every member looks at all of x, which
// costs less than to ask the others.
template <class Team>
FASTMTL_HOST_DEVICE void project_on_simplex(const Team& team, double* x, int n) {
  team.sync();
  double largest = -INFINITY, least = -INFINITY;
  bool finite = true;
  for (int i = 0; i < n; ++i) {
    largest = std::fmax(largest, x[i]);
    finite = finite && std::isfinite(x[i]);
  }
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
  for (int i = team.rank(); i < n; i += team.size()) x[i] = finite ? std::fmax(x[i] - largest - least, 0.0) : NAN;
}

// p.m: of two independent batches, g_i . g'_k. p.out: in, the weights to start from; out, those after `steps` steps of
// descent with momentum along M (w + more wanted). rate: the length of a step where the mean of sqrt(max(M_ii, 0)) is
// 1; where it is 0 no step is made. total: the sum of p.weights, the shares of what is wanted.
template <class Team, class Problem>
FASTMTL_HOST_DEVICE void sdmgrad(const Team& team, const Problem& p, double rate, double momentum, int steps,
                                 double more, double total) {
  const int n = p.n;
  double mean = 0.0;
  for (int i = 0; i < n; ++i) mean += std::sqrt(std::fmax(p.m[i][i], 0.0)) / n;
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

// One step along M (w) + more w, from and to p.out; p.m as for `sdmgrad`, with the scale that it came with.
template <class Team, class Problem>
FASTMTL_HOST_DEVICE void modo(const Team& team, const Problem& p, double rate, double more) {
  const int n = p.n;
  const double scale = p.scale > 0 ? p.scale : 1.0;
  for (int i = team.rank(); i < n; i += team.size()) {
    double sum = 0.0;
    for (int k = 0; k < n; ++k) sum += p.m[i][k] * p.out[k];
    p.x[i] = p.out[i] - rate * (scale * sum + more * p.out[i]);
  }
  project_on_simplex(team, p.x, n);
  for (int i = team.rank(); i < n; i += team.size()) p.out[i] = p.x[i];
}

}  // namespace fastmtl::solvers
