// Who solves a T x T problem: one thread of the CPU, or the threads of a block together.
//
// A solver is written once, for a team. What it works on lies where every member sees it. Loops over tasks and over
// entries of a matrix are shared out (`each`, `each_entry`); what one member writes the others may read after
// `team.sync()`. Every member takes every branch that holds a `sync` or a reduction, so that whatever such a branch
// depends on must be equal for all.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FASTMTL_HOST_DEVICE __host__ __device__
#define FASTMTL_INLINE __forceinline__
#define FASTMTL_NOINLINE __noinline__
#else
#define FASTMTL_HOST_DEVICE
#define FASTMTL_INLINE inline
#define FASTMTL_NOINLINE
#endif

namespace fastmtl::solvers {

constexpr double kEpsilon = 2.220446049250313e-16;  // of float64

// What rounding of its entries may make of an eigenvalue of n gradients' Gram matrix that is zero, relative to the
// largest one. An entry is a sum of many products: where the entries of gradients are all alike, all of them are
// rounded to the same side, and few tasks, too, see 20 roundings of an entry. rounding: one, relative to the entry.
constexpr double kEntryRoundings = 32.0;
FASTMTL_HOST_DEVICE inline double none_of(int n, double rounding) {
  return std::fmax(1.0 * n, kEntryRoundings) * rounding;
}

// A matrix as torch has it: float32 or float64, `step` entries from row to row.
struct Entries {
  const void* data = nullptr;
  int64_t step = 0;
  bool is_double = true;

  FASTMTL_HOST_DEVICE double at(int i, int k) const {
    const int64_t entry = i * step + k;
    return is_double ? static_cast<const double*>(data)[entry] : static_cast<const float*>(data)[entry];
  }
  // that of `group`, of contiguous [L, T, T] matrices of which this is the first
  FASTMTL_HOST_DEVICE Entries of_group(int64_t group, int T) const {
    const int64_t bytes = group * T * step * (is_double ? 8 : 4);
    return {static_cast<const char*>(data) + bytes, step, is_double};
  }
};

// Whether a task takes part; present: [T], or null: all do.
FASTMTL_HOST_DEVICE inline bool takes_part(const uint8_t* present, int t) {
  return present == nullptr || present[t] != 0;
}

// A number and where it was found; of equal numbers the first.
struct Found {
  double value;
  int index;
};

FASTMTL_HOST_DEVICE inline Found smaller(Found a, Found b) {
  return b.value < a.value || (b.value == a.value && b.index < a.index) ? b : a;
}

// 1 / x and 1 / sqrt(x), to a few roundings on a GPU: by an estimate of 20 bits and Newton's method, at a third of the
// latency of a division. x: positive, neither infinite nor so small that the result would be.
FASTMTL_HOST_DEVICE inline double inverse_of(double x) {
#if defined(__CUDA_ARCH__)
  double y;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(y) : "d"(x));
  y = fma(y, fma(-x, y, 1.0), y);
  return fma(y, fma(-x, y, 1.0), y);
#else
  return 1.0 / x;
#endif
}
FASTMTL_HOST_DEVICE inline double inverse_root_of(double x) {
#if defined(__CUDA_ARCH__)
  double y;
  asm("rsqrt.approx.ftz.f64 %0, %1;" : "=d"(y) : "d"(x));
  y = fma(0.5 * y, fma(-x * y, y, 1.0), y);
  return fma(0.5 * y, fma(-x * y, y, 1.0), y);
#else
  return 1.0 / std::sqrt(x);
#endif
}

// A set of tasks, up to 128. Every member of a team holds the same.
struct Members {
  uint32_t words[4];

  FASTMTL_HOST_DEVICE static int bits(uint32_t word) {
#if defined(__CUDA_ARCH__)
    return __popc(word);
#else
    return std::popcount(word);
#endif
  }
  // all ones for the word that holds i: words are picked by arithmetic, since registers can't be indexed
  FASTMTL_HOST_DEVICE static uint32_t holds(int k, int i) { return i / 32 == k ? ~0u : 0u; }
  FASTMTL_HOST_DEVICE bool has(int i) const {
    uint32_t word = 0;
    for (int k = 0; k < 4; ++k) word |= words[k] & holds(k, i);
    return word >> (i % 32) & 1;
  }
  FASTMTL_HOST_DEVICE int count() const { return bits(words[0]) + bits(words[1]) + bits(words[2]) + bits(words[3]); }
  // how many of them come before i
  FASTMTL_HOST_DEVICE int before(int i) const {
    int sum = 0;
    for (int k = 0; k < 4; ++k) {
      const int bit = i - 32 * k;
      sum += bits(words[k] & (bit >= 32 ? ~0u : bit <= 0 ? 0u : (1u << bit) - 1));
    }
    return sum;
  }
  // in it if it was not, out of it if it was
  FASTMTL_HOST_DEVICE void exchange(int i) {
    for (int k = 0; k < 4; ++k) words[k] ^= holds(k, i) & 1u << (i % 32);
  }
  FASTMTL_HOST_DEVICE void exchange(const Members& others) {
    for (int k = 0; k < 4; ++k) words[k] ^= others.words[k];
  }
};

