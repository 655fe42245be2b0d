// M = G G^T for few tasks: every thread reads all rows at its columns and keeps the sums of all pairs in registers.
#pragma once

#include "cuda/gradients/finish.cuh"

namespace fastmtl::cuda {

template <class In, int kRows>
struct RowsShape {
  using Acc = typename Accumulator<In>::type;
  static constexpr int kPairs = kRows * (kRows + 1) / 2;
  static constexpr int kVector = 16 / static_cast<int>(sizeof(In));
  // enough loads in flight where rows are few
  static constexpr int kUnroll = kRows >= 8 ? 1 : 8 / kRows;
  // lanes whose sums are left for the block to add
  static constexpr int kLeft = 8;

  struct Shared {
    Batch<kRows, 0> batch;
    union {
      Acc sums[kPairs][kWarps * kLeft];
      SolverMemory<16> solver;
    };
    int flag;
  };
};

// loaded: Raw, or one element
template <class In, int kVector, int kRows, class Loaded>
__device__ inline void add_products(const Loaded (&loaded)[kRows],
                                    typename Accumulator<In>::type (&acc)[kRows * (kRows + 1) / 2]) {
  Vector<In, kVector> g[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) g[r] = unpacked<In, kVector>(loaded[r]);
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    typename Accumulator<In>::type x[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) x[r] = widen<In>(g[r].v[k]);
    int pair = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = i; j < kRows; ++j) acc[pair++] += x[i] * x[j];
  }
}

// The sums of the counted columns [low, high), one row of T (T + 1) / 2, to where partial_of() says, which is asked
// last.
template <class In, int kRows, class PartialOf>
__device__ inline void leave_row_sums(const Grads& grads, int64_t low, int64_t high, const PartialOf& partial_of,
                                      typename RowsShape<In, kRows>::Shared& shared) {
  using Shape = RowsShape<In, kRows>;
  using Acc = typename Shape::Acc;
  const int tid = threadIdx.x;
  const int T = grads.num_tasks;
  Acc acc[Shape::kPairs] = {};

  for_each_segment(
      grads, low, high, 0, [](int r) { return r; }, shared.batch,
      [&](int s) {
        const Segment segment = shared.batch.segment[s];
        const void* const* row = shared.batch.row[s];
        int64_t at = segment.begin;
        if (segment.aligned16) {
          constexpr int64_t kStep = int64_t{kThreads} * Shape::kVector;
          const int64_t whole = segment.begin + (segment.end - segment.begin) / Shape::kVector * Shape::kVector;
          for (int64_t c = segment.begin + tid * Shape::kVector; c < whole; c += Shape::kUnroll * kStep) {
            Raw g[Shape::kUnroll][kRows];
#pragma unroll
            for (int u = 0; u < Shape::kUnroll; ++u)
#pragma unroll
              for (int r = 0; r < kRows; ++r) {
                g[u][r] = Raw{};
                if (row[r] != nullptr && (u == 0 || c + u * kStep < whole))
                  g[u][r] = *reinterpret_cast<const Raw*>(in_global(static_cast<const In*>(row[r]) + c + u * kStep));
              }
#pragma unroll
            for (int u = 0; u < Shape::kUnroll; ++u) add_products<In, Shape::kVector>(g[u], acc);
          }
          at = whole;
        }
        for (int64_t c = at + tid; c < segment.end; c += kThreads) {
          Vector<In, 1> g[kRows];
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            g[r] = Vector<In, 1>{};
            if (row[r] != nullptr) g[r].v[0] = in_global(static_cast<const In*>(row[r]))[c * shared.batch.stride[s][r]];
          }
          add_products<In, 1>(g, acc);
        }
      });

  // 32 lanes to 8, then the block's 64 sums of a pair in double, in order
  const int lane = tid % kWarp;
#pragma unroll
  for (int pair = 0; pair < Shape::kPairs; ++pair) {
    Acc x = acc[pair];
    x += __shfl_xor_sync(~0u, x, 16);
    x += __shfl_xor_sync(~0u, x, 8);
    if (lane < Shape::kLeft) shared.sums[pair][tid / kWarp * Shape::kLeft + lane] = x;
  }
  __syncthreads();
  double* partial = partial_of();
  constexpr int kShare = 4;  // threads to a pair
  for (int first = 0; first < Shape::kPairs; first += kThreads / kShare) {
    const int pair = first + tid / kShare;
    double sum = 0.0;
    if (pair < Shape::kPairs)
      for (int k = tid % kShare; k < kWarps * Shape::kLeft; k += kShare)
        sum += static_cast<double>(shared.sums[pair][k]);
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (pair < Shape::kPairs && tid % kShare == 0) {
      int i = 0, rest = pair;
      while (rest >= kRows - i) rest -= kRows - i++;
      if (i + rest < T) partial[entry_of(T, i, i + rest)] = sum;
    }
  }
}

template <class In, int kRows>
__global__ void __launch_bounds__(kThreads, sizeof(In) < 8 ? 2 : 1)
    gram_rows_kernel(const __grid_constant__ GramParams p) {
  using Shape = RowsShape<In, kRows>;
  FASTMTL_SHARED(typename Shape::Shared, shared);
  const int64_t low = static_cast<int64_t>(blockIdx.x) * p.columns_per_slot;
  const int slot = p.first_slot + static_cast<int>(blockIdx.x);
  leave_row_sums<In, kRows>(
      p.grads, low, low + p.columns_per_slot,
      [&] { return p.partial + static_cast<int64_t>(slot) * num_entries(p.grads.num_tasks); }, shared);
  finish<16>(p, slot, shared.flag, shared.solver);
}

}  // namespace fastmtl::cuda
