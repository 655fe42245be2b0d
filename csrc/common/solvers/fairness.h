// Equations M z = c z^(-1 / alpha) for positive z: Nash bargaining (alpha = 1) and alpha-fairness.
#pragma once

#include "common/solvers/cholesky.h"

namespace fastmtl::solvers {

struct FairnessScratch {
  Matrix factor;
  double *gradient, *step, *moved;
};

// Newton's method on 1/2 z^T M z - sum_i c_i integral of z_i^(-1 / alpha), which is convex in z > 0, with steps that
// stay positive and go down. m: positive semidefinite, of diagonal 1. z: out.
template <class Team>
FASTMTL_HOST_DEVICE void fairness(const Team& team, Matrix m, const double* c, int n, double alpha, double* z,
                                  const FairnessScratch& s) {
  const double power = 1.0 / alpha;
  auto potential = [&](const double* x) {
    double sum = 0.0;
    for (int i = team.rank(); i < n; i += team.size()) {
      double product = 0.0;
      for (int k = 0; k < n; ++k) product += m[i][k] * x[k];
      const double gain = power == 1.0 ? std::log(x[i]) : std::pow(x[i], 1.0 - power) / (1.0 - power);
      sum += 0.5 * x[i] * product - c[i] * gain;
    }
    return team.sum(sum);
  };
  // where all were orthogonal
  for (int i = team.rank(); i < n; i += team.size()) z[i] = std::pow(c[i], 1.0 / (1.0 + power));
  team.sync();
  double now = potential(z);
  for (int iteration = 0; iteration < 100; ++iteration) {
    for (int i = team.rank(); i < n; i += team.size()) {
      double sum = 0.0;
      for (int k = 0; k < n; ++k) sum += m[i][k] * z[k];
      const double target = c[i] * std::pow(z[i], -power);
      s.gradient[i] = sum - target;
      s.step[i] = target - sum;
      for (int k = i; k < n; ++k) s.factor[i][k] = m[i][k];
      s.factor[i][i] += power * target / z[i];
    }
    cholesky(team, s.factor, n, 0.0, 1e300);
    solve_cholesky(team, s.factor, s.step, n);
    const double slope = dot(team, s.gradient, s.step, n);  // not positive
    double length = 1.0;
    for (int i = 0; i < n; ++i)
      if (s.step[i] < 0 && -0.9 * z[i] / s.step[i] < length) length = -0.9 * z[i] / s.step[i];
    double relative = 0.0;
    for (int i = 0; i < n; ++i) {
      const double r = std::fabs(s.step[i]) / z[i];
      relative = r > relative ? r : relative;
    }
    for (int half = 0; half < 40; ++half) {
      team.sync();
      for (int i = team.rank(); i < n; i += team.size()) s.moved[i] = z[i] + length * s.step[i];
      team.sync();
      const double there = potential(s.moved);
      if (there <= now + 1e-4 * length * slope || relative < 1e-7) {
        now = there;
        break;
      }
      length *= 0.5;
    }
    team.sync();
    for (int i = team.rank(); i < n; i += team.size()) z[i] = s.moved[i];
    team.sync();
    if (!(relative > 1e-14)) return;
    if (!(slope < 0)) return;
  }
}

}  // namespace fastmtl::solvers
