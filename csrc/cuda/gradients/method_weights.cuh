// The weights of a method by one block, in float64: the solvers that the CPU runs, shared out over the block's threads.
// Few tasks by one warp, whose barriers cost little. Of a problem that falls into parts each block solves some.
#pragma once

#include "common/solvers/methods.h"
#include "cuda/device.cuh"
#include "cuda/gradients/finish.cuh"

namespace fastmtl::cuda {

struct MethodParams {
  solvers::Request request;
  solvers::Entries gram;  // [T, T]
  int num_tasks;
  const uint8_t* present;     // [T], or null: all
  const double* preferences;  // [T], or null: all equal
  double* scratch;            // of each block, `block_scratch(T)` numbers of device memory
  double* parts;              // [blocks, T], if there are several
  unsigned* ticket;           // likewise
  double* out;                // [T]
  // problems that have the request, `present` and `preferences` in common: `gram`, `out`, the blocks with what they
  // have, and the tickets of each follow each other
  int num_groups;
};

// up to here one warp does it all
constexpr int kWarpTasks = 16;
// more tasks than these have no room in shared memory
constexpr int kMostSharedTasks = 64;
// of more tasks, whose scratch is in device memory
constexpr int kMostScratchBlocks = 32;

inline int64_t block_scratch(int T) { return T > kMostSharedTasks ? solvers::scratch_size(kMaxTasks) : 0; }

inline int method_blocks(solvers::Kind kind, int T) {
  if (!solvers::has_parts(kind)) return 1;
  return T > kMostSharedTasks && T > kMostScratchBlocks ? kMostScratchBlocks : T;
}

template <int kTeamWarps>
struct TeamShared {
  double values[kTeamWarps];
  int indices[kTeamWarps];
  uint32_t words[4];
};

// A team of all threads of a block (see common/solvers/team.h). Sums are added up in a fixed order. One warp needs no
// shared memory for it.
template <int kTeamWarps, int kMost>
struct Block {
  static constexpr int kRows = kTeamWarps == 1 ? 4 : 2 * kTeamWarps, kColumns = kTeamWarps * kWarp / kRows;
  static_assert(kWarp % kColumns == 0, "a row lies in one warp");
  static constexpr int kRoom = kMost;
  TeamShared<kTeamWarps>* shared;

  __device__ static double* scratch(double* p) { return kMost <= kMostSharedTasks ? in_shared(p) : in_global(p); }
  __device__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ int size() const { return kTeamWarps * kWarp; }
  __device__ int row() const { return rank() / kColumns; }
  __device__ int column() const { return rank() % kColumns; }
  __device__ void sync(Site site = {}) const {
    if constexpr (kTeamWarps == 1) warp_barrier(site);
    else block_barrier(site);
  }

  __device__ double sum(double x) const {
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
    if constexpr (kTeamWarps == 1) return x;
    if (rank() % kWarp == 0) shared->values[rank() / kWarp] = x;
    __syncthreads();
    double total = 0.0;
    for (int w = 0; w < kTeamWarps; ++w) total += shared->values[w];
    __syncthreads();
    return total;
  }

  __device__ double largest(double x) const {
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x = fmax(x, __shfl_xor_sync(~0u, x, lanes));
    if constexpr (kTeamWarps == 1) return x;
    if (rank() % kWarp == 0) shared->values[rank() / kWarp] = x;
    __syncthreads();
    for (int w = 0; w < kTeamWarps; ++w) x = fmax(x, shared->values[w]);
    __syncthreads();
    return x;
  }

  __device__ solvers::Found least(solvers::Found x) const {
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2)
      x = solvers::smaller(x, {__shfl_xor_sync(~0u, x.value, lanes), __shfl_xor_sync(~0u, x.index, lanes)});
    if constexpr (kTeamWarps == 1) return x;
    if (rank() % kWarp == 0) {
      shared->values[rank() / kWarp] = x.value;
      shared->indices[rank() / kWarp] = x.index;
    }
    __syncthreads();
    for (int w = 0; w < kTeamWarps; ++w) x = solvers::smaller(x, {shared->values[w], shared->indices[w]});
    __syncthreads();
    return x;
  }

  __device__ double across(double x) const {
    for (int lanes = kColumns / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
    return x;
  }

  // there is a sync between two calls
  template <class Is>
  __device__ solvers::Members members(int n, const Is& is_in) const {
    const unsigned word = __ballot_sync(~0u, rank() < n && is_in(rank()));
    if constexpr (kTeamWarps == 1) return {{word, 0, 0, 0}};
    if (rank() % kWarp == 0 && rank() / kWarp < 4) shared->words[rank() / kWarp] = word;
    __syncthreads();
    solvers::Members found;
    for (int k = 0; k < 4; ++k) found.words[k] = shared->words[k];
    return found;
  }
};

template <int kMost>
struct MethodMemory {
  static constexpr int kTeamWarps = kMost <= kWarpTasks ? 1 : kWarps;
  TeamShared<kTeamWarps> team;
  int is_last;
  double scratch[kMost <= kMostSharedTasks ? solvers::scratch_size(kMost) : 1];
};

// kMost: tasks that its shared memory is for
template <int kMost>
__global__ void __launch_bounds__(MethodMemory<kMost>::kTeamWarps* kWarp, 1)
    method_weights_kernel(const __grid_constant__ MethodParams p) {
  using Memory = MethodMemory<kMost>;
  FASTMTL_BIG_SHARED(Memory, memory);
  const Block<Memory::kTeamWarps, kMost> team{&memory.team};
  // beyond shared memory a launch is of one group
  constexpr bool kGroups = kMost <= kMostSharedTasks;
  const int T = p.num_tasks, block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  const int parts = kGroups ? blocks / p.num_groups : blocks;
  const int group = kGroups ? block / parts : 0, part = kGroups ? block % parts : block;
  double* scratch = kMost <= kMostSharedTasks ? memory.scratch : p.scratch + block * solvers::scratch_size(kMost);
  double* weights = p.out + group * T;
  double* group_parts = p.parts + group * parts * T;
  double* out = parts == 1 ? weights : group_parts + part * T;
  const solvers::Entries gram = kGroups ? p.gram.of_group(group, T) : p.gram;
  solvers::solve(team, p.request, gram, T, p.present, p.preferences, scratch, out, {part, parts});
  if (parts > 1) {
    if (!arrives_last(p.ticket + group, static_cast<unsigned>(parts), memory.is_last)) return;
    // 0 for absent tasks in each
    solvers::each(team, T, [&](int t) {
      double sum = 0.0;
      for (int k = 0; k < parts; ++k) sum += __ldcg(group_parts + k * T + t);
      weights[t] = sum;
    });
  }
  solvers::follow(team, p.request, T, p.present, weights);
}

}  // namespace fastmtl::cuda
