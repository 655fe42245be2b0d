// What the kernel bodies need of the device: dtypes, loads of 16 bytes, tensor core products. Compiled by nvcc; or by a
// host compiler under tests/host/cuda_on_host.h, which defines the same names, so that tests can run the bodies.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/ceil_div.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
// one block of shared memory per kernel, as a struct
#define FASTMTL_SHARED(Type, name)                            \
  __shared__ alignas(16) unsigned char name##_[sizeof(Type)]; \
  Type& name = *reinterpret_cast<Type*>(name##_)
// the same, of a size that the launch says, which may be more than 48 KiB
#define FASTMTL_BIG_SHARED(Type, name)                         \
  extern __shared__ __align__(16) unsigned char big_shared_[]; \
  Type& name = *reinterpret_cast<Type*>(big_shared_)
// the kernel comes last, since its template arguments have commas
#define FASTMTL_LAUNCH(blocks, stream, arguments, ...) __VA_ARGS__<<<blocks, kThreads, 0, stream>>> arguments
// for FASTMTL_BIG_SHARED. Beyond 48 KiB a kernel must be told; where that fails the launch fails, which is checked.
#define FASTMTL_BIG_LAUNCH(bytes, blocks, threads, stream, arguments, ...)                   \
  do {                                                                                       \
    if constexpr (bytes > 48 * 1024)                                                         \
      cudaFuncSetAttribute(__VA_ARGS__, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes); \
    __VA_ARGS__<<<blocks, threads, bytes, stream>>> arguments;                               \
  } while (false)
// early: its blocks may start before the launch in front is done (sm_90)
#define FASTMTL_LAUNCH_EARLY(early, blocks, stream, argument, ...) \
  launch_early(early, blocks, stream, __VA_ARGS__, argument)
#else
#include "cuda_on_host.h"
#endif

namespace fastmtl::cuda {

constexpr int kMaxTasks = 128;
constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

// float32 accumulates everything but float64
template <class In>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

// torch compiles with the implicit conversions of the half types switched off
template <class In>
__device__ inline typename Accumulator<In>::type widen(In x) {
  return x;
}
template <class In>
__device__ inline In narrow(typename Accumulator<In>::type x) {
  return x;
}
template <>
__device__ inline float widen<__nv_bfloat16>(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
template <>
__device__ inline float widen<__half>(__half x) {
  return __half2float(x);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half narrow<__half>(float x) {
  return __float2half_rn(x);
}

// N elements that are loaded and stored at once
template <class In, int N>
struct alignas(sizeof(In) * N) Vector {
  In v[N];
};

// 16 bytes of a row as they came: of 16-bit elements the compiler would unpack one row before it loads the next
struct alignas(16) Raw {
  uint32_t w[4];
};

template <class In, int kVector>
__device__ inline Vector<In, kVector> unpacked(const Raw& x) {
  static_assert(sizeof(Vector<In, kVector>) == sizeof(Raw));
  Vector<In, kVector> v;
  memcpy(&v, &x, sizeof(v));
  return v;
}
template <class In, int kVector>
__device__ inline Vector<In, kVector> unpacked(const Vector<In, kVector>& x) {
  return x;
}

#if defined(__CUDACC__)
// Where a call stands: the host run can leave it out.
struct Site {};
__device__ inline void block_barrier(Site = {}) { __syncthreads(); }
__device__ inline void warp_barrier(Site = {}) { __syncwarp(); }

// Gradients and results: of pointers that were read from memory the compiler doesn't know that they are global.
template <class T>
__device__ inline T* in_global(T* p) {
  __builtin_assume(__isGlobal(p));
  return p;
}
template <class T>
__device__ inline T* in_shared(T* p) {
  __builtin_assume(__isShared(p));
  return p;
}

// 16 bytes at once, which the compiler would store element by element
template <class V>
__device__ inline void store16(void* to, const V& x) {
  static_assert(sizeof(V) == 16);
  uint32_t word[4];
  memcpy(word, &x, 16);
  asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3])
               : "memory");
}

// 16 bytes from global to shared memory, which are there once this thread has waited for them: a load that holds no
// register meanwhile. Copies are waited for in the order in which they were committed.
__device__ inline void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;"
               :
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(to))), "l"(__cvta_generic_to_global(from))
               : "memory");
}
// The first `bytes` of them, 16 or 0, and zeros behind. kAgain: this multiprocessor soon reads them again, by way of
// its first-level cache; only from sm_90 on, where the second level gives less than a product asks for.
template <bool kAgain = false>
__device__ inline void copy_async(void* to, const void* from, int bytes) {
  const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const auto global = __cvta_generic_to_global(from);
#if __CUDA_ARCH__ >= 900
  if constexpr (kAgain) {
    asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :
                 : "r"(shared), "l"(global), "r"(bytes)
                 : "memory");
    return;
  }
