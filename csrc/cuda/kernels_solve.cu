// The launcher of the T x T problem by itself.
#include "launch.h"

namespace fastmtl::cuda {

void launch_coefficients(const double* gram, int num_tasks, const Solve& solve, cudaStream_t stream) {
  if (num_tasks <= 16) FASTMTL_LAUNCH(1, stream, (gram, num_tasks, solve), pcgrad_coefficients_kernel<16, 1>);
  else if (num_tasks <= 64) FASTMTL_LAUNCH(1, stream, (gram, num_tasks, solve), pcgrad_coefficients_kernel<4, 16>);
  else FASTMTL_LAUNCH(1, stream, (gram, num_tasks, solve), pcgrad_coefficients_kernel<4, 32>);
}

}  // namespace fastmtl::cuda
