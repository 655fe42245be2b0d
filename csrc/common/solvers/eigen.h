// Eigenvalues and eigenvectors of a symmetric matrix: one thread by tridiagonal form, a block by rotations side by
// side.
#pragma once

#include "common/solvers/team.h"

namespace fastmtl::solvers {

// Scratch of `eigen`: three arrays of n + 1 numbers.
struct EigenScratch {
  double *off, *first, *second;
};

// The square of a column that counts as zero, of a matrix whose entries are at most 1: its inverse would be no float64.
constexpr double kLeastSquare = 1e-280;

// Rows, entry by entry: in registers of 256 bits where the processor has them, to the same bits.
namespace by_row {

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__CUDACC__)
#define FASTMTL_EACH_WIDTH(name, parameters, arguments)                                        \
  __attribute__((target("avx2"))) inline void name##_wide parameters { name##_any arguments; } \
  inline void name parameters {                                                                \
    if (__builtin_cpu_supports("avx2")) name##_wide arguments;                                 \
    else name##_any arguments;                                                                 \
  }
#define FASTMTL_ANY_WIDTH __attribute__((always_inline)) inline
#else
#define FASTMTL_EACH_WIDTH(name, parameters, arguments) \
  inline void name parameters { name##_any arguments; }
#define FASTMTL_ANY_WIDTH inline
#endif

// x += factor y, from one index up to another.
FASTMTL_ANY_WIDTH void add_any(double* __restrict__ x, const double* __restrict__ y, double factor, int from, int to) {
  for (int k = from; k < to; ++k) x[k] += factor * y[k];
}
FASTMTL_EACH_WIDTH(add, (double* x, const double* y, double factor, int from, int to), (x, y, factor, from, to))

// x -= a y + b z, from one index up to another.
FASTMTL_ANY_WIDTH void take_any(double* __restrict__ x, const double* __restrict__ y, double a,
                                const double* __restrict__ z, double b, int from, int to) {
  for (int k = from; k < to; ++k) x[k] -= a * y[k] + b * z[k];
}
FASTMTL_EACH_WIDTH(take, (double* x, const double* y, double a, const double* z, double b, int from, int to),
                   (x, y, a, z, b, from, to))

// x and y, n numbers each, turned by an angle.
FASTMTL_ANY_WIDTH void rotate_any(double* __restrict__ x, double* __restrict__ y, double cosine, double sine, int n) {
  for (int k = 0; k < n; ++k) {
    const double a = x[k], c = y[k];
    x[k] = cosine * a - sine * c;
    y[k] = sine * a + cosine * c;
  }
}
FASTMTL_EACH_WIDTH(rotate, (double* x, double* y, double cosine, double sine, int n), (x, y, cosine, sine, n))

#undef FASTMTL_ANY_WIDTH
#undef FASTMTL_EACH_WIDTH

}  // namespace by_row

// To tridiagonal form by Householder's reflections, H = 1 - beta v v^T. m: in; out: row k holds v of step k behind its
// diagonal. diagonal, off: out, of the tridiagonal matrix. rows: out, the product of the reflections, the last one
// first. Loops run along rows, each entry by itself: a sum along a row would wait for every addition.
inline void tridiagonal(Matrix m, Matrix rows, int n, double* diagonal, double* off, double* betas, double* product) {
  for (int k = 0; k + 1 < n; ++k) {
    double* v = m[k];
    double square = 0.0;
    for (int i = k + 1; i < n; ++i) square += v[i] * v[i];
    diagonal[k] = v[k];
    off[k] = betas[k] = 0.0;
    if (!(square > kLeastSquare)) continue;
    const double head = v[k + 1], length = std::sqrt(square), moved = head > 0 ? -length : length;
    const double beta = 1.0 / (square - moved * head);
    off[k] = moved;
    betas[k] = beta;
    v[k + 1] = head - moved;
    for (int j = k + 1; j < n; ++j) product[j] = 0.0;
    for (int i = k + 1; i < n; ++i) by_row::add(product, m[i], v[i], k + 1, n);
    double along = 0.0;
    for (int i = k + 1; i < n; ++i) {
      product[i] *= beta;
      along += product[i] * v[i];
    }
    for (int i = k + 1; i < n; ++i) product[i] -= 0.5 * beta * along * v[i];
    for (int i = k + 1; i < n; ++i) by_row::take(m[i], product, v[i], v, product[i], k + 1, n);
  }
  diagonal[n - 1] = m[n - 1][n - 1];
  off[n - 1] = 0.0;
  // its transpose, from the last reflection to the first, so that each meets the block that is no identity yet
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) rows[i][j] = i == j ? 1.0 : 0.0;
  for (int k = n - 1; k-- > 0;) {
    if (betas[k] == 0) continue;
    const double* v = m[k];
    for (int j = k + 1; j < n; ++j) product[j] = 0.0;
    for (int i = k + 1; i < n; ++i) by_row::add(product, rows[i], v[i], k + 1, n);
    for (int i = k + 1; i < n; ++i) by_row::add(rows[i], product, -betas[k] * v[i], k + 1, n);
  }
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < i; ++j) {
      const double x = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = x;
    }
}

