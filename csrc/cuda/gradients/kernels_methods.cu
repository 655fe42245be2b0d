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

}  // namespace

void launch_method_weights(const MethodParams& p, cudaStream_t stream) {
  const int rows = p.request.rows(p.num_tasks);
  if (rows <= kWarpTasks) launch<kWarpTasks>(p, stream);
  else if (rows <= kMostSharedTasks) launch<kMostSharedTasks>(p, stream);
  else launch<kMaxTasks>(p, stream);
}

}  // namespace fastmtl::cuda
