// GradVac's T x T problem by one block, in float64.
#pragma once

#include "common/solvers/gradvac.h"
#include "cuda/gradients/solve.cuh"

namespace fastmtl::cuda {

struct GradVacParams {
  solvers::GradVac method;
  const double* gram;  // [T, T]
  int num_tasks;
  const int64_t* order;  // [T, num_visits]
  int64_t num_visits;
  const double* targets;  // [T, T]
  double* more;           // beyond 64 tasks: `T * leading_dimension(T)` float64 of device memory, on 16 bytes
  double *out, *new_targets;
};

// To 64 tasks the matrix of cosines is in shared memory.
template <int kMost>
struct GradVacMemory {
  alignas(16) double cosines[kMost <= 64 ? kMost * kMost : 2];
  double lengths[kMost];
};

// How many rows kLanes lanes have in hand at once, as SolverShape's lanes and values share them out. A row's products,
// targets and coefficients are all in registers.
template <int kMost>
constexpr int kGradVacRows = kMost == 64 ? 2 : 1;

// Row by row, as `gradvac_row` of common/solvers/gradvac.h defines them.
template <int kMost>
__device__ inline void solve_gradvac(const GradVacParams& p, const double* cosines, const double* lengths) {
  using Shape = SolverShape<kMost>;
  constexpr int kLanes = Shape::kLanes, kValues = Shape::kValues, kRows = kGradVacRows<kMost>;
  constexpr int kGroups = kThreads / kLanes;
  const int tid = threadIdx.x, lane = tid % kLanes, T = p.num_tasks;
  auto visit = [&](int i, int64_t k) -> int {
    const int64_t j = p.order[i * p.num_visits + k];
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
      next[r] = here && p.num_visits > 0 ? visit(i, 0) : kNobody;
    }
    for (int64_t k = 0; k < p.num_visits; ++k) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int i = row[r], j = next[r];
        const bool here = i < T, in_range = j < T;
        if (here && k + 1 < p.num_visits) next[r] = visit(i, k + 1);  // early: it waits for nothing
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

template <int kMost>
__global__ void __launch_bounds__(kThreads, 1) gradvac_kernel(const __grid_constant__ GradVacParams p) {
  FASTMTL_SHARED(GradVacMemory<kMost>, shared);
  const int T = p.num_tasks, stride = leading_dimension(T), tid = threadIdx.x;
  double* cosines = kMost <= 64 ? shared.cosines : p.more;
  for (int t = tid; t < T; t += kThreads) shared.lengths[t] = sqrt(p.gram[t * (T + 1)]);
  __syncthreads();
  for (int e = tid; e < T * stride; e += kThreads) {
    const int i = e / stride, j = e % stride;
    cosines[e] = j < T ? solvers::cosine(p.gram[i * T + j], shared.lengths[i], shared.lengths[j]) : 0.0;
  }
  __syncthreads();
  solve_gradvac<kMost>(p, cosines, shared.lengths);
}

}  // namespace fastmtl::cuda