// By the implicit QL method on the tridiagonal form (Martin and Wilkinson 1968). m: [n, n], lost. values: out, n
// numbers in no order. vectors: out, row k the eigenvector of value k. Values are right to a few roundings of the
// largest.
inline void eigen(const Alone&, Matrix m, Matrix vectors, int n, double* values, const EigenScratch& s) {
  double *d = values, *e = s.off;
  tridiagonal(m, vectors, n, d, e, s.first, s.second);
  double largest = 0.0;
  for (int i = 0; i < n; ++i) largest = std::fmax(largest, std::fabs(d[i]) + std::fabs(e[i]));
  const double least = 2e-17 * largest;  // an off-diagonal entry that is none
  for (int low = 0; low < n; ++low) {
    for (int sweep = 0; sweep < 60; ++sweep) {
      int high = low;
      while (high + 1 < n && std::fabs(e[high]) > least) high += 1;
      if (high == low) break;
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
        by_row::rotate(vectors[i], vectors[i + 1], cosine, sine, n);
      }
      d[low] -= shift;
      e[low] = g;
      e[high] = 0.0;
    }
  }
}

// The two tasks that meet in game `game` of round `round`, when n of them (n even) each meet each other once.
struct Meeting {
  int low, high;
};
FASTMTL_HOST_DEVICE inline Meeting meeting(int n, int round, int game) {
  const int others = n - 1;
  int a = round + game, b = round - game;
  a = game == 0 ? others : a >= others ? a - others : a;
  b = b < 0 ? b + others : b;
  return a < b ? Meeting{a, b} : Meeting{b, a};
}

// Where the rows of one meeting cross the columns of another: four entries, or fewer where an index is none.
struct Crossing {
  Meeting rows, columns;
  double pp, pq, qp, qq;

  FASTMTL_HOST_DEVICE void read(Matrix m, int n) {
    pp = m[rows.low][columns.low];
    pq = columns.high < n ? m[rows.low][columns.high] : 0.0;
    qp = rows.high < n ? m[rows.high][columns.low] : 0.0;
    qq = rows.high < n && columns.high < n ? m[rows.high][columns.high] : 0.0;
  }
  // turned by both meetings' angles, on both sides of the diagonal
  FASTMTL_HOST_DEVICE void write(Matrix m, int n, double c, double t, double d, double u) const {
    const double low_p = c * pp - t * qp, low_q = c * pq - t * qq, high_p = t * pp + c * qp, high_q = t * pq + c * qq;
    auto set = [&](int i, int k, double x) {
      if (i < n && k < n) m[i][k] = m[k][i] = x;
    };
    set(rows.low, columns.low, d * low_p - u * low_q);
    set(rows.low, columns.high, u * low_p + d * low_q);
    set(rows.high, columns.low, d * high_p - u * high_q);
    set(rows.high, columns.high, u * high_p + d * high_q);
  }
};

