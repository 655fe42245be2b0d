// Gradients of W, the deltas, the gates and the bias: the products dY^T X of each task's rows, in a fixed order.
//
// A block owns a tile of the filter, [output channels, (tap, input channel)], and a piece of rows of one task; its sums
// go to memory in float32. The finish adds up pieces and tasks in order, and makes of them what is wanted.
#pragma once

#include "cuda/task_weights/fragments.cuh"
#include "cuda/task_weights/tasks.cuh"

namespace fastmtl::cuda {

struct PiecesArguments {
  TaskBatch batch;
  const void *x, *grad_out;
  PictureStrides x_strides, grad_out_strides;
  ConvShape shape;
  int64_t split_rows;
  Values gate;
  TaskPointers grad_delta;
  bool delta_only;  // nothing else is wanted: closed gates, and tasks without delta, need no sums
  float* parts;     // [splits, Cout, kh, kw, Cin]
};

constexpr int kPieceTiles = 4;
// The second is for few output channels: 64 of them, and of 64 channels the three taps of a line. Of float32 all are
// the third, whose three products for one are what bounds it.
constexpr TileSize kPieceTile16[kPieceTiles] = {
    {128, 128, 64, 64, 2, true}, {64, 192, 64, 48, 2, true}, {64, 64, 32, 32, 4, true}, {64, 64, 32, 32, 3, false}};
constexpr TileSize kPieceTile32[kPieceTiles] = {
    {64, 64, 32, 32, 3, true}, {64, 64, 32, 32, 3, true}, {64, 64, 32, 32, 3, true}, {64, 64, 32, 32, 3, false}};

constexpr int kOutside = -(1 << 30);

template <class In, int kTile>
struct PieceShape {
  static constexpr TileSize kSize = sizeof(In) == 4 ? kPieceTile32[kTile] : kPieceTile16[kTile];
  static constexpr int kRows = kSize.rows, kColumns = kSize.columns;
  static constexpr int kWarpsAcross = kColumns / kSize.warp_columns;
  static constexpr int kThreads = kRows / kSize.warp_rows * kWarpsAcross * kWarp;
  static constexpr int kStages = 4;
  static constexpr int kDepth = sizeof(In) == 4 ? 16 : 32;  // rows of pictures in a step
  static constexpr int kUnitsA = kRows / kPer16<In>, kUnitsB = kColumns / kPer16<In>;
  // a thread copies the same unit of each stretch of so many channels, and the same lines of both operands
  static constexpr int kStretch = 64, kUnitsOfStretch = kStretch / kPer16<In>;
  static_assert(kRows % kStretch == 0 && kColumns % kStretch == 0);
  static constexpr int kStageBytes = kDepth * (kUnitsA + kUnitsB) * kUnit;
  // places of rows are found a group ahead, one by each thread
  static constexpr int kGroup = kThreads, kStepsOfGroup = kGroup / kDepth;
  static_assert(kStepsOfGroup >= kStages);

