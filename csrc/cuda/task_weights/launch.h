// Launches of the task convolution in CUDA C++: staging, product (forward and input gradient), weight gradients. Plain
// structs of pointers, sizes and strides in elements; no torch type and no allocation. See
// docs/kernels/task-kernels-cuda.md.
//
// Memory. Every buffer is the caller's, workspaces too: functions ending in `_bytes` say how large they must be, memory
// must begin on 16 bytes and live until the launches are done. Nothing is read of a workspace before it is written, so
// it needs no zeros. Every launch is on the given stream; none waits for the device, so all may be captured. Launches
// are not checked here: the caller asks cudaGetLastError() once after each function.
//
// Pictures (x, y and their gradients) are `[N, C, H, W]` with channels next to each other (channel stride 1); the
// caller copies others to channels_last. A linear layer is a filter of one pixel over pictures of 1 x R pixels. Where
// pointer, channels and strides are multiples of 16 bytes, 16 bytes are loaded at a time; else single elements.
#pragma once

#include <cstdint>

#include "common/params.h"
#if defined(__CUDACC__) || __has_include("cuda_on_host.h")
#include "cuda/device.cuh"
#else
using cudaStream_t = void*;  // the launcher, which is built without CUDA too, comes to these by functions.h
#endif

namespace fastmtl::cuda {

// beyond these the caller takes other kernels, see refusal()
constexpr int kMaxConvTasks = 1024, kMaxTaps = 16;
// deltas of a list whose addresses travel in the arguments; longer lists need a table in device memory
constexpr int kListed = 64;

// those of dimensions with one element best as 0, since they are looked at for 16 bytes, too
struct PictureStrides {
  int64_t n, h, w;
};
// of one filter, [Cout, Cin, kh, kw]
struct FilterStrides {
  int64_t co, ci, kh, kw;
};

// A batch sorted by task, as task_plan leaves it on the device. Samples behind offsets[T] have no task: their results
// are NaN, and they take no part in sums.
struct TaskBatch {
  const int64_t* order;    // [N]
  const int64_t* offsets;  // [T + 1], every `step`-th of a longer one
  int64_t num_samples;     // N
  int num_tasks;           // T
  int step = 1;
};

// Sizes of one convolution, without groups.
struct ConvShape {
  int channels, features;  // Cin, Cout
  int height, width, out_height, out_width;
  int kh, kw, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

// One tensor for each task, or none for some: a delta, or its gradient. No task has one: all members are null.
struct TaskPointers {
  void* stacked;            // one [T, ...] tensor; null: a list
  int64_t task_stride;      // of a stacked one, in elements
  const int64_t* table;     // [T] addresses in device memory, 0: none; for lists of more than kListed tasks
  int64_t listed[kListed];  // addresses by task, 0: none, for the others
  bool table_aligned16;     // whether the table's addresses are multiples of 16 bytes
  bool any;                 // whether a task may have one

