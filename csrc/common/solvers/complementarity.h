// Quadratic programs with bounds: y >= 0, r = M y + q >= 0, y . r = 0, for a positive definite M.
#pragma once

#include "common/solvers/cholesky.h"

namespace fastmtl::solvers {

struct ComplementarityScratch {
  Matrix factor;
  double *values, *residual;
  int *chosen, *is_free;  // is_free: n flags
};

// Block principal pivoting (Judice and Pires 1994): which entries of y are free is guessed, the system is solved for
// these, and all wrong guesses are exchanged at once; where that does not lead on, the last of them alone, which ends
// for every positive definite M. y: out. fixed: an entry that stays 0, or -1. Whether it ended.
template <class Team>
FASTMTL_HOST_DEVICE bool complementarity(const Team& team, Matrix m, const double* q, int n, int fixed, double* y,
                                         const ComplementarityScratch& s) {
  double scale = 0.0;
  for (int i = 0; i < n; ++i) scale = std::fabs(q[i]) > scale ? std::fabs(q[i]) : scale;
  double largest = 0.0;
  for (int i = 0; i < n; ++i) largest = m[i][i] > largest ? m[i][i] : largest;
  team.sync();
  for (int i = team.rank(); i < n; i += team.size()) s.is_free[i] = i != fixed && q[i] < 0;
  int best = n + 1, tries = 3;
  for (int iteration = 0; iteration < 16 * n + 64; ++iteration) {
    team.sync();
    int count = 0;
    for (int i = 0; i < n; ++i) count += s.is_free[i];
    if (team.rank() == 0) {
      int k = 0;
      for (int i = 0; i < n; ++i)
        if (s.is_free[i]) s.chosen[k++] = i;
    }
    team.sync();
    for (int a = team.rank(); a < count; a += team.size()) {
      for (int b = a; b < count; ++b) s.factor[a][b] = m[s.chosen[a]][s.chosen[b]];
      s.values[a] = -q[s.chosen[a]];
    }
    cholesky(team, s.factor, count, 1e-15 * largest, 1e30 * largest);
    solve_cholesky(team, s.factor, s.values, count);
    for (int i = team.rank(); i < n; i += team.size()) y[i] = 0.0;
    team.sync();
    for (int a = team.rank(); a < count; a += team.size()) y[s.chosen[a]] = s.values[a];
    team.sync();
    for (int i = team.rank(); i < n; i += team.size()) {
      double sum = q[i];
      for (int a = 0; a < count; ++a) sum += m[i][s.chosen[a]] * s.values[a];
      s.residual[i] = sum;
    }
    team.sync();
    double size = 0.0;
    for (int a = 0; a < count; ++a) size += std::fabs(s.values[a]);
    const double slack = 1e-13 * (scale + largest * size);
    int wrong = 0, last = -1;
    for (int i = 0; i < n; ++i) {
      if (i == fixed || !(s.is_free[i] ? y[i] < 0 : s.residual[i] < -slack)) continue;
      wrong += 1;
      last = i;
    }
    if (wrong == 0) return true;
    const bool all = wrong < best || tries > 0;
    if (wrong < best) best = wrong, tries = 3;
    else if (tries > 0) tries -= 1;
    team.sync();
    for (int i = team.rank(); i < n; i += team.size()) {
      const bool is_wrong = i != fixed && (s.is_free[i] ? y[i] < 0 : s.residual[i] < -slack);
      if (is_wrong && (all || i == last)) s.is_free[i] = !s.is_free[i];
    }
  }
  return false;
}

}  // namespace fastmtl::solvers
