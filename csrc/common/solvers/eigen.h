// Eigenvalues and eigenvectors of a symmetric matrix.
#pragma once

#include "common/solvers/team.h"

namespace fastmtl::solvers {

// Scratch of `eigen`: three arrays of n numbers.
struct EigenScratch {
  double *off, *first, *second;
};

// To tridiagonal form by Householder's reflections, H = 1 - beta v v^T. m: in; out: row k holds v of step k behind its
// diagonal. diagonal, off: out, of the tridiagonal matrix. rows: out, the product of the reflections, the last one
// first.
template <class Team>
FASTMTL_HOST_DEVICE void tridiagonal(const Team& team, Matrix m, Matrix rows, int n, double* diagonal, double* off,
                                     double* betas, double* product) {
  for (int k = 0; k + 1 < n; ++k) {
    double* v = m[k];
    team.sync();
    double square = 0.0;
    for (int i = k + 1; i < n; ++i) square += v[i] * v[i];
    const double head = v[k + 1], length = std::sqrt(square), moved = head > 0 ? -length : length;
    const double beta = square > 0 ? 1.0 / (square - moved * head) : 0.0;
    team.sync();  // all have read the row
    if (team.rank() == 0) {
      diagonal[k] = v[k];
      off[k] = moved;
      betas[k] = beta;
      v[k + 1] = head - moved;
    }
    if (beta == 0) continue;
    team.sync();
    for (int i = k + 1 + team.rank(); i < n; i += team.size()) {
      const double* row = m[i];
      double sum = 0.0;
      for (int j = k + 1; j < n; ++j) sum += row[j] * v[j];
      product[i] = beta * sum;
    }
    team.sync();
    double along = 0.0;
    for (int i = k + 1; i < n; ++i) along += product[i] * v[i];
    team.sync();
    for (int i = k + 1 + team.rank(); i < n; i += team.size()) product[i] -= 0.5 * beta * along * v[i];
    team.sync();
    for (int i = k + 1 + team.rank(); i < n; i += team.size()) {
      double* row = m[i];
      const double vi = v[i], qi = product[i];
      for (int j = k + 1; j < n; ++j) row[j] -= vi * product[j] + qi * v[j];
    }
  }
  team.sync();
  if (team.rank() == 0) {
    diagonal[n - 1] = m[n - 1][n - 1];
    off[n - 1] = 0.0;
  }
  // from the last reflection to the first, so that each meets the block that is no identity yet: row by row
  for (int i = team.rank(); i < n; i += team.size()) {
    double* row = rows[i];
    for (int j = 0; j < n; ++j) row[j] = i == j ? 1.0 : 0.0;
    for (int k = n - 1; k-- > 0;) {
      if (i <= k) continue;
      const double* v = m[k];
      double sum = 0.0;
      for (int j = k + 1; j < n; ++j) sum += row[j] * v[j];
      sum *= betas[k];
      for (int j = k + 1; j < n; ++j) row[j] -= sum * v[j];
    }
  }
  team.sync();
}

// By the implicit QL method on the tridiagonal form (Martin and Wilkinson 1968): rank 0 works out the rotations of one
// sweep, then each member turns its columns of `vectors`. m: [n, n], lost. values: out, n numbers in no order. vectors:
// out, row k the eigenvector of value k. Values are right to a few roundings of the largest.
template <class Team>
FASTMTL_HOST_DEVICE void eigen(const Team& team, Matrix m, Matrix vectors, int n, double* values,
                               const EigenScratch& s) {
  double *d = values, *e = s.off, *cosines = s.first, *sines = s.second;
  tridiagonal(team, m, vectors, n, d, e, s.first, s.second);
  double largest = 0.0;
  for (int i = 0; i < n; ++i) largest = std::fmax(largest, std::fabs(d[i]) + std::fabs(e[i]));
  const double least = 2e-17 * largest;  // an off-diagonal entry that is none
  for (int low = 0; low < n; ++low) {
    for (int sweep = 0; sweep < 60; ++sweep) {
      int high = low;
      while (high + 1 < n && std::fabs(e[high]) > least) high += 1;
      if (high == low) break;
      team.sync();
      if (team.rank() == 0) {
        double g = (d[low + 1] - d[low]) / (2.0 * e[low]);
        g = d[high] - d[low] + e[low] / (g + std::copysign(std::sqrt(g * g + 1.0), g));
        double sine = 1.0, cosine = 1.0, shift = 0.0;
        for (int i = high; i-- > low;) {
          const double f = sine * e[i], b = cosine * e[i], r = std::sqrt(f * f + g * g);
          e[i + 1] = r;
          sine = r > 0 ? f / r : 0.0;
          cosine = r > 0 ? g / r : 1.0;
          g = d[i + 1] - shift;
          const double turned = (d[i] - g) * sine + 2.0 * cosine * b;
          shift = sine * turned;
          d[i + 1] = g + shift;
          g = cosine * turned - b;
          cosines[i] = cosine;
          sines[i] = sine;
        }
        d[low] -= shift;
        e[low] = g;
        e[high] = 0.0;
      }
      team.sync();
      for (int i = high; i-- > low;) {
        double *x = vectors[i], *y = vectors[i + 1];
        const double c = cosines[i], t = sines[i];
        for (int k = team.rank(); k < n; k += team.size()) {
          const double a = x[k], b = y[k];
          x[k] = c * a - t * b;
          y[k] = t * a + c * b;
        }
      }
    }
  }
  team.sync();
}

}  // namespace fastmtl::solvers
