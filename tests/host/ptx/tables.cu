// The kernels of table.cuh: csrc/cuda/runtime.cu, which launches them, would bring torch's headers.
#include "cuda/table.cuh"

namespace fastmtl::cuda {

template __global__ void write_table_kernel<kFewWords>(const __grid_constant__ TableWords<kFewWords>);
template __global__ void write_table_kernel<kSomeWords>(const __grid_constant__ TableWords<kSomeWords>);
template __global__ void write_table_kernel<kMostWords>(const __grid_constant__ TableWords<kMostWords>);

}  // namespace fastmtl::cuda
