// The launcher of GradVac's coefficients.
#include "cuda/gradients/launch.h"

namespace fastmtl::cuda {

void launch_gradvac(const GradVacParams& p, cudaStream_t stream) {
  if (p.num_tasks <= 16) FASTMTL_LAUNCH(1, stream, (p), gradvac_kernel<16>);
  else if (p.num_tasks <= 32) FASTMTL_LAUNCH(1, stream, (p), gradvac_kernel<32>);
  else if (p.num_tasks <= 64) FASTMTL_LAUNCH(1, stream, (p), gradvac_kernel<64>);
  else FASTMTL_LAUNCH(1, stream, (p), gradvac_kernel<128>);
}

}  // namespace fastmtl::cuda
