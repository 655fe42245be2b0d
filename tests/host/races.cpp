// See races.h. Compiled without -fsanitize=thread.
#include "races.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cuda_on_host.h"

namespace cuda_on_host::races {
namespace {

struct Stamp {
  uint64_t time = 0;  // 0: never. Counts accesses, fences and barriers of all blocks
  int block = 0, thread = 0;
  bool atomic = false;
};

struct Byte {
  Stamp write;
  Stamp read[2];  // since then, by threads that do not know of each other
};

// by block: for each of its threads the time before which all that it did is known
using Clock = std::map<int, std::vector<uint64_t>>;

void join(Clock& to, const Clock& from) {
  for (const auto& [block, times] : from) {
    auto& mine = to[block];
    mine.resize(std::max(mine.size(), times.size()));
    for (size_t u = 0; u < times.size(); ++u) mine[u] = std::max(mine[u], times[u]);
  }
}

bool knows(const Clock& clock, const Stamp& what) {
  const auto it = clock.find(what.block);
  return it != clock.end() && what.time < it->second[what.thread];
}

struct Thread {
  Clock acquired;  // since the last barrier
  Clock released;  // known by the time of its last fence
  Clock read;      // by its atomics since then
};

// "+0x..." within the library, which tests/helpers/host_kernels.py turns into a line of source
std::string offset_of(const void* where) {
  Dl_info info;
  dladdr(where, &info);
  char text[32];
  std::snprintf(text, sizeof text, "+%#zx", reinterpret_cast<size_t>(where) - reinterpret_cast<size_t>(info.dli_fbase));
  return text;
}

struct State {
  bool running = false;  // a kernel's code
  int block = 0, num_threads = 0;
  uint64_t time = 0, barrier = 0;
  std::vector<uint64_t> warp_barrier;
  std::vector<Thread> threads;
  Clock block_knows, block_released, block_read;  // of all threads by the last barrier
  uintptr_t shared = 0;
  std::vector<Byte> shared_bytes;
  std::unordered_map<uintptr_t, std::vector<Byte>> global;         // by 8 bytes
  std::unordered_map<uintptr_t, Clock> passed_on;                  // by an atomic's address
  std::unordered_map<uintptr_t, std::pair<int, int>> last_atomic;  // block and thread
  std::string error;
  std::string (*describe)(const void*) = offset_of;
  std::string skipped_file;
  int skipped_line = 0;
  std::set<std::pair<const char*, int>> sites;  // that ran, by file and line
  bool equal_writes = false;                    // are allowed
};

State& state() {
  static State it;
  return it;
}

Clock clock_of(int thread) {
  const State& s = state();
  Clock clock = s.block_knows;
  join(clock, s.threads[thread].acquired);
  auto& mine = clock[s.block];
  mine.resize(s.num_threads);
  for (int u = 0; u < s.num_threads; ++u) {
    const uint64_t here = u == thread ? s.time + 1 : u / 32 == thread / 32 ? s.warp_barrier[u / 32] : s.barrier;
    mine[u] = std::max(mine[u], here);
  }
  return clock;
}

bool ordered(const Stamp& was, int thread) {
  const State& s = state();
  if (was.time == 0) return true;
  if (was.block == s.block) {
    if (was.thread == thread || was.time < s.barrier) return true;
    if (was.thread / 32 == thread / 32 && was.time < s.warp_barrier[thread / 32]) return true;
  }
  return knows(s.block_knows, was) || knows(s.threads[thread].acquired, was);
}

struct Access {
  int thread;
  bool write, atomic, shared;
  const void* where;
  bool equal = false;  // a write of what is there
};

std::string name(int block, int thread) {
  return "block " + std::to_string(block) + " thread " + std::to_string(thread);
}

void check(const char* what, const Stamp& was, const Access& a) {
  if ((a.atomic && was.atomic) || ordered(was, a.thread)) return;
  State& s = state();
  s.error = std::string("a race in ") + (a.shared ? "shared" : "global") + " memory: a " + what + " by " +
            name(was.block, was.thread) + ", of " + name(s.block, a.thread) + " at " + s.describe(a.where);
  fail(s.error.c_str());
}

void access_byte(Byte& b, const Access& a) {
  const Stamp now{state().time, state().block, a.thread, a.atomic};
  if (!a.equal) check(a.write ? "write after a write" : "read after a write", b.write, a);
  if (!a.write) {
    b.read[!ordered(b.read[0], a.thread)] = now;
    return;
  }
  for (const Stamp& r : b.read) check("write after a read", r, a);
  b = {now, {}};
}

void access(const void* p, size_t size, Access a, const void* written = nullptr) {
  State& s = state();
  const Quiet quiet;
  ++s.time;
  const auto at = reinterpret_cast<uintptr_t>(p);
  a.shared = at - s.shared < s.shared_bytes.size();
  if (a.shared) {
    a.equal = s.equal_writes && written != nullptr && std::memcmp(p, written, size) == 0;
    for (size_t k = 0; k < size; ++k) access_byte(s.shared_bytes[at - s.shared + k], a);
    return;
  }
  if (!a.atomic) {  // its own ticket, where it has seen all that the others did
    const auto it = s.last_atomic.find(at);
    if (it != s.last_atomic.end() && it->second == std::pair{s.block, a.thread}) return;
  }
  for (size_t k = 0; k < size; ++k) {
    auto& granule = s.global[(at + k) / 8];
    granule.resize(8);
    access_byte(granule[(at + k) % 8], a);
  }
}

}  // namespace

Quiet::Quiet() : was_(state().running) { state().running = false; }
Quiet::~Quiet() { state().running = was_; }

void launch_begins() {
  State& s = state();
  s.global.clear();
  s.passed_on.clear();
  s.last_atomic.clear();
}

void block_begins(int64_t block, int num_threads) {
  State& s = state();
  s.block = static_cast<int>(block);
  s.num_threads = num_threads;
  s.barrier = ++s.time;
  s.warp_barrier.assign(num_threads / kWarp, s.time);
  s.threads.assign(num_threads, Thread{});
  for (Clock* clock : {&s.block_knows, &s.block_released, &s.block_read}) clock->clear();
  s.shared_bytes.clear();
}

void shared_memory_is(const void* p, size_t bytes) {
  state().shared = reinterpret_cast<uintptr_t>(p);
  state().shared_bytes.assign(bytes, Byte{});
}

void kernel_runs(bool runs) { state().running = runs; }

void access(const void* p, size_t size, bool write, const void* where, const void* written) {
  if (state().running) access(p, size, {machine.current, write, false, false, where}, written);
}

void allow_equal_writes(bool allowed) { state().equal_writes = allowed; }

void atomic(const void* p, size_t size, bool acq_rel, const void* where) {
  State& s = state();
  const int thread = machine.current;
  access(p, size, {thread, true, true, false, where});
  Thread& t = s.threads[thread];
  Clock& here = s.passed_on[reinterpret_cast<uintptr_t>(p)];
  join(acq_rel ? t.acquired : t.read, here);
  join(here, acq_rel ? clock_of(thread) : t.released);
  join(here, s.block_released);
  s.last_atomic[reinterpret_cast<uintptr_t>(p)] = {s.block, thread};
}

void fence() {
  State& s = state();
  Thread& t = s.threads[machine.current];
  ++s.time;
  join(t.acquired, t.read);
  join(t.acquired, s.block_read);
  t.read.clear();
  t.released = clock_of(machine.current);
}

void barrier() {
  State& s = state();
  s.barrier = ++s.time;
  s.warp_barrier.assign(s.warp_barrier.size(), s.time);
  for (Thread& t : s.threads) {
    join(s.block_knows, t.acquired);
    join(s.block_released, t.released);
    join(s.block_read, t.read);
    t.acquired.clear();
  }
}

void warp_barrier() { state().warp_barrier[machine.current / kWarp] = ++state().time; }

void describe_by(std::string (*describe)(const void*)) { state().describe = describe; }

bool skipped(const char* file, int line) {
  state().sites.emplace(file, line);
  return line == state().skipped_line && std::string(file).ends_with(state().skipped_file);
}

}  // namespace cuda_on_host::races

