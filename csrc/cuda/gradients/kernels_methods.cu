// The launcher of the methods' weights.
#include "cuda/gradients/launch.h"

namespace fastmtl::cuda {

namespace {

template <int kMost>
void launch(const MethodParams& p, cudaStream_t stream) {
  using Memory = MethodMemory<kMost>;
  constexpr int kBytes = sizeof(Memory), kTeam = Memory::kTeamWarps * kWarp;
  const int blocks = p.num_groups * method_blocks(p.request.kind, p.num_tasks);
  FASTMTL_BIG_LAUNCH(kBytes, blocks, kTeam, stream, (p), method_weights_kernel<kMost>);
}

// Group by group: that kernel has no registers left for which one it is at.
template <class Launch>
void for_each_group(const MethodParams& p, const Launch& launch_one) {
  for (int group = 0; group < p.num_groups; ++group) {
    MethodParams one = p;
    one.gram = p.gram.of_group(group, p.num_tasks);
    one.out += int64_t{group} * p.num_tasks;
    one.num_groups = 1;
    launch_one(one);
  }
}

}  // namespace

void launch_method_weights(const MethodParams& p, cudaStream_t stream) {
  const int rows = p.request.rows(p.num_tasks);
  if (rows <= kWarpTasks) launch<kWarpTasks>(p, stream);
  else if (rows <= kMostSharedTasks) launch<kMostSharedTasks>(p, stream);
  else for_each_group(p, [&](const MethodParams& one) { launch<kMaxTasks>(one, stream); });
}

}  // namespace fastmtl::cuda
