// w G and C G: one read of G per group of outputs. Blocks walk the columns from the last to the first, since what the
// Gram kernel has read last may still lie in the second-level cache. The weights are read last: until the launch before
// is done, a block has its first rows on their way (see launch_early).
#pragma once

#include <type_traits>

#include "cuda/gradients/grads.cuh"
#include "cuda/gradients/plan.h"

namespace fastmtl::cuda {

struct CombineParams {
  Grads grads;
  int64_t columns_per_slot;
  const double* weights;  // [K, T], device memory
};

constexpr int kRowsAtOnce = 8;  // rows whose loads are in flight together

// elements that were loaded one by one, each in a register of its own for the same reason
template <class In, int kVector>
struct Single {
  std::conditional_t<sizeof(In) == 8, uint64_t, uint32_t> bits[kVector];
};
template <class In, int kVector>
__device__ inline Vector<In, kVector> unpacked(const Single<In, kVector>& x) {
  Vector<In, kVector> v;
#pragma unroll
  for (int k = 0; k < kVector; ++k) memcpy(&v.v[k], &x.bits[k], sizeof(In));
  return v;
}

template <class In, int kOut>
struct CombineShared {
  Batch<kMaxTasks, kOut> batch;
  typename Accumulator<In>::type weight[kMaxTasks][kOut];
};

// result = weights x rows; load(r): Raw, or one element. with_weights() is called once the first loads are under
// way, and by all threads of the block.
template <class In, int kOut, int kVector, class Load, class WithWeights>
__device__ inline void combine_columns(const CombineShared<In, kOut>& shared, int num_tasks, const Load& load,
                                       const WithWeights& with_weights, Vector<In, kVector> (&result)[kOut]) {
  using Acc = typename Accumulator<In>::type;
  Acc acc[kOut][kVector] = {};
  for (int first = 0; first < num_tasks; first += kRowsAtOnce) {
    decltype(load(0)) loaded[kRowsAtOnce];
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) loaded[r] = load(first + r);
    with_weights();
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const auto g = unpacked<In, kVector>(loaded[r]);
#pragma unroll
      for (int o = 0; o < kOut; ++o)
#pragma unroll
        for (int k = 0; k < kVector; ++k) acc[o][k] += shared.weight[first + r][o] * widen<In>(g.v[k]);
    }
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

// Outputs first_out, ..., kOut of them, at the counted columns [low, high). weight_of(o, t): of task t in output o.
template <class In, int kOut, class WeightOf>
__device__ inline void combine_slot(const Grads& grads, int first_out, int64_t low, int64_t high,
                                    const WeightOf& weight_of, CombineShared<In, kOut>& shared) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(In));
  using Vec = Vector<In, kVector>;
  using One = Vector<In, 1>;
  using Acc = typename Accumulator<In>::type;
  const int tid = threadIdx.x;
  const int T = grads.num_tasks;
  bool has_weights = false;
  auto with_weights = [&] {
    if (has_weights) return;
    has_weights = true;
    wait_for_launch_before();
    // zeros up to where rows are taken together
    const int rows = (T + kRowsAtOnce - 1) / kRowsAtOnce * kRowsAtOnce;
#pragma unroll 1
    for (int e = tid; e < rows * kOut; e += kThreads) {
      const int t = e / kOut, o = first_out + e % kOut;
      shared.weight[t][e % kOut] = t < T && o < grads.num_out ? static_cast<Acc>(weight_of(o, t)) : Acc(0);
    }
    __syncthreads();
  };
  for_each_segment(
      grads, low, high, first_out, [](int r) { return r; }, shared.batch,
      [&](int s) {
        const Segment segment = shared.batch.segment[s];
        const void* const* row = shared.batch.row[s];
        int64_t at = segment.begin;
        if (segment.aligned16) {
          at += (segment.end - segment.begin) / kVector * kVector;
          for (int64_t base = segment.begin; base < at; base += kThreads * kVector) {
            const int64_t c = base + tid * kVector;
            const bool here = c < at;
            Vec result[kOut];
            combine_columns<In, kOut, kVector>(
                shared, T,
                [&](int r) {
                  return here && row[r] != nullptr
                             ? *reinterpret_cast<const Raw*>(in_global(static_cast<const In*>(row[r]) + c))
                             : Raw{};
                },
                with_weights, result);
            if (!here) continue;
#pragma unroll
            for (int o = 0; o < kOut; ++o)
              if (void* out = shared.batch.out[s][o]) store16(static_cast<In*>(out) + c, result[o]);
          }
        }
        for (int64_t base = at; base < segment.end; base += kThreads) {
          const int64_t c = base + tid;
          const bool here = c < segment.end;
          One result[kOut];
          combine_columns<In, kOut, 1>(
              shared, T,
              [&](int r) {
                One x{};
                if (here && row[r] != nullptr)
                  x.v[0] = in_global(static_cast<const In*>(row[r]))[c * shared.batch.stride[s][r]];
                return x;
              },
              with_weights, result);
          if (!here) continue;
#pragma unroll
          for (int o = 0; o < kOut; ++o)
            if (void* out = shared.batch.out[s][o]) in_global(static_cast<In*>(out))[c] = result[o].v[0];
        }
      });
}

