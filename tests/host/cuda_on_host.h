// What csrc/cuda/device.cuh needs of CUDA, for a host compiler: tests run the kernels' bodies without a GPU.
//
// Every thread of a block is a fiber, the blocks run one after another. It sees wrong indices and sums, barriers that
// not all reach, shared memory that is read before it is written, and, since threads may be run in rising or falling
// order, barriers that are missing; with FASTMTL_RACES every access that no barrier or fence orders (races.h). It does
// not see what only a GPU does: most misaligned accesses, speed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "races.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
using cudaStream_t = void*;

// of the thread and block that run now
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_host {

constexpr int kWarp = 32;
#if !defined(FASTMTL_STACK_KIB)
#define FASTMTL_STACK_KIB 128  // the sanitizer's frames are large
#endif
constexpr size_t kStackBytes = FASTMTL_STACK_KIB << 10;

// --- fibers

#if defined(__x86_64__)
// ucontext's switch makes a system call each time
using Context = void*;  // the stack pointer, where the other registers are saved
extern "C" void cuda_on_host_switch(Context* from, Context to);
asm(R"(
  .pushsection .text
  .weak cuda_on_host_switch
  .type cuda_on_host_switch, @function
cuda_on_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size cuda_on_host_switch, .-cuda_on_host_switch
  .popsection
)");
inline void switch_context(Context& from, Context& to) { cuda_on_host_switch(&from, to); }
inline void make_context(Context& context, char* stack, void (*entry)()) {
  auto** top = reinterpret_cast<void**>(stack + kStackBytes) - 8;  // six registers, the entry, and a return address
  std::fill(top, top + 8, nullptr);
  top[6] = reinterpret_cast<void*>(entry);
  context = top;
}
#else
using Context = ucontext_t;
inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
inline void make_context(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

enum class State : unsigned char { runs, at_warp, at_block, left };

struct Warp {
  int arrived = 0;
  const void* operation = nullptr;  // which one its lanes are in
  alignas(16) unsigned char given[kWarp][48];
  alignas(16) unsigned char taken[kWarp][32];
};

// how blocks and threads take turns: 0 in rising order, 1 both in falling order, else blocks shuffled by this seed
inline uint64_t schedule = 0;

// copies to shared memory that their thread has not waited for; `group` counts the thread's commits
struct Copy {
  void* to;
  const void* from;
  uint32_t bytes, taken;  // zeros behind those taken
  int group;
};
struct Copies {
  std::vector<Copy> waiting;
  int committed = 0;
};

struct Machine {
  std::vector<Context> contexts;
  std::vector<Copies> copies;
  std::vector<State> states;
  std::vector<Warp> warps;
  std::unique_ptr<char[]> stacks;
  size_t num_stacks = 0;
  std::unique_ptr<unsigned char[]> shared;
  size_t shared_bytes = 0;
  size_t dynamic_shared = 0;  // what the launch asks for
  Context caller;
  void (*body)(const void*) = nullptr;
  const void* arguments = nullptr;
  int num_threads = 0, live = 0, at_block = 0, current = 0, step = 1;
  const char* error = nullptr;
};
inline Machine machine;

inline void go_to(int thread) {
  Machine& m = machine;
  const int from = m.current;
  m.current = thread;
  threadIdx.x = static_cast<unsigned>(thread);
  switch_context(m.contexts[from], m.contexts[thread]);
}

// back to the caller of launch(), which throws; what the block's threads had on their stacks is dropped
inline void fail(const char* what) {
  machine.error = what;
  switch_context(machine.contexts[machine.current], machine.caller);
}

// to the next thread that can run, of this warp if there is one
inline void next_thread() {
  Machine& m = machine;
  const int warp = m.current / kWarp, lane = m.current % kWarp, num_warps = m.num_threads / kWarp;
  for (int w = 0; w < num_warps; ++w) {
    const int base = (warp + m.step * w + num_warps) % num_warps * kWarp;
    // of another warp: from its first lane in the order of turns
    const int start = w == 0 ? lane + m.step : m.step > 0 ? 0 : kWarp - 1;
    for (int k = 0; k < kWarp; ++k) {
      const int thread = base + (start + m.step * k + 2 * kWarp) % kWarp;
      if (m.states[thread] == State::runs && thread != m.current) return go_to(thread);
    }
  }
  fail("a barrier or a warp's operation that not all of its threads reach");
}

inline void release_block() {
  races::barrier();
  Machine& m = machine;
  m.at_block = 0;
  for (State& s : m.states)
    if (s == State::at_block) s = State::runs;
}

inline void barrier() {
  const races::Quiet quiet;
  Machine& m = machine;
  m.states[m.current] = State::at_block;
  if (++m.at_block == m.live) release_block();
  else next_thread();
}

// entry of every fiber
inline void run_thread() {
  Machine& m = machine;
  races::kernel_runs(true);
  m.body(m.arguments);
  races::kernel_runs(false);
  if (!m.copies[m.current].waiting.empty()) fail("a copy to shared memory that nobody waits for");
  m.states[m.current] = State::left;
  --m.live;
  if (m.live == 0) switch_context(m.contexts[m.current], m.caller);
  // a barrier waits for those that are still there
  if (m.at_block == m.live) release_block();
  next_thread();
}

// All lanes of a warp call this together; all(given, taken) does it for all of them.
template <class Taken, class Given, class All>
Taken collective(const Given& mine, const All& all) {
  static_assert(sizeof(Given) <= 48 && sizeof(Taken) <= 32);
  static const char operation = 0;
  const races::Quiet quiet;
  Machine& m = machine;
  Warp& warp = m.warps[m.current / kWarp];
  const int lane = m.current % kWarp;
  std::memcpy(warp.given[lane], &mine, sizeof(Given));
  if (warp.arrived == 0) warp.operation = &operation;
  if (warp.operation != &operation) fail("lanes of one warp in different operations");
  if (++warp.arrived < kWarp) {
    m.states[m.current] = State::at_warp;
    next_thread();
  } else {
    Given given[kWarp];
    Taken taken[kWarp];
    for (int k = 0; k < kWarp; ++k) std::memcpy(&given[k], warp.given[k], sizeof(Given));
    all(given, taken);
    const int first = m.current - lane;
    for (int k = 0; k < kWarp; ++k) {
      std::memcpy(warp.taken[k], &taken[k], sizeof(Taken));
      m.states[first + k] = State::runs;
    }
    warp.arrived = 0;
  }
  Taken result;
  std::memcpy(&result, warp.taken[lane], sizeof(Taken));
  return result;
}

// the block's shared memory: all bits set, so that what was not written is NaN
inline void* shared_memory(size_t bytes) {
  const races::Quiet quiet;
  Machine& m = machine;
  if (m.shared == nullptr) {
    m.shared.reset(new unsigned char[bytes]);
    m.shared_bytes = bytes;
    std::memset(m.shared.get(), 0xFF, bytes);
    races::shared_memory_is(m.shared.get(), bytes);
  }
  if (bytes != m.shared_bytes) fail("two kinds of shared memory in one kernel");
  return m.shared.get();
}

inline void* big_shared_memory(size_t bytes) {
  if (bytes > machine.dynamic_shared) fail("more shared memory than the launch asks for");
  return shared_memory(bytes);
}

// Copies to shared memory arrive as late as they may; until then all bits are set there. where: the code that calls.
inline void begin_copy(void* to, const void* from, uint32_t bytes, uint32_t taken, const void* where) {
  for (const void* p : {static_cast<const void*>(to), from})
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail("a misaligned copy");
  if (taken > 0) races::access(from, taken, false, where);
  races::access(to, bytes, true, where);
  const races::Quiet quiet;
  std::memset(to, 0xFF, bytes);
  Copies& copies = machine.copies[machine.current];
  copies.waiting.push_back({to, from, bytes, taken, copies.committed});
}
inline void commit_copies() {
  const races::Quiet quiet;
  ++machine.copies[machine.current].committed;
}
// but for the last `most` groups committed
inline void finish_copies(int most, const void* where) {
  Copies& copies = machine.copies[machine.current];
  auto it = copies.waiting.begin();
  for (; it != copies.waiting.end() && it->group < copies.committed - most; ++it) {
    races::access(it->to, it->bytes, true, where);
    const races::Quiet quiet;
    std::memcpy(it->to, it->from, it->taken);
    std::memset(static_cast<char*>(it->to) + it->taken, 0, it->bytes - it->taken);
  }
  const races::Quiet quiet;
  copies.waiting.erase(copies.waiting.begin(), it);
}

inline void run_block(int num_threads) {
  Machine& m = machine;
  m.num_threads = m.live = num_threads;
  m.at_block = 0;
  m.error = nullptr;
  m.shared.reset();
  m.contexts.resize(num_threads);
  m.states.assign(num_threads, State::runs);
  m.warps.assign(num_threads / kWarp, Warp{});
  m.copies.assign(num_threads, Copies{});
  if (m.num_stacks < static_cast<size_t>(num_threads)) {
    m.stacks.reset(new char[num_threads * kStackBytes]);
    m.num_stacks = num_threads;
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(m.stacks.get(), m.num_stacks * kStackBytes);
#endif
  for (int t = 0; t < num_threads; ++t) make_context(m.contexts[t], m.stacks.get() + t * kStackBytes, run_thread);
  m.current = m.step > 0 ? 0 : num_threads - 1;
  threadIdx = {static_cast<unsigned>(m.current), 0, 0};
  switch_context(m.caller, m.contexts[m.current]);
  races::kernel_runs(false);
  m.shared.reset();
  if (m.error != nullptr) throw std::runtime_error(m.error);
}

// dynamic_shared: bytes of FASTMTL_BIG_SHARED
template <class Body>
void launch(dim3 grid, int num_threads, const Body& body, size_t dynamic_shared = 0) {
  const int64_t blocks = int64_t{grid.x} * grid.y * grid.z;
  if (blocks < 1 || num_threads < 1 || num_threads % kWarp != 0) throw std::runtime_error("a launch without threads");
  Machine& m = machine;
  m.arguments = &body;
  m.dynamic_shared = dynamic_shared;
  m.body = [](const void* it) { (*static_cast<const Body*>(it))(); };
  m.step = schedule == 1 ? -1 : 1;
  gridDim = grid;
  blockDim = {static_cast<unsigned>(num_threads), 1, 1};
  std::vector<int64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  if (schedule == 1) std::reverse(order.begin(), order.end());
  if (schedule > 1) std::shuffle(order.begin(), order.end(), std::mt19937_64(schedule));
  races::launch_begins();
  for (int64_t block : order) {
    blockIdx = {static_cast<unsigned>(block % grid.x), static_cast<unsigned>(block / grid.x % grid.y),
                static_cast<unsigned>(block / grid.x / grid.y)};
    races::block_begins(block, num_threads);
    run_block(num_threads);
  }
}
template <class Body>
void launch(int64_t blocks, int num_threads, const Body& body, size_t dynamic_shared = 0) {
  launch(dim3{static_cast<unsigned>(std::max<int64_t>(blocks, 0))}, num_threads, body, dynamic_shared);
}

template <class To, class From>
To bits_as(const From& x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(To));
  return y;
}

}  // namespace cuda_on_host

#define FASTMTL_SHARED(Type, name) Type& name = *static_cast<Type*>(cuda_on_host::shared_memory(sizeof(Type)))
#define FASTMTL_BIG_SHARED(Type, name) Type& name = *static_cast<Type*>(cuda_on_host::big_shared_memory(sizeof(Type)))
#define FASTMTL_BIG_LAUNCH(bytes, blocks, threads, stream, arguments, ...) \
  (static_cast<void>(stream), cuda_on_host::launch(blocks, threads, [&] { __VA_ARGS__ arguments; }, bytes))
#define FASTMTL_LAUNCH(blocks, stream, arguments, ...) \
  (static_cast<void>(stream), cuda_on_host::launch(blocks, kThreads, [&] { __VA_ARGS__ arguments; }))
// launches run one after another
#define FASTMTL_LAUNCH_EARLY(early, blocks, stream, argument, ...) \
  (static_cast<void>(early), FASTMTL_LAUNCH(blocks, stream, (argument), __VA_ARGS__))

using std::isfinite;

// Where a call stands, so that tests can leave it out.
struct Site {
  bool skipped;
  Site(std::source_location at = std::source_location::current())
      : skipped(cuda_on_host::races::skipped(at.file_name(), static_cast<int>(at.line()))) {}
};

inline void __syncthreads(Site site = {}) {
  if (!site.skipped) cuda_on_host::barrier();
}
inline void __syncwarp(unsigned = ~0u, Site site = {}) {
  if (site.skipped) return;
  cuda_on_host::collective<char>('\0', [](const char (&)[32], char (&taken)[32]) {
    cuda_on_host::races::warp_barrier();
    std::fill_n(taken, 32, '\0');
  });
}
inline void __threadfence(Site site = {}) {
  if (!site.skipped) cuda_on_host::races::fence();
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T atomicAdd(T* p, T x) {
  cuda_on_host::races::atomic(p, sizeof(T), false, __builtin_return_address(0));
  const cuda_on_host::races::Quiet quiet;
  const T before = *p;
  *p += x;
  return before;
}

template <class T>
struct ShuffleOf {
  T value;
  int from;  // lane
};
template <class T>
T shuffle(T value, int from) {
  using One = ShuffleOf<T>;
  return cuda_on_host::collective<T>(One{value, from}, [](const One(&given)[32], T(&taken)[32]) {
    for (int k = 0; k < 32; ++k) taken[k] = given[given[k].from].value;
  });
}
inline int host_lane() { return static_cast<int>(threadIdx.x) % 32; }
inline void check_mask(unsigned mask) {
  if (mask != ~0u) cuda_on_host::fail("a shuffle among some lanes only");
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  check_mask(mask);
  return shuffle(value, host_lane() / width * width + lane % width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  check_mask(mask);
  return shuffle(value, host_lane() ^ lanes);
}
inline unsigned __ballot_sync(unsigned mask, bool is_in) {
  check_mask(mask);
  return cuda_on_host::collective<unsigned>(is_in, [](const bool (&given)[32], unsigned (&taken)[32]) {
    unsigned word = 0;
    for (int k = 0; k < 32; ++k) word |= static_cast<unsigned>(given[k]) << k;
    std::fill_n(taken, 32, word);
  });
}

// --- 16-bit numbers

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return cuda_on_host::bits_as<float>(uint32_t{x.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (std::isnan(x)) return {0x7FFF};
  const auto bits = cuda_on_host::bits_as<uint32_t>(x);
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  float y = 0.0f;
  if (exponent == 31) y = fraction != 0 ? NAN : INFINITY;
  else if (exponent == 0) y = std::ldexp(static_cast<float>(fraction), -24);
  else y = std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return x.bits >> 15 ? -y : y;
}
inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return {0x7FFF};
  const float a = std::fabs(x);
  if (a >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7C00)};
  if (a == 0.0f) return {sign};
  int exponent = 0;
  std::frexp(a, &exponent);
  // the place of the last digit; nearbyint rounds ties to even, and a carry moves on into the exponent by itself
  const int last = std::max(exponent - 11, -24);
  const auto digits = static_cast<int>(std::nearbyint(std::ldexp(a, -last)));
  return {static_cast<uint16_t>(sign | (digits + ((last + 24) << 10)))};
}

namespace fastmtl::cuda {

using ::Site;
inline void block_barrier(Site site = {}) { __syncthreads(site); }
inline void warp_barrier(Site site = {}) { __syncwarp(~0u, site); }

template <class T>
T* in_global(T* p) {
  return p;
}
template <class T>
T* in_shared(T* p) {
  return p;
}
inline void next_launch_may_begin() {}
inline void wait_for_launch_before() {}
template <class V>
void store16(void* to, const V& x) {
  static_assert(sizeof(V) == 16);
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) cuda_on_host::fail("a misaligned store");
  cuda_on_host::races::access(to, 16, true, __builtin_return_address(0));
  const cuda_on_host::races::Quiet quiet;
  std::memcpy(to, &x, sizeof(V));
}

inline void copy_async(void* to, const void* from) {
  cuda_on_host::begin_copy(to, from, 16, 16, __builtin_return_address(0));
}
template <bool kAgain = false>
inline void copy_async(void* to, const void* from, int bytes) {
  cuda_on_host::begin_copy(to, from, 16, static_cast<uint32_t>(bytes), __builtin_return_address(0));
}
inline void commit_copies() { cuda_on_host::commit_copies(); }
template <int kMost>
void wait_for_copies() {
  cuda_on_host::finish_copies(kMost, __builtin_return_address(0));
}

// skipped: without its release and acquire
inline unsigned add_acq_rel(unsigned* to, unsigned x, Site site = {}) {
  cuda_on_host::races::atomic(to, sizeof x, !site.skipped, __builtin_return_address(0));
  const cuda_on_host::races::Quiet quiet;
  return std::exchange(*to, *to + x);
}

// --- tensor cores

struct Words {
  uint32_t w[4];
};
inline void load_lines(uint32_t (&to)[4], const void* from, bool transposed) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) cuda_on_host::fail("a misaligned line of a matrix");
  cuda_on_host::races::access(from, 16, false, __builtin_return_address(0));
  const Words words = cuda_on_host::collective<Words>(from, [&](const void* const(&given)[32], Words(&taken)[32]) {
    for (int lane = 0; lane < 32; ++lane)
      for (int k = 0; k < 4; ++k) {
        const int g = lane / 4, t = lane % 4;
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
          const int line = transposed ? 2 * t + i : g, column = transposed ? g : 2 * t + i;
          pair[i] = static_cast<const uint16_t*>(given[8 * k + line])[column];
        }
        std::memcpy(&taken[lane].w[k], pair, 4);
      }
  });
  std::copy_n(words.w, 4, to);
}
inline void load_matrices(uint32_t (&to)[4], const void* from) { load_lines(to, from, false); }
inline void load_transposed(uint32_t (&to)[4], const void* from) { load_lines(to, from, true); }

