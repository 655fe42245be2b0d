// See ptx.h. The fibers, copies, tensor cores and race checks are those of the host run.
#include "ptx.h"

#include <cstdarg>
#include <set>

#include "cuda_on_host.h"

namespace ptx {

bool fault_reached = false;

namespace {

using cuda_on_host::machine;

std::set<std::string> entered;

// Which threads know that the launch in front is done: they have waited, or passed a barrier behind one that had.
struct Waits {
  std::vector<char> waited;
  std::vector<int> barriers;  // that a thread has come to
  int known_from = std::numeric_limits<int>::max();

  explicit Waits(int num_threads = 0) : waited(num_threads), barriers(num_threads) {}
  void comes_to_barrier(int thread) {
    ++barriers[thread];
    if (waited[thread]) known_from = std::min(known_from, barriers[thread]);
  }
  bool known(int thread) const { return waited[thread] || known_from <= barriers[thread]; }
};
Waits waits;

// printf's, and back to the launch
void fail(const char* format, ...) {
  static char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  cuda_on_host::fail(text);
}

const char* kind(bool write) { return write ? "store" : "load"; }

std::string instruction(const void* where) { return static_cast<const char*>(where); }

bool is_shared(u64 address) { return address - reinterpret_cast<u64>(machine.shared.get()) < machine.shared_bytes; }

void* in_shared(u32 offset, u32 bytes, bool write, const char* where) {
  if (u64{offset} + bytes > machine.shared_bytes)
    fail("a %s beyond the %zu bytes of shared memory, at byte %u: %s", kind(write), machine.shared_bytes, offset,
         where);
  return machine.shared.get() + offset;
}

void* in_global(u64 address, bool write, const char* where) {
  if (address < 4096) fail("a %s at address %llu: %s", kind(write), static_cast<unsigned long long>(address), where);
  if (is_shared(address)) fail("a %s of global memory in shared memory: %s", kind(write), where);
  return reinterpret_cast<void*>(address);
}

u32 shared_offset(u64 address) { return static_cast<u32>(address - reinterpret_cast<u64>(machine.shared.get())); }

const void* load(const void* p, u32 bytes, u32 used, const char* where) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail("a misaligned load at %s", where);
  cuda_on_host::races::access(p, used, false, where);
  return p;
}

void store(void* p, const void* from, u32 bytes, const char* where) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail("a misaligned store at %s", where);
  cuda_on_host::races::access(p, bytes, true, where, from);
  std::memcpy(p, from, bytes);
}

void check_mask(u32 mask) {
  if (mask != ~0u) fail("a warp's operation among some lanes only");
}

}  // namespace

u64 enter(const char* kernel, u32 static_bytes) {
  if (threadIdx.x == 0 && blockIdx.x == 0) entered.insert(kernel);
  cuda_on_host::races::describe_by(instruction);
  if (machine.shared == nullptr) waits = Waits(machine.num_threads);  // the block's first thread
  return reinterpret_cast<u64>(cuda_on_host::shared_memory(static_bytes + machine.dynamic_shared));
}

Special special() {
  return {threadIdx.x, blockDim.x, {blockIdx.x, blockIdx.y, blockIdx.z}, {gridDim.x, gridDim.y, gridDim.z}};
}

const void* shared_at(u32 offset, u32 bytes, u32 used, const char* where) {
  return load(in_shared(offset, bytes, false, where), bytes, used, where);
}
const void* global_at(u64 address, u32 bytes, u32 used, const char* where) {
  return load(in_global(address, false, where), bytes, used, where);
}
const void* generic_at(u64 address, u32 bytes, u32 used, const char* where) {
  return is_shared(address) ? shared_at(shared_offset(address), bytes, used, where)
                            : global_at(address, bytes, used, where);
}

