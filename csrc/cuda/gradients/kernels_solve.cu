// The launchers of the T x T problem by itself, and of one for each group of parameters.
#include "cuda/gradients/launch.h"

namespace fastmtl::cuda {

void launch_coefficients(const double* gram, int num_tasks, double* more, const Solve& solve, cudaStream_t stream) {
  if (num_tasks <= 16) FASTMTL_LAUNCH(1, stream, (gram, num_tasks, more, solve), pcgrad_coefficients_kernel<16>);
  else if (num_tasks <= 32) FASTMTL_LAUNCH(1, stream, (gram, num_tasks, more, solve), pcgrad_coefficients_kernel<32>);
  else if (num_tasks <= 64) FASTMTL_LAUNCH(1, stream, (gram, num_tasks, more, solve), pcgrad_coefficients_kernel<64>);
  else FASTMTL_LAUNCH(1, stream, (gram, num_tasks, more, solve), pcgrad_coefficients_kernel<128>);
}

void launch_pcgrad_weights(const SolveGroupsParams& p, int num_groups, cudaStream_t stream) {
  if (p.num_tasks <= 16) FASTMTL_LAUNCH(num_groups, stream, (p), pcgrad_weights_kernel<16>);
  else if (p.num_tasks <= 32) FASTMTL_LAUNCH(num_groups, stream, (p), pcgrad_weights_kernel<32>);
  else if (p.num_tasks <= 64) FASTMTL_LAUNCH(num_groups, stream, (p), pcgrad_weights_kernel<64>);
  else FASTMTL_LAUNCH(num_groups, stream, (p), pcgrad_weights_kernel<128>);
}

}  // namespace fastmtl::cuda
