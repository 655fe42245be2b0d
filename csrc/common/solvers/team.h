// Who solves a T x T problem: one thread of the CPU, or the threads of a block together.
//
// A solver is written once, for a team. What it works on lies where every member sees it. `for (int i = team.rank(); i
// < n; i += team.size())` shares a loop out; what one member writes the others may read after `team.sync()`. Every
// member takes every branch that holds a `sync` or a `sum`, so that whatever such a branch depends on must be equal for
// all.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FASTMTL_HOST_DEVICE __host__ __device__
#else
#define FASTMTL_HOST_DEVICE
#endif

namespace fastmtl::solvers {

// A number and where it was found; of equal numbers the first.
struct Found {
  double value;
  int index;
};

FASTMTL_HOST_DEVICE inline Found smaller(Found a, Found b) {
  return b.value < a.value || (b.value == a.value && b.index < a.index) ? b : a;
}

struct Alone {
  FASTMTL_HOST_DEVICE int rank() const { return 0; }
  FASTMTL_HOST_DEVICE int size() const { return 1; }
  FASTMTL_HOST_DEVICE void sync() const {}
  FASTMTL_HOST_DEVICE double sum(double x) const { return x; }
  FASTMTL_HOST_DEVICE Found least(Found x) const { return x; }
};

// A square matrix; the distance between rows is `step`.
struct Matrix {
  double* data;
  int step;
  FASTMTL_HOST_DEVICE double* operator[](int row) const { return data + row * step; }
};

template <class Team>
FASTMTL_HOST_DEVICE double dot(const Team& team, const double* x, const double* y, int n) {
  double sum = 0.0;
  for (int i = team.rank(); i < n; i += team.size()) sum += x[i] * y[i];
  return team.sum(sum);
}

// out = M x for a symmetric M: its rows. A sync must follow.
template <class Team>
FASTMTL_HOST_DEVICE void multiply(const Team& team, Matrix m, const double* x, double* out, int n) {
  for (int i = team.rank(); i < n; i += team.size()) {
    double sum = 0.0;
    for (int k = 0; k < n; ++k) sum += m[i][k] * x[k];
    out[i] = sum;
  }
}

}  // namespace fastmtl::solvers