#endif
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               :
               : "r"(shared), "l"(global), "r"(bytes)
               : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" : : : "memory"); }
// but for the last kMost groups committed
template <int kMost>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kMost) : "memory");
}

// the value before; what this thread has seen or written is seen by who adds later
__device__ inline unsigned add_acq_rel(unsigned* to, unsigned x) {
  unsigned before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(to)), "r"(x)
               : "memory");
  return before;
}

// A launch may be let in while the one in front still runs (programmatic dependent launch): once every block of that
// one has called next_launch_may_begin or has ended. Until wait_for_launch_before it may only read what was there
// before the launch in front began; after it, all that this one wrote is seen. Neither does anything between other
// launches.
__device__ inline void next_launch_may_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ inline void wait_for_launch_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

template <class Params>
void launch_early(bool early, unsigned blocks, cudaStream_t stream, void (*kernel)(Params), const Params& params) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, params);
}

// Four matrices of 8 lines of 16 bytes in shared memory; lanes 8 k to 8 k + 7 say where the lines of the k-th begin.
// Lane 4 g + t gets of each the word t of line g; transposed, of 16-bit numbers, those of column g in lines 2 t, 2 t
// + 1.
#define FASTMTL_LOAD_MATRICES(how)                                                    \
  asm volatile("ldmatrix.sync.aligned.m8n8.x4" how ".shared.b16 {%0,%1,%2,%3}, [%4];" \
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])                   \
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(from)))           \
               : "memory")
__device__ inline void load_matrices(uint32_t (&to)[4], const void* from) { FASTMTL_LOAD_MATRICES(""); }
__device__ inline void load_transposed(uint32_t (&to)[4], const void* from) { FASTMTL_LOAD_MATRICES(".trans"); }
#undef FASTMTL_LOAD_MATRICES

// Tensor core products of one warp: d = a b, or with kAdd d += a b. A is 16 x k by rows, B is k x 8 by columns, two
// numbers of 16 bits or one of 32 to a register; lane 4 g + t holds of A the rows g and g + 8, of B the column g, of D
// the columns 2 t and 2 t + 1 (PTX ISA, fragments of mma.m16n8k8 and .m16n8k16).
#define FASTMTL_MMA(shape, type)                                             \
  if constexpr (kAdd)                                                        \
    asm("mma.sync.aligned." shape ".row.col.f32." type "." type              \
        ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "                       \
        "{%0,%1,%2,%3};"                                                     \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                     \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])); \
  else                                                                       \
    asm("mma.sync.aligned." shape ".row.col.f32." type "." type              \
        ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "                       \
        "{%10,%10,%10,%10};"                                                 \
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                     \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.0f))
template <bool kAdd>
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float) {  // tf32
  FASTMTL_MMA("m16n8k8", "tf32");
}
template <bool kAdd>
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
  FASTMTL_MMA("m16n8k16", "bf16");
}
template <bool kAdd>
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  FASTMTL_MMA("m16n8k16", "f16");
}
#undef FASTMTL_MMA
// d += a b in float64. A is 8 x 4, B is 4 x 8: lane 4 g + t holds A[g][t], B[t][g] and, of row g of D, the columns 2 t
// and 2 t + 1
__device__ inline void mma(double (&d)[2], double a, double b) {
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
      : "+d"(d[0]), "+d"(d[1])
      : "d"(a), "d"(b));
}
#endif

// float32 to tf32, to nearest, ties away from zero. Tensor cores don't read the other 13 bits. By hand, since cvt.rna
// costs three instructions, for the sake of a NaN of all bits set, which becomes -0 here.
constexpr uint32_t kTf32 = 0xFFFFE000;
__device__ inline uint32_t to_tf32(uint32_t bits) { return (bits + 0x1000) & kTf32; }

}  // namespace fastmtl::cuda
