// Priority-constrained descent: near to one gradient, with a least progress along each of the others.
#pragma once

#include "common/solvers/krum.h"

namespace fastmtl::solvers {

// Scratch of `least_multipliers`: a matrix, and arrays of n numbers or integers.
struct MultiplierScratch {
  Matrix swept;
  double *violations, *column;
  int* states;  // in: kNever for constraints that are none; out: kActive where y may be positive
};

constexpr int kNever = -1, kFree = 0, kActive = 1;

// The sweep operator on entry k: of the matrix [A B; B^T C] that is swept on the entries of A it makes
// [-A^-1 A^-1 B; B^T A^-1 C - B^T A^-1 B]. forward: k joins A; else it leaves. column: n numbers of scratch.
template <class Team>
FASTMTL_HOST_DEVICE void sweep(const Team& team, Matrix m, int n, int k, bool forward, double* column) {
  for (int i = team.rank(); i < n; i += team.size()) column[i] = m[i][k];
  team.sync();
  const double inverse = 1.0 / column[k], sign = forward ? inverse : -inverse;
  each_entry(team, n, [&](int i, int j) {
    if (i != k && j != k) m[i][j] -= column[i] * column[j] * inverse;
    else if (i == k && j == k) m[i][j] = -inverse;
    else m[i][j] = sign * column[i == k ? j : i];
  });
  team.sync();
}

// The y >= 0 of `min y . C y / 2 - h . y`, where C are the cosines of unit vectors u_i: the multipliers of the shortest
// d with `u_i . d >= h_i` for all i. By the dual method of Goldfarb and Idnani (1983): a constraint that is violated
// most is brought to equality, while those that are active stay at it, and one whose multiplier comes to zero on the
// way is let go. What is solved for at each step is read off the matrix that is swept on the active constraints.
// dependent: a vector whose squared part across the active ones is no more depends on them, and what violates it by no
// more is none. Whether there is such a d at all.
template <class Team>
FASTMTL_HOST_DEVICE bool least_multipliers(const Team& team, Matrix c, const double* h, int n, double dependent,
                                           double* y, const MultiplierScratch& s) {
  double largest = 0.0;
  for (int i = 0; i < n; ++i) largest = std::fmax(largest, std::fabs(h[i]));
  each_entry(team, n, [&](int i, int k) { s.swept[i][k] = c[i][k]; });
  for (int i = team.rank(); i < n; i += team.size()) {
    y[i] = 0.0;
    s.violations[i] = h[i];
  }
  team.sync();
  int entering = -1;
  for (int iteration = 0; iteration < 8 * n + 64; ++iteration) {
    if (entering < 0) {
      double total = 0.0;
      for (int i = team.rank(); i < n; i += team.size()) total += y[i];
      total = largest + team.sum(total);
      Found worst{INFINITY, n};
      for (int i = team.rank(); i < n; i += team.size()) {
        const double least = (s.swept[i][i] > dependent ? 1e-12 : dependent) * total;
        if (s.states[i] == kFree && s.violations[i] > least) worst = smaller(worst, {-s.violations[i], i});
      }
      worst = team.least(worst);
      if (worst.index == n) break;
      entering = worst.index;
    }
    Found first{INFINITY, n};  // of the active ones, whose multiplier comes to zero
    for (int i = team.rank(); i < n; i += team.size()) {
      const double rate = s.swept[i][entering];
      if (s.states[i] == kActive && rate > 0) first = smaller(first, {y[i] / rate, i});
    }
    first = team.least(first);
    const double across = s.swept[entering][entering];
    const double whole = across > 0 ? s.violations[entering] / across : INFINITY;
    const bool arrives = whole <= first.value;
    if (arrives && !(across > dependent)) return false;
    const double step = arrives ? whole : first.value;
    const int changes = arrives ? entering : first.index;
    team.sync();  // all have read what the step moves
    for (int i = team.rank(); i < n; i += team.size()) {
      const double rate = s.swept[i][entering];
      if (s.states[i] == kActive) y[i] = std::fmax(y[i] - step * rate, 0.0);
      else s.violations[i] -= step * rate;
      if (i == entering) y[i] += step;
      if (i != changes) continue;
      s.states[i] = arrives ? kActive : kFree;
      s.violations[i] = 0.0;
      if (!arrives) y[i] = 0.0;
    }
    sweep(team, s.swept, n, changes, arrives, s.column);
    if (arrives) entering = -1;
  }
  // what rounding has left of the equations of the active ones, solved for once more
  for (int round = 0; round < 2; ++round) {
    for (int i = team.rank(); i < n; i += team.size()) {
      double sum = h[i];
      for (int k = 0; k < n; ++k) sum -= c[i][k] * y[k];
      s.column[i] = s.states[i] == kActive ? sum : 0.0;
    }
    team.sync();
    for (int i = team.rank(); i < n; i += team.size()) {
      if (s.states[i] != kActive) continue;
      double sum = y[i];
      for (int k = 0; k < n; ++k) sum -= s.swept[i][k] * s.column[k];
      y[i] = std::fmax(sum, 0.0);
    }
    team.sync();
  }
  return true;
}

// first: the task whose gradient g_1 the update follows. p.weights: the scale s_i of each gradient. p.t: tau_i of each.
// The update is d |g_1| / |d|, with the d nearest to g_1 among those with `g_j . d >= tau_j (s_j / s_1) |g_j|^2` for
// all others j. Where there is no such d it is g_1.
template <class Team, class Problem>
FASTMTL_HOST_DEVICE void pcd(const Team& team, const Problem& p, int first, double rounding) {
  const int n = p.n;
  if (!(p.m[first][first] > 0)) return;
  cosines(team, p, p.b);
  for (int i = team.rank(); i < n; i += team.size()) {
    const bool is_one = i != first && p.u[i] > 0;
    const double least = p.t[i] * (p.weights[i] / p.weights[first]) * (p.u[i] / p.u[first]);
    p.z[i] = is_one ? least - p.m[i][first] / p.u[i] / p.u[first] : 0.0;
    p.first[i] = is_one ? kFree : kNever;
  }
  team.sync();
  double wrong = 0.0;
  for (int i = team.rank(); i < n; i += team.size()) wrong += !std::isfinite(p.z[i]);
  const bool finite = team.sum(wrong) == 0.0;
  const double dependent = std::fmax(n * rounding, 1e-9);
  const bool has_solution = finite && least_multipliers(team, p.b, p.z, n, dependent, p.y, {p.a, p.v, p.w, p.first});
  double square = 0.0, total = 0.0;
  for (int i = team.rank(); i < n && has_solution; i += team.size()) {
    double sum = 2.0 * p.b[i][first];
    for (int k = 0; k < n; ++k) sum += p.b[i][k] * p.y[k];
    square += p.y[i] * sum;
    total += p.y[i];
  }
  square = 1.0 + team.sum(square);
  total = 1.0 + team.sum(total);
  const double factor = square > n * rounding * total * total ? 1.0 / std::sqrt(square) : 0.0;
  for (int i = team.rank(); i < n; i += team.size()) {
    const double share = i == first ? 1.0 : has_solution && p.u[i] > 0 ? p.y[i] * (p.u[first] / p.u[i]) : 0.0;
    p.out[i] = finite ? factor * share : NAN;
  }
}

}  // namespace fastmtl::solvers
