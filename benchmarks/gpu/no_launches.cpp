// Launches of the task convolution that do nothing but count and tell their tiles, for host_time.py and task_model.py:
// linked with kernels_task.cu, which plans them, and with the tests' table of functions for CPU tensors.
#include "cuda/task_weights/kernels_task.h"

namespace fastmtl::cuda {
namespace {

int64_t launches = 0;
int last_product = -1, last_pieces = -1;

}  // namespace

template <class In>
void launch_stage(const StageArguments&, DType, dim3, cudaStream_t) {
  ++launches;
}
template <class In>
void launch_product(const ProductArguments&, int tile, dim3, cudaStream_t) {
  last_product = tile;
  ++launches;
}
template <class In>
void launch_pieces(const PiecesArguments&, int tile, dim3, cudaStream_t) {
  last_pieces = tile;
  ++launches;
}
template <class In>
void launch_bias(const BiasArguments&, bool, dim3, cudaStream_t) {
  ++launches;
}
template <class W>
void launch_finish(const FinishArguments&, int, dim3, cudaStream_t) {
  ++launches;
}
template <class W>
void launch_chunks(const ChunksArguments&, unsigned, cudaStream_t) {
  ++launches;
}
template <class W>
void launch_gates(const GatesArguments&, unsigned, cudaStream_t) {
  ++launches;
}

#define FASTMTL_OF(T)                                                                \
  template void launch_stage<T>(const StageArguments&, DType, dim3, cudaStream_t);   \
  template void launch_product<T>(const ProductArguments&, int, dim3, cudaStream_t); \
  template void launch_pieces<T>(const PiecesArguments&, int, dim3, cudaStream_t);   \
  template void launch_bias<T>(const BiasArguments&, bool, dim3, cudaStream_t);      \
  template void launch_finish<T>(const FinishArguments&, int, dim3, cudaStream_t);   \
  template void launch_chunks<T>(const ChunksArguments&, unsigned, cudaStream_t);    \
  template void launch_gates<T>(const GatesArguments&, unsigned, cudaStream_t);
FASTMTL_OF(float)
FASTMTL_OF(__nv_bfloat16)
FASTMTL_OF(__half)
#undef FASTMTL_OF

}  // namespace fastmtl::cuda

extern "C" {

int64_t launches_made() { return fastmtl::cuda::launches; }
// the tiles of the last launches
int64_t product_tile() { return fastmtl::cuda::last_product; }
int64_t pieces_tile() { return fastmtl::cuda::last_pieces; }
}
