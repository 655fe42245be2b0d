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

// A task's M[j][j], and its reciprocal: 0 where a division must be used instead.
struct alignas(16) Norm {
  double value, inverse;
};

// within these bounds neither the reciprocal nor what is made of it leaves the normal numbers
__device__ inline bool has_inverse(double norm) { return norm > 0x1p-500 && norm < 0x1p500; }

// Where a T x T problem stands. Rows of the Gram matrix begin on 16 bytes. The random numbers of an order lie where the
// matrix will.
struct Scratch {
  double* gram;
  Norm* norm;
  double* c;
  int64_t* numbers;
  int num_numbers;
  uint8_t* visits;  // [T, T] at most
  bool* unusual;    // by warp: see `tell`

  // Writes an entry of the matrix; whether it is unusual: not finite, or a norm, not 0, without an inverse.
  __device__ bool put(int T, int i, int j, double x) const;
  // Each thread says whether it met something that `solve_ordinary_rows` does not expect. A barrier must follow.
  __device__ void tell(bool met) const {
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) met = __shfl_xor_sync(~0u, static_cast<int>(met), lanes) || met;
    if (threadIdx.x % kWarp == 0) unusual[threadIdx.x / kWarp] = met;
  }
};

__host__ __device__ constexpr int leading_dimension(int T) { return T + T % 2; }

__device__ inline bool Scratch::put(int T, int i, int j, double x) const {
  gram[i * leading_dimension(T) + j] = x;
  if (i != j) return !isfinite(x);
  norm[i] = {x, has_inverse(x) ? 1.0 / x : 0.0};
  return !has_inverse(x) && x != 0;
}

// Shared memory of the solver for up to kMost tasks. To 16 tasks everything is in it; to 64 the Gram matrix and the
// order; beyond, the order. The coefficients, which nobody waits for, are then in device memory, where they are wanted.
template <int kMost>
struct SolverMemory {
  static constexpr bool kSmall = kMost <= 16;
  alignas(16) int64_t words[kSmall ? 256 : 4096];
  Norm norm[kMost];
  double c[kSmall ? 256 : 1];
  uint8_t visits[kSmall ? 256 : 4096];
  bool unusual[kWarps];

  // kTasks: as many at most. more: `more_words(T)` float64 of device memory, on 16 bytes
  template <int kTasks>
  __device__ Scratch scratch(int T, double* more) {
    static_assert(kTasks <= kMost);
    auto* matrix = reinterpret_cast<double*>(words);
    if constexpr (kSmall) return {matrix, norm, c, words, 256, visits, unusual};
    else if constexpr (kTasks <= 64) return {matrix, norm, more, words, 4096, visits, unusual};
    else
      return {more,   norm, more + T * leading_dimension(T), words, 2048, reinterpret_cast<uint8_t*>(words + 2048),
              unusual};
  }
};

// float64s of device memory for the matrix and the coefficients
__host__ __device__ constexpr int more_words(int T) { return 2 * T * leading_dimension(T); }

__device__ inline bool is_absent(const Solve& s, int t) { return (t < 64 ? s.absent[0] : s.absent[1]) >> (t % 64) & 1; }

// An entry that no task has, for one out of range.
constexpr uint8_t kNobody = 255;

__device__ inline bool is_staged(const Solve& s, int T) { return s.draw || s.num_visits <= T; }

