// w G and C G on the GPU: plain structs in, no torch type. One launch reads one parameter's rows once per four
// outputs.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fastmtl::cuda {

constexpr int kRows = 128;

struct CombineParams {
  const void* row[kRows];
  int64_t row_stride[kRows];  // elements
  uint8_t task[kRows];
  void* out[4];
  const double* weights;  // [num_out, num_tasks], device memory
  int64_t numel;
  int num_rows;
  int num_tasks;
};

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
#if defined(__CUDACC__)
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
#endif

template <class In, int N>
struct alignas(sizeof(In) * N) Vector {
  In v[N];
};

// kVector elements at once (1: any stride, any alignment); every thread walks the columns with the grid's stride
template <class In, int kVector, int kOut>
__global__ void __launch_bounds__(256, 4) combine_fwd_kernel(const CombineParams p) {
  using Acc = typename Accumulator<In>::type;
  using Vec = Vector<In, kVector>;
  __shared__ Acc weight[kRows][kOut];
  for (int k = threadIdx.x; k < p.num_rows * kOut; k += blockDim.x)
    weight[k / kOut][k % kOut] = static_cast<Acc>(p.weights[(k % kOut) * p.num_tasks + p.task[k / kOut]]);
  __syncthreads();
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * kVector;
  for (int64_t at = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kVector; at < p.numel; at += step) {
    Acc acc[kOut][kVector] = {};
#pragma unroll 4
    for (int r = 0; r < p.num_rows; ++r) {
      const In* row = static_cast<const In*>(p.row[r]);
      const Vec g = kVector == 1 ? Vec{{row[at * p.row_stride[r]]}} : *reinterpret_cast<const Vec*>(row + at);
#pragma unroll
      for (int o = 0; o < kOut; ++o)
#pragma unroll
        for (int k = 0; k < kVector; ++k) acc[o][k] += weight[r][o] * widen<In>(g.v[k]);
    }
#pragma unroll
    for (int o = 0; o < kOut; ++o) {
      Vec result;
#pragma unroll
      for (int k = 0; k < kVector; ++k) result.v[k] = narrow<In>(acc[o][k]);
      *reinterpret_cast<Vec*>(static_cast<In*>(p.out[o]) + at) = result;
    }
  }
}

}  // namespace fastmtl::cuda
