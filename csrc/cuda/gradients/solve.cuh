// PCGrad's T x T problem by one block, in float64, on the Gram matrix that the block has just finished.
#pragma once

#include "common/solvers.h"
#include "cuda/device.cuh"

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
  uint8_t* visits;  // [T, T] at most, on 16 bytes
  bool* unusual;    // by warp: see `tell`
  int* ranks;       // by warp, of random numbers

  // Writes an entry of the matrix; whether it is unusual: not finite.
  __device__ bool put(int T, int i, int j, double x) const;
  // the same of M[i][i] and its reciprocal: a norm, not 0, without an inverse
  __device__ bool put_norm(int i, double x) const {
    norm[i] = {x, has_inverse(x) ? 1.0 / x : 0.0};
    return !has_inverse(x) && x != 0;
  }
  // Each thread says whether it met something that `solve_ordinary_rows` does not expect. A barrier must follow.
  __device__ void tell(bool met) const {
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) met = __shfl_xor_sync(~0u, static_cast<int>(met), lanes) || met;
    if (threadIdx.x % kWarp == 0) unusual[threadIdx.x / kWarp] = met;
  }
  // whether some thread has
  __device__ bool told() const {
    bool met = false;
    for (int w = 0; w < kWarps; ++w) met = met || unusual[w];
    return met;
  }
};

// Of the matrix. Lanes read whole lines, and what lies behind a row: to 64 tasks there is shared memory to do so.
__host__ __device__ constexpr int leading_dimension(int T) { return T <= 64 ? T + T % 2 : kMaxTasks; }

__device__ inline bool Scratch::put(int T, int i, int j, double x) const {
  gram[i * leading_dimension(T) + j] = x;
  return !isfinite(x);
}

// Shared memory of the solver for up to kMost tasks. To 16 tasks everything is in it; to 64 the Gram matrix and the
// order; beyond, the order. The coefficients, which nobody waits for, are then in device memory, where they are wanted.
template <int kMost>
struct SolverMemory {
  static constexpr bool kSmall = kMost <= 16;
  alignas(16) int64_t words[kSmall ? 256 : 4096];
  Norm norm[kMost];
  double c[kSmall ? 256 : 1];
  alignas(16) uint8_t visits[kSmall ? 256 : 4096];
  bool unusual[kWarps];
  int ranks[kWarps];

  // kTasks: as many at most. more: `more_words(T)` float64 of device memory, on 16 bytes
  template <int kTasks>
  __device__ Scratch scratch(int T, double* more) {
    static_assert(kTasks <= kMost);
    auto* matrix = reinterpret_cast<double*>(words);
    if constexpr (kSmall) return {matrix, norm, c, words, 256, visits, unusual, ranks};
    else if constexpr (kTasks <= 64) return {matrix, norm, more, words, 4096, visits, unusual, ranks};
    else
      return {more,    norm, more + T * leading_dimension(T), words, 2048, reinterpret_cast<uint8_t*>(words + 2048),
              unusual, ranks};
  }
};

// words of a [T, T] order
__host__ __device__ constexpr int order_words(int T) { return (T * T + 7) / 8; }
// where it begins in the solver's device memory
__host__ __device__ constexpr int order_at(int T) { return 2 * T * leading_dimension(T); }
// float64s of device memory for the matrix, the coefficients and an order that another block has drawn
__host__ __device__ constexpr int more_words(int T) { return order_at(T) + order_words(T); }

__device__ inline bool is_absent(const Solve& s, int t) { return (t < 64 ? s.absent[0] : s.absent[1]) >> (t % 64) & 1; }

// Whether there is a row i of coefficients of which something is wanted. Those of absent tasks are zeros otherwise.
__device__ inline bool is_row(const Solve& s, int T, int i) { return i < T && (s.project || !is_absent(s, i)); }

// An entry that no task has, for one out of range.
constexpr uint8_t kNobody = 255;

__device__ inline bool is_staged(const Solve& s, int T) { return s.draw || s.num_visits <= T; }