// The order into scratch.visits, if it fits: copied, or drawn, one thread per entry, whose rank among the row's random
// numbers is the step at which it is visited. Whether this thread met an entry out of range. A barrier must follow.
__device__ inline bool stage_order(const Solve& s, int T, const Scratch& scratch) {
  const int tid = threadIdx.x;
  if (!s.draw) {
    bool outside = false;
    if (!is_staged(s, T)) return outside;
    for (int e = tid; e < T * s.num_visits; e += kThreads) {
      const int64_t j = s.order[e];
      scratch.visits[e] = j >= 0 && j < T ? static_cast<uint8_t>(j) : kNobody;
      outside = outside || scratch.visits[e] == kNobody;
    }
    return outside;
  }
  uint64_t key = s.key, counter = 0;
  if (s.state != nullptr) {
    key ^= static_cast<uint64_t>(s.state[0]);
    counter = static_cast<uint64_t>(s.state[1]);
  }
  const int stride = leading_dimension(T), rows = scratch.num_numbers / stride;  // at a time
  for (int first = 0; first < T; first += rows) {
    const int count = T - first < rows ? T - first : rows;
    for (int e = tid; e < count * stride; e += kThreads) {
      const int i = e / stride, t = e % stride;
      scratch.numbers[e] = t < T ? random_number(key, counter * kNumbersPerCount + (first + i) * T + t) : INT64_MAX;
    }
    __syncthreads();
    if (s.state != nullptr && tid == 0) s.state[1] = static_cast<int64_t>(counter + 1);
    for (int e = tid; e < count * T; e += kThreads) {
      const int i = e / T, t = e % T;
      const int64_t mine = scratch.numbers[i * stride + t];
      const auto* row = reinterpret_cast<const Vector<int64_t, 2>*>(scratch.numbers + i * stride);
      // no two numbers are equal: the stream's function of key and counter is one to one
      int rank = 0;
#pragma unroll 8
      for (int u = 0; u < stride / 2; ++u) {
        const Vector<int64_t, 2> two = row[u];
        rank += (two.v[0] < mine) + (two.v[1] < mine);
      }
      scratch.visits[(first + i) * T + rank] = static_cast<uint8_t>(t);
    }
    __syncthreads();
  }
  return false;
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

// How a block solves problems of up to kMost tasks: kLanes lanes share a row of coefficients, of whose products c M
// each holds kValues in registers; kRows such rows at a time, so that one's latencies pass during the other's work.
template <int kMost>
struct SolverShape {
  static constexpr bool kShared = kMost <= 16;  // the coefficients are in shared memory
  static constexpr int kLanes = kMost <= 16 ? 16 : 8;
  static constexpr int kValues = kMost / kLanes;
  static constexpr int kRows = kMost <= 32 ? 1 : 2;

  // task t's product: whose it is, and which of this lane's; two neighbours are one 16-byte load of the matrix
  __device__ static int lane_of(int t) { return kValues == 1 ? t : t / 2 % kLanes; }
  __device__ static int value_of(int t) { return kValues == 1 ? 0 : t / (2 * kLanes) * 2 + t % 2; }
  __device__ static int task_of(int lane, int value) {
    return kValues == 1 ? lane : value / 2 * (2 * kLanes) + 2 * lane + value % 2;
  }
};

// This lane's part of row j of the matrix, where it is wanted; else zeros, without a load.
template <int kMost>
__device__ inline void read_line(const double* m, int T, int j, bool wanted,
                                 double (&line)[SolverShape<kMost>::kValues]) {
  using Shape = SolverShape<kMost>;
  const int lane = static_cast<int>(threadIdx.x) % Shape::kLanes, stride = leading_dimension(T);
  if constexpr (Shape::kValues == 1) {
    line[0] = wanted && lane < T ? m[j * stride + lane] : 0.0;
  } else {
#pragma unroll
    for (int q = 0; q < Shape::kValues; q += 2) {
      const int t = Shape::task_of(lane, q);
      Vector<double, 2> two{};
      if (wanted && t < T) two = *reinterpret_cast<const Vector<double, 2>*>(m + j * stride + t);
      line[q] = two.v[0];
      line[q + 1] = two.v[1];
    }
  }
}

// Rows of coefficients, as `pcgrad_row` of solvers.h defines them, where nothing is out of the ordinary: the matrix is
// a Gram matrix (|M[i][j]|^2 <= M[i][i] M[j][j], so that a visit at most doubles a product, in units of the norms),
// finite, every norm is 0 or has an inverse, the order is staged and in range. Then no visit has to look at more than
// the sign of its product, which is what this path is for: a visit is bound by the number of its instructions.
// Coefficients stand in scratch.c, of which the lane that owns task j alone touches column j.
template <int kMost>
__device__ inline void solve_ordinary_rows(const Solve& s, int T, const Scratch& scratch) {
  using Shape = SolverShape<kMost>;
  constexpr int kLanes = Shape::kLanes, kValues = Shape::kValues, kRows = Shape::kRows;
  constexpr int kGroups = kThreads / kLanes;
  const int tid = threadIdx.x;
  const int lane = tid % kLanes;
  const int num_visits = s.draw ? T : static_cast<int>(s.num_visits);
  const int stride = leading_dimension(T);
  const double* mine = scratch.gram + (kValues == 1 ? lane : 2 * lane);
  for (int base = 0; base < T; base += kRows * kGroups) {
    if (base + tid / kWarp * (kWarp / kLanes) >= T) continue;  // none of this warp's rows is there
    double product[kRows][kValues], line[kRows][kValues] = {};
    const uint8_t* visits[kRows];
    int row[kRows], next[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = row[r] = base + r * kGroups + tid / kLanes;
      // a row that is not there has products of 0, which conflict with nothing
      read_line<kMost>(scratch.gram, T, i < T ? i : 0, i < T, product[r]);
#pragma unroll
      for (int q = 0; q < kValues; ++q) {
        const int t = Shape::task_of(lane, q);
        if (i < T && t < T) scratch.c[i * T + t] = t == i ? 1.0 : 0.0;
      }
      visits[r] = scratch.visits + (i < T ? i : 0) * num_visits;
      next[r] = num_visits > 0 ? visits[r][0] : 0;
    }
    for (int k = 1; k <= num_visits; ++k) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int j = next[r], last = num_visits - 1;
        next[r] = visits[r][k < last ? k : last];  // early: it waits for nothing
        const double d = __shfl_sync(~0u, pick<kValues>(product[r], Shape::value_of(j)), Shape::lane_of(j), kLanes);
        const Norm norm = scratch.norm[j];
        const bool conflict = d < 0 && (j != row[r] || s.include_self);
        // d / norm, to the last digit but for rare ties; 0 where the norm is
        const double quotient = d * norm.inverse;
        const double step = conflict ? fma(fma(-quotient, norm.value, d), norm.inverse, quotient) : 0.0;
        // without a conflict the line is an earlier one, and finite
        if (conflict) {
          const double* from = mine + j * stride;
#pragma unroll
          for (int q = 0; q < kValues; q += kValues == 1 ? 1 : 2) {
            if (Shape::task_of(lane, q) >= T) continue;
            if constexpr (kValues == 1) {
              line[r][q] = *from;
            } else {
              const auto two = *reinterpret_cast<const Vector<double, 2>*>(from + q * kLanes);
              line[r][q] = two.v[0];
              line[r][q + 1] = two.v[1];
            }
          }
          if (Shape::lane_of(j) == lane) {
            double* c = scratch.c + row[r] * T + j;
            if constexpr (Shape::kShared) *c -= step;
            else if (s.draw) *c = (j == row[r] ? 1.0 : 0.0) - step;  // a drawn order visits each task once
            else atomicAdd(c, -step);                                // nobody waits for it
          }
        }
#pragma unroll
        for (int q = 0; q < kValues; ++q) product[r][q] = fma(-step, line[r][q], product[r][q]);
      }
    }
  }
}

