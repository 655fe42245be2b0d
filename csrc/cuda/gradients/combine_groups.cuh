// w G, where the parameters of each of L groups have weights of their own: one read of G, one launch.
#pragma once

#include "cuda/gradients/combine.cuh"
#include "cuda/gradients/groups.cuh"

namespace fastmtl::cuda {

template <class In>
struct CombineGroupsShared {
  CombineShared<In, 1> rows;
  GroupSlot mine;
};

template <class In>
__global__ void __launch_bounds__(kThreads, kCombineBlocks<In, 1>)
    combine_groups_kernel(const __grid_constant__ CombineGroupsParams p) {
  FASTMTL_SHARED(CombineGroupsShared<In>, shared);
  // from the last slot to the first, as the other kernel
  const int slot = static_cast<int>(gridDim.x) - 1 - static_cast<int>(blockIdx.x);
  const GroupSlot& mine = shared.mine;
  find_group(p.cut, slot, shared.mine);
  combine_slot<In, 1>(
      p.grads, 0, mine.low(p.cut, slot), mine.high(p.cut, slot),
      [&](int, int t) { return p.weights[static_cast<int64_t>(mine.group.group) * p.grads.num_tasks + t]; },
      shared.rows);
}

}  // namespace fastmtl::cuda
