// The weights of a method by one block, in float64: the solvers that the CPU runs, shared out over the block's threads.
#pragma once

#include "common/solvers/methods.h"
#include "cuda/device.cuh"

namespace fastmtl::cuda {

struct MethodParams {
  solvers::Request request;
  const double* gram;  // [T, T]
  int num_tasks;
  const uint8_t* present;     // [T], or null: all
  const double* preferences;  // [T], or null: all equal
  double* scratch;            // beyond `kMostSharedTasks`: `solvers::scratch_size(T)` numbers of device memory
  double* out;                // [T]
};

// more tasks than these have no room in shared memory
constexpr int kMostSharedTasks = 64;

struct BlockSums {
  double values[kWarps];
  int indices[kWarps];
};

// A team of all threads of a block (see common/solvers/team.h). Sums are added up in a fixed order.
struct Block {
  BlockSums* shared;

  __device__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ int size() const { return kThreads; }
  __device__ void sync() const { __syncthreads(); }

  __device__ double sum(double x) const {
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
    if (rank() % kWarp == 0) shared->values[rank() / kWarp] = x;
    __syncthreads();
    double total = 0.0;
    for (int w = 0; w < kWarps; ++w) total += shared->values[w];
    __syncthreads();
    return total;
  }

  __device__ solvers::Found least(solvers::Found x) const {
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2)
      x = solvers::smaller(x, {__shfl_xor_sync(~0u, x.value, lanes), __shfl_xor_sync(~0u, x.index, lanes)});
    if (rank() % kWarp == 0) {
      shared->values[rank() / kWarp] = x.value;
      shared->indices[rank() / kWarp] = x.index;
    }
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) x = solvers::smaller(x, {shared->values[w], shared->indices[w]});
    __syncthreads();
    return x;
  }
};

template <int kMost>
struct MethodMemory {
  BlockSums sums;
  double scratch[kMost <= kMostSharedTasks ? solvers::scratch_size(kMost) : 1];
};

// kMost: tasks that its shared memory is for
template <int kMost>
__global__ void __launch_bounds__(kThreads, 1) method_weights_kernel(const __grid_constant__ MethodParams p) {
  FASTMTL_BIG_SHARED(MethodMemory<kMost>, memory);
  double* scratch = kMost <= kMostSharedTasks ? memory.scratch : p.scratch;
  solvers::solve(Block{&memory.sums}, p.request, p.gram, p.num_tasks, p.present, p.preferences, scratch, p.out);
}

}  // namespace fastmtl::cuda
