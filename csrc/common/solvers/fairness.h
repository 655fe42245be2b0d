// Equations M z = c z^-p for positive z: Nash bargaining (p = 1) and alpha-fairness (p = 1 / alpha).
#pragma once

#include "common/solvers/cholesky.h"

namespace fastmtl::solvers {

struct FairnessScratch {
  Matrix factor;
  double* step;
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
  // where all were orthogonal
  for (int i = team.rank(); i < n; i += team.size()) z[i] = std::pow(c[i], 1.0 / (1.0 + p));
  double last = INFINITY;
  for (int iteration = 0; iteration < 100; ++iteration) {
    team.sync();
    for (int i = team.rank(); i < n; i += team.size()) {
      double product = 0.0;
      for (int k = 0; k < n; ++k) product += m[i][k] * z[k];
      const double target = c[i] * std::pow(z[i], -p);
      s.step[i] = target - product;
      for (int k = i; k < n; ++k) s.factor[i][k] = m[i][k];
      s.factor[i][i] += p * target / z[i];
    }
    cholesky(team, s.factor, n, 0.0, INFINITY);
    solve_cholesky(team, s.factor, s.step, n);
    double falls = 0.0, moves = 0.0;
    for (int i = 0; i < n; ++i) {
      const double relative = s.step[i] / z[i];
      falls = std::fmax(falls, -relative);
      moves = std::fmax(moves, std::fabs(relative));
    }
    const double length = falls > 0 ? std::fmin(-std::expm1(-std::log1p(p * falls) / p), 0.99) / falls : 1.0;
    team.sync();
    for (int i = team.rank(); i < n; i += team.size()) z[i] += length * s.step[i];
    // converged, or as near as rounding lets it come
    if (!(moves > 1e-14) || (moves < 1e-6 && moves > 0.5 * last)) break;
    last = moves;
  }
  team.sync();
}

}  // namespace fastmtl::solvers