  // the pixel of x that a row's first tap meets; where there is no such row, one that lies outside with every tap
  struct alignas(16) Pixel {
    int64_t at;
    int h, w;
  };
  struct alignas(16) Shared {
    unsigned char stage[kStages][kStageBytes];
    Pixel pixel[2][kGroup];
    int64_t grad_out[2][kGroup];  // where the row's result lies; -1: there is no such row
  };
};

template <class In, int kTile>
__global__ void __launch_bounds__((PieceShape<In, kTile>::kThreads), (PieceShape<In, kTile>::kSize.blocks))
    task_pieces_kernel(const __grid_constant__ PiecesArguments p) {
  using Shape = PieceShape<In, kTile>;
  using Shared = typename Shape::Shared;
  using Pixel = typename Shape::Pixel;
  constexpr int kPer = kPer16<In>, kThreads = Shape::kThreads, kDepth = Shape::kDepth;
  constexpr int kUnitsA = Shape::kUnitsA, kUnitsB = Shape::kUnitsB, kStretch = Shape::kStretch;
  constexpr int kStretchesA = Shape::kRows / kStretch, kStretchesB = Shape::kColumns / kStretch;
  constexpr int kApart = kThreads / Shape::kUnitsOfStretch, kLines = kDepth / kApart;
  static_assert(kLines * kApart == kDepth && kApart % 8 == 0);
  // taps next to each other read much the same pixels
  constexpr bool kReadAgain = Shape::kColumns > 2 * kStretch;
  FASTMTL_BIG_SHARED(Shared, shared);
  const int tid = static_cast<int>(threadIdx.x), lane = tid % kWarp, warp = tid / kWarp;
  const int warp_row = warp / Shape::kWarpsAcross * Shape::kSize.warp_rows;
  const int warp_column = warp % Shape::kWarpsAcross * Shape::kSize.warp_columns;
  const ConvShape& s = p.shape;
  const int pixels = s.out_height * s.out_width;

  const Piece piece = find_piece(p.batch, pixels, blockIdx.y, p.split_rows);
  if (piece.rows <= 0 || piece.task >= p.batch.num_tasks) return;
  if (p.delta_only && (!has_tensor(p.grad_delta, piece.task) || gate_of(p.gate, piece.task) == 0.0f)) return;
  const int num_rows = static_cast<int>(piece.rows < p.split_rows ? piece.rows : p.split_rows);
  const int steps = (num_rows + kDepth - 1) / kDepth;
  const Rows rows(piece, pixels, s.out_width);

  const int depth = s.kh * s.kw * s.channels;  // columns
  const int tiles_down = (s.features + Shape::kRows - 1) / Shape::kRows;
  const int first_column = static_cast<int>(blockIdx.x) / tiles_down * Shape::kColumns;
  const int first_feature = static_cast<int>(blockIdx.x) % tiles_down * Shape::kRows;

  // in two parts, so that the load between them is under way while products are formed; sample of -1: no such row
  auto find_sample = [&](int row, Place& place) -> int64_t {
    if (row >= num_rows) return -1;
    place = rows.at(row);
    return p.batch.order[place.sample];
  };
  auto leave_place = [&](int group, int64_t n, const Place& place) {
    Pixel pixel = {0, kOutside, kOutside};
    int64_t grad_out = -1;
    if (n >= 0) {
      const int h = place.h * s.stride_h - s.pad_h, w = place.w * s.stride_w - s.pad_w;
      pixel = {n * p.x_strides.n + h * p.x_strides.h + w * p.x_strides.w, h, w};
      grad_out = n * p.grad_out_strides.n + place.h * p.grad_out_strides.h + place.w * p.grad_out_strides.w;
    }
    shared.pixel[group % 2][tid] = pixel;
    shared.grad_out[group % 2][tid] = grad_out;
  };

  // what this thread copies: always the same channels, and for x the same taps
  const int first_line = tid / Shape::kUnitsOfStretch, unit = tid % Shape::kUnitsOfStretch;
  const int feature = first_feature + unit * kPer, column = first_column + unit * kPer;
  const auto* grad_out = static_cast<const In*>(p.grad_out);
  const auto* x = static_cast<const In*>(p.x);
  struct Column {
    int c, h, w;  // channel, and how the tap moves
    int64_t moved;
  };
  auto column_at = [&](int k) -> Column {
    const int tap = k / s.channels, kh = tap / s.kw;
    const int c = k - tap * s.channels, h = kh * s.dilation_h, w = (tap - kh * s.kw) * s.dilation_w;
    return {c, h, w, h * p.x_strides.h + w * p.x_strides.w + c};
  };
  Column mine[kStretchesB];
#pragma unroll
  for (int j = 0; j < kStretchesB; ++j) mine[j] = column_at(column + j * kStretch);
  auto is_inside = [&](const Pixel& pixel, const Column& one) {
    // both at once, without a branch
    return (static_cast<unsigned>(pixel.h + one.h) < static_cast<unsigned>(s.height)) &
           (static_cast<unsigned>(pixel.w + one.w) < static_cast<unsigned>(s.width));
  };
  auto copy = [&](int step, int stage) {
    const int group = step / Shape::kStepsOfGroup % 2, first = step % Shape::kStepsOfGroup * kDepth;
    unsigned char* a = shared.stage[stage];
    unsigned char* b = a + kDepth * kUnitsA * kUnit;
    // all places before the first copy: between a load from shared memory and a copy ptxas puts three loads of nothing
    constexpr bool kAhead = Shape::kSize.aligned16;
    int64_t grad_outs[kLines];
    Pixel seen[kLines];
    if constexpr (kAhead) {
#pragma unroll
      for (int k = 0; k < kLines; ++k) {
        grad_outs[k] = shared.grad_out[group][first + first_line + k * kApart];
        seen[k] = shared.pixel[group][first + first_line + k * kApart];
      }
    }
#pragma unroll
    for (int k = 0; k < kLines; ++k) {
      const int line = first_line + k * kApart;
      const int64_t from = kAhead ? grad_outs[k] : shared.grad_out[group][first + line];
      unsigned char* to = a + place_across<In, kUnitsA>(line, unit);
#pragma unroll
      for (int j = 0; j < kStretchesA; ++j, to += Shape::kUnitsOfStretch * kUnit) {
        const int here = feature + j * kStretch;
        if constexpr (Shape::kSize.aligned16) {
          const bool ok = from >= 0 && here < s.features;
          copy_async(to, ok ? grad_out + from + here : grad_out, ok ? kUnit : 0);
        } else {
          Vector<In, kPer> value = {};
#pragma unroll
          for (int e = 0; e < kPer; ++e)
            if (from >= 0 && here + e < s.features) value.v[e] = grad_out[from + here + e];
          memcpy(to, &value, kUnit);
        }
      }
      const Pixel pixel = kAhead ? seen[k] : shared.pixel[group][first + line];
      to = b + place_across<In, kUnitsB>(line, unit);
#pragma unroll
      for (int j = 0; j < kStretchesB; ++j, to += Shape::kUnitsOfStretch * kUnit) {
        const int here = column + j * kStretch;
        if constexpr (Shape::kSize.aligned16) {
          const bool ok = (here < depth) & is_inside(pixel, mine[j]);
          copy_async<kReadAgain>(to, ok ? x + pixel.at + mine[j].moved : x, ok ? kUnit : 0);
        } else {
          Vector<In, kPer> value = {};
#pragma unroll
          for (int e = 0; e < kPer; ++e) {
            const Column one = column_at(here + e);
            if (here + e < depth && is_inside(pixel, one)) value.v[e] = x[pixel.at + one.moved];
          }
          memcpy(to, &value, kUnit);
        }
      }
    }
  };

  WarpTile<In, Shape::kSize.warp_rows, Shape::kSize.warp_columns> sum, total;
  sum.fill(0.0f);
  if constexpr (sizeof(In) == 4) total.fill(0.0f);
  Place place{};
  int64_t sample = find_sample(tid, place);
  leave_place(0, sample, place);
  block_barrier();
#pragma unroll
  for (int k = 0; k < Shape::kStages - 1; ++k) {
    if (k < steps) copy(k, k);
    commit_copies();
  }
  int stage = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<Shape::kStages - 2>();
    block_barrier();
    const int next = stage == 0 ? Shape::kStages - 1 : stage - 1;  // whose numbers all threads have used
    if (step + Shape::kStages - 1 < steps) copy(step + Shape::kStages - 1, next);
    commit_copies();
    // The next group's places, which the next step is the first to read, in place of the last group's, which were read
    // for the last time kStages - 1 steps before this group began.
    const bool finds = step % Shape::kStepsOfGroup == 0;
    const int group = step / Shape::kStepsOfGroup + 1;
    if (finds) sample = find_sample(group * Shape::kGroup + tid, place);
    const unsigned char* a = shared.stage[stage];
#pragma unroll
    for (int part = 0; part < 2; ++part)
      add_across<In, kUnitsA, kUnitsB>(sum, a, a + kDepth * kUnitsA * kUnit, warp_row, warp_column, part);
    if (finds) leave_place(group, sample, place);
    stage = stage + 1 < Shape::kStages ? stage + 1 : 0;
    if constexpr (sizeof(In) == 4)
      if (step % kStepsOfSum == kStepsOfSum - 1) total.add_and_clear(sum);
  }
  if constexpr (sizeof(In) == 4) sum.add_and_clear(total);

