// Equations M z = c z^-p for positive z: Nash bargaining (p = 1) and alpha-fairness (p = 1 / alpha).
#pragma once

#include "common/solvers/definite.h"

namespace fastmtl::solvers {

struct FairnessScratch {
  Matrix factor;
  double *step, *target;
};

// Newton's method on 1/2 z^T M z - sum_i c_i integral of z_i^-p, which is convex in z > 0. m: positive definite; c > 0.
// z: out.
//
// Along a step d, whose fastest fall is r = max(-d_i / z_i), the second derivative grows at most by (1 - t r)^-(p + 1).
// Newton's first derivative is the negative of the second, so that up to t = (1 - (1 + p r)^(-1 / p)) / r the function
// falls for certain: a length that needs no search, keeps z positive, and tends to 1 as r tends to 0.
template <class Team>
FASTMTL_HOST_DEVICE void fairness(const Team& team, Matrix m, const double* c, int n, double p, double* z,
                                  const FairnessScratch& s) {
  // where all were orthogonal, times what is best along that ray: half the iterations of a start without it
  each(team, n, [&](int i) { z[i] = std::pow(c[i], 1.0 / (1.0 + p)); });
  team.sync();
  multiply(team, m, z, n, [&](int i, double product) { s.step[i] = product; });
  each(team, n, [&](int i) { s.target[i] = c[i] * std::pow(z[i], 1.0 - p); });
  team.sync();
  const double square = dot(team, z, s.step, n), wanted = sum_of(team, n, [&](int i) { return s.target[i]; });
  const double ray = std::pow(wanted / square, 1.0 / (1.0 + p));
  each(team, n, [&](int i) { z[i] *= ray; });
  double last = INFINITY;
  for (int iteration = 0; iteration < 100; ++iteration) {
    each(team, n, [&](int i) { s.target[i] = c[i] * (p == 1.0 ? 1.0 / z[i] : std::pow(z[i], -p)); });
    team.sync();
    multiply(team, m, z, n, [&](int i, double product) { s.step[i] = s.target[i] - product; });
    each_entry(team, n, [&](int i, int k) {
      if (k >= i) s.factor[i][k] = m[i][k] + (k == i ? p * s.target[i] / z[i] : 0.0);
    });
    solve_definite(team, s.factor, s.step, nullptr, n, 0.0, INFINITY);
    const double falls = largest_of(team, n, [&](int i) { return -s.step[i] / z[i]; });
    const double moves = largest_of(team, n, [&](int i) { return std::fabs(s.step[i] / z[i]); });
    double length = 1.0;
    if (falls > 0) {
      const double most = p == 1.0 ? falls / (1.0 + falls) : -std::expm1(-std::log1p(p * falls) / p);
      length = std::fmin(most, 0.99) / falls;
    }
    each(team, n, [&](int i) { z[i] += length * s.step[i]; });
    // converged, or as near as rounding lets it come
    if (!(moves > 1e-14) || (moves < 1e-6 && moves > 0.5 * last)) break;
    last = moves;
  }
}

}  // namespace fastmtl::solvers