// A given order into scratch.visits, if it fits. Whether this thread met an entry out of range, or a row that visits a
// task twice. A barrier must follow.
template <int kMost>
__device__ inline bool copy_order(const Solve& s, int T, const Scratch& scratch) {
  if (!is_staged(s, T)) return false;
  constexpr int kLanes = 8;  // to a row
  constexpr int kInFlight = 8;
  constexpr int kWords = (kMost + 31) / 32;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int num_visits = static_cast<int>(s.num_visits);
  bool unusual = false;
  for (int base = 0; base < T; base += kThreads / kLanes) {
    const int i = base + static_cast<int>(threadIdx.x) / kLanes;
    uint32_t seen[kWords] = {};  // a bit per task
    int count = 0;               // of visits in range
    for (int first = 0; first < num_visits; first += kInFlight * kLanes) {
      int64_t task[kInFlight];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const int k = first + u * kLanes + lane;
        task[u] = i < T && k < num_visits ? s.order[i * num_visits + k] : 0;
      }
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const int k = first + u * kLanes + lane;
        if (i >= T || k >= num_visits) continue;
        const bool in_range = static_cast<uint64_t>(task[u]) < static_cast<uint64_t>(T);
        const int j = in_range ? static_cast<int>(task[u]) : kNobody;
        scratch.visits[i * num_visits + k] = static_cast<uint8_t>(j);
        count += in_range;
#pragma unroll
        for (int w = 0; w < kWords; ++w) seen[w] |= j / 32 == w ? 1u << (j % 32) : 0u;
      }
    }
    int distinct = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
#pragma unroll
      for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) seen[w] |= __shfl_xor_sync(~0u, seen[w], lanes);
      distinct += __popc(seen[w]);
    }
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) count += __shfl_xor_sync(~0u, count, lanes);
    if (i < T) unusual = unusual || count != num_visits || distinct != num_visits;
  }
  return unusual;
}

// Ranks the random numbers of each row, or their upper halves, one thread per entry: to[i, rank] = t, the step at which
// row i visits task t. The sum of this thread's ranks. Ends with a barrier.
template <class Number>
__device__ inline int rank_numbers(uint64_t key, uint64_t counter, int T, const Scratch& scratch, uint8_t* to) {
  constexpr int kAtOnce = 16 / static_cast<int>(sizeof(Number));
  constexpr int kShift = 64 - 8 * static_cast<int>(sizeof(Number));
  const int tid = threadIdx.x;
  auto* numbers = reinterpret_cast<Number*>(scratch.numbers);
  const int stride = (T + kAtOnce - 1) / kAtOnce * kAtOnce;
  const int rows = scratch.num_numbers * static_cast<int>(sizeof(int64_t) / sizeof(Number)) / stride;  // at a time
  int ranks = 0;
  for (int first = 0; first < T; first += rows) {
    const int count = T - first < rows ? T - first : rows;
    for (int e = tid; e < count * stride; e += kThreads) {
      const int i = e / stride, t = e % stride;
      const int64_t number = t < T ? random_number(key, counter * kNumbersPerCount + (first + i) * T + t) : INT64_MAX;
      numbers[e] = static_cast<Number>(number >> kShift);
    }
    __syncthreads();
    for (int e = tid; e < count * T; e += kThreads) {
      const int i = e / T, t = e % T;
      const Number mine = numbers[i * stride + t];
      const auto* row = reinterpret_cast<const Vector<Number, kAtOnce>*>(numbers + i * stride);
      int rank = 0;
#pragma unroll 4
      for (int u = 0; u < stride / kAtOnce; ++u) {
        const Vector<Number, kAtOnce> some = row[u];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) rank += some.v[k] < mine;
      }
      to[(first + i) * T + rank] = static_cast<uint8_t>(t);
      ranks += rank;
    }
    __syncthreads();  // before another round, if there is one
  }
  return ranks;
}

// An order into `to`, by the whole block. No two numbers are equal, since the stream's function of key and counter is
// one to one, but for the upper halves of a few. From 17 tasks on halves are ranked, in less than half of the time.
// Where two are equal both have the lower rank, so that the sum of all ranks shows it, and all is done again with whole
// numbers: once in 4000 draws of 128 tasks, in 70,000 of 50. Their two writes to one byte are a race, whose outcome
// nobody reads; docs/kernels/gpu-evidence.md says what it would cost to have none.
template <int kMost>
__device__ inline void draw_order(const Solve& s, int T, const Scratch& scratch, uint8_t* to) {
  uint64_t key = s.key, counter = 0;
  if (s.state != nullptr) {
    key ^= static_cast<uint64_t>(s.state[0]);
    counter = static_cast<uint64_t>(s.state[1]);
  }
  bool ranked = false;
  if constexpr (kMost > 16) {
    int ranks = rank_numbers<int32_t>(key, counter, T, scratch, to);
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) ranks += __shfl_xor_sync(~0u, ranks, lanes);
    if (threadIdx.x % kWarp == 0) scratch.ranks[threadIdx.x / kWarp] = ranks;
    __syncthreads();
    ranks = 0;
    for (int w = 0; w < kWarps; ++w) ranks += scratch.ranks[w];
    ranked = ranks == T * T * (T - 1) / 2;
  }
  if (!ranked) rank_numbers<int64_t>(key, counter, T, scratch, to);
  if (s.state != nullptr && threadIdx.x == 0) s.state[1] = static_cast<int64_t>(counter + 1);
}

