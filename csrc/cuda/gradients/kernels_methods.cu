// The launcher of the methods' weights.
#include "cuda/gradients/launch.h"

namespace fastmtl::cuda {

void launch_method_weights(const MethodParams& p, cudaStream_t stream) {
  constexpr int kSmall = sizeof(MethodMemory<16>), kMiddle = sizeof(MethodMemory<kMostSharedTasks>),
                kLarge = sizeof(MethodMemory<kMaxTasks>);
  if (p.num_tasks <= 16) FASTMTL_BIG_LAUNCH(kSmall, 1, stream, (p), method_weights_kernel<16>);
  else if (p.num_tasks <= kMostSharedTasks)
    FASTMTL_BIG_LAUNCH(kMiddle, 1, stream, (p), method_weights_kernel<kMostSharedTasks>);
  else FASTMTL_BIG_LAUNCH(kLarge, 1, stream, (p), method_weights_kernel<kMaxTasks>);
}

}  // namespace fastmtl::cuda
