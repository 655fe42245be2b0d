// Streams, tickets and pointer tables: what launches need that outlives them.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

namespace fastmtl::cuda {

using torch::stable::Tensor;

void check(cudaError_t error, const char* what);

cudaStream_t current_stream(int device);

// uninitialised device memory that lives as long as the tensor
Tensor workspace(int device, int64_t bytes);

// Whether a launch may begin before the one in front is done: on sm_90 and later, unless FASTMTL_PDL=0.
bool launches_early(int device);

// Counters, zero when a call's first launch begins.
struct Tickets {
  unsigned* counters;
  std::optional<Tensor> own;  // their memory, where it is the call's
};

// Counters of a set
constexpr int kTickets = 256;

// A call of one launch, which leaves its counters at zero, takes the stream's set; captured in a CUDA graph a set of
// its own, since graphs may run beside each other. A call of several launches gets a new one, zeroed on the stream:
// another thread's call may come between its launches, or the call may end between them. So does one that wants more
// counters than a set has. The first call on a device makes all sets, and the host waits until they are zero, in a
// capture too; without memory for them every call gets a new one.
Tickets tickets(int device, cudaStream_t stream, size_t launches, int count = kTickets);

// Words in device memory, which lasts until the launches that read them are queued, and those launches' time.
using DeviceTable = std::shared_ptr<const int64_t>;

// Kept by device, stream and content, in memory that the stream's later tables take over. In a capture the table is the
// call's, in memory of the graph's pool, and is written at every replay: what the same stream does later in the graph
// may use that memory again.
DeviceTable device_table(int device, cudaStream_t stream, const std::vector<int64_t>& words);

}  // namespace fastmtl::cuda