// One round of rotations: of M from both sides, and of the vectors' rows. even: n, or n + 1 where that is odd.
template <class Team>
FASTMTL_HOST_DEVICE inline void turn(const Team& team, Matrix m, Matrix vectors, int n, int even, int round,
                                     const double* cosines, const double* sines) {
  const int games = even / 2;
  // what a member has of it in two steps is read before it is written
  for (int a = team.row(); a < games; a += 2 * Team::kRows) {
    for (int b = team.column(); b < games; b += Team::kColumns) {
      const int a2 = a + Team::kRows;
      const bool has_first = b < a, has_second = b < a2 && a2 < games;
      Crossing first, second;
      first.columns = second.columns = meeting(even, round, b);
      first.rows = meeting(even, round, a);
      second.rows = meeting(even, round, has_second ? a2 : a);
      if (has_first) first.read(m, n);
      if (has_second) second.read(m, n);
      if (has_first) first.write(m, n, cosines[a], sines[a], cosines[b], sines[b]);
      if (has_second) second.write(m, n, cosines[a2], sines[a2], cosines[b], sines[b]);
    }
  }
  each(team, games, [&](int a) {
    const auto [p, q] = meeting(even, round, a);
    if (q >= n) return;
    const double c = cosines[a], t = sines[a], x = m[p][p], y = m[q][q], off = m[p][q];
    m[p][p] = c * c * x - 2.0 * c * t * off + t * t * y;
    m[q][q] = t * t * x + 2.0 * c * t * off + c * c * y;
    m[p][q] = m[q][p] = c * t * (x - y) + (c * c - t * t) * off;
  });
  for (int a = team.row(); a < games; a += Team::kRows) {
    const auto [p, q] = meeting(even, round, a);
    if (q >= n) continue;
    const double c = cosines[a], t = sines[a];
    double *low = vectors[p], *high = vectors[q];
    constexpr int kAtOnce = Team::kRoom > 2 * Team::kColumns ? 4 : 2;
    for (int k = team.column(); k < n; k += kAtOnce * Team::kColumns) {
      double x[kAtOnce], y[kAtOnce];
#pragma unroll
      for (int w = 0; w < kAtOnce; ++w) {
        const int at = k + w * Team::kColumns;
        x[w] = at < n ? low[at] : 0.0;
        y[w] = at < n ? high[at] : 0.0;
      }
#pragma unroll
      for (int w = 0; w < kAtOnce; ++w) {
        const int at = k + w * Team::kColumns;
        if (at >= n) continue;
        low[at] = c * x[w] - t * y[w];
        high[at] = t * x[w] + c * y[w];
      }
    }
  }
}

// By Jacobi's method, what `eigen` of one thread gives: in each round n / 2 rotations that have no row in common.
template <class Team>
FASTMTL_HOST_DEVICE void eigen(const Team& team, Matrix m, Matrix vectors, int n, double* values,
                               const EigenScratch& s) {
  double *cosines = s.first, *sines = s.second;
  const int even = n + n % 2, games = even / 2;
  each_entry(team, n, [&](int i, int k) { vectors[i][k] = i == k ? 1.0 : 0.0; });
  const double largest = largest_of(team, n, [&](int i) { return std::fabs(m[i][i]); });
  constexpr int kSweeps = 24;
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    Found most{0.0, 0};
    each_entry(team, n, [&](int i, int k) {
      if (k > i) most = smaller(most, {-std::fabs(m[i][k]), 0});
    });
    if (!(-team.least(most).value > 4e-16 * largest)) break;
    for (int round = 0; round < even - 1; ++round) {
      each(team, games, [&](int game) {
        const auto [p, q] = meeting(even, round, game);
        // a task too few: nobody to meet
        const double off = q < n ? m[p][q] : 0.0;
        double sine = 0.0, cosine = 1.0;
        if (std::fabs(off) > 1e-17 * largest) {
          const double half = 0.5 * (m[q][q] - m[p][p]), square = half * half + off * off;
          const double length = square * inverse_root_of(square);
          const double tangent = (half < 0 ? -off : off) * inverse_of(std::fabs(half) + length);
          cosine = inverse_root_of(1.0 + tangent * tangent);
          sine = tangent * cosine;
        }
        cosines[game] = cosine;
        sines[game] = sine;
      });
      team.sync();
      turn(team, m, vectors, n, even, round, cosines, sines);
      team.sync();
    }
  }
  each(team, n, [&](int i) { values[i] = m[i][i]; });
  team.sync();
}

}  // namespace fastmtl::solvers
