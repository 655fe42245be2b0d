// PCGrad's T x T problem by one block, in float64, on the Gram matrix that the block has just finished.
#pragma once

#include "../solvers.h"
#include "device.cuh"

namespace fastmtl::cuda {

struct Solve {
  bool wanted;
  bool project;  // the result is the coefficients [T, T] instead of the weights [T]
  bool include_self, mean;
  bool draw;             // the order, from key and state
  const int64_t* order;  // [T, num_visits] otherwise
  int64_t num_visits;
  uint64_t key;
  int64_t* state;      // key and counter, or null
  uint64_t absent[2];  // a bit per task
  double* result;
};

// Where a T x T problem stands. The random numbers of an order lie where the Gram matrix will.
struct Scratch {
  double* gram;
  double* c;
  int64_t* numbers;
  int num_numbers;
  uint8_t* visits;  // [T, T] at most
};

// Shared memory of the solver for up to kMost tasks. To 16 tasks everything is in it; to 64 the Gram matrix and the
// order; beyond, the order. The coefficients, which nobody waits for, are then in device memory, where they are wanted.
template <int kMost>
struct SolverMemory {
  static constexpr bool kSmall = kMost <= 16;
  int64_t words[kSmall ? 256 : 4096];
  double c[kSmall ? 256 : 1];
  uint8_t visits[kSmall ? 256 : 4096];