// A sum as tensor cores may form it, at worst: every term cut off at the last digit of the largest, and the sum too.
inline float cut_sum(const double* terms, int count) {
  double largest = 0.0, plain = 0.0;
  for (int k = 0; k < count; ++k) {
    largest = std::max(largest, std::fabs(terms[k]));
    plain += terms[k];
  }
  if (!std::isfinite(plain) || largest == 0.0) return static_cast<float>(plain);
  constexpr uint64_t kExponent = 0x7FF0000000000000;
  const double power = cuda_on_host::bits_as<double>(cuda_on_host::bits_as<uint64_t>(largest) & kExponent);
  const double unit = power * 0x1p-23, per_unit = 0x1p23 / power;  // of 24 digits the last
  double sum = 0.0;
  for (int k = 0; k < count; ++k) sum += static_cast<double>(static_cast<int64_t>(terms[k] * per_unit));
  sum *= unit;
  auto rounded = static_cast<float>(sum);
  if (std::fabs(rounded) > std::fabs(sum)) rounded = std::nextafter(rounded, 0.0f);
  return rounded;
}

struct MmaGiven {
  uint32_t a[4], b[2];
  float d[4];
};
struct MmaTaken {
  float d[4];
};

// d = a b (+ d) of a warp. kDepth numbers to a row of A, kPerWord of them to a register; read(word, k) is the k-th.
template <bool kAdd, int kDepth, int kPerWord, class Read>
void warp_product(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Read& read) {
  MmaGiven mine{};
  std::copy_n(a, 4, mine.a);
  std::copy_n(b, 2, mine.b);
  if (kAdd) std::copy_n(d, 4, mine.d);
  const auto sum = cuda_on_host::collective<MmaTaken>(mine, [&](const MmaGiven(&given)[32], MmaTaken(&taken)[32]) {
    double left[16][kDepth], right[8][kDepth];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int k = 0; k < kPerWord; ++k) {
        const int low = t * kPerWord + k, high = low + kDepth / 2;
        left[g][low] = read(given[lane].a[0], k);
        left[g + 8][low] = read(given[lane].a[1], k);
        left[g][high] = read(given[lane].a[2], k);
        left[g + 8][high] = read(given[lane].a[3], k);
        right[g][low] = read(given[lane].b[0], k);
        right[g][high] = read(given[lane].b[1], k);
      }
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int k = 0; k < 4; ++k) {
        const int row = lane / 4 + k / 2 * 8, column = lane % 4 * 2 + k % 2;
        double terms[kDepth + 1];
        for (int i = 0; i < kDepth; ++i) terms[i] = left[row][i] * right[column][i];
        terms[kDepth] = given[lane].d[k];
        taken[lane].d[k] = cut_sum(terms, kDepth + 1);
      }
  });
  std::copy_n(sum.d, 4, d);
}