// One thread. A team's members stand in `kRows` rows and `kColumns` columns, by which entries of a matrix are shared
// out. kRoom: the tasks that its scratch has room for; 0: as many as there are.
struct Alone {
  static constexpr int kRows = 1, kColumns = 1, kRoom = 0;
  // says to the compiler in which memory scratch lies
  FASTMTL_HOST_DEVICE static double* scratch(double* p) { return p; }
  FASTMTL_HOST_DEVICE int rank() const { return 0; }
  FASTMTL_HOST_DEVICE int size() const { return 1; }
  FASTMTL_HOST_DEVICE int row() const { return 0; }
  FASTMTL_HOST_DEVICE int column() const { return 0; }
  FASTMTL_HOST_DEVICE void sync() const {}
  // over all members, for all of them
  FASTMTL_HOST_DEVICE double sum(double x) const { return x; }
  FASTMTL_HOST_DEVICE double largest(double x) const { return x; }
  FASTMTL_HOST_DEVICE Found least(Found x) const { return x; }
  // over the members of a row, for all of them
  FASTMTL_HOST_DEVICE double across(double x) const { return x; }
  // those of 0 .. n - 1 for which `is_in` is true; a team of several has a member for each
  template <class Is>
  FASTMTL_HOST_DEVICE Members members(int n, const Is& is_in) const {
    Members found{};
    for (int i = 0; i < n; ++i) found.words[i / 32] |= static_cast<uint32_t>(is_in(i)) << (i % 32);
    return found;
  }
};

// A square matrix; the distance between rows is `step`.
struct Matrix {
  double* data;
  int step;
  FASTMTL_HOST_DEVICE double* operator[](int row) const { return data + row * step; }
};

template <class Team, class Do>
FASTMTL_HOST_DEVICE void each(const Team& team, int n, const Do& act) {
  for (int i = team.rank(); i < n; i += team.size()) act(i);
}

template <class Team, class Do>
FASTMTL_HOST_DEVICE void each_entry(const Team& team, int n, const Do& act) {
  for (int i = team.row(); i < n; i += Team::kRows)
    for (int k = team.column(); k < n; k += Team::kColumns) act(i, k);
}

// Sum, largest and smallest of n numbers: of(i) for i from 0 on; the largest is no less than 0.
template <class Team, class Of>
FASTMTL_HOST_DEVICE double sum_of(const Team& team, int n, const Of& of) {
  double sum = 0.0;
  each(team, n, [&](int i) { sum += of(i); });
  return team.sum(sum);
}
template <class Team, class Of>
FASTMTL_HOST_DEVICE double largest_of(const Team& team, int n, const Of& of) {
  double largest = 0.0;
  each(team, n, [&](int i) { largest = std::fmax(largest, of(i)); });
  return team.largest(largest);
}
template <class Team, class Of>
FASTMTL_HOST_DEVICE double smallest_of(const Team& team, int n, const Of& of) {
  double smallest = INFINITY;
  each(team, n, [&](int i) { smallest = std::fmin(smallest, of(i)); });
  return -team.largest(-smallest);
}

template <class Team>
FASTMTL_HOST_DEVICE double dot(const Team& team, const double* x, const double* y, int n) {
  return sum_of(team, n, [&](int i) { return x[i] * y[i]; });
}

// use(i, product) for each row i of M x.
template <class Team, class Use>
FASTMTL_HOST_DEVICE void multiply(const Team& team, Matrix m, const double* x, int n, const Use& use) {
  for (int first = 0; first < n; first += Team::kRows) {
    const int i = first + team.row();
    double product = 0.0;
    if (i < n)
      for (int k = team.column(); k < n; k += Team::kColumns) product += m[i][k] * x[k];
    product = team.across(product);
    if (i < n && team.column() == 0) use(i, product);
  }
}

// use(k, product) for each column k of x^T M.
template <class Team, class Use>
FASTMTL_HOST_DEVICE void multiply_transposed(const Team& team, Matrix m, const double* x, int n, const Use& use) {
  each(team, n, [&](int k) {
    double sum = 0.0;
    for (int i = 0; i < n; ++i) sum += m[i][k] * x[i];
    use(k, sum);
  });
}

// use(i, product, size) for each row i of M x, with what the sizes of its terms add up to, for x >= 0.
template <class Team, class Use>
FASTMTL_HOST_DEVICE void multiply_with_sizes(const Team& team, Matrix m, const double* x, int n, const Use& use) {
  for (int first = 0; first < n; first += Team::kRows) {
    const int i = first + team.row();
    double product = 0.0, size = 0.0;
    if (i < n) {
      for (int k = team.column(); k < n; k += Team::kColumns) {
        product += m[i][k] * x[k];
        size += std::fabs(m[i][k]) * x[k];
      }
    }
    product = team.across(product);
    size = team.across(size);
    if (i < n && team.column() == 0) use(i, product, size);
  }
}

// Of a problem's Gram matrix p.m: the cosines into `to`, the norms into p.u; a zero gradient has a row of zeros.
template <class Team, class Problem>
FASTMTL_HOST_DEVICE void cosines(const Team& team, const Problem& p, Matrix to) {
  each(team, p.n, [&](int i) { p.u[i] = p.m[i][i] > 0 ? std::sqrt(p.m[i][i]) : 0.0; });
  team.sync();
  each_entry(team, p.n, [&](int i, int k) {
    to[i][k] = p.u[i] > 0 && p.u[k] > 0 ? (i == k ? 1.0 : p.m[i][k] / (p.u[i] * p.u[k])) : 0.0;
  });
  team.sync();
}

}  // namespace fastmtl::solvers