  // more: device memory, 2 T^2 float64
  template <bool kBig = false>
  __device__ Scratch scratch(int T, double* more) {
    auto* matrix = reinterpret_cast<double*>(words);
    if constexpr (kSmall) return {matrix, c, words, 256, visits};
    else if constexpr (!kBig) return {matrix, more, words, 4096, visits};
    else return {more + T * T, more, words, 2048, reinterpret_cast<uint8_t*>(words + 2048)};
  }
};

__device__ inline bool is_absent(const Solve& s, int t) { return (t < 64 ? s.absent[0] : s.absent[1]) >> (t % 64) & 1; }

// An entry that no task has, for one out of range.
constexpr uint8_t kNobody = 255;

__device__ inline bool is_staged(const Solve& s, int T) { return s.draw || s.num_visits <= T; }

// The order into scratch.visits, if it fits: copied, or drawn, one thread per entry, whose rank among the row's random
// numbers is the step at which it is visited.
__device__ inline void stage_order(const Solve& s, int T, const Scratch& scratch) {
  const int tid = threadIdx.x;
  if (!s.draw) {
    if (!is_staged(s, T)) return;
    for (int e = tid; e < T * s.num_visits; e += kThreads) {
      const int64_t j = s.order[e];
      scratch.visits[e] = j >= 0 && j < T ? static_cast<uint8_t>(j) : kNobody;
    }
    __syncthreads();
    return;
  }
  uint64_t key = s.key, counter = 0;
  if (s.state != nullptr) {
    key ^= static_cast<uint64_t>(s.state[0]);
    counter = static_cast<uint64_t>(s.state[1]);
  }
  const int rows = scratch.num_numbers / T;  // at a time
  for (int first = 0; first < T; first += rows) {
    const int count = (T - first < rows ? T - first : rows) * T;
    for (int e = tid; e < count; e += kThreads)
      scratch.numbers[e] = random_number(key, counter * kNumbersPerCount + first * T + e);
    __syncthreads();
    if (s.state != nullptr && tid == 0) s.state[1] = static_cast<int64_t>(counter + 1);
    for (int e = tid; e < count; e += kThreads) {
      const int i = e / T, t = e % T;
      const int64_t* row = scratch.numbers + i * T;
      const int64_t mine = row[t];
      int rank = 0;
      for (int u = 0; u < T; ++u) rank += row[u] < mine || (row[u] == mine && u < t);
      scratch.visits[(first + i) * T + rank] = static_cast<uint8_t>(t);
    }
    __syncthreads();
  }
}

// values[k] of an array in registers, by halves; kCount is a power of two
template <int kCount>
__device__ inline double pick(const double (&values)[kCount], int k) {
  if constexpr (kCount == 1) {
    return values[0];
  } else {
    double half[kCount / 2];
#pragma unroll
    for (int q = 0; q < kCount / 2; ++q) half[q] = k & (kCount / 2) ? values[q + kCount / 2] : values[q];
    return pick<kCount / 2>(half, k);
  }
}

// Rows of coefficients, as `pcgrad_row` of solvers.h defines them: kLanes lanes share a row, lane l holds the products
// (c M)[l], (c M)[l + kLanes], ... of which there are at most kValues. The coefficients stand in scratch.c, of which
// the lane that owns task j alone touches column j.
template <int kLanes, int kValues, bool kShared>
__device__ inline void solve_rows(const Solve& s, int T, const Scratch& scratch) {
  const int tid = threadIdx.x;
  const int lane = tid % kLanes;
  const double* m = scratch.gram;
  const bool staged = is_staged(s, T);
  const int64_t num_visits = s.draw ? T : s.num_visits;
  auto visit = [&](int64_t e) { return staged ? scratch.visits[e] : s.order[e]; };
  for (int first = 0; first < T; first += kThreads / kLanes) {
    const int i = first + tid / kLanes;
    const bool here = i < T;
    double product[kValues];
#pragma unroll
    for (int q = 0; q < kValues; ++q) {
      const int t = lane + q * kLanes;
      product[q] = here && t < T ? m[i * T + t] : 0.0;
      if (here && t < T) scratch.c[i * T + t] = t == i ? 1.0 : 0.0;
    }
    bool bad = false;
    int64_t next = here && num_visits > 0 ? visit(i * num_visits) : 0;
    for (int64_t k = 0; k < num_visits; ++k) {
      const int64_t j = next;
      if (here && k + 1 < num_visits) next = visit(i * num_visits + k + 1);  // early: it waits for nothing
      const bool in_range = j >= 0 && j < T;
      const int jj = in_range ? static_cast<int>(j) : 0;
      const double d = __shfl_sync(~0u, pick<kValues>(product, jj / kLanes), jj % kLanes, kLanes);
      const double norm = here ? m[jj * T + jj] : 1.0;
      const bool visited = here && !bad && !(in_range && j == i && !s.include_self);
      if (visited && !(in_range && isfinite(d) && isfinite(norm))) bad = true;
      if (visited && !bad && d < 0 && norm != 0) {
        double line[kValues];
#pragma unroll
        for (int q = 0; q < kValues; ++q) line[q] = lane + q * kLanes < T ? m[jj * T + lane + q * kLanes] : 0.0;
        const double step = d / norm;
        if (jj % kLanes == lane) {
          if constexpr (kShared) scratch.c[i * T + jj] -= step;
          else atomicAdd(scratch.c + i * T + jj, -step);  // nobody waits for it
        }
#pragma unroll
        for (int q = 0; q < kValues; ++q)
          product[q] -= step * line[q];
      }
    }
    if (!kShared) __threadfence();
    if (bad)
      for (int t = lane; t < T; t += kLanes) scratch.c[i * T + t] = NAN;
  }
}

// The rows, and what the caller wants of them, from the Gram matrix and the order in scratch.
template <int kLanes, int kValues, bool kShared>
__device__ inline void solve_pcgrad(const Solve& s, int T, const Scratch& scratch) {
  const int tid = threadIdx.x;
  solve_rows<kLanes, kValues, kShared>(s, T, scratch);
  __threadfence();
  __syncthreads();
  auto c = [&](int e) { return kShared ? scratch.c[e] : __ldcg(scratch.c + e); };
  if (s.project) {
    for (int e = tid; e < T * T; e += kThreads) s.result[e] = c(e);
    return;
  }
  int count = 0;
  for (int i = 0; i < T; ++i) count += !is_absent(s, i);
  const double scale = s.mean ? 1.0 / count : 1.0;
  for (int t = tid; t < T; t += kThreads) {
    double sum = 0.0;
#pragma unroll 8
    for (int i = 0; i < T; ++i) {
      const double x = c(i * T + t);
      sum += is_absent(s, i) ? 0.0 : x;
    }
    s.result[t] = is_absent(s, t) ? 0.0 : scale * sum;
  }
}

template <int kLanes, int kValues>
__global__ void __launch_bounds__(kThreads, 1)
    pcgrad_coefficients_kernel(const double* gram, int T, const __grid_constant__ Solve s) {
  FASTMTL_SHARED(SolverMemory<kMaxTasks>, shared);
  Scratch scratch = shared.scratch<(kValues > 16)>(T, s.result);
  stage_order(s, T, scratch);
  scratch.gram = const_cast<double*>(gram);
  solve_pcgrad<kLanes, kValues, false>(s, T, scratch);
}

}  // namespace fastmtl::cuda