// A slot's columns and kOut of the outputs to a block; the blocks of a slot follow each other, so that all but one find
// its rows in the second-level cache.
template <class In, int kOut>
__global__ void __launch_bounds__(kThreads, kCombineBlocks<In, kOut>)
    combine_kernel(const __grid_constant__ CombineParams p) {
  using Shared = CombineShared<In, kOut>;
  FASTMTL_SHARED(Shared, shared);
  const unsigned per_slot = (static_cast<unsigned>(p.grads.num_out) + kOut - 1) / kOut;
  const int first_out = static_cast<int>(blockIdx.x % per_slot) * kOut;
  const int64_t low = (static_cast<int64_t>(gridDim.x / per_slot) - 1 - blockIdx.x / per_slot) * p.columns_per_slot;
  combine_slot<In, kOut>(
      p.grads, first_out, low, low + p.columns_per_slot,
      [&](int o, int t) { return p.weights[static_cast<int64_t>(o) * p.grads.num_tasks + t]; }, shared);
}

// --- one output, few columns, many tasks

// Where kAlign counted columns lie, all of them in one parameter.
struct Chunk {
  int64_t begin, size;  // the first one within the parameter, and the parameter's length
  int param;
  bool aligned16;
};

// The threads of a block share its columns' tasks, so that few columns have as many loads in flight as many.
template <class In>
struct SplitShape {
  using Acc = typename Accumulator<In>::type;
  static constexpr int kVector = 16 / static_cast<int>(sizeof(In));
  static constexpr int kAcross = kSplitColumns / kVector;  // threads to a row
  static constexpr int kGroups = kThreads / kAcross;       // of tasks, which take them in turn
  static constexpr int kChunks = kSplitColumns / static_cast<int>(kAlign);
  static constexpr int kPerChunk = kAcross / kChunks;  // threads to a chunk of a row

  struct Shared {
    Chunk chunk[kChunks];
    alignas(16) Acc sums[kGroups][kSplitColumns];
  };
};

