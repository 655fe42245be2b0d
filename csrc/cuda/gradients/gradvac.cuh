// GradVac's T x T problem by one block, in float64.
#pragma once

#include "common/solvers/gradvac.h"
#include "cuda/gradients/solve.cuh"

namespace fastmtl::cuda {

struct GradVacParams {
  solvers::GradVac method;
  solvers::Entries gram;  // [T, T]
  int num_tasks;
  Solve order;                // given, or drawn; nothing else of it is looked at
  const uint8_t* present;     // [T], or null: all
  const double* targets;      // [T, T]
  double* more;               // beyond 64 tasks: `T * leading_dimension(T)` float64 of device memory, on 16 bytes
  double *out, *new_targets;  // [T, T] each: coefficients and targets
  // [T], or null; with them `out` and `new_targets` are scratch, and `kept` is what `targets` is, to be changed
  double *weights, *kept;
  bool mean;
};

// To 64 tasks the matrix of cosines is in shared memory; where it will be, or would be, lie the numbers that an order
// is drawn by.
template <int kMost>
struct GradVacMemory {
  static constexpr int kNumbers = kMost <= 64 ? kMost * kMost : 2048;
  alignas(16) double cosines[kNumbers];
  double lengths[kMost];
  alignas(16) uint8_t visits[kMost * kMost];
  int ranks[kWarps];
  bool unusual[kWarps];
};

// How many rows kLanes lanes have in hand at once, as SolverShape's lanes and values share them out. A row's products,
// targets and coefficients are all in registers.
template <int kMost>
constexpr int kGradVacRows = kMost == 64 ? 2 : 1;

// Row by row, as `gradvac_row` of common/solvers/gradvac.h defines them.
template <int kMost>
__device__ inline void solve_gradvac(const GradVacParams& p, const double* cosines, const double* lengths,
                                     const uint8_t* drawn) {
  using Shape = SolverShape<kMost>;
  constexpr int kLanes = Shape::kLanes, kValues = Shape::kValues, kRows = kGradVacRows<kMost>;
  constexpr int kGroups = kThreads / kLanes;
  const int tid = threadIdx.x, lane = tid % kLanes, T = p.num_tasks;
  const int64_t num_visits = p.order.draw ? T : p.order.num_visits;
  auto visit = [&](int i, int64_t k) -> int {
    if (p.order.draw) return drawn[i * T + k];
    const int64_t j = p.order.order[i * num_visits + k];
    return j >= 0 && j < T ? static_cast<int>(j) : kNobody;
  };
  for (int base = 0; base < T; base += kRows * kGroups) {
    if (base + tid / kWarp * (kWarp / kLanes) >= T) continue;  // none of this warp's rows is there
    double product[kRows][kValues], target[kRows][kValues], c[kRows][kValues], length[kRows], size[kRows];
    int row[kRows], next[kRows];
    bool bad[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = row[r] = base + r * kGroups + tid / kLanes;
      const bool here = i < T;
      read_line<kMost>(cosines, T, here ? i : 0, here, product[r]);
#pragma unroll
      for (int q = 0; q < kValues; ++q) {
        const int t = Shape::task_of(lane, q);
        target[r][q] = here && t < T ? p.targets[i * T + t] : 0.0;
        c[r][q] = t == i ? 1.0 : 0.0;
      }
      length[r] = size[r] = 1.0;
      next[r] = here && num_visits > 0 ? visit(i, 0) : kNobody;
    }
    for (int64_t k = 0; k < num_visits; ++k) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int i = row[r], j = next[r];
        const bool here = i < T, in_range = j < T;
        if (here && k + 1 < num_visits) next[r] = visit(i, k + 1);  // early: it waits for nothing
        const int task = in_range ? j : 0, whose = Shape::lane_of(task), which = Shape::value_of(task);
        double line[kValues];
        read_line<kMost>(cosines, T, task, true, line);
        const double along = __shfl_sync(~0u, pick<kValues>(product[r], which), whose, kLanes);
        const double wanted = __shfl_sync(~0u, pick<kValues>(target[r], which), whose, kLanes);
        const double mine = lengths[here ? i : 0], other = lengths[task];
        const bool visited = here && !bad[r] && j != i;
        bad[r] = bad[r] ||
                 (visited && !(in_range && isfinite(along) && isfinite(wanted) && isfinite(mine) && isfinite(other)));
        const bool meets =
            visited && !bad[r] && mine > 0 && other > 0 && solvers::has_direction(p.method, length[r], size[r]);
        const solvers::Turn found = solvers::turn(p.method, length[r], along, wanted);
        const double step = meets ? found.step : 0.0, moved = meets ? found.target : wanted;
        const double share = step == 0 ? 0.0 : step * (mine / other);
        length[r] = meets ? found.length : length[r];
        size[r] += fabs(step);
#pragma unroll
        for (int q = 0; q < kValues; ++q) {
          const bool is_it = lane == whose && q == which;
          // what is not finite must not reach a row that it is no part of
          product[r][q] += step == 0 ? 0.0 : step * line[q];
          target[r][q] = is_it ? moved : target[r][q];
          c[r][q] += is_it ? share : 0.0;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int q = 0; q < kValues; ++q) {
        const int t = Shape::task_of(lane, q), e = row[r] * T + t;
        if (row[r] >= T || t >= T) continue;
        p.out[e] = bad[r] ? NAN : c[r][q];
        p.new_targets[e] = bad[r] ? p.targets[e] : target[r][q];
      }
    }
  }
}

