// Staging: W + s_t Delta_t, added in float32 and rounded once, of the tasks that have samples and an open delta; and W.
//
// Slot T is W, which all other tasks share. A block takes 32 columns and 32 inner channels of one slot, tap by tap, by
// way of shared memory, so that both sides are read and written in lines, in whatever order they lie.
#pragma once

#include <type_traits>

#include "cuda/task_weights/tasks.cuh"

namespace fastmtl::cuda {

constexpr int kStageTile = 32;

struct StageArguments {
  TaskBatch batch;
  const void* weight;
  FilterStrides weight_strides;
  TaskPointers delta;
  FilterStrides delta_strides;
  Values gate;
  void* out;
  int* slot;  // [T]; null: nothing has a delta, and W is slot 0
  int columns, inner, kh, kw;
  int64_t column_stride, slot_stride;
  int shared_slot;
  bool transposed;   // for the input gradient: columns are Cin
  bool taps_inside;  // for task_stage_taps_kernel
  int64_t line;      // all lie in the order of the result, and this is how many elements they have; 0: they don't
};

// float32 beside 16 bits, or as x
template <class In, int kBytes>
using WeightOf = std::conditional_t<kBytes == 4, float, In>;

struct StageOf {
  bool opened, wanted;
  float scale;
};

// What slot blockIdx.y is made of; writes which slot the task has
__device__ inline StageOf stage_of(const StageArguments& p) {
  const int slot = static_cast<int>(blockIdx.y);
  if (slot == p.shared_slot) return {false, true, 0.0f};
  const float scale = gate_of(p.gate, slot);
  const bool opened = has_tensor(p.delta, slot) && scale != 0.0f && end_of(p.batch, slot) > begin_of(p.batch, slot);
  if (blockIdx.x == 0 && threadIdx.x == 0) p.slot[slot] = opened ? slot : p.shared_slot;
  return {opened, opened, scale};
}

template <class W>
__device__ inline const W* delta_of(const StageArguments& p, bool opened) {
  return opened ? tensor_of<const W>(p.delta, static_cast<int>(blockIdx.y)) : nullptr;
}

template <class In, int kWeightBytes>
__global__ void __launch_bounds__(kThreads) task_stage_kernel(const __grid_constant__ StageArguments p) {
  using W = WeightOf<In, kWeightBytes>;
  struct Shared {
    float tile[kStageTile][kStageTile + 1];  // [column][inner]
  };
  FASTMTL_SHARED(Shared, shared);
  const StageOf how = stage_of(p);
  if (!how.wanted) return;
  const auto* weight = static_cast<const W*>(p.weight);
  const W* delta = delta_of<W>(p, how.opened);
  const int blocks_inner = (p.inner + kStageTile - 1) / kStageTile;
  const int column_block = static_cast<int>(blockIdx.x) / blocks_inner;
  const int first_column = column_block * kStageTile;
  const int first_inner = (static_cast<int>(blockIdx.x) - column_block * blocks_inner) * kStageTile;
  auto* out = static_cast<In*>(p.out) + static_cast<int64_t>(blockIdx.y) * p.slot_stride;
  const int64_t w_column = p.transposed ? p.weight_strides.ci : p.weight_strides.co;
  const int64_t w_inner = p.transposed ? p.weight_strides.co : p.weight_strides.ci;
  const int64_t d_column = p.transposed ? p.delta_strides.ci : p.delta_strides.co;
  const int64_t d_inner = p.transposed ? p.delta_strides.co : p.delta_strides.ci;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  // lanes go along what lies closer together
  const bool along_inner = weight != nullptr ? w_inner <= w_column : d_inner <= d_column;
  const int taps = p.kh * p.kw;
  for (int tap = 0; tap < taps; ++tap) {
    const int kh = tap / p.kw, kw = tap - kh * p.kw;
    const int64_t w_tap = kh * p.weight_strides.kh + kw * p.weight_strides.kw;
    const int64_t d_tap = kh * p.delta_strides.kh + kw * p.delta_strides.kw;
#pragma unroll
    for (int k = 0; k < kStageTile / kWarps; ++k) {
      const int other = warp + k * kWarps;
      const int c = along_inner ? other : lane, i = along_inner ? lane : other;
      const int column = first_column + c, inner = first_inner + i;
      float value = 0.0f;
      if (column < p.columns && inner < p.inner) {
        if (weight != nullptr) value = widen(in_global(weight)[column * w_column + inner * w_inner + w_tap]);
        if (delta != nullptr) value += how.scale * widen(in_global(delta)[column * d_column + inner * d_inner + d_tap]);
      }
      shared.tile[c][i] = value;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kStageTile / kWarps; ++k) {
      const int c = warp + k * kWarps, column = first_column + c, inner = first_inner + lane;
      if (column < p.columns && inner < p.inner)
        out[column * p.column_stride + static_cast<int64_t>(tap) * p.inner + inner] = narrow<In>(shared.tile[c][lane]);
    }
    __syncthreads();
  }
  // rows end with zeros, up to 16 bytes
  const int64_t depth = static_cast<int64_t>(taps) * p.inner;
  const int rest = static_cast<int>(p.column_stride - depth);
  if (first_inner == 0)
    for (int k = static_cast<int>(threadIdx.x); k < kStageTile * rest; k += kThreads) {
      const int column = first_column + k / rest;
      if (column < p.columns) out[column * p.column_stride + depth + k % rest] = narrow<In>(0.0f);
    }
}

// Where W and deltas are [.., Cin, kh, kw] without gaps, forward: a run of one column, of channels and taps, is read as
// it lies, and written tap by tap.
constexpr int kStageRun = 2048;

template <class In, int kWeightBytes>
__global__ void __launch_bounds__(kThreads) task_stage_taps_kernel(const __grid_constant__ StageArguments p) {
  using W = WeightOf<In, kWeightBytes>;
  struct Shared {
    float run[kStageRun];
  };
  FASTMTL_SHARED(Shared, shared);
  const StageOf how = stage_of(p);
  if (!how.wanted) return;
  const int taps = p.kh * p.kw, most = kStageRun / taps;
  const int runs = (p.inner + most - 1) / most;
  const int column = static_cast<int>(blockIdx.x) / runs;
  const int first = (static_cast<int>(blockIdx.x) - column * runs) * most;
  const int channels = p.inner - first < most ? p.inner - first : most;
  const auto* weight = static_cast<const W*>(p.weight);
  const W* delta = delta_of<W>(p, how.opened);
  const int64_t offset = static_cast<int64_t>(first) * taps;
  const int64_t w_offset = column * p.weight_strides.co + offset, d_offset = column * p.delta_strides.co + offset;
#pragma unroll 4
  for (int k = static_cast<int>(threadIdx.x); k < channels * taps; k += kThreads) {
    float value = weight != nullptr ? widen(weight[w_offset + k]) : 0.0f;
    if (delta != nullptr) value += how.scale * widen(in_global(delta)[d_offset + k]);
    shared.run[k] = value;
  }
  __syncthreads();
  auto* out = static_cast<In*>(p.out) + static_cast<int64_t>(blockIdx.y) * p.slot_stride + column * p.column_stride;
#pragma unroll 4
  for (int k = static_cast<int>(threadIdx.x); k < channels * taps; k += kThreads) {
    const int tap = k / channels, channel = k - tap * channels;
    out[static_cast<int64_t>(tap) * p.inner + first + channel] = narrow<In>(shared.run[channel * taps + tap]);
  }
  const int64_t depth = static_cast<int64_t>(taps) * p.inner;
  if (first == 0 && static_cast<int>(threadIdx.x) < p.column_stride - depth)
    out[depth + static_cast<int64_t>(threadIdx.x)] = narrow<In>(0.0f);
}

// Where all lie in the order of the result: one line of elements, 16 bytes of the result to a thread.
template <class In, int kWeightBytes>
__global__ void __launch_bounds__(kThreads) task_stage_line_kernel(const __grid_constant__ StageArguments p) {
  using W = WeightOf<In, kWeightBytes>;
  constexpr int kPer = kPer16<In>;
  constexpr int kPerLoad = 16 / static_cast<int>(sizeof(W)), kLoads = kPer / kPerLoad;
  const StageOf how = stage_of(p);
  if (!how.wanted) return;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + static_cast<int64_t>(threadIdx.x)) * kPer;
  if (at >= p.line) return;
  const auto* weight = static_cast<const W*>(p.weight);
  const W* delta = delta_of<W>(p, how.opened);
  using Load = Vector<W, kPerLoad>;
  Load w[kLoads] = {}, d[kLoads] = {};
#pragma unroll
  for (int k = 0; k < kLoads; ++k) {
    if (weight != nullptr) w[k] = *reinterpret_cast<const Load*>(weight + at + k * kPerLoad);
    if (delta != nullptr) d[k] = *reinterpret_cast<const Load*>(in_global(delta + at + k * kPerLoad));
  }
  Vector<In, kPer> value;
#pragma unroll
  for (int k = 0; k < kPer; ++k)
    value.v[k] =
        narrow<In>(widen(w[k / kPerLoad].v[k % kPerLoad]) + how.scale * widen(d[k / kPerLoad].v[k % kPerLoad]));
  store16(static_cast<In*>(p.out) + static_cast<int64_t>(blockIdx.y) * p.slot_stride + at, value);
}

}  // namespace fastmtl::cuda