  float* parts = p.parts + static_cast<int64_t>(blockIdx.y) * s.features * depth;
  const bool pairs = depth % 2 == 0;
#pragma unroll
  for (int m = 0; m < decltype(sum)::kM; ++m)
#pragma unroll
    for (int n = 0; n < decltype(sum)::kN; ++n)
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int f = first_feature + warp_row + m * 16 + k * 8 + lane / 4;
        const int c = first_column + warp_column + n * 8 + lane % 4 * 2;
        if (f >= s.features || c >= depth) continue;
        float* to = parts + static_cast<int64_t>(f) * depth + c;
        const Vector<float, 2> pair = {sum.sum[m][n][2 * k], sum.sum[m][n][2 * k + 1]};
        if (pairs) {
          *reinterpret_cast<Vector<float, 2>*>(to) = pair;
        } else {
          to[0] = pair.v[0];
          if (c + 1 < depth) to[1] = pair.v[1];
        }
      }
}

// --- the finish

struct FinishArguments {
  TaskBatch batch;
  const float* parts;  // [splits, size]
  int pixels;
  int64_t split_rows, size;
  int channels, kh, kw;
  bool taps_inside;  // of the gradients' memory; see FilterPlace
  int chunk_tasks;
  Values gate;
  TaskPointers delta;  // none: no gate's gradient is wanted
  FilterStrides delta_strides;
  TaskPointers grad_delta;
  FilterStrides grad_delta_strides;
  float* gate_parts;  // [T, blocks]; null: not wanted
  float* chunks;  // [chunks, size], in the order of e: sums over the tasks of a chunk, if there is more than one; else
                  // null
  void* grad_weight;  // their sum, if there is one chunk; null: not wanted
  FilterStrides grad_weight_strides;
};

