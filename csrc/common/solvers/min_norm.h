// The point of least norm in the convex hull of n vectors, of which the Gram matrix is known.
#pragma once

#include "common/solvers/complementarity.h"

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
  Found shortest{INFINITY, 0};
  each(team, count, [&](int a) { shortest = smaller(shortest, {m[s.corral[a]][s.corral[a]], a}); });
  const double shift = team.least(shortest).value;
  each(team, count, [&](int a) { s.affine[a] = s.lengths[a] = 1.0 / std::sqrt(m[s.corral[a]][s.corral[a]] + shift); });
  team.sync();
  each_entry(team, count, [&](int a, int b) {
    if (b >= a) s.factor[a][b] = (m[s.corral[a]][s.corral[b]] + shift) * s.lengths[a] * s.lengths[b];
  });
  solve_definite(team, s.factor, s.affine, nullptr, count, 1e-15, 1e30);
  const double total = dot(team, s.affine, s.lengths, count);
  each(team, count, [&](int a) { s.affine[a] *= s.lengths[a] / total; });
}

// Wolfe 1976, *Finding the nearest point in a polytope*. m: [n, n] inner products. w: in, the weights to start from;
// out, the weights of the point, which are not negative and add up to 1. It ends where no vector is nearer to the
// origin along the point than the point itself, as far as rounding lets that be seen, or where the norm falls no more.
// On the way the corral holds the vectors whose weight is positive. A sync goes before and after.
template <class Team>
FASTMTL_HOST_DEVICE void min_norm(const Team& team, Matrix m, int n, double* w, const MinNormScratch& s) {
  team.sync();
  Found zero{INFINITY, n};
  each(team, n, [&](int i) {
    if (!(m[i][i] > 0)) zero = smaller(zero, {0.0, i});
  });
  zero = team.least(zero);
  if (zero.index < n) {
    each(team, n, [&](int i) { w[i] = i == zero.index ? 1.0 : 0.0; });
    team.sync();
    return;
  }
  const Members start = team.members(n, [&](int i) { return w[i] > 0; });
  int count = start.count();
  each(team, n, [&](int i) {
    if (start.has(i)) s.corral[start.before(i)] = i;
  });
  team.sync();
  double last = INFINITY;
  // a start of several vectors is first moved to the best point of its own
  for (int iteration = 0; iteration < 8 * n + 64; ++iteration) {
    while (count > 1) {
      nearest_in_affine_hull(team, m, count, s);
      // all the way there, or as far as no weight turns negative: whose weight vanishes first leaves
      Found leaves{INFINITY, count};
      each(team, count, [&](int a) {
        const double from = w[s.corral[a]], to = s.affine[a];
        if (!(to > 0)) leaves = smaller(leaves, {from > 0 ? from / (from - to) : 0.0, a});
      });
      leaves = team.least(leaves);
      const bool is_there = leaves.index == count;
      const double step = is_there ? 1.0 : leaves.value;
      each(team, count, [&](int a) {
        const int i = s.corral[a];
        w[i] = a == leaves.index ? 0.0 : std::fmax((1.0 - step) * w[i] + step * s.affine[a], 0.0);
        s.lengths[a] = i;  // its place is about to be another's
      });
      team.sync();
      if (is_there) break;
      count -= 1;
      each(team, count, [&](int a) { s.corral[a] = static_cast<int>(s.lengths[a + (a >= leaves.index)]); });
      if (count == 1 && team.rank() == 0) w[s.corral[0]] = 1.0;
      team.sync();
    }
    multiply_with_sizes(team, m, w, n, [&](int i, double product, double size) {
      s.product[i] = product;
      s.lengths[i] = size;
    });
    team.sync();
    const double norm = dot(team, w, s.product, n);
    Found nearest{INFINITY, n};
    each(team, n, [&](int i) {
      // which of those that would help comes nearest to its own length against the point
      const double gain = norm - s.product[i] - 1e-14 * (s.lengths[i] + std::fabs(norm));
      if (gain > 0 && w[i] == 0) nearest = smaller(nearest, {-gain / std::sqrt(m[i][i]), i});
    });
    nearest = team.least(nearest);
    if (nearest.index == n || !(norm < last)) break;
    last = norm;
    if (team.rank() == 0) s.corral[count] = nearest.index;
    count += 1;
    team.sync();
  }
  team.sync();
}

}  // namespace fastmtl::solvers