void store_shared(u32 offset, const void* from, u32 bytes, const char* where) {
  store(in_shared(offset, bytes, true, where), from, bytes, where);
}
void store_global(u64 address, const void* from, u32 bytes, const char* where) {
  store(in_global(address, true, where), from, bytes, where);
}
void store_generic(u64 address, const void* from, u32 bytes, const char* where) {
  if (is_shared(address)) store_shared(shared_offset(address), from, bytes, where);
  else store_global(address, from, bytes, where);
}

void* atomic_at(u64 address, u32 bytes, bool acq_rel, const char* where) {
  auto* p = reinterpret_cast<void*>(address);
  if (address % bytes != 0) fail("a misaligned atomic at %s", where);
  cuda_on_host::races::atomic(p, bytes, acq_rel, where);
  return p;
}

const void* param_at(u64 address, u32 bytes, const void* params, u64 params_bytes, const char* where) {
  if (address - reinterpret_cast<u64>(params) + bytes > params_bytes) fail("a load beside the arguments: %s", where);
  if (address % bytes != 0) fail("a misaligned load of an argument: %s", where);
  return reinterpret_cast<const void*>(address);
}

void barrier() {
  waits.comes_to_barrier(machine.current);
  cuda_on_host::barrier();
}
void warp_barrier(u32 mask) { __syncwarp(mask); }
void fence() { cuda_on_host::races::fence(); }

void wait_for_launch_before() { waits.waited[machine.current] = true; }
void check_waited(const char* where) {
  if (!waits.known(machine.current)) fail("a store before the launch in front is waited for: %s", where);
}

void copy_async(u32 to, u64 from, u32 bytes, u32 taken, const char* where) {
  if (u64{to} + bytes > machine.shared_bytes) fail("a copy beyond shared memory: %s", where);
  if (taken > 0 && is_shared(from)) fail("a copy from shared memory: %s", where);
  cuda_on_host::begin_copy(machine.shared.get() + to, reinterpret_cast<const void*>(from), bytes, taken, where);
}
void commit_copies() { cuda_on_host::commit_copies(); }
void wait_for_copies(u32 most, const char* where) { cuda_on_host::finish_copies(static_cast<int>(most), where); }

namespace {
struct Shuffled {
  u32 value;
  bool in_range;
};
struct ShuffleGiven {
  u32 value, b, c;
};

// PTX ISA, shfl.sync
template <char kMode>
Shuffled shuffled(const ShuffleGiven& mine) {
  return cuda_on_host::collective<Shuffled>(mine, [](const ShuffleGiven(&given)[32], Shuffled(&taken)[32]) {
    for (int lane = 0; lane < 32; ++lane) {
      const int b = static_cast<int>(given[lane].b & 31), clamp = static_cast<int>(given[lane].c & 31);
      const int segment = static_cast<int>(given[lane].c >> 8 & 31);
      const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
      int from = first | (b & ~segment);
      if (kMode == 'u') from = lane - b;
      if (kMode == 'd') from = lane + b;
      if (kMode == 'b') from = lane ^ b;
      const bool in_range = kMode == 'u' ? from >= last : from <= last;
      taken[lane] = {given[in_range ? from : lane].value, in_range};
    }
  });
}
}  // namespace

u32 shuffle(char mode, u32 value, u32 b, u32 c, u32 mask, bool* in_range) {
  check_mask(mask);
  const ShuffleGiven mine{value, b, c};
  const Shuffled it = mode == 'u'   ? shuffled<'u'>(mine)
                      : mode == 'd' ? shuffled<'d'>(mine)
                      : mode == 'b' ? shuffled<'b'>(mine)
                                    : shuffled<'i'>(mine);
  *in_range = it.in_range;
  return it.value;
}

u32 ballot(bool vote, u32 mask) {
  check_mask(mask);
  return cuda_on_host::collective<u32>(u32{vote}, [](const u32(&given)[32], u32(&taken)[32]) {
    u32 votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= given[lane] << lane;
    std::fill_n(taken, 32, votes);
  });
}

