// Symmetric positive definite systems: M = U^T U with an upper triangular U, in place.
#pragma once

#include "common/solvers/team.h"

namespace fastmtl::solvers {

// The upper triangle of m becomes U. A pivot at or below `least` is replaced by `instead`: what is then solved for has
// a component of no size along it (`instead` large). Whether any was.
template <class Team>
FASTMTL_HOST_DEVICE bool cholesky(const Team& team, Matrix m, int n, double least, double instead) {
  bool met = false;
  for (int k = 0; k < n; ++k) {
    team.sync();
    const bool small = !(m[k][k] > least);
    const double pivot = small ? instead : m[k][k];
    met = met || small;
    const double root = std::sqrt(pivot), inverse = 1.0 / root;
    team.sync();  // all have read the pivot
    for (int j = k + team.rank(); j < n; j += team.size()) m[k][j] = j == k ? root : small ? 0.0 : m[k][j] * inverse;
    team.sync();
    const double* top = m[k];
    for (int i = k + 1 + team.rank(); i < n; i += team.size()) {
      const double factor = top[i];
      double* row = m[i];
      for (int j = i; j < n; ++j) row[j] -= factor * top[j];
    }
  }
  team.sync();
  return met;
}

// Solves U^T U x = b in place.
template <class Team>
FASTMTL_HOST_DEVICE void solve_cholesky(const Team& team, Matrix u, double* x, int n) {
  for (int k = 0; k < n; ++k) {
    const double value = x[k] / u[k][k];
    team.sync();
    for (int j = k + team.rank(); j < n; j += team.size()) x[j] = j == k ? value : x[j] - value * u[k][j];
    team.sync();
  }
  for (int k = n; k-- > 0;) {
    const double value = x[k] / u[k][k];
    team.sync();
    for (int i = team.rank(); i <= k; i += team.size()) x[i] = i == k ? value : x[i] - value * u[i][k];
    team.sync();
  }
}

}  // namespace fastmtl::solvers