// The weights, sums of the coefficients of the tasks that take part, and the targets of their pairs; these stay as they
// are unless all weights are finite.
__device__ inline void keep_targets(const GradVacParams& p, const Scratch& scratch) {
  const int T = p.num_tasks, tid = threadIdx.x;
  __syncthreads();
  bool bad = false;
  for (int t = tid; t < T; t += kThreads) {
    double sum = 0.0;
    int count = 0;
#pragma unroll 8
    for (int i = 0; i < T; ++i) {
      const bool here = solvers::takes_part(p.present, i);
      sum += here ? p.out[i * T + t] : 0.0;
      count += here;
    }
    const bool here = solvers::takes_part(p.present, t);
    p.weights[t] = !here ? 0.0 : p.mean ? sum / count : sum;
    bad = bad || (here && !isfinite(sum));
  }
  scratch.tell(bad);
  __syncthreads();
  if (scratch.told()) return;
  for (int e = tid; e < T * T; e += kThreads)
    if (solvers::takes_part(p.present, e / T) && solvers::takes_part(p.present, e % T)) p.kept[e] = p.new_targets[e];
}

template <int kMost>
__global__ void __launch_bounds__(kThreads, 1) gradvac_kernel(const __grid_constant__ GradVacParams p) {
  FASTMTL_SHARED(GradVacMemory<kMost>, shared);
  const int T = p.num_tasks, stride = leading_dimension(T), tid = threadIdx.x;
  double* cosines = kMost <= 64 ? shared.cosines : p.more;
  Scratch scratch{};
  scratch.numbers = reinterpret_cast<int64_t*>(shared.cosines);
  scratch.num_numbers = GradVacMemory<kMost>::kNumbers;
  scratch.unusual = shared.unusual;
  scratch.ranks = shared.ranks;
  if (p.order.draw) draw_order<kMost>(p.order, T, scratch, shared.visits);  // ends with a barrier
  for (int t = tid; t < T; t += kThreads)
    shared.lengths[t] = solvers::takes_part(p.present, t) ? sqrt(p.gram.at(t, t)) : 0.0;
  __syncthreads();
  for (int e = tid; e < T * stride; e += kThreads) {
    const int i = e / stride, j = e % stride;
    const bool here = j < T && solvers::takes_part(p.present, i) && solvers::takes_part(p.present, j);
    cosines[e] = here ? solvers::cosine(p.gram.at(i, j), shared.lengths[i], shared.lengths[j]) : 0.0;
  }
  __syncthreads();
  solve_gradvac<kMost>(p, cosines, shared.lengths, shared.visits);
  if (p.weights != nullptr) keep_targets(p, scratch);
}

}  // namespace fastmtl::cuda
