// Symmetric positive definite systems, M = U^T D U with an upper triangular U of unit diagonal.
#pragma once

#include "common/solvers/team.h"

namespace fastmtl::solvers {

// Solves M x = b for each of `kSides` right-hand sides, in place, by elimination. m: its upper triangle, lost. A pivot
// at or below `least` is replaced by `instead`, which is large or INFINITY: its component comes out as 0, or nearly.
// The smallest pivot, -INFINITY for NaN. A sync goes before and after.
template <int kSides, class Team>
FASTMTL_HOST_DEVICE double solve_definite(const Team& team, Matrix m, double* const (&x)[kSides], int n, double least,
                                          double instead) {
  double smallest = INFINITY, last = 0.0;
  for (int k = 0; k < n; ++k) {
    team.sync();
    const double* top = m[k];
    const double pivot = top[k];
    const bool is_small = !(pivot > least);
    smallest = std::fmin(smallest, std::isnan(pivot) ? -INFINITY : pivot);
    const double inverse = 1.0 / (is_small ? instead : pivot);
    // each pivot makes way for its inverse when all have read it
    if (k > 0 && team.rank() == 0) m[k - 1][k - 1] = last;
    last = inverse;
    if (is_small) continue;
    for (int i = k + 1 + team.row(); i < n; i += Team::kRows) {
      const double factor = top[i] * inverse;
      double* row = m[i];
      for (int j = i + team.column(); j < n; j += Team::kColumns) row[j] -= factor * top[j];
      if (team.column() == 0)
        for (double* side : x) side[i] -= factor * side[k];
    }
  }
  team.sync();
  each(team, n, [&](int i) {
    for (double* side : x) side[i] *= i == n - 1 ? last : m[i][i];
  });
  for (int k = n; k-- > 1;) {
    team.sync();
    each(team, k, [&](int i) {
      const double factor = m[i][k] * m[i][i];
      for (double* side : x) side[i] -= factor * side[k];
    });
  }
  team.sync();
  return smallest;
}

}  // namespace fastmtl::solvers