template <class In>
__global__ void __launch_bounds__(kThreads, 3) combine_split_kernel(const __grid_constant__ CombineParams p) {
  using Shape = SplitShape<In>;
  using Acc = typename Shape::Acc;
  constexpr int kVector = Shape::kVector, kGroups = Shape::kGroups, kChunk = static_cast<int>(kAlign);
  FASTMTL_SHARED(typename Shape::Shared, shared);
  const int tid = threadIdx.x;
  const Grads& g = p.grads;
  const int n = g.num_params, T = g.num_tasks;
  const int64_t low = (static_cast<int64_t>(gridDim.x) - 1 - blockIdx.x) * kSplitColumns;
  const int64_t* offset = g.table;
  const int64_t* rows = offset + 3 * static_cast<int64_t>(n) + 1;
  const int64_t* strides = rows + static_cast<int64_t>(n) * T;
  const int64_t* outs = strides + static_cast<int64_t>(n) * T;

  if (tid < Shape::kChunks) {
    const int64_t at = low + tid * kChunk;
    if (at >= g.columns) shared.chunk[tid] = Chunk{0, 0, 0, false};
    else if (offset == nullptr) shared.chunk[tid] = Chunk{at, g.numel, 0, g.aligned16};
  }
  if (offset != nullptr) {
#pragma unroll 1
    for (int k = tid; k < n; k += kThreads) {
      // numel and aligned16 come with the others, found or not: later they would be one more latency
      const int64_t begin = offset[k], end = offset[k + 1], size = offset[n + 1 + k];
      const bool aligned16 = offset[2 * n + 1 + k] != 0;
#pragma unroll
      for (int q = 0; q < Shape::kChunks; ++q) {
        const int64_t at = low + q * kChunk;
        if (begin <= at && at < end) shared.chunk[q] = Chunk{at - begin, size, k, aligned16};
      }
    }
  }
  __syncthreads();

  // what this thread adds up at the end: one column
  const Chunk to = shared.chunk[tid / kChunk];
  auto* out = static_cast<In*>(offset == nullptr ? g.out : reinterpret_cast<void*>(outs[to.param]));

  const int across = tid % Shape::kAcross, group = tid / Shape::kAcross;
  const Chunk chunk = shared.chunk[across / Shape::kPerChunk];
  const int64_t* row_words = rows + static_cast<int64_t>(chunk.param) * T;
  const int64_t* stride_words = strides + static_cast<int64_t>(chunk.param) * T;
  // and what it reads: kVector columns that follow each other where they can be loaded at once, else as far apart as
  // its neighbours are many, which then read what lies between
  const int mine = across % Shape::kPerChunk * (chunk.aligned16 ? kVector : 1),
            apart = chunk.aligned16 ? 1 : Shape::kPerChunk;
  const int64_t first = chunk.begin + mine;
  Acc acc[kVector] = {};
  // load(row, r): of the rows at once the r-th
  auto add_rows = [&](auto rows_at_once, const auto& prepare, const auto& load) {
    constexpr int kAtOnce = decltype(rows_at_once)::value;
#pragma unroll 1
    for (int base = group; base < T; base += kGroups * kAtOnce) {
      const In* row[kAtOnce];
      decltype(load(row[0], 0)) loaded[kAtOnce];
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        const int t = base + r * kGroups;
        const void* from = nullptr;
        if (t < T) {
          if (offset == nullptr) from = static_cast<const char*>(g.bank) + t * g.row_stride;
          else from = reinterpret_cast<const void*>(row_words[t]);
        }
        row[r] = static_cast<const In*>(from);
      }
      prepare(base);
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) loaded[r] = load(row[r], r);
      wait_for_launch_before();
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        const int t = base + r * kGroups;
        const Acc weight = t < T ? static_cast<Acc>(p.weights[t]) : Acc(0);
        const auto x = unpacked<In, kVector>(loaded[r]);
#pragma unroll
        for (int k = 0; k < kVector; ++k) acc[k] += weight * widen<In>(x.v[k]);
      }
    }
  };
  if (chunk.aligned16 && first + kVector <= chunk.size) {
    add_rows(
        std::integral_constant<int, kRowsAtOnce>{}, [](int) {},
        [&](const In* row, int) {
          return row != nullptr ? *reinterpret_cast<const Raw*>(in_global(row + first)) : Raw{};
        });
  } else {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    constexpr int kFewer = sizeof(In) == 2 ? 2 : 4;  // of eight elements each, four rows spill
#else
    constexpr int kFewer = 4;
#endif
    int64_t stride[kFewer];
    add_rows(
        std::integral_constant<int, kFewer>{},
        [&](int base) {
#pragma unroll
          for (int r = 0; r < kFewer; ++r) {
            const int t = base + r * kGroups;
            stride[r] = offset == nullptr ? g.column_stride : t < T ? stride_words[t] : 1;
          }
        },
        [&](const In* row, int r) {
          Single<In, kVector> x{};
#pragma unroll
          for (int k = 0; k < kVector; ++k) {
            const int64_t c = first + k * apart;
            if (row != nullptr && c < chunk.size) {
              const In element = in_global(row)[c * stride[r]];
              std::conditional_t<sizeof(In) == 2, uint16_t, decltype(+x.bits[k])> bits;
              memcpy(&bits, &element, sizeof(In));
              x.bits[k] = bits;
            }
          }
          return x;
        });
  }
  const int column = across / Shape::kPerChunk * kChunk + mine;
#pragma unroll
  for (int k = 0; k < kVector; ++k) shared.sums[group][column + k * apart] = acc[k];
  __syncthreads();
  Acc sum = shared.sums[0][tid];
#pragma unroll
  for (int k = 1; k < kGroups; ++k) sum += shared.sums[k][tid];
  const int64_t c = to.begin + tid % kChunk;
  if (c < to.size) in_global(out)[c] = narrow<In>(sum);
}

}  // namespace fastmtl::cuda
