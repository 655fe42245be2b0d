// Krum: the gradients that have others near them.
#pragma once

#include <algorithm>

#include "common/solvers/team.h"

namespace fastmtl::solvers {

// How many of n numbers come before number i in rising order; equal ones by place, and `least` before all.
FASTMTL_HOST_DEVICE inline int rank_of(const double* x, int n, int i, int least) {
  if (i == least) return 0;
  int rank = least >= 0 && (x[least] > x[i] || (x[least] == x[i] && least > i));
  for (int k = 0; k < n; ++k) rank += x[k] < x[i] || (x[k] == x[i] && k < i);
  return rank;
}

// to[i][k]: the distance of i and k if k is among the `nearest` others of i, or else 0. scratch: n numbers.
template <class Team>
FASTMTL_HOST_DEVICE void keep_nearest(const Team& team, Matrix distances, Matrix to, int n, int nearest, double*) {
  // its distance to itself is the first of each row
  each_entry(team, n,
             [&](int i, int k) { to[i][k] = rank_of(distances[i], n, k, i) <= nearest ? distances[i][k] : 0.0; });
}
// One thread has no use for n ranks a row: the distance of the last of them says which they are.
inline void keep_nearest(const Alone&, Matrix distances, Matrix to, int n, int nearest, double* scratch) {
  for (int i = 0; i < n; ++i) {
    const double* row = distances[i];
    double *others = std::copy(row + i + 1, row + n, std::copy(row, row + i, scratch)), last = -1.0;
    if (nearest > 0) {
      std::nth_element(scratch, scratch + nearest - 1, others);
      last = scratch[nearest - 1];
    }
    auto equal = nearest - std::count_if(scratch, others, [&](double x) { return x < last; });
    for (int k = 0; k < n; ++k) {
      const bool is_kept = k != i && (row[k] < last || (row[k] == last && equal-- > 0));
      to[i][k] = is_kept ? row[k] : 0.0;
    }
  }
}

// byzantine: how many gradients may be wrong in any way. Each scores the sum of its distances, or squared ones, to the
// n - byzantine - 2 nearest others, one at least; the `selected` lowest scores have equal weights. a and b are scratch.
template <class Team, class Problem>
FASTMTL_HOST_DEVICE void krum(const Team& team, const Problem& p, double byzantine, double selected, bool squared) {
  const int n = p.n;
  const double nearest = std::fmin(std::fmax(n - byzantine - 2.0, 1.0), n - 1.0), count = std::fmin(selected, n);
  each_entry(team, n, [&](int i, int k) {
    const double square = i == k ? 0.0 : std::fmax(p.m[i][i] + p.m[k][k] - 2.0 * p.m[i][k], 0.0);
    p.a[i][k] = squared ? square : std::sqrt(square);
  });
  team.sync();
  keep_nearest(team, p.a, p.b, n, static_cast<int>(nearest), p.y);
  team.sync();
  for (int i = team.rank(); i < n; i += team.size()) {
    double sum = 0.0;
    for (int k = 0; k < n; ++k) sum += p.b[i][k];
    p.x[i] = sum;
  }
  team.sync();
  for (int i = team.rank(); i < n; i += team.size()) p.out[i] = rank_of(p.x, n, i, -1) < count ? 1.0 / count : 0.0;
}

}  // namespace fastmtl::solvers