extern "C" {

void races_skip(const char* file, int64_t line) {
  cuda_on_host::races::state().skipped_file = file;
  cuda_on_host::races::state().skipped_line = static_cast<int>(line);
}

// The barriers, fences and atomics that ran since the last call, as lines of "file:line".
const char* races_sites() {
  static std::string found;
  found.clear();
  for (const auto& [file, line] : cuda_on_host::races::state().sites) {
    found += std::string(file) + ":" + std::to_string(line) + "\n";
  }
  cuda_on_host::races::state().sites.clear();
  return found.c_str();
}

// --- what gcc's -fsanitize=thread calls before each access

static void hook(const void* p, size_t size, bool write, const void* caller) {
  using namespace cuda_on_host;
  const auto stacks = reinterpret_cast<uintptr_t>(machine.stacks.get());
  if (reinterpret_cast<uintptr_t>(p) - stacks < machine.num_stacks * kStackBytes) return;  // a thread's own
  races::access(p, size, write, caller);
}

void __tsan_init() {}
#define FASTMTL_HOOKS(size)                                                                        \
  void __tsan_read##size(void* p) { hook(p, size, false, __builtin_return_address(0)); }           \
  void __tsan_write##size(void* p) { hook(p, size, true, __builtin_return_address(0)); }           \
  void __tsan_unaligned_read##size(void* p) { hook(p, size, false, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##size(void* p) { hook(p, size, true, __builtin_return_address(0)); }
FASTMTL_HOOKS(1)
FASTMTL_HOOKS(2)
FASTMTL_HOOKS(4)
FASTMTL_HOOKS(8)
FASTMTL_HOOKS(16)
void __tsan_read_range(void* p, size_t size) { hook(p, size, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t size) { hook(p, size, true, __builtin_return_address(0)); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
// of a local static's guard
unsigned char __tsan_atomic8_load(const volatile unsigned char* p, int) { return *p; }
}