// The order into scratch.visits, if it fits. Whether this thread met something that `solve_ordinary_rows` does not
// expect. A barrier must follow.
template <int kMost>
__device__ inline bool stage_order(const Solve& s, int T, const Scratch& scratch) {
  if (!s.draw) return copy_order<kMost>(s, T, scratch);
  draw_order<kMost>(s, T, scratch, scratch.visits);
  return false;
}

// What drawing takes does not depend on the gradients: from so many tasks on, where it is long, a block of its own does
// it while the others read them, and leaves the order in device memory.
__host__ __device__ inline bool draws_apart(const Solve& s, int T) { return s.wanted && s.draw && T > 16; }

// An order that another block has left in `from`, into scratch.visits. A barrier must follow.
__device__ inline void fetch_order(int T, const int64_t* from, const Scratch& scratch) {
  auto* to = reinterpret_cast<int64_t*>(scratch.visits);
#pragma unroll 8
  for (int e = threadIdx.x; e < order_words(T); e += kThreads) to[e] = __ldcg(from + e);
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

// This lane's part of a line of the matrix, where it is wanted; else what was there stays. Without a test for tasks
// that there are none of: what is read in place of theirs is no one else's, and nobody looks at what comes of it.
template <int kMost>
__device__ inline void read_line_if(bool wanted, const double* from, double (&line)[SolverShape<kMost>::kValues]) {
  using Shape = SolverShape<kMost>;
  const int lane = static_cast<int>(threadIdx.x) % Shape::kLanes;
  if constexpr (Shape::kValues == 1) {
    if (wanted) line[0] = from[lane];
  } else {
#pragma unroll
    for (int q = 0; q < Shape::kValues; q += 2) {
      if (!wanted) continue;
      const auto two = *reinterpret_cast<const Vector<double, 2>*>(from + Shape::task_of(lane, q));
      line[q] = two.v[0];
      line[q + 1] = two.v[1];
    }
  }
}

// Rows of coefficients, as `pcgrad_row` of solvers.h defines them, where nothing is out of the ordinary: the matrix is
// a Gram matrix (|M[i][j]|^2 <= M[i][i] M[j][j], so that a visit at most doubles a product, in units of the norms),
// finite, every norm is 0 or has an inverse, the order is staged, in range, and no row visits a task twice. Then no
// visit has to look at more than the sign of its product, which is what this path is for: a visit is bound by the
// number of its instructions, and by what each has to wait for.
//
// What the next visit meets is its product before this visit's step, and what the step takes from it. Both are fetched
// while the step is made, so that from one sign to the next there are but multiply-adds. No conflict branches, so that
// the latencies of a lane's rows overlap. A step is the negative of a coefficient: lane k % kLanes keeps that of visit
// k.
template <int kMost>
__device__ inline void solve_ordinary_rows(const Solve& s, int T, const Scratch& scratch) {
  using Shape = SolverShape<kMost>;
  constexpr int kLanes = Shape::kLanes, kValues = Shape::kValues, kRows = Shape::kRows;
  constexpr int kGroups = kThreads / kLanes;
  const int tid = threadIdx.x;
  const int lane = tid % kLanes;
  const int num_visits = s.draw ? T : static_cast<int>(s.num_visits);
  const int stride = leading_dimension(T), last = num_visits - 1;
  for (int base = 0; base < T; base += kRows * kGroups) {
    if (base + tid / kWarp * (kWarp / kLanes) >= T) continue;  // none of this warp's rows is there
    double product[kRows][kValues], line[kRows][kValues] = {}, d[kRows], kept[kRows] = {};
    Norm norm[kRows];
    const uint8_t* visits[kRows];
    int row[kRows], now[kRows], next[kRows];
    bool here[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = row[r] = base + r * kGroups + tid / kLanes;
      here[r] = is_row(s, T, i);
      // a row that is not there has products of 0, which conflict with nothing
      read_line<kMost>(scratch.gram, T, here[r] ? i : 0, here[r], product[r]);
#pragma unroll
      for (int q = 0; q < kValues; ++q) {
        const int t = Shape::task_of(lane, q);
        if (i < T && t < T) scratch.c[i * T + t] = here[r] && t == i ? 1.0 : 0.0;
      }
      visits[r] = scratch.visits + (i < T ? i : 0) * num_visits;
      now[r] = num_visits > 0 ? visits[r][0] : 0;
      next[r] = num_visits > 1 ? visits[r][1] : now[r];
      d[r] = here[r] ? scratch.gram[i * stride + now[r]] : 0.0;
      norm[r] = scratch.norm[now[r]];
    }
    __syncwarp();  // lanes write coefficients that others have written first
    for (int k = 0; k < num_visits; ++k) {
      double step[kRows], before[kRows], taken[kRows];
      bool conflict[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        conflict[r] = d[r] < 0 && (now[r] != row[r] || s.include_self);
        // d / norm, to the last digit but for rare ties; 0 where the norm is
        const double quotient = d[r] * norm[r].inverse;
        step[r] = fma(fma(-quotient, norm[r].value, d[r]), norm[r].inverse, quotient);
        step[r] = conflict[r] ? step[r] : 0.0;
        if (k % kLanes == lane) kept[r] = step[r];
        norm[r] = scratch.norm[next[r]];
        taken[r] = scratch.gram[now[r] * stride + next[r]];
        before[r] =
            __shfl_sync(~0u, pick<kValues>(product[r], Shape::value_of(next[r])), Shape::lane_of(next[r]), kLanes);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        // without a conflict the line is an earlier one, and finite
        read_line_if<kMost>(conflict[r], scratch.gram + now[r] * stride, line[r]);
        d[r] = fma(-step[r], taken[r], before[r]);
#pragma unroll
        for (int q = 0; q < kValues; ++q) product[r][q] = fma(-step[r], line[r][q], product[r][q]);
        now[r] = next[r];
        next[r] = visits[r][k + 2 < last ? k + 2 : last];
      }
      if (k % kLanes == kLanes - 1 || k == last) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int visit = k / kLanes * kLanes + lane;
          if (!here[r] || visit > k) continue;
          const int j = visits[r][visit];
          scratch.c[row[r] * T + j] = (j == row[r] ? 1.0 : 0.0) - kept[r];
        }
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
      const bool here = is_row(s, T, i);
      read_line<kMost>(scratch.gram, T, here ? i : 0, here, product[r]);
#pragma unroll
      for (int q = 0; q < kValues; ++q) {
        const int t = Shape::task_of(lane, q);
        if (i < T && t < T) scratch.c[i * T + t] = here && t == i ? 1.0 : 0.0;
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
        const bool here = is_row(s, T, i), in_range = j < T;
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
  if (is_staged(s, T) && !scratch.told()) solve_ordinary_rows<kMost>(s, T, scratch);
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
    constexpr int kInFlight = kMost <= 16 ? 8 : 16;
    for (int first = tid % split; first < T; first += kInFlight * split) {
      double x[kInFlight];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const int i = first + u * split;
        x[u] = t < T && i < T ? c(i * T + t) : 0.0;
      }
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) sum += x[u];
    }
    for (int step = split / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (t < T && tid % split == 0) s.result[t] = is_absent(s, t) ? 0.0 : scale * sum;
  }
}

// A matrix in device memory into scratch. Whether this thread met something that `solve_ordinary_rows` does not expect.
// A barrier must follow.
__device__ inline bool stage_matrix(const double* gram, int T, const Scratch& scratch) {
  bool unusual = false;
  constexpr int kInFlight = 8;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int t = threadIdx.x; t < T; t += kThreads) unusual = scratch.put_norm(t, gram[t * (T + 1)]) || unusual;
  for (int j = lane; j < T; j += kWarp) {
    const double right = gram[j * (T + 1)];
    for (int first = warp; first < T; first += kInFlight * kWarps) {
      double x[kInFlight], left[kInFlight];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const int i = first + u * kWarps;
        x[u] = i < T ? gram[i * T + j] : 0.0;
        left[u] = i < T ? gram[i * (T + 1)] : 0.0;
      }
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const int i = first + u * kWarps;
        if (i >= T) continue;
        // a matrix that is no Gram matrix may grow beyond all bounds on the way
        const bool bounded = x[u] * x[u] <= 1.01 * left[u] * right;
        unusual = scratch.put(T, i, j, x[u]) || !bounded || unusual;
      }
    }
  }
  return unusual;
}

// more: as for SolverMemory
template <int kMost>
__global__ void __launch_bounds__(kThreads, 1)
    pcgrad_coefficients_kernel(const double* gram, int T, double* more, const __grid_constant__ Solve s) {
  FASTMTL_SHARED(SolverMemory<kMost>, shared);
  const Scratch scratch = shared.template scratch<kMost>(T, more);
  bool unusual = stage_order<kMost>(s, T, scratch);
  unusual = stage_matrix(gram, T, scratch) || unusual;
  scratch.tell(unusual);
  __syncthreads();
  solve_pcgrad<kMost>(s, T, scratch);
}

}  // namespace fastmtl::cuda