// Number e of a filter: of the parts' order [Cout, kh, kw, Cin], or with `taps_inside` of [Cout, Cin, kh, kw]. Threads
// go along what is written, since there are fewer writes than reads, but a write of single numbers costs more.
struct FilterPlace {
  int64_t co;
  int ci, tap, kh, kw;

  __device__ FilterPlace(int64_t e, int channels, int kh_, int kw_, bool taps_inside) : kw(kw_) {
    const int taps = kh_ * kw_;
    const int64_t row = quotient(e, taps_inside ? taps : channels);
    const auto last = static_cast<int>(e - row * (taps_inside ? taps : channels));
    co = quotient(row, taps_inside ? channels : taps);
    const auto middle = static_cast<int>(row - co * (taps_inside ? channels : taps));
    ci = taps_inside ? middle : last;
    tap = taps_inside ? last : middle;
    kh = tap / kw;
  }
  __device__ int64_t in_parts(int channels, int taps) const { return (co * taps + tap) * channels + ci; }
  __device__ int64_t by(const FilterStrides& strides) const {
    return co * strides.co + ci * strides.ci + kh * strides.kh + (tap - kh * kw) * strides.kw;
  }
};

// One number of all threads of the block, summed up in a fixed order; for thread 0
__device__ inline float block_sum(float x, float (&lane_sums)[kWarps]) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) lane_sums[threadIdx.x / kWarp] = x;
  __syncthreads();
  float sum = 0.0f;
  if (threadIdx.x == 0)
#pragma unroll
    for (int k = 0; k < kWarps; ++k) sum += lane_sums[k];
  return sum;
}