template <bool kAdd>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float) {
  // the lower 13 bits of a tf32 are not read
  warp_product<kAdd, 8, 1>(d, a, b,
                           [](uint32_t word, int) { return cuda_on_host::bits_as<float>(word & ~uint32_t{0x1FFF}); });
}
template <bool kAdd>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
  warp_product<kAdd, 16, 2>(
      d, a, b, [](uint32_t word, int k) { return __bfloat162float({static_cast<uint16_t>(word >> 16 * k)}); });
}
template <bool kAdd>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  warp_product<kAdd, 16, 2>(d, a, b,
                            [](uint32_t word, int k) { return __half2float({static_cast<uint16_t>(word >> 16 * k)}); });
}

inline void mma(double (&d)[2], double a, double b) {
  struct Taken {
    double d[2];
  };
  struct Given {
    double d[2], a, b;
  };
  const Taken sum =
      cuda_on_host::collective<Taken>(Given{{d[0], d[1]}, a, b}, [](const Given(&given)[32], Taken(&taken)[32]) {
        for (int lane = 0; lane < 32; ++lane) {
          const int g = lane / 4, t = lane % 4;
          for (int i = 0; i < 2; ++i) {
            double sum = given[lane].d[i];
            for (int k = 0; k < 4; ++k) sum = std::fma(given[4 * g + k].a, given[4 * (2 * t + i) + k].b, sum);
            taken[lane].d[i] = sum;
          }
        }
      });
  d[0] = sum.d[0];
  d[1] = sum.d[1];
}

}  // namespace fastmtl::cuda
