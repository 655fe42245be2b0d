// Quadratic programs with bounds: y >= 0, r = M y + q >= 0, y . r = 0, for a positive definite M.
#pragma once

#include "common/solvers/cholesky.h"

namespace fastmtl::solvers {

struct ComplementarityScratch {
  Matrix factor;
  double *values, *residual;
  int *chosen, *is_free;  // is_free: n flags
};

// First block principal pivoting (Judice and Pires 1994): which entries of y are free is guessed, the system is solved
// for these, and all wrong guesses are exchanged at once. It takes a few rounds, or goes round in circles. Then an
// active-set method (Lawson and Hanson 1974): one entry at a time is set free, and y moves towards each solution as far
// as it stays positive, so that the function falls with every move. least: an eigenvalue of M is no smaller; its
// entries are at most about 1. y: out; what is below zero by no more than rounding stays.
template <class Team>
FASTMTL_HOST_DEVICE void complementarity(const Team& team, Matrix m, const double* q, int n, double least, double* y,
                                         const ComplementarityScratch& s) {
  constexpr int kPatience = 3;  // rounds in a row that may fail to leave fewer wrong guesses
  double scale = 0.0;
  for (int i = 0; i < n; ++i) scale = std::fmax(scale, std::fabs(q[i]));
  team.sync();
  for (int i = team.rank(); i < n; i += team.size()) {
    s.is_free[i] = q[i] < 0;
    y[i] = 0.0;
  }
  int best = n + 1, patience = kPatience;
  bool one_by_one = false;
  for (int iteration = 0; iteration < 8 * n + 64; ++iteration) {
    team.sync();
    int count = 0;
    for (int i = 0; i < n; ++i) {
      if (!s.is_free[i]) continue;
      if (team.rank() == 0) s.chosen[count] = i;
      count += 1;
    }
    team.sync();
    for (int a = team.rank(); a < count; a += team.size()) {
      for (int b = a; b < count; ++b) s.factor[a][b] = m[s.chosen[a]][s.chosen[b]];
      s.values[a] = -q[s.chosen[a]];
    }
    cholesky(team, s.factor, count, 0.1 * least, 1e30);
    solve_cholesky(team, s.factor, s.values, count);
    double step = 1.0;
    int leaves = -1;
    for (int a = 0; a < count && one_by_one; ++a) {
      const double from = y[s.chosen[a]], to = s.values[a];
      if (to > 0) continue;
      const double here = from > 0 ? from / (from - to) : 0.0;
      if (leaves < 0 || here < step) step = here, leaves = a;
    }
    team.sync();
    for (int a = team.rank(); a < count; a += team.size()) {
      const int i = s.chosen[a];
      y[i] = leaves < 0 ? s.values[a] : a == leaves ? 0.0 : std::fmax((1.0 - step) * y[i] + step * s.values[a], 0.0);
      if (a == leaves) s.is_free[i] = false;
    }
    team.sync();
    if (leaves >= 0) continue;
    for (int i = team.rank(); i < n; i += team.size()) {
      double sum = q[i];
      for (int a = 0; a < count; ++a) sum += m[i][s.chosen[a]] * s.values[a];
      s.residual[i] = sum;
    }
    double size = 0.0, most = 0.0;
    for (int a = 0; a < count; ++a) {
      size += std::fabs(s.values[a]);
      most = std::fmax(most, std::fabs(s.values[a]));
    }
    team.sync();
    const double below = -1e-15 / least * most, under = -1e-13 * (scale + size);
    auto is_wrong = [&](int i) { return s.is_free[i] ? y[i] < below : s.residual[i] < under; };
    int wrong = 0, worst = -1;
    for (int i = 0; i < n; ++i) {
      if (!is_wrong(i)) continue;
      wrong += 1;
      if (worst < 0 || s.residual[i] < s.residual[worst]) worst = i;
    }
    if (wrong == 0) return;
    patience = wrong < best ? kPatience : patience - 1;
    best = wrong < best ? wrong : best;
    const bool starts_over = !one_by_one && patience < 0;
    team.sync();
    for (int i = team.rank(); i < n; i += team.size()) {
      const bool changes = one_by_one ? i == worst : is_wrong(i);
      s.is_free[i] = starts_over ? 0 : s.is_free[i] != changes;
      if (!s.is_free[i]) y[i] = 0.0;
    }
    one_by_one = one_by_one || starts_over;
  }
}

}  // namespace fastmtl::solvers
