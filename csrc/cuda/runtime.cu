#include "cuda/runtime.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "common/abi.h"
#include "cuda/table.cuh"

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

using StreamId = unsigned long long;

// A handle may come again when its stream is gone but not yet done, or mean another stream in each thread.
StreamId id_of(cudaStream_t stream) {
  StreamId id;
  check(cudaStreamGetId(stream, &id), "stream id");
  return id;
}

// CUDA 12.1 is 12010
int driver_version() {
  static const int version = [] {
    int found = 0;
    check(cudaDriverGetVersion(&found), "driver version");
    return found;
  }();
  return version;
}

// For calls that are forbidden while some stream is captured, by this thread or another, but that no graph has to see.
class OutsideCapture {
 public:
  OutsideCapture() { check(cudaThreadExchangeStreamCaptureMode(&mode_), "capture mode"); }
  ~OutsideCapture() { static_cast<void>(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  OutsideCapture(const OutsideCapture&) = delete;
  OutsideCapture& operator=(const OutsideCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Device memory for good; null if there is none left. Not torch's: its allocator may be handing out a graph's pool, to
// a capture or to one of torch.compile's warm-ups, and replays overwrite what lies there.
void* lasting_memory(size_t bytes) {
  const OutsideCapture outside;
  void* memory = nullptr;
  const cudaError_t error = cudaMalloc(&memory, bytes);
  if (error == cudaErrorMemoryAllocation) {
    static_cast<void>(cudaGetLastError());  // or the next launch would seem to have failed
    return nullptr;
  }
  check(error, "cudaMalloc");
  return memory;
}

constexpr int kSets = 2048;
constexpr int kSetsForStreams = 256;  // that graphs leave
constexpr size_t kSetBytes = kTickets * sizeof(unsigned);

// the sets of one device
struct TicketArena {
  unsigned* memory;
  int used = 0;
  std::map<StreamId, int> by_stream;

  unsigned* set(int k) const { return memory + k * kTickets; }
};

// The host waits, this once: any stream's work may then use the arena, and so may any graph, at whatever time it is
// captured. On a stream of its own, that waits for no other stream's work.
unsigned* make_arena() {
  auto* memory = static_cast<unsigned*>(lasting_memory(kSets * kSetBytes));
  if (memory == nullptr) return nullptr;
  const OutsideCapture outside;
  cudaStream_t own;
  check(cudaStreamCreateWithFlags(&own, cudaStreamNonBlocking), "tickets");
  check(cudaMemsetAsync(memory, 0, kSets * kSetBytes, own), "tickets");
  check(cudaStreamSynchronize(own), "tickets");
  check(cudaStreamDestroy(own), "tickets");
  return memory;
}

void queue_table(int64_t* table, const std::vector<int64_t>& words, cudaStream_t stream) {
  // an older driver under this runtime refuses more than 4 KiB of arguments
  const bool large = driver_version() >= 12010;
  write_table(table, words, large, stream, [] { check(cudaGetLastError(), "pointer table launch"); });
}

struct KeptTable {
  std::vector<int64_t> words;
  size_t capacity;
  std::shared_ptr<int64_t> memory;  // held by calls that have yet to queue their launches, too
};

// of a stream, that could hold a new one: then the one that was not used for longest makes room
constexpr int kKeptTables = 32;
// of all tables of a device: a table of many tasks and parameters may have tens of megabytes
constexpr size_t kKeptBytes = size_t{64} << 20;
constexpr size_t kStreamsWithTables = 256;

// Never destroyed: at exit CUDA may be gone before this library is.
struct State {
  std::mutex mutex;
  std::map<int, TicketArena> arenas;
  std::map<int, bool> early;                                        // by device
  std::map<std::pair<int, StreamId>, std::list<KeptTable>> tables;  // last used first
  std::map<int, size_t> table_bytes;                                // by device, of all streams
};

State& state() {
  static State* const it = new State;
  return *it;
}

// of a call: torch's allocator may give its memory to what is queued, or captured, on the same stream later
DeviceTable table_of_call(int device, cudaStream_t stream, const std::vector<int64_t>& words) {
  const auto owner = std::make_shared<Tensor>(workspace(device, static_cast<int64_t>(words.size() * sizeof(int64_t))));
  auto* memory = static_cast<int64_t*>(owner->mutable_data_ptr());
  queue_table(memory, words, stream);
  return DeviceTable(owner, memory);
}

}  // namespace

bool launches_early(int device) {
  static const bool wanted = [] {
    const char* value = std::getenv("FASTMTL_PDL");
    return value == nullptr || std::strcmp(value, "0") != 0;
  }();
  // before 12.3 a graph has no such edges
  if (!wanted || driver_version() < 12030) return false;
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  const auto found = s.early.find(device);
  if (found != s.early.end()) return found->second;
  // code for an older architecture, which a newer card runs too, doesn't wait; all sources are compiled for the same
  const OutsideCapture outside;
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, write_table_kernel<kFewWords>), "function attributes");
  return s.early[device] = attributes.ptxVersion >= 90;
}

Tickets tickets(int device, cudaStream_t stream, size_t launches, int count) {
  if (launches == 1 && count <= kTickets) {
    const bool capturing = is_capturing(stream);
    State& s = state();
    const std::lock_guard<std::mutex> lock(s.mutex);
    auto found = s.arenas.find(device);
    if (found == s.arenas.end())
      if (unsigned* memory = make_arena()) found = s.arenas.emplace(device, TicketArena{memory}).first;
    if (found != s.arenas.end()) {
      TicketArena& arena = found->second;
      if (capturing) {
        if (arena.used < kSets - kSetsForStreams) return {arena.set(arena.used++), std::nullopt};
      } else {
        const auto mine = arena.by_stream.find(id_of(stream));
        if (mine != arena.by_stream.end()) return {arena.set(mine->second), std::nullopt};
        if (arena.used < kSets) return {arena.set(arena.by_stream[id_of(stream)] = arena.used++), std::nullopt};
      }
    }
  }
  const size_t bytes = static_cast<size_t>(count) * sizeof(unsigned);
  Tensor memory = workspace(device, static_cast<int64_t>(bytes));
  auto* counters = static_cast<unsigned*>(memory.mutable_data_ptr());
  check(cudaMemsetAsync(counters, 0, bytes, stream), "tickets");
  return {counters, memory};
}

DeviceTable device_table(int device, cudaStream_t stream, const std::vector<int64_t>& words) {
  if (is_capturing(stream)) return table_of_call(device, stream, words);
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  const std::pair<int, StreamId> key{device, id_of(stream)};
  // of streams that come and go no one learns that they are gone
  if (s.tables.size() >= kStreamsWithTables && !s.tables.contains(key)) return table_of_call(device, stream, words);
  std::list<KeptTable>& tables = s.tables[key];
  auto found = std::find_if(tables.begin(), tables.end(), [&](const KeptTable& t) { return t.words == words; });
  if (found == tables.end()) {
    int fitting = 0;
    for (auto t = tables.begin(); t != tables.end(); ++t)
      if (t->capacity >= words.size() && t->memory.use_count() == 1) {
        ++fitting;
        found = t;
      }
    const size_t capacity = std::bit_ceil(std::max<size_t>(words.size(), 64)), bytes = capacity * sizeof(int64_t);
    size_t& kept = s.table_bytes[device];
    if (fitting < kKeptTables && kept + bytes <= kKeptBytes) {
      auto* memory = static_cast<int64_t*>(lasting_memory(bytes));
      if (memory == nullptr) return table_of_call(device, stream, words);
      tables.push_back({{}, capacity, std::shared_ptr<int64_t>(memory, [](int64_t*) {})});
      found = std::prev(tables.end());
      kept += bytes;
    } else if (fitting == 0) {
      return table_of_call(device, stream, words);
    }
    found->words.clear();  // if the launch fails, it holds nothing
    queue_table(found->memory.get(), words, stream);
    found->words = words;
  }
  tables.splice(tables.begin(), tables, found);
  return found->memory;
}

}  // namespace fastmtl::cuda