  static TaskPointers of_stacked(const void* base, int64_t stride) {
    TaskPointers p{};
    p.stacked = const_cast<void*>(base);
    p.task_stride = stride;
    p.any = true;
    return p;
  }
  static TaskPointers of_table(const int64_t* table, bool aligned16) {
    TaskPointers p{};
    p.table = table;
    p.table_aligned16 = aligned16;
    p.any = true;
    return p;
  }
  // words: [count] addresses by task, count <= kListed
  static TaskPointers of_list(const int64_t* words, int count) {
    TaskPointers p{};
    for (int t = 0; t < count; ++t) p.listed[t] = words[t];
    p.any = true;
    return p;
  }
};

// A number of any dtype for each task, or one for all of a kind: gates, biases.
struct Values {
  const void* data;  // null: there are none
  DType dtype;
};

// Null, or why these kernels do not take a layer (float64, too many tasks or taps, a stride above 8, a picture of 2^31
// pixels, a filter of 2^31 elements): the caller then takes Triton's.
const char* refusal(DType dtype, const ConvShape& shape, int num_tasks);

// --- 1. Staging: W + s_t Delta_t of the tasks that have samples and an open delta, and W for all others

// What the product multiplies with: rows of `depth` = taps x inner channels, one for each column of the result.
// Forward: [slot, Cout, kh, kw, Cin]. Input gradient: [slot, Cin, kh, kw, Cout].
struct StagedWeights {
  const void* data;       // begins on 16 bytes
  int64_t slot_stride;    // from one filter to the next
  int64_t column_stride;  // from one row of `depth` to the next; a multiple of 16 bytes
  const int* slot;        // [T], device: each task's slot; null: all have slot 0, or each has its own (`own`)
  bool own;
};

struct StageParams {
  TaskBatch batch;
  ConvShape shape;
  bool for_input_gradient;
  DType dtype;         // of x, and so of what is staged
  DType weight_dtype;  // of W and the deltas: float32 or `dtype`
  const void* weight;  // null: there is no W
  FilterStrides weight_strides;
  TaskPointers delta;
  FilterStrides delta_strides;
  Values gate;  // [T]; none: all are 1. Of a closed gate (0) no delta is read
};

// Whether the weights can be multiplied with as they lie, without staging; `found` says how. Only forward: no delta and
// W dense in the order [Cout, kh, kw, Cin], or stacked deltas in that order without W and gate; in the dtype of x, on
// 16 bytes, rows of a multiple of 16 bytes.
bool weights_as_they_are(const StageParams& p, StagedWeights* found);

int64_t stage_bytes(const StageParams& p);
// One launch. The result points into `workspace`.
StagedWeights launch_stage(const StageParams& p, void* workspace, cudaStream_t stream);

// --- 2. and 3. The product: forward, or gradient of the input

struct ProductParams {
  TaskBatch batch;
  ConvShape shape;
  bool input_gradient;  // in: the result's gradient; out: the input's
  DType dtype;          // of in and out
  const void* in;
  PictureStrides in_strides;
  void* out;  // every element is written
  PictureStrides out_strides;
  StagedWeights weights;
  Values bias;               // forward only, [Cout] or [T, Cout] of stride 1
  int64_t bias_task_stride;  // 0: all tasks share it
};

// Which tile, by its place in the table of product.cuh, and how many blocks; chosen by a model where they are below 0.
struct Choice {
  int tile = -1;
  int64_t blocks = -1;      // product: of the persistent grid
  int64_t split_rows = -1;  // weight gradient: rows of a piece
  int chunks = -1;          // weight gradient: of the tasks, in the finish
};

// One launch. num_sms: of the device.
void launch_product(const ProductParams& p, int num_sms, const Choice& choice, cudaStream_t stream);

// --- 4. Weight gradients: of W, the deltas, the gates and the bias; what is not wanted is null

struct WeightGradParams {
  TaskBatch batch;
  ConvShape shape;
  DType dtype;  // of x and grad_out
  const void* x;
  PictureStrides x_strides;
  const void* grad_out;
  PictureStrides grad_out_strides;
  DType weight_dtype;  // of W, deltas and their gradients
  TaskPointers delta;  // read for the gates' gradients only
  FilterStrides delta_strides;
  Values gate;              // [T]; none: all are 1
  TaskPointers grad_delta;  // every element is written: 0 for tasks without samples and closed gates
  FilterStrides grad_delta_strides;
  void* grad_weight;
  FilterStrides grad_weight_strides;
  void* grad_gate;  // [T], in the dtype of the gates
  void* grad_bias;  // [Cout], or [T, Cout] if grad_bias_by_task
  DType grad_bias_dtype;
  bool grad_bias_by_task;
};

// Tile, pieces of rows, chunks of tasks and the memory that these take, by a model from what the host knows; the same
// plan goes to launch_weight_grads.
struct WeightGradPlan {
  int tile;
  int64_t split_rows, splits;  // rows of a piece, and how many pieces there can be
  int chunks, chunk_tasks;     // the finish adds up `chunk_tasks` tasks in order; then the chunks
  int64_t bias_split_rows, bias_splits;
  bool together;  // nothing is wanted by task: all samples are one task's
  int64_t workspace_bytes;
};
WeightGradPlan plan_weight_grads(const WeightGradParams& p, int num_sms, const Choice& choice);
// Pieces, their finish, and the last sums: up to three launches, and two or three for the bias.
void launch_weight_grads(const WeightGradParams& p, const WeightGradPlan& plan, void* workspace, cudaStream_t stream);

}  // namespace fastmtl::cuda
