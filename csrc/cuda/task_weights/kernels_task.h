// Launches of one dtype each: kernels_task_<dtype>.cu has them.
#pragma once

#include "cuda/task_weights/product.cuh"
#include "cuda/task_weights/stage.cuh"
#include "cuda/task_weights/weight_grads.cuh"

namespace fastmtl::cuda {

// weight_dtype: that of In, or float32
template <class In>
void launch_stage(const StageArguments& p, DType weight_dtype, dim3 grid, cudaStream_t stream);
template <class In>
void launch_product(const ProductArguments& p, int tile, dim3 grid, cudaStream_t stream);
template <class In>
void launch_pieces(const PiecesArguments& p, int tile, dim3 grid, cudaStream_t stream);
template <class In>
void launch_bias(const BiasArguments& p, bool aligned16, dim3 grid, cudaStream_t stream);
// W: of the weights; per: numbers to a thread, 4 or 1
template <class W>
void launch_finish(const FinishArguments& p, int per, dim3 grid, cudaStream_t stream);
template <class W>
void launch_chunks(const ChunksArguments& p, unsigned blocks, cudaStream_t stream);
// W: of the gates
template <class W>
void launch_gates(const GatesArguments& p, unsigned blocks, cudaStream_t stream);

}  // namespace fastmtl::cuda
