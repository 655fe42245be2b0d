// Symmetric positive definite systems, M = U^T D U with an upper triangular U of unit diagonal.
#pragma once

#include "common/solvers/team.h"

namespace fastmtl::solvers {

// A member's entries of a square whose corner is (i0, j0), `kUnits` units of rows and of columns wide: all are read
// before one is written, since a read that waits for a write costs more than the arithmetic.
// M[i][j] -= top[i] inverse top[j] for them. kOnDiagonal: the square's diagonal is M's, and what lies below not needed.
template <int kUnits, bool kOnDiagonal, class Team>
FASTMTL_HOST_DEVICE inline void eliminate(const Team& team, Matrix m, const double* top, double inverse, int i0, int j0,
                                          int n) {
  constexpr int kUnit = Team::kRows > Team::kColumns ? Team::kRows : Team::kColumns;
  constexpr int kDown = kUnits * kUnit / Team::kRows, kAcross = kUnits * kUnit / Team::kColumns;
  i0 += team.row();
  j0 += team.column();
  double right[kAcross], factor[kDown], entry[kDown][kAcross];
#pragma unroll
  for (int b = 0; b < kAcross; ++b) right[b] = j0 + b * Team::kColumns < n ? top[j0 + b * Team::kColumns] : 0.0;
#pragma unroll
  for (int a = 0; a < kDown; ++a) factor[a] = i0 + a * Team::kRows < n ? top[i0 + a * Team::kRows] * inverse : 0.0;
  // the rows of a all lie below the columns of b
  auto is_below = [](int a, int b) { return kOnDiagonal && a * Team::kRows >= (b + 1) * Team::kColumns; };
#pragma unroll
  for (int a = 0; a < kDown; ++a)
#pragma unroll
    for (int b = 0; b < kAcross; ++b) {
      const int i = i0 + a * Team::kRows, j = j0 + b * Team::kColumns;
      if (!is_below(a, b) && i < n && j < n) entry[a][b] = m[i][j];
    }
#pragma unroll
  for (int a = 0; a < kDown; ++a)
#pragma unroll
    for (int b = 0; b < kAcross; ++b) {
      const int i = i0 + a * Team::kRows, j = j0 + b * Team::kColumns;
      if (!is_below(a, b) && i < n && j < n) m[i][j] = entry[a][b] - factor[a] * right[b];
    }
}

// M[i][j] -= top[i] inverse top[j] for first <= i <= j < n, and some entries below the diagonal.
template <class Team>
FASTMTL_HOST_DEVICE inline void eliminate(const Team& team, Matrix m, const double* top, double inverse, int first,
                                          int n) {
  if constexpr (Team::kRows == 1) {
    for (int i = first; i < n; ++i) {
      const double factor = top[i] * inverse;
      double* row = m[i];
      for (int j = i; j < n; ++j) row[j] -= factor * top[j];
    }
  } else {
    constexpr int kUnit = Team::kRows > Team::kColumns ? Team::kRows : Team::kColumns;
    constexpr int kMost = (Team::kRoom + kUnit - 1) / kUnit;
    const int units = (n - first + kUnit - 1) / kUnit;
    if (units <= 0) return;
    if (units == 1) return eliminate<1, true>(team, m, top, inverse, first, first, n);
    if constexpr (kMost >= 2)
      if (kMost == 2 || units == 2) return eliminate<2, true>(team, m, top, inverse, first, first, n);
    if constexpr (kMost >= 3) {
      if (units == 3) return eliminate<3, true>(team, m, top, inverse, first, first, n);
      if (kMost <= 4 || units == 4) return eliminate<4, true>(team, m, top, inverse, first, first, n);
    }
    if constexpr (kMost > 4) {
      for (int i = first; i < n; i += 4 * kUnit) {
        eliminate<4, true>(team, m, top, inverse, i, i, n);
        for (int j = i + 4 * kUnit; j < n; j += 4 * kUnit) eliminate<4, false>(team, m, top, inverse, i, j, n);
      }
    }
  }
}

// `solve_definite` by itself, since it is called in many places; by numbers and addresses alone, which travel in
// registers.
template <class Team>
FASTMTL_HOST_DEVICE FASTMTL_NOINLINE double solve_definite(double* data, int step, double* x, double* y, int n,
                                                           double least, double instead) {
  const Team team{};
  const Matrix m{Team::scratch(data), step};
  x = Team::scratch(x);
  y = Team::scratch(y);
  double smallest = INFINITY, last = 0.0;
  for (int k = 0; k < n; ++k) {
    team.sync();
    const double* top = m[k];
    const double pivot = top[k];
    const bool is_small = !(pivot > least);
    smallest = std::fmin(smallest, std::isnan(pivot) ? -INFINITY : pivot);
    const double inverse = is_small ? 1.0 / instead : inverse_of(pivot);
    // each pivot makes way for its inverse when all have read it
    if (k > 0 && team.rank() == 0) m[k - 1][k - 1] = last;
    last = inverse;
    if (is_small) continue;
    for (int i = k + 1 + team.rank(); i < n; i += team.size()) {
      const double factor = top[i] * inverse;
      x[i] -= factor * x[k];
      if (y != nullptr) y[i] -= factor * y[k];
    }
    eliminate(team, m, top, inverse, k + 1, n);
  }
  team.sync();
  each(team, n, [&](int i) {
    const double inverse = i == n - 1 ? last : m[i][i];
    x[i] *= inverse;
    if (y != nullptr) y[i] *= inverse;
  });
  for (int k = n; k-- > 1;) {
    team.sync();
    each(team, k, [&](int i) {
      const double factor = m[i][k] * m[i][i];
      x[i] -= factor * x[k];
      if (y != nullptr) y[i] -= factor * y[k];
    });
  }
  team.sync();
  return smallest;
}

// Solves M x = b for the right-hand sides in x and, unless it is null, in y, in place, by elimination. m: its upper
// triangle, lost. A pivot at or below `least` is replaced by `instead`, which is large or INFINITY: its component comes
// out as 0, or nearly. The smallest pivot, -INFINITY for NaN. A sync goes before and after.
template <class Team>
FASTMTL_HOST_DEVICE double solve_definite(const Team&, Matrix m, double* x, double* y, int n, double least,
                                          double instead) {
  return solve_definite<Team>(m.data, m.step, x, y, n, least, instead);
}

}  // namespace fastmtl::solvers
