// Streams, tickets and pointer tables: what launches need that outlives them.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace fastmtl::cuda {

using torch::stable::Tensor;

void check(cudaError_t error, const char* what);

cudaStream_t current_stream(int device);

// uninitialised device memory that lives as long as the tensor
Tensor workspace(int device, int64_t bytes);

// 256 counters, zero when a call's first launch begins.
struct Tickets {
  unsigned* counters;
  std::optional<Tensor> own;  // their memory, where it is the call's
};

// A call of one launch, which leaves its counters at zero, takes the stream's set; captured in a CUDA graph a set of
// its own, since graphs may run beside each other. A call of several launches gets a new one, zeroed on the stream:
// another thread's call may come between its launches, or the call may end between them.
Tickets tickets(int device, cudaStream_t stream, size_t launches);

// The words in device memory. Written by launches that carry them as arguments, so nothing is copied from the host and
// the call may be captured; kept by device, stream and content, unless it is.
Tensor device_table(int device, cudaStream_t stream, const std::vector<int64_t>& words);

}  // namespace fastmtl::cuda