// Adds up the pieces of each task of chunk blockIdx.y. kPer numbers to a thread, of one tap; W: of the weights.
template <class W, int kPer>
__global__ void __launch_bounds__(kThreads, 3) task_finish_kernel(const __grid_constant__ FinishArguments p) {
  struct Shared {
    float lane_sums[kWarps];
  };
  FASTMTL_SHARED(Shared, shared);
  using Part = Vector<float, kPer>;
  const int64_t e = (static_cast<int64_t>(blockIdx.x) * kThreads + static_cast<int64_t>(threadIdx.x)) * kPer;
  const bool is_there = e < p.size;
  const int first_task = static_cast<int>(blockIdx.y) * p.chunk_tasks;
  const int last_task = first_task + p.chunk_tasks < p.batch.num_tasks ? first_task + p.chunk_tasks : p.batch.num_tasks;
  const FilterPlace place(e, p.channels, p.kh, p.kw, p.taps_inside);
  const int64_t part_place = place.in_parts(p.channels, p.kh * p.kw);
  const int64_t delta_place = place.by(p.delta_strides), grad_place = place.by(p.grad_delta_strides);
  const bool sums_all = p.chunks != nullptr || p.grad_weight != nullptr;
  auto pieces_of = [&](int task) {
    return ((end_of(p.batch, task) - begin_of(p.batch, task)) * p.pixels + p.split_rows - 1) / p.split_rows;
  };
  int64_t piece = 0;
  for (int task = 0; task < first_task; ++task) piece += pieces_of(task);
  Part total{};
  for (int task = first_task; task < last_task; ++task) {
    const int64_t pieces = pieces_of(task);
    const float scale = pieces > 0 ? gate_of(p.gate, task) : 0.0f;
    W* grad = tensor_of<W>(p.grad_delta, task);
    const bool opened = pieces > 0 && scale != 0.0f;
    Part sum{};
    if (is_there && (sums_all || p.gate_parts != nullptr || (grad != nullptr && opened))) {
      const float* from = p.parts + piece * p.size + part_place;
      int64_t k = 0;
      // eight loads under way at a time
      for (; k + 8 <= pieces; k += 8) {
        Part part[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) part[j] = *reinterpret_cast<const Part*>(from + (k + j) * p.size);
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
          for (int i = 0; i < kPer; ++i) sum.v[i] += part[j].v[i];
      }
      for (; k < pieces; ++k) {
        const Part part = *reinterpret_cast<const Part*>(from + k * p.size);
#pragma unroll
        for (int i = 0; i < kPer; ++i) sum.v[i] += part.v[i];
      }
    }
    piece += pieces;
    if (p.gate_parts != nullptr) {
      const W* delta = tensor_of<const W>(p.delta, task);
      float product = 0.0f;
      if (is_there && delta != nullptr && pieces > 0)
#pragma unroll
        for (int i = 0; i < kPer; ++i)
          product += sum.v[i] * widen(in_global(delta)[delta_place + i * p.delta_strides.ci]);
      product = block_sum(product, shared.lane_sums);
      if (threadIdx.x == 0) p.gate_parts[static_cast<int64_t>(task) * gridDim.x + blockIdx.x] = product;
    }
    if (is_there && grad != nullptr)
#pragma unroll
      for (int i = 0; i < kPer; ++i)
        in_global(grad)[grad_place + i * p.grad_delta_strides.ci] = narrow<W>(opened ? scale * sum.v[i] : 0.0f);
#pragma unroll
    for (int i = 0; i < kPer; ++i) total.v[i] += sum.v[i];
  }
  if (!is_there || !sums_all) return;
  if (p.chunks != nullptr) {
    *reinterpret_cast<Part*>(p.chunks + static_cast<int64_t>(blockIdx.y) * p.size + e) = total;
    return;
  }
  const int64_t weight_place = place.by(p.grad_weight_strides);
#pragma unroll
  for (int i = 0; i < kPer; ++i)
    static_cast<W*>(p.grad_weight)[weight_place + i * p.grad_weight_strides.ci] = narrow<W>(total.v[i]);
}

