// w G and C G: one read of G per group of outputs. Blocks walk the columns from the last to the first, since what the
// Gram kernel has read last may still lie in the second-level cache.
#pragma once

#include "grads.cuh"

namespace fastmtl::cuda {

struct CombineParams {
  Grads grads;
  int64_t columns_per_slot;
  const double* weights;  // [K, T], device memory
};

constexpr int kRowsAtOnce = 8;  // rows whose loads are in flight together

template <class In, int kOut>
struct CombineShared {
  Batch<kMaxTasks, kOut> batch;
  typename Accumulator<In>::type weight[kMaxTasks][kOut];
};

template <class In, int kOut, int kVector, class Load>
__device__ inline void combine_columns(const CombineShared<In, kOut>& shared, int num_tasks, const Load& load,
                                       Vector<In, kVector> (&result)[kOut]) {
  using Acc = typename Accumulator<In>::type;
  Acc acc[kOut][kVector] = {};
  for (int first = 0; first < num_tasks; first += kRowsAtOnce) {
    Vector<In, kVector> g[kRowsAtOnce];
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) g[r] = load(first + r);
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r)
#pragma unroll
      for (int o = 0; o < kOut; ++o)
#pragma unroll
        for (int k = 0; k < kVector; ++k) acc[o][k] += shared.weight[first + r][o] * widen<In>(g[r].v[k]);
  }
#pragma unroll
  for (int o = 0; o < kOut; ++o)
#pragma unroll
    for (int k = 0; k < kVector; ++k) result[o].v[k] = narrow<In>(acc[o][k]);
}

// blocks that a multiprocessor has registers for
template <class In, int kOut>
constexpr int kCombineBlocks = kOut == 1         ? 3
                               : sizeof(In) == 4 ? 2
                                                 : 1;

template <class In, int kOut>
__global__ void __launch_bounds__(kThreads, kCombineBlocks<In, kOut>)
    combine_kernel(const __grid_constant__ CombineParams p) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(In));
  using Vec = Vector<In, kVector>;
  using One = Vector<In, 1>;
  using Acc = typename Accumulator<In>::type;
  using Shared = CombineShared<In, kOut>;
  FASTMTL_SHARED(Shared, shared);
  const int tid = threadIdx.x;
  const int T = p.grads.num_tasks;
  const int64_t low = (static_cast<int64_t>(gridDim.x) - 1 - blockIdx.x) * p.columns_per_slot;
  for (int first_out = 0; first_out < p.grads.num_out; first_out += kOut) {
    __syncthreads();
    for (int e = tid; e < kMaxTasks * kOut; e += kThreads) {
      const int t = e / kOut, o = first_out + e % kOut;
      shared.weight[t][e % kOut] = t < T && o < p.grads.num_out ? static_cast<Acc>(p.weights[o * T + t]) : Acc(0);
    }
    for_each_segment(
        p.grads, low, low + p.columns_per_slot, first_out, [](int r) { return r; }, shared.batch,
        [&](int s) {
          const Segment segment = shared.batch.segment[s];
          const void* const* row = shared.batch.row[s];
          int64_t at = segment.begin;
          if (segment.wide) {
            at += (segment.end - segment.begin) / kVector * kVector;
            for (int64_t c = segment.begin + tid * kVector; c < at; c += kThreads * kVector) {
              Vec result[kOut];
              combine_columns<In, kOut, kVector>(
                  shared, T,
                  [&](int r) {
                    return row[r] != nullptr
                               ? *reinterpret_cast<const Vec*>(in_global(static_cast<const In*>(row[r]) + c))
                               : Vec{};
                  },
                  result);
#pragma unroll
              for (int o = 0; o < kOut; ++o)
                if (void* out = shared.batch.out[s][o]) store_wide(static_cast<In*>(out) + c, result[o]);
            }
          }
          for (int64_t c = at + tid; c < segment.end; c += kThreads) {
            One result[kOut];
            combine_columns<In, kOut, 1>(
                shared, T,
                [&](int r) {
                  One x{};
                  if (row[r] != nullptr)
                    x.v[0] = in_global(static_cast<const In*>(row[r]))[c * shared.batch.stride[s][r]];
                  return x;
                },
                result);
#pragma unroll
            for (int o = 0; o < kOut; ++o)
              if (void* out = shared.batch.out[s][o]) in_global(static_cast<In*>(out))[c] = result[o].v[0];
          }
        });
  }
}

}  // namespace fastmtl::cuda
