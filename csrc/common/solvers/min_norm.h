// The point of least norm in the convex hull of n vectors, of which the Gram matrix is known.
#pragma once

#include "common/solvers/cholesky.h"

namespace fastmtl::solvers {

// Scratch of `min_norm`: a matrix like m, and arrays of n numbers or integers.
struct MinNormScratch {
  Matrix factor;
  double *product, *affine, *lengths;
  int* corral;
};

// The weights, which add up to 1, of the point nearest to the origin in the affine hull of the corral: those with
// (M + s) a ~ 1 for any s > 0. Its rows and columns are divided by the vectors' lengths, so that vectors of very
// different lengths are all seen to 1e-15 of their own. A vector that depends on those before it gets weight 0.
template <class Team>
FASTMTL_HOST_DEVICE void nearest_in_affine_hull(const Team& team, Matrix m, int count, const MinNormScratch& s) {
  double shortest = INFINITY;
  for (int a = 0; a < count; ++a) shortest = std::fmin(shortest, m[s.corral[a]][s.corral[a]]);
  for (int a = team.rank(); a < count; a += team.size())
    s.affine[a] = s.lengths[a] = 1.0 / std::sqrt(m[s.corral[a]][s.corral[a]] + shortest);
  team.sync();
  for (int a = team.rank(); a < count; a += team.size()) {
    const double* row = m[s.corral[a]];
    for (int b = a; b < count; ++b) s.factor[a][b] = (row[s.corral[b]] + shortest) * s.lengths[a] * s.lengths[b];
  }
  cholesky(team, s.factor, count, 1e-15, 1e30);
  solve_cholesky(team, s.factor, s.affine, count);
  double total = 0.0;
  for (int a = 0; a < count; ++a) total += s.affine[a] * s.lengths[a];
  team.sync();
  for (int a = team.rank(); a < count; a += team.size()) s.affine[a] *= s.lengths[a] / total;
  team.sync();
}

// Wolfe 1976, *Finding the nearest point in a polytope*. m: [n, n] inner products. w: in, the weights to start from,
// those of affinely independent vectors; out, the weights of the point, which are not negative and add up to 1. It ends
// where no vector is nearer to the origin along the point than the point itself, as far as rounding lets that be seen,
// or where the norm falls no more. On the way the corral holds the vectors whose weight is positive.
template <class Team>
FASTMTL_HOST_DEVICE void min_norm(const Team& team, Matrix m, int n, double* w, const MinNormScratch& s) {
  team.sync();
  for (int i = 0; i < n; ++i) {
    if (m[i][i] > 0) continue;
    team.sync();
    for (int k = team.rank(); k < n; k += team.size()) w[k] = k == i ? 1.0 : 0.0;
    team.sync();
    return;
  }
  int count = 0;
  for (int i = 0; i < n; ++i) {
    if (!(w[i] > 0)) continue;
    if (team.rank() == 0) s.corral[count] = i;
    count += 1;
  }
  double last = INFINITY;
  // a start of several vectors is first moved to the best point of its own
  for (int iteration = 0; iteration < 8 * n + 64; ++iteration) {
    if (count > 1) team.sync();
    while (count > 1) {
      nearest_in_affine_hull(team, m, count, s);
      // all the way there, or as far as no weight turns negative: whose weight vanishes first leaves
      double step = 1.0;
      int leaves = -1;
      for (int a = 0; a < count; ++a) {
        const double from = w[s.corral[a]], to = s.affine[a];
        if (to > 0) continue;
        const double here = from > 0 ? from / (from - to) : 0.0;
        if (leaves < 0 || here < step) step = here, leaves = a;
      }
      team.sync();
      for (int a = team.rank(); a < count; a += team.size()) {
        const int i = s.corral[a];
        w[i] = a == leaves ? 0.0 : std::fmax((1.0 - step) * w[i] + step * s.affine[a], 0.0);
      }
      team.sync();
      if (leaves < 0) break;
      if (team.rank() == 0)
        for (int a = leaves; a + 1 < count; ++a) s.corral[a] = s.corral[a + 1];
      count -= 1;
      team.sync();
      if (count == 1) {
        if (team.rank() == 0) w[s.corral[0]] = 1.0;
        team.sync();
      }
    }
    double norm = 0.0;
    Found nearest{INFINITY, n};
    for (int i = team.rank(); i < n; i += team.size()) {
      double product = 0.0, size = 0.0;
      for (int k = 0; k < n; ++k) {
        product += m[i][k] * w[k];
        size += std::fabs(m[i][k]) * w[k];
      }
      norm += w[i] * product;
      s.product[i] = product;
      s.lengths[i] = size;
    }
    norm = team.sum(norm);
    for (int i = team.rank(); i < n; i += team.size()) {
      // which of those that would help comes nearest to its own length against the point
      const double gain = norm - s.product[i] - 1e-14 * (s.lengths[i] + std::fabs(norm));
      if (gain > 0 && w[i] == 0) nearest = smaller(nearest, {-gain / std::sqrt(m[i][i]), i});
    }
    nearest = team.least(nearest);
    if (nearest.index == n || !(norm < last)) return;
    last = norm;
    team.sync();
    if (team.rank() == 0) s.corral[count] = nearest.index;
    count += 1;
  }
}

}  // namespace fastmtl::solvers