// Rows of coefficients, whatever the matrix and the order hold.
template <int kMost>
__device__ inline void solve_rows(const Solve& s, int T, const Scratch& scratch) {
  using Shape = SolverShape<kMost>;
  constexpr int kLanes = Shape::kLanes, kValues = Shape::kValues, kRows = Shape::kRows;
  constexpr int kGroups = kThreads / kLanes;
  const int tid = threadIdx.x;
  const int lane = tid % kLanes;
  const bool staged = is_staged(s, T);
  const int64_t num_visits = s.draw ? T : s.num_visits;
  auto visit = [&](int i, int64_t k) -> int {
    const int64_t e = i * num_visits + k;
    if (staged) return scratch.visits[e];
    const int64_t j = s.order[e];
    return j >= 0 && j < T ? static_cast<int>(j) : kNobody;
  };
  for (int base = 0; base < T; base += kRows * kGroups) {
    if (base + tid / kWarp * (kWarp / kLanes) >= T) continue;  // none of this warp's rows is there
    double product[kRows][kValues];
    int row[kRows], next[kRows];
    bool bad[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = row[r] = base + r * kGroups + tid / kLanes;
      const bool here = i < T;
      read_line<kMost>(scratch.gram, T, here ? i : 0, here, product[r]);
#pragma unroll
      for (int q = 0; q < kValues; ++q) {
        const int t = Shape::task_of(lane, q);
        if (here && t < T) scratch.c[i * T + t] = t == i ? 1.0 : 0.0;
      }
      next[r] = here && num_visits > 0 ? visit(i, 0) : kNobody;
    }
    for (int64_t k = 0; k < num_visits; ++k) {
      double d[kRows], step[kRows], line[kRows][kValues];
      int task[kRows];
      bool conflict[kRows], divide = false;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int i = row[r], j = next[r];
        const bool here = i < T, in_range = j < T;
        if (here && k + 1 < num_visits) next[r] = visit(i, k + 1);  // early: it waits for nothing
        task[r] = in_range ? j : 0;
        // a short line is loaded before it is known to be wanted, a long one would keep shared memory busy
        if constexpr (kValues == 1) read_line<kMost>(scratch.gram, T, task[r], true, line[r]);
        d[r] = __shfl_sync(~0u, pick<kValues>(product[r], Shape::value_of(task[r])), Shape::lane_of(task[r]), kLanes);
        const Norm norm = scratch.norm[task[r]];
        const bool visited = here && !bad[r] && (j != i || s.include_self);
        bad[r] = bad[r] || (visited && !(in_range && isfinite(d[r]) && isfinite(norm.value)));
        conflict[r] = visited && !bad[r] && d[r] < 0 && norm.value != 0;
        // d / norm, to the last digit but for rare ties
        const double quotient = d[r] * norm.inverse;
        step[r] = fma(fma(-quotient, norm.value, d[r]), norm.inverse, quotient);
        divide = divide || (conflict[r] && norm.inverse == 0);
      }
      if (divide) {
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          if (scratch.norm[task[r]].inverse == 0) step[r] = d[r] / scratch.norm[task[r]].value;
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        // without branches around it, so that the rows' loads and sums overlap
        if constexpr (kValues > 1) read_line<kMost>(scratch.gram, T, task[r], conflict[r], line[r]);
        // what is not finite must not reach a row that it is no part of
#pragma unroll
        for (int q = 0; q < kValues; ++q) product[r][q] -= conflict[r] ? step[r] * line[r][q] : 0.0;
        if (conflict[r] && Shape::lane_of(task[r]) == lane) {
          double* c = scratch.c + row[r] * T + task[r];
          if constexpr (Shape::kShared) *c -= step[r];
          else atomicAdd(c, -step[r]);  // nobody waits for it
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      for (int q = 0; q < kValues; ++q) {
        const int t = Shape::task_of(lane, q);
        if (bad[r] && t < T) scratch.c[row[r] * T + t] = NAN;
      }
  }
}

// The rows, and what the caller wants of them, from the Gram matrix and the order in scratch.
template <int kMost>
__device__ inline void solve_pcgrad(const Solve& s, int T, const Scratch& scratch) {
  const int tid = threadIdx.x;
  bool ordinary = is_staged(s, T);
  for (int w = 0; w < kWarps; ++w) ordinary = ordinary && !scratch.unusual[w];
  if (ordinary) solve_ordinary_rows<kMost>(s, T, scratch);
  else solve_rows<kMost>(s, T, scratch);
  __syncthreads();
  auto c = [&](int e) { return SolverShape<kMost>::kShared ? scratch.c[e] : __ldcg(scratch.c + e); };
  if (s.project) {
    for (int e = tid; e < T * T; e += kThreads) s.result[e] = c(e);
    return;
  }
  int count = T;
  if (s.mean)
    for (int i = 0; i < T; ++i) count -= is_absent(s, i);
  const double scale = s.mean ? 1.0 / count : 1.0;
  // as many threads to a column as there are to spare, and several loads of each on their way at once
  int split = 1;
  while (split < kWarp && 2 * split * T <= kThreads) split *= 2;
  for (int base = 0; base < T; base += kThreads / split) {
    const int t = base + tid / split;
    double sum = 0.0;
    constexpr int kInFlight = 8;
    for (int first = tid % split; first < T; first += kInFlight * split) {
      double x[kInFlight];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const int i = first + u * split;
        x[u] = t < T && i < T && !is_absent(s, i) ? c(i * T + t) : 0.0;
      }
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) sum += x[u];
    }
    for (int step = split / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (t < T && tid % split == 0) s.result[t] = is_absent(s, t) ? 0.0 : scale * sum;
  }
}

// more: as for SolverMemory
template <int kMost>
__global__ void __launch_bounds__(kThreads, 1)
    pcgrad_coefficients_kernel(const double* gram, int T, double* more, const __grid_constant__ Solve s) {
  FASTMTL_SHARED(SolverMemory<kMost>, shared);
  const Scratch scratch = shared.template scratch<kMost>(T, more);
  bool unusual = stage_order(s, T, scratch);
#pragma unroll 4
  for (int e = threadIdx.x; e < T * T; e += kThreads) {
    const int i = e / T, j = e % T;
    const double x = gram[e];
    // a matrix that is no Gram matrix may grow beyond all bounds on the way
    const bool bounded = x * x <= 1.01 * gram[i * T + i] * gram[j * T + j];
    unusual = scratch.put(T, i, j, x) || !bounded || unusual;
  }
  scratch.tell(unusual);
  __syncthreads();
  solve_pcgrad<kMost>(s, T, scratch);
}

}  // namespace fastmtl::cuda
