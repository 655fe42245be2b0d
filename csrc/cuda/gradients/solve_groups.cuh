// PCGrad's weights of L groups of parameters, each by a block of its own, from their Gram matrices.
#pragma once

#include "cuda/gradients/finish.cuh"

namespace fastmtl::cuda {

struct SolveGroupsParams {
  Solve solve;         // result: [L, T]
  const double* gram;  // [L, T, T]
  int num_tasks;
  double* more;      // from 17 tasks on: `order_at(T)` float64 of device memory for each group, on 16 bytes
  unsigned* ticket;  // where a state is to be advanced
};

// Group g draws what call number g from here on would: numbers that lie g counts further on in the same stream, as
// those of another key do (see `random_number`).
__device__ inline Solve solve_of_group(const Solve& all, int T, int group) {
  Solve s = all;
  uint64_t counter = static_cast<uint64_t>(group);
  if (all.draw && all.state != nullptr) {
    s.key ^= static_cast<uint64_t>(all.state[0]);
    counter += static_cast<uint64_t>(all.state[1]);
  }
  s.key += counter * kNumbersPerCount * kRandomStep;
  s.state = nullptr;
  s.result += static_cast<int64_t>(group) * T;
  return s;
}

template <int kMost>
__global__ void __launch_bounds__(kThreads, 1) pcgrad_weights_kernel(const __grid_constant__ SolveGroupsParams p) {
  struct Shared {
    SolverMemory<kMost> solver;
    int flag;
  };
  FASTMTL_SHARED(Shared, shared);
  const int T = p.num_tasks, group = static_cast<int>(blockIdx.x);
  const Solve s = solve_of_group(p.solve, T, group);
  const Scratch scratch = shared.solver.template scratch<kMost>(T, p.more + static_cast<int64_t>(group) * order_at(T));
  bool unusual = stage_order<kMost>(s, T, scratch);
  unusual = stage_matrix(p.gram + static_cast<int64_t>(group) * T * T, T, scratch) || unusual;
  scratch.tell(unusual);
  __syncthreads();
  solve_pcgrad<kMost>(s, T, scratch);
  // by the last block: the others have read it
  if (p.ticket == nullptr || !arrives_last(p.ticket, gridDim.x, shared.flag)) return;
  if (threadIdx.x == 0)
    p.solve.state[1] = static_cast<int64_t>(static_cast<uint64_t>(__ldcg(p.solve.state + 1)) + gridDim.x);
}

}  // namespace fastmtl::cuda