namespace {
struct ReduceGiven {
  u32 value;
  char op;
  bool is_signed;
};
u32 reduced(const ReduceGiven& x, u32 y) {
  const bool less = x.is_signed ? static_cast<s32>(x.value) < static_cast<s32>(y) : x.value < y;
  switch (x.op) {
    case 'a': return x.value + y;
    case 'n': return less ? x.value : y;
    case 'x': return less ? y : x.value;
    case '&': return x.value & y;
    case '|': return x.value | y;
    default: return x.value ^ y;
  }
}
}  // namespace

u32 reduce(char op, u32 value, bool is_signed, u32 mask) {
  check_mask(mask);
  const ReduceGiven mine{value, op, is_signed};
  return cuda_on_host::collective<u32>(mine, [](const ReduceGiven(&given)[32], u32(&taken)[32]) {
    u32 sum = given[0].value;
    for (int lane = 1; lane < 32; ++lane) sum = reduced(given[lane], sum);
    std::fill_n(taken, 32, sum);
  });
}

// ldmatrix: lane 8 j + r says where row r of matrix j lies; lane 4 r + c takes of each the numbers 2 c and 2 c + 1 of
// row r, or, transposed, of column r
void load_matrix(u32 (&to)[4], u32 offset, int count, bool transposed, const char* where) {
  struct Given {
    const unsigned char* row;
    int count;
    bool transposed;
  };
  struct Taken {
    u32 word[4];
  };
  const bool has_row = static_cast<int>(threadIdx.x) % 32 < 8 * count;
  const void* row = has_row ? shared_at(offset, 16, 16, where) : nullptr;
  const Given mine{static_cast<const unsigned char*>(row), count, transposed};
  const auto taken = cuda_on_host::collective<Taken>(mine, [](const Given(&given)[32], Taken(&all)[32]) {
    for (int lane = 0; lane < 32; ++lane)
      for (int j = 0; j < given[0].count; ++j) {
        u16 two[2];
        for (int e = 0; e < 2; ++e) {
          const int across = lane % 4 * 2 + e, down = lane / 4;
          const auto [r, c] = given[0].transposed ? std::pair{across, down} : std::pair{down, across};
          std::memcpy(&two[e], given[8 * j + r].row + 2 * c, 2);
        }
        all[lane].word[j] = two[0] | u32{two[1]} << 16;
      }
  });
  std::copy_n(taken.word, 4, to);
}

void mma_tf32(f32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { fastmtl::cuda::mma<true>(d, a, b, 0.0f); }
void mma_bf16(f32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { fastmtl::cuda::mma<true>(d, a, b, __nv_bfloat16{}); }
void mma_f16(f32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { fastmtl::cuda::mma<true>(d, a, b, __half{}); }
void mma_f64(f64 (&d)[2], f64 a, f64 b) { fastmtl::cuda::mma(d, a, b); }

u16 to_bf16(f32 x) { return __float2bfloat16_rn(x).bits; }
u16 to_f16(f32 x) { return __float2half_rn(x).bits; }
f32 from_bf16(u16 x) { return __bfloat162float({x}); }
f32 from_f16(u16 x) { return __half2float({x}); }

}  // namespace ptx

extern "C" {

// the names of the kernels that have run since the last call, one to a line
const char* ptx_entered() {
  static std::string names;
  names.clear();
  for (const std::string& name : ptx::entered) names += name + "\n";
  ptx::entered.clear();
  return names.c_str();
}

// A kernel of Triton's by translate.py's call_<kernel>; given: addresses of its arguments; grid: blocks along x, y and
// z; schedule: see cuda_on_host.h. The error, or null.
const char* ptx_launch(void (*call)(const void* const*), const void* const* given, const unsigned* grid,
                       int num_threads, int64_t dynamic_shared, uint64_t schedule) {
  static std::string error;
  try {
    cuda_on_host::schedule = schedule;
    cuda_on_host::races::allow_equal_writes(true);
    cuda_on_host::launch(dim3{grid[0], grid[1], grid[2]}, num_threads, [&] { call(given); },
                         static_cast<size_t>(dynamic_shared));
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}

int ptx_fault_reached() { return ptx::fault_reached; }
}
