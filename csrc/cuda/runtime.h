// Streams, tickets and pointer tables: what launches need that outlives them.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace fastmtl::cuda {

using torch::stable::Tensor;

void check(cudaError_t error, const char* what);

cudaStream_t current_stream(int device);

// uninitialised device memory that lives as long as the tensor
Tensor workspace(int device, int64_t bytes);

// 256 counters, zero when a launch begins, which must leave them at zero. One set per stream; each call that is
// captured in a CUDA graph has a set of its own, since graphs may run beside each other.
unsigned* tickets(int device, cudaStream_t stream);

// The words in device memory. Written by launches that carry them as arguments, so nothing is copied from the host and
// the call may be captured; kept by device, stream and content, unless it is.
Tensor device_table(int device, cudaStream_t stream, const std::vector<int64_t>& words);

}  // namespace fastmtl::cuda
