// The point of least norm in the convex hull of T vectors, of which the Gram matrix is known.
#pragma once

#include "common/solvers/cholesky.h"

namespace fastmtl::solvers {

// Scratch of `min_norm`: a matrix like m, and five arrays of n numbers or integers.
struct MinNormScratch {
  Matrix factor;
  double *product, *affine;
  int* corral;
};

// Wolfe 1976, *Finding the nearest point in a polytope*. m: [n, n] inner products. w: in, the weights to start from,
// those of a few vectors other than 0; out, the weights of the point, which are not negative and add up to 1. Ends when
// no vector is nearer to the origin along the point than the point itself, up to 1e-14 of the longest vector's square.
// Returns the square of the point's norm.
template <class Team>
FASTMTL_HOST_DEVICE double min_norm(const Team& team, Matrix m, int n, double* w, const MinNormScratch& s) {
  double longest = 0.0, mean = 0.0;
  for (int i = 0; i < n; ++i) {
    longest = m[i][i] > longest ? m[i][i] : longest;
    mean += m[i][i] / n;
  }
  const double tolerance = 1e-14 * longest;
  int count = 0;
  for (int i = 0; i < n; ++i)
    if (w[i] > 0) count += 1;
  team.sync();
  if (team.rank() == 0) {
    int k = 0;
    for (int i = 0; i < n; ++i)
      if (w[i] > 0) s.corral[k++] = i;
  }
  bool added = count > 1;  // a start of several is first moved to the best point of its own
  int newest = -1;
  for (int iteration = 0; iteration < 8 * n + 64; ++iteration) {
    // to the best point of the corral's affine hull, or as far as weights stay positive
    while (added) {
      team.sync();
      for (int a = team.rank(); a < count; a += team.size()) {
        for (int b = a; b < count; ++b) s.factor[a][b] = m[s.corral[a]][s.corral[b]] + mean;
        s.affine[a] = 1.0;
      }
      cholesky(team, s.factor, count, 1e-15 * mean, 1e30 * mean);
      solve_cholesky(team, s.factor, s.affine, count);
      double total = 0.0;
      for (int a = 0; a < count; ++a) total += s.affine[a];
      double step = 1.0;
      bool inside = true;
      for (int a = 0; a < count; ++a) {
        const double from = w[s.corral[a]], to = s.affine[a] / total;
        if (to > 1e-15) continue;
        inside = false;
        const double here = from > 0 ? from / (from - to) : 0.0;
        step = here < step ? here : step;
      }
      // who reaches zero leaves, the newest at once if it cannot enter
      int left = 0;
      bool refused = false;
      team.sync();
      if (inside) {
        for (int a = team.rank(); a < count; a += team.size()) w[s.corral[a]] = s.affine[a] / total;
        left = count;
        added = false;
      } else {
        for (int a = 0; a < count; ++a) {
          const int i = s.corral[a];
          const double from = w[i], to = s.affine[a] / total, moved = from + step * (to - from);
          const bool stays = to > 1e-15 || moved > 1e-15;
          refused = refused || (!stays && i == newest);
          left += stays;
        }
        team.sync();
        if (team.rank() == 0) {
          double sum = 0.0;
          int k = 0;
          for (int a = 0; a < count; ++a) {
            const int i = s.corral[a];
            const double from = w[i], to = s.affine[a] / total, moved = from + step * (to - from);
            const bool stays = to > 1e-15 || moved > 1e-15;
            w[i] = stays ? (moved > 0 ? moved : 0.0) : 0.0;
            sum += w[i];
            if (stays) s.corral[k++] = i;
          }
          for (int i = 0; i < n; ++i) w[i] /= sum;
        }
      }
      count = left;
      team.sync();
      if (refused || count <= 1) added = false;
    }
    team.sync();
    multiply(team, m, w, s.product, n);
    team.sync();
    const double norm = dot(team, w, s.product, n);
    Found nearest{INFINITY, n};
    for (int i = team.rank(); i < n; i += team.size()) nearest = smaller(nearest, {s.product[i], i});
    nearest = team.least(nearest);
    if (!(nearest.value < norm - tolerance) || nearest.index == newest) return norm > 0 ? norm : 0.0;
    newest = nearest.index;
    for (int a = 0; a < count; ++a)
      if (s.corral[a] == newest) return norm > 0 ? norm : 0.0;  // rounding: it has its weight already
    team.sync();
    if (team.rank() == 0) s.corral[count] = newest;
    count += 1;
    added = true;
  }
  return dot(team, w, s.product, n);
}

}  // namespace fastmtl::solvers
