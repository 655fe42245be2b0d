// Happens-before checks for tests/host/cuda_on_host.h: whether accesses of shared and global memory are ordered by
// barriers, fences and atomics, or only by the order in which the host happens to run the threads.
//
// The rules are those of the PTX memory model: a barrier orders all that the block's threads do before it before all
// that they do after it; __syncwarp the same within a warp. Between blocks, what a thread knows by the time of a fence
// is passed on by its next atomic, and what an atomic has read counts from the thread's next fence on; an atomic that
// releases and acquires needs no fence. A barrier may lie between fence and atomic. Accesses that nothing orders, one
// of them a write, end the launch with an error.
//
// `allow_equal_writes`: but for a write of the bytes that another has left there. Triton lets several threads hold the
// same value, and all of them store it to shared memory.
//
// FASTMTL_RACES switches this on, with races.cpp. Accesses are then reported by gcc's -fsanitize=thread, whose hooks
// are in races.cpp in place of the sanitizer's runtime.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace cuda_on_host::races {

#if defined(FASTMTL_RACES)

// While one lives, accesses are the header's own.
class Quiet {
 public:
  Quiet();
  ~Quiet();
  Quiet(const Quiet&) = delete;
  Quiet& operator=(const Quiet&) = delete;

 private:
  bool was_;
};

void launch_begins();
void block_begins(int64_t block, int num_threads);
void shared_memory_is(const void* p, size_t bytes);
void kernel_runs(bool runs);  // from here on accesses are a kernel's, or not
// The running thread's; `where`: the code that calls. An access is reported before it is made. written: what a write
// will leave there, if that is known.
void access(const void* p, size_t size, bool write, const void* where, const void* written = nullptr);
void allow_equal_writes(bool allowed);
void atomic(const void* p, size_t size, bool acq_rel, const void* where);  // acq_rel: as if between two fences
void fence();
void barrier();  // all threads of the block that are left have come
void warp_barrier();
// what an error says of `where`
void describe_by(std::string (*describe)(const void* where));
// To see whether faults are found, tests leave out one barrier or fence, or make one atomic relaxed; they ask by
// `races_sites` which cases run it at all.
bool skipped(const char* file, int line);

#else

struct Quiet {
  Quiet() {}
};
inline void launch_begins() {}
inline void block_begins(int64_t, int) {}
inline void shared_memory_is(const void*, size_t) {}
inline void kernel_runs(bool) {}
inline void access(const void*, size_t, bool, const void*, const void* = nullptr) {}
inline void allow_equal_writes(bool) {}
inline void atomic(const void*, size_t, bool, const void*) {}
inline void fence() {}
inline void barrier() {}
inline void warp_barrier() {}
inline void describe_by(std::string (*)(const void*)) {}
inline bool skipped(const char*, int) { return false; }

#endif

}  // namespace cuda_on_host::races
