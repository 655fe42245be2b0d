#include "runtime.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <list>
#include <map>
#include <mutex>

#include "abi.h"

// a CPU-only torch has no such function: the library must load all the same
#pragma weak aoti_torch_get_current_cuda_stream

namespace fastmtl::cuda {

void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "fastmtl: ", what, ": ", cudaGetErrorString(error));
}

cudaStream_t current_stream(int device) {
  STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream != nullptr, "fastmtl: CUDA tensors, but this torch has no CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

Tensor workspace(int device, int64_t bytes) {
  using torch::headeronly::ScalarType;
  const int64_t words = std::max<int64_t>((bytes + 7) / 8, 1);
  return torch::stable::empty({words}, ScalarType::Long, std::nullopt,
                              torch::stable::Device(torch::headeronly::DeviceType::CUDA, device));
}

namespace {

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  check(cudaStreamIsCapturing(stream, &status), "capture status");
  return status != cudaStreamCaptureStatusNone;
}

constexpr int kTickets = 256;  // counters in a set
constexpr int kSets = 2048;
constexpr int kSetsForStreams = 256;  // that graphs leave

// the sets of one device, zeroed once
struct TicketArena {
  Tensor memory;
  cudaEvent_t zeroed;
  int used = 0;
  std::map<cudaStream_t, int> by_stream;
};

constexpr int kWordsPerLaunch = 480;  // with the rest, less than the 4 KiB that arguments may take

struct TableWords {
  int64_t* table;
  int count;
  int64_t word[kWordsPerLaunch];
};

__global__ void __launch_bounds__(kWordsPerLaunch) write_table_kernel(const __grid_constant__ TableWords words) {
  const int k = static_cast<int>(threadIdx.x);
  if (k < words.count) words.table[k] = words.word[k];
}

void write_table(int64_t* table, const std::vector<int64_t>& words, cudaStream_t stream) {
  for (size_t first = 0; first < words.size(); first += kWordsPerLaunch) {
    TableWords part{table + first, static_cast<int>(std::min<size_t>(kWordsPerLaunch, words.size() - first)), {}};
    std::copy_n(words.begin() + first, part.count, part.word);
    write_table_kernel<<<1, kWordsPerLaunch, 0, stream>>>(part);
    check(cudaGetLastError(), "pointer table launch");
  }
}

struct KeptTable {
  int device;
  cudaStream_t stream;
  uint64_t hash;
  std::vector<int64_t> words;
  Tensor table;
};

constexpr size_t kKeptTables = 64;

uint64_t hash_of(const std::vector<int64_t>& words) {
  uint64_t hash = words.size();
  for (int64_t word : words) hash = (hash ^ static_cast<uint64_t>(word)) * 0x9E3779B97F4A7C15u;
  return hash;
}

// Never destroyed: at exit torch's allocator may be gone before this library is.
struct State {
  std::mutex mutex;
  std::map<int, TicketArena> arenas;
  std::list<KeptTable> tables;  // last used first
};

State& state() {
  static State* const it = new State;
  return *it;
}

}  // namespace

Tickets tickets(int device, cudaStream_t stream, size_t launches) {
  constexpr int64_t kSetBytes = kTickets * sizeof(unsigned);
  if (launches == 1) {
    State& s = state();
    const std::lock_guard<std::mutex> lock(s.mutex);
    const bool capturing = is_capturing(stream);
    auto found = s.arenas.find(device);
    if (found == s.arenas.end() && !capturing) {
      TicketArena arena{workspace(device, kSets * kSetBytes), nullptr};
      check(cudaMemsetAsync(arena.memory.mutable_data_ptr(), 0, kSets * kSetBytes, stream), "tickets");
      check(cudaEventCreateWithFlags(&arena.zeroed, cudaEventDisableTiming), "tickets");
      check(cudaEventRecord(arena.zeroed, stream), "tickets");
      found = s.arenas.emplace(device, std::move(arena)).first;
    }
    auto set = [&](int k) { return static_cast<unsigned*>(found->second.memory.mutable_data_ptr()) + k * kTickets; };
    if (!capturing) {
      auto& by_stream = found->second.by_stream;
      const auto mine = by_stream.find(stream);
      if (mine != by_stream.end()) return {set(mine->second), std::nullopt};
      if (found->second.used < kSets) {
        check(cudaStreamWaitEvent(stream, found->second.zeroed), "tickets");
        return {set(by_stream[stream] = found->second.used++), std::nullopt};
      }
    } else if (found != s.arenas.end() && found->second.used < kSets - kSetsForStreams) {
      return {set(found->second.used++), std::nullopt};
    }
  }
  Tensor memory = workspace(device, kSetBytes);
  auto* counters = static_cast<unsigned*>(memory.mutable_data_ptr());
  check(cudaMemsetAsync(counters, 0, kSetBytes, stream), "tickets");
  return {counters, memory};
}

Tensor device_table(int device, cudaStream_t stream, const std::vector<int64_t>& words) {
  const int64_t bytes = static_cast<int64_t>(words.size() * sizeof(int64_t));
  if (is_capturing(stream)) {
    Tensor table = workspace(device, bytes);
    write_table(static_cast<int64_t*>(table.mutable_data_ptr()), words, stream);
    return table;
  }
  State& s = state();
  const uint64_t hash = hash_of(words);
  const std::lock_guard<std::mutex> lock(s.mutex);
  const auto found = std::find_if(s.tables.begin(), s.tables.end(), [&](const KeptTable& t) {
    return t.hash == hash && t.device == device && t.stream == stream && t.words == words;
  });
  if (found != s.tables.end()) {
    s.tables.splice(s.tables.begin(), s.tables, found);
  } else {
    Tensor table = workspace(device, bytes);
    write_table(static_cast<int64_t*>(table.mutable_data_ptr()), words, stream);
    s.tables.push_front({device, stream, hash, words, table});
    if (s.tables.size() > kKeptTables) s.tables.pop_back();
  }
  return s.tables.front().table;
}

}  // namespace fastmtl::cuda
