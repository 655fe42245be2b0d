// What the kernels of the task convolution share: how a tile finds its task and its rows, gates, deltas' addresses.
//
// A *row* is one pixel of one sample. The rows of a task are counted in the order of its samples in `order`, and of
// their pixels, line by line. A tile of rows, or a piece of them, holds one task.
#pragma once

#include "cuda/task_weights/launch.h"

namespace fastmtl::cuda {

constexpr unsigned kAllLanes = ~0u;

template <class In>
constexpr int kPer16 = 16 / static_cast<int>(sizeof(In));  // elements of 16 bytes

__device__ inline int64_t begin_of(const TaskBatch& batch, int task) {
  return batch.offsets[static_cast<int64_t>(task) * batch.step];
}
// task T: samples of no task
__device__ inline int64_t end_of(const TaskBatch& batch, int task) {
  return task < batch.num_tasks ? begin_of(batch, task + 1) : batch.num_samples;
}

struct Piece {
  int task;
  int64_t begin;  // the task's first place in `order`
  int64_t low;    // the piece's first row, of the task's
  int64_t rows;   // of the task, from `low` on; 0: there is no such piece
};

// The `piece`-th of all pieces of `rows_per_piece` rows that hold one task each. All lanes of a warp together.
__device__ inline Piece find_piece(const TaskBatch& batch, int pixels, int64_t piece, int64_t rows_per_piece) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  int64_t before = 0;  // pieces of earlier tasks
  for (int first = 0; first <= batch.num_tasks; first += kWarp) {
    const int task = first + lane;
    const bool is_task = task <= batch.num_tasks;
    const int64_t begin = is_task ? begin_of(batch, task) : 0;
    const int64_t rows = is_task ? (end_of(batch, task) - begin) * pixels : 0;
    const auto mine = static_cast<int>((rows + rows_per_piece - 1) / rows_per_piece);
    int upto = mine;  // of the lanes up to this one
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int other = __shfl_sync(kAllLanes, upto, lane >= step ? lane - step : lane);
      if (lane >= step) upto += other;
    }
    const int here = __shfl_sync(kAllLanes, upto, kWarp - 1);
    if (piece < before + here) {
      const int owner = __popc(__ballot_sync(kAllLanes, before + upto <= piece));
      const int64_t first_piece = before + __shfl_sync(kAllLanes, upto - mine, owner);
      const int64_t low = (piece - first_piece) * rows_per_piece;
      return {first + owner, __shfl_sync(kAllLanes, begin, owner), low, __shfl_sync(kAllLanes, rows, owner) - low};
    }
    before += here;
  }
  return {batch.num_tasks, 0, 0, 0};
}

// x / y of 64 bits, which most often are 32
__device__ inline int64_t quotient(int64_t x, int y) {
  return x >> 32 == 0 ? static_cast<int64_t>(static_cast<uint32_t>(x) / static_cast<uint32_t>(y)) : x / y;
}

// Where a row lies: place in `order`, line and column.
struct Place {
  int64_t sample;
  int h, w;
};

// Rows `first` and on of a piece, without a division of 64 bits for each.
struct Rows {
  int64_t sample;  // of the first one
  int row, pixels, width;

  __device__ Rows(const Piece& piece, int pixels_, int width_) : pixels(pixels_), width(width_) {
    const int64_t samples = quotient(piece.low, pixels);
    sample = piece.begin + samples;
    row = static_cast<int>(piece.low - samples * pixels);
  }
  __device__ Place at(int k) const {
    const auto r = static_cast<uint32_t>(row) + static_cast<uint32_t>(k);
    const uint32_t samples = r / static_cast<uint32_t>(pixels);
    const uint32_t pixel = r - samples * static_cast<uint32_t>(pixels);
    const uint32_t h = pixel / static_cast<uint32_t>(width);
    return {sample + samples, static_cast<int>(h), static_cast<int>(pixel - h * static_cast<uint32_t>(width))};
  }
};

__device__ inline float value_at(const Values& values, int64_t k) {
  switch (values.dtype) {
    case DType::f32: return static_cast<const float*>(values.data)[k];
    case DType::bf16: return widen(static_cast<const __nv_bfloat16*>(values.data)[k]);
    case DType::f16: return widen(static_cast<const __half*>(values.data)[k]);
    case DType::f64: return static_cast<float>(static_cast<const double*>(values.data)[k]);
  }
  return 0.0f;
}

// s_t: 1 without gates
__device__ inline float gate_of(const Values& gate, int task) {
  return gate.data == nullptr ? 1.0f : value_at(gate, task);
}

// A task's tensor, or null
template <class T>
__device__ inline T* tensor_of(const TaskPointers& tensors, int task) {
  if (!tensors.any) return nullptr;
  if (tensors.stacked != nullptr) return static_cast<T*>(tensors.stacked) + task * tensors.task_stride;
  const int64_t address = tensors.table != nullptr ? tensors.table[task] : tensors.listed[task];
  return reinterpret_cast<T*>(address);
}

__device__ inline bool has_tensor(const TaskPointers& tensors, int task) {
  return tensor_of<char>(tensors, task) != nullptr;
}

}  // namespace fastmtl::cuda