// W's gradient: the sums of chunks, in order.
struct ChunksArguments {
  const float* chunks;
  int count;
  int64_t size;
  int channels, kh, kw;
  bool taps_inside;
  void* grad_weight;
  FilterStrides strides;
};

template <class W>
__global__ void __launch_bounds__(kThreads) task_chunks_kernel(const __grid_constant__ ChunksArguments p) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + static_cast<int64_t>(threadIdx.x);
  if (e >= p.size) return;
  float sum = 0.0f;
#pragma unroll 8
  for (int k = 0; k < p.count; ++k) sum += p.chunks[k * p.size + e];
  const FilterPlace place(e, p.channels, p.kh, p.kw, p.taps_inside);
  static_cast<W*>(p.grad_weight)[place.by(p.strides)] = narrow<W>(sum);
}

// The gates' gradients: task blockIdx.x's parts, in order.
struct GatesArguments {
  const float* parts;  // [T, count]
  int64_t count;
  void* grad_gate;  // [T]
};

template <class W>
__global__ void __launch_bounds__(kThreads) task_gates_kernel(const __grid_constant__ GatesArguments p) {
  struct Shared {
    float lane_sums[kWarps];
  };
  FASTMTL_SHARED(Shared, shared);
  const auto task = static_cast<int64_t>(blockIdx.x);
  float sum = 0.0f;
  for (int64_t k = threadIdx.x; k < p.count; k += kThreads) sum += p.parts[task * p.count + k];
  sum = block_sum(sum, shared.lane_sums);
  if (threadIdx.x == 0) static_cast<W*>(p.grad_gate)[task] = narrow<W>(sum);
}

// --- bias

struct BiasArguments {
  TaskBatch batch;
  const void* grad_out;
  PictureStrides strides;
  int features, pixels, width;
  int64_t split_rows;
  float* parts;  // [splits, Cout]
};

// Sums over a piece of rows (blockIdx.y) of kPer channels to a lane; a warp takes every eighth row.
template <class In, int kPer>
__global__ void __launch_bounds__(kThreads) task_bias_kernel(const __grid_constant__ BiasArguments p) {
  struct Shared {
    float sum[kWarps][kWarp * kPer];
  };
  FASTMTL_SHARED(Shared, shared);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const Piece piece = find_piece(p.batch, p.pixels, blockIdx.y, p.split_rows);
  if (piece.rows <= 0 || piece.task >= p.batch.num_tasks) return;
  const int num_rows = static_cast<int>(piece.rows < p.split_rows ? piece.rows : p.split_rows);
  const Rows rows(piece, p.pixels, p.width);
  const int first = static_cast<int>(blockIdx.x) * kWarp * kPer, feature = first + lane * kPer;
  const auto* from = static_cast<const In*>(p.grad_out) + feature;
  float sum[kPer] = {};
  constexpr int kAtOnce = 4;
  for (int row = warp; row < num_rows; row += kWarps * kAtOnce) {
    Vector<In, kPer> value[kAtOnce] = {};
    if (feature < p.features)
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k)
        if (row + k * kWarps < num_rows) {
          const Place place = rows.at(row + k * kWarps);
          const int64_t n = p.batch.order[place.sample];
          value[k] = *reinterpret_cast<const Vector<In, kPer>*>(from + n * p.strides.n + place.h * p.strides.h +
                                                                place.w * p.strides.w);
        }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
#pragma unroll
      for (int i = 0; i < kPer; ++i) sum[i] += widen(value[k].v[i]);
  }
#pragma unroll
  for (int i = 0; i < kPer; ++i) shared.sum[warp][lane * kPer + i] = sum[i];
  __syncthreads();
  for (int k = static_cast<int>(threadIdx.x); k < kWarp * kPer; k += kThreads) {
    if (first + k >= p.features) continue;
    float all = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) all += shared.sum[w][k];
    p.parts[static_cast<int64_t>(blockIdx.y) * p.features + first + k] = all;
  }
}

}  // namespace fastmtl::cuda
