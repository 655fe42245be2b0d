// Eigenvalues and eigenvectors of a symmetric matrix.
#pragma once

#include "common/solvers/team.h"

namespace fastmtl::solvers {

// Jacobi's rotations, n / 2 disjoint pairs at a time. m: [n, n], out: its diagonal holds the eigenvalues. vectors: out,
// row k the eigenvector of value k. cosines, sines: scratch of n / 2 + 1 numbers each.
template <class Team>
FASTMTL_HOST_DEVICE void eigen(const Team& team, Matrix m, Matrix vectors, int n, double* cosines, double* sines) {
  const int players = n + n % 2, pairs = players / 2;
  for (int i = team.rank(); i < n; i += team.size())
    for (int k = 0; k < n; ++k) vectors[i][k] = i == k ? 1.0 : 0.0;
  // a tournament: in each round everyone meets another; the last player of an odd number rests its opponent
  auto meets = [=](int round, int pair, int& p, int& q) {
    const int turn = players - 1;
    p = pair == 0 ? turn : (round + pair) % turn;
    q = pair == 0 ? round : (round + turn - pair) % turn;
    if (p > q) {
      const int swap = p;
      p = q;
      q = swap;
    }
    return q < n;
  };
  for (int sweep = 0; sweep < 30; ++sweep) {
    team.sync();
    double off = 0.0, diagonal = 0.0;
    for (int i = team.rank(); i < n; i += team.size()) {
      for (int k = 0; k < n; ++k) (k == i ? diagonal : off) += m[i][k] * m[i][k];
    }
    off = team.sum(off);
    diagonal = team.sum(diagonal);
    if (!(off > 1e-34 * diagonal)) return;
    for (int round = 0; round < players - 1; ++round) {
      for (int pair = team.rank(); pair < pairs; pair += team.size()) {
        int p, q;
        double c = 1.0, s = 0.0;
        if (meets(round, pair, p, q) && m[p][q] != 0) {
          const double theta = (m[q][q] - m[p][p]) / (2.0 * m[p][q]);
          const double t = (theta >= 0 ? 1.0 : -1.0) / (std::fabs(theta) + std::sqrt(theta * theta + 1.0));
          c = 1.0 / std::sqrt(t * t + 1.0);
          s = std::isfinite(theta * theta) ? t * c : 0.0;
        }
        cosines[pair] = c;
        sines[pair] = s;
      }
      team.sync();
      for (int pair = team.rank(); pair < pairs; pair += team.size()) {  // rows
        int p, q;
        if (!meets(round, pair, p, q) || sines[pair] == 0) continue;
        const double c = cosines[pair], s = sines[pair];
        double *mp = m[p], *mq = m[q], *vp = vectors[p], *vq = vectors[q];
        for (int k = 0; k < n; ++k) {
          const double x = mp[k], y = mq[k];
          mp[k] = c * x - s * y;
          mq[k] = s * x + c * y;
        }
        for (int k = 0; k < n; ++k) {
          const double x = vp[k], y = vq[k];
          vp[k] = c * x - s * y;
          vq[k] = s * x + c * y;
        }
      }
      team.sync();
      for (int i = team.rank(); i < n; i += team.size()) {  // columns
        double* row = m[i];
        for (int pair = 0; pair < pairs; ++pair) {
          int p, q;
          if (!meets(round, pair, p, q)) continue;
          const double c = cosines[pair], s = sines[pair], x = row[p], y = row[q];
          row[p] = c * x - s * y;
          row[q] = s * x + c * y;
        }
      }
      team.sync();
    }
  }
}

}  // namespace fastmtl::solvers
