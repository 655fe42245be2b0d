// Equations M z = u^(p - 1) z^-p for positive z: Nash bargaining (p = 1) and alpha-fairness (p = 1 / alpha).
#pragma once

#include "common/solvers/definite.h"

namespace fastmtl::solvers {

struct FairnessScratch {
  Matrix factor;
  double *step, *target, *sizes;
};

// u^(p - 1) z^-p, without a power that no float64 holds.
FASTMTL_HOST_DEVICE inline double fair_target(double u, double z, double p) {
  return p == 1.0 ? 1.0 / z : std::pow(u / z, p) / u;
}

constexpr int kFairnessIterations = 200;
// In the first of them an entry that Newton's step changes by more than this, in its own size, jumps instead.
constexpr int kJumpIterations = 50;
constexpr double kFarStep = 3.0;
// No entry gets smaller: a solution may have some that no float64 holds.
constexpr double kLeastEntry = 1e-280;

// Newton's method on 1/2 z^T M z - sum_i u_i^(p - 1) integral of z_i^-p, which is convex in z > 0. m: positive
// definite, with a diagonal of about 1; u > 0. z: out.
//
// Along a step d, whose fastest fall is r = max(-d_i / z_i), the second derivative grows at most by (1 - t r)^-(p + 1).
// Newton's first derivative is the negative of the second, so that up to t = (1 - (1 + p r)^(-1 / p)) / r the function
// falls for certain: a length that needs no search, keeps z positive, and tends to 1 as r tends to 0.
//
// An entry whose solution is many orders of magnitude off would hold up all others so. 1 + p r is (M z)_i over its
// target: times (1 + p r)^(-1 / p) the entry meets its own equation, for an M z that stays as it is. There it jumps, at
// most to where its own part of M z alone would be the target.
template <class Team>
FASTMTL_HOST_DEVICE void fairness(const Team& team, Matrix m, const double* u, int n, double p, double* z,
                                  const FairnessScratch& s) {
  auto alone = [&](int i) { return p == 1.0 ? 1.0 : std::pow(u[i], (p - 1.0) / (p + 1.0)); };
  // where all were orthogonal, times what is best along that ray: half the iterations of a start without it
  each(team, n, [&](int i) { z[i] = alone(i); });
  team.sync();
  multiply(team, m, z, n, [&](int i, double product) { s.step[i] = product; });
  each(team, n, [&](int i) { s.target[i] = z[i] * fair_target(u[i], z[i], p); });
  team.sync();
  const double square = dot(team, z, s.step, n), wanted = sum_of(team, n, [&](int i) { return s.target[i]; });
  const double ray = square > 0 ? std::pow(wanted / square, 1.0 / (1.0 + p)) : 1.0;
  each(team, n, [&](int i) { z[i] *= ray; });
  double last = INFINITY;
  // what a step that seems to be all that rounding leaves may leave of the equations, in the targets' sizes
  double left = 0.0;
  bool may_end = false;
  for (int iteration = 0; iteration < kFairnessIterations; ++iteration) {
    each(team, n, [&](int i) { s.target[i] = fair_target(u[i], z[i], p); });
    team.sync();
    multiply_with_sizes(team, m, z, n, [&](int i, double product, double size) {
      s.step[i] = s.target[i] - product;
      s.sizes[i] = size;
    });
    if (may_end) {
      team.sync();
      const double off = largest_of(team, n, [&](int i) {
        const bool is_held = z[i] <= kLeastEntry && s.step[i] < 0;
        return !is_held && std::fabs(s.step[i]) > n * kEpsilon * s.sizes[i] + left * s.target[i] ? 1.0 : 0.0;
      });
      if (off == 0) break;
    }
    each_entry(team, n, [&](int i, int k) {
      if (k >= i) s.factor[i][k] = m[i][k] + (k == i ? p * s.target[i] / z[i] : 0.0);
    });
    solve_definite(team, s.factor, s.step, nullptr, n, 0.0, INFINITY);
    const double far = iteration < kJumpIterations ? kFarStep : INFINITY;
    auto fall = [&](int i) { return -s.step[i] / z[i]; };
    // at the least entry there is it stays, and keeps no other back
    auto is_held = [&](int i) { return z[i] <= kLeastEntry && fall(i) > 0; };
    const double falls = largest_of(team, n, [&](int i) { return is_held(i) || fall(i) > far ? 0.0 : fall(i); });
    const double moves = largest_of(team, n, [&](int i) { return is_held(i) ? 0.0 : std::fabs(fall(i)); });
    double length = 1.0;
    if (falls > 0) {
      const double most = p == 1.0 ? falls / (1.0 + falls) : -std::expm1(-std::log1p(p * falls) / p);
      length = std::fmin(most, 0.99) / falls;
    }
    each(team, n, [&](int i) {
      if (is_held(i)) return;
      const double r = fall(i), stepped = z[i] + length * s.step[i];
      if (!(std::fabs(r) > far)) {
        z[i] = stepped;
        return;
      }
      const double jumped = z[i] * std::exp(std::fmin(-std::log(std::fmax(1.0 + p * r, 1e-300)) / p, 600.0));
      z[i] = r > 0 ? std::fmax(jumped, kLeastEntry) : std::fmax(stepped, std::fmin(jumped, alone(i)));
    });
    if (!(moves > 1e-14)) break;
    // Newton's steps get smaller faster than that, but for rounding: it is enough if that is all that is left of the
    // equations, or what steps of this size leave of them
    may_end = moves * std::fmin(p, 1.0) < 0.1 && moves > 0.5 * last;
    if (may_end && moves < 1e-6) break;
    left = moves < 1e-2 ? (1.0 + p) * moves * moves : 0.0;
    last = moves;
  }
}

}  // namespace fastmtl::solvers
