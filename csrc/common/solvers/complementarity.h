// Quadratic programs with bounds: y >= 0, r = M y + q >= 0, y . r = 0, for a positive definite M.
#pragma once

#include "common/solvers/definite.h"

namespace fastmtl::solvers {

struct ComplementarityScratch {
  Matrix factor;
  double *values, *residual;
  int* chosen;
};

// Rounds in a row of block pivoting that may fail to leave fewer wrong guesses.
constexpr int kPatience = 3;

// First block principal pivoting (Judice and Pires 1994): which entries of y are free is guessed, the system is solved
// for these, and all wrong guesses are exchanged at once. It takes a few rounds, or goes round in circles. Then an
// active-set method (Lawson and Hanson 1974): one entry at a time is set free, and y moves towards each solution as far
// as it stays positive, so that the function falls with every move. least: an eigenvalue of M is no smaller; its
// entries are at most about 1. y: out; what is below zero by no more than rounding stays. only_blocks: the first method
// alone. Whether it was solved.
template <class Team>
FASTMTL_HOST_DEVICE bool complementarity(const Team& team, Matrix m, const double* q, int n, double least, double* y,
                                         const ComplementarityScratch& s, bool only_blocks = false) {
  const double scale = largest_of(team, n, [&](int i) { return std::fabs(q[i]); });
  Members is_free = team.members(n, [&](int i) { return q[i] < 0; });
  each(team, n, [&](int i) { y[i] = 0.0; });
  int best = n + 1, patience = kPatience;
  bool one_by_one = false;
  for (int iteration = 0; iteration < 8 * n + 64; ++iteration) {
    const int count = is_free.count();
    each(team, n, [&](int i) {
      if (!is_free.has(i)) return;
      s.chosen[is_free.before(i)] = i;
      s.values[is_free.before(i)] = -q[i];
    });
    team.sync();
    each_entry(team, count, [&](int a, int b) {
      if (b >= a) s.factor[a][b] = m[s.chosen[a]][s.chosen[b]];
    });
    solve_definite(team, s.factor, s.values, nullptr, count, 0.1 * least, 1e30);
    Found leaves{INFINITY, n};
    if (one_by_one) {
      each(team, count, [&](int a) {
        const double from = y[s.chosen[a]], to = s.values[a];
        if (!(to > 0)) leaves = smaller(leaves, {from > 0 ? from / (from - to) : 0.0, s.chosen[a]});
      });
      leaves = team.least(leaves);
    }
    const bool is_there = leaves.index == n;
    const double step = leaves.value;
    each(team, count, [&](int a) {
      const int i = s.chosen[a];
      y[i] = is_there            ? s.values[a]
             : i == leaves.index ? 0.0
                                 : std::fmax((1.0 - step) * y[i] + step * s.values[a], 0.0);
    });
    team.sync();
    if (!is_there) {
      is_free.exchange(leaves.index);
      continue;
    }
    multiply(team, m, y, n, [&](int i, double product) { s.residual[i] = q[i] + product; });
    const double size = sum_of(team, count, [&](int a) { return std::fabs(s.values[a]); });
    const double most = largest_of(team, count, [&](int a) { return std::fabs(s.values[a]); });
    team.sync();
    const double below = -1e-15 / least * most, under = -1e-13 * (scale + size);
    const Members wrong = team.members(n, [&](int i) { return is_free.has(i) ? y[i] < below : s.residual[i] < under; });
    const int count_wrong = wrong.count();
    if (count_wrong == 0) return true;
    patience = count_wrong < best ? kPatience : patience - 1;
    best = count_wrong < best ? count_wrong : best;
    if (one_by_one) {
      Found worst{INFINITY, n};
      each(team, n, [&](int i) {
        if (wrong.has(i)) worst = smaller(worst, {s.residual[i], i});
      });
      is_free.exchange(team.least(worst).index);
    } else if (patience < 0) {
      if (only_blocks) return false;
      one_by_one = true;
      is_free = {};
    } else {
      is_free.exchange(wrong);
    }
    each(team, n, [&](int i) {
      if (!is_free.has(i)) y[i] = 0.0;
    });
  }
  return false;
}

}  // namespace fastmtl::solvers
