// The product of the task convolution, forward and input gradient: an implicit GEMM over rows in order of tasks.
//
//   out[row, column] = sum over (tap, c) of in[row moved by tap, c] weights[slot of the row's task][column, tap, c]
//
// A block walks over tiles that hold one task each. Operands go to shared memory by copies that run some steps ahead;
// depth is counted over taps and channels together, in steps of 64 bytes: where these are channels of one tap, all taps
// of the same channels behind each other, which read much the same of `in`. A row's place, and which taps lie inside
// the picture for it, are found once for a tile, and wait in shared memory. Forward, all taps meet every row. For the
// input gradient of a strided convolution, rows are the pixels of one residue class (blockIdx.y), which the same taps
// meet.
#pragma once

#include "cuda/task_weights/fragments.cuh"
#include "cuda/task_weights/tasks.cuh"

namespace fastmtl::cuda {

// One dimension of the filter's way over a picture.
struct Axis {
  int taps, in_size, out_size;
  int classes;                // out pixel = row of the class * classes + class
  int stride, pad, dilation;  // of the convolution
};

struct ProductArguments {
  TaskBatch batch;
  const void* in;
  void* out;
  PictureStrides in_strides, out_strides;
  StagedWeights weights;
  Values bias;
  int64_t bias_task_stride;
  Axis h, w;
  int inner, columns;  // channels of in and out
  bool backward;
  bool out_aligned16;
};

// For one class of pixels: the first tap that meets it, how many do, how far they are apart; the pixel of `in` that the
// first tap finds at the class's first row, and how far it moves from row to row and from tap to tap.
struct Walk {
  int first, count, step, origin, per_row, per_tap, rows;

  __device__ Walk(const Axis& axis, int which, bool backward) {
    rows = (axis.out_size - which + axis.classes - 1) / axis.classes;
    if (!backward) {
      first = 0, count = axis.taps, step = 1;
      origin = -axis.pad, per_row = axis.stride, per_tap = axis.dilation;
      return;
    }
    // out pixel = in pixel * stride + tap * dilation - pad, for taps that leave no remainder
    const int rest = which + axis.pad;
    first = 0, count = 0, step = 1;
    for (int tap = axis.taps - 1; tap >= 0; --tap)
      if ((rest - tap * axis.dilation) % axis.stride == 0) {
        if (count > 0) step = first - tap;
        first = tap;
        ++count;
      }
    origin = (rest - first * axis.dilation) / axis.stride;
    per_row = 1;
    per_tap = -(step * axis.dilation / axis.stride);
  }
};

struct TileSize {
  int rows, columns, warp_rows, warp_columns;
  int blocks;      // that should fit on a multiprocessor at once
  bool aligned16;  // `in` is copied 16 bytes at a time; else number by number
};
constexpr int kProductTiles = 4;
// Of 16 bits and of float32, which keeps two sums: warps of 64 x 64 do not fit into its registers.
constexpr TileSize kProductTile16[kProductTiles] = {
    {128, 128, 64, 64, 2, true}, {128, 64, 64, 32, 3, true}, {64, 64, 32, 32, 4, true}, {64, 64, 32, 32, 3, false}};
constexpr TileSize kProductTile32[kProductTiles] = {
    {128, 64, 64, 32, 2, true}, {128, 64, 64, 32, 2, true}, {64, 64, 32, 32, 3, true}, {64, 64, 32, 32, 3, false}};

template <class In, int kTile>
struct ProductShape {
  static constexpr TileSize kSize = sizeof(In) == 4 ? kProductTile32[kTile] : kProductTile16[kTile];
  static constexpr int kRows = kSize.rows, kColumns = kSize.columns;
  static constexpr int kWarpsDown = kRows / kSize.warp_rows, kWarpsAcross = kColumns / kSize.warp_columns;
  static constexpr int kThreads = kWarpsDown * kWarpsAcross * kWarp;
  static constexpr int kStages = 4;
  static constexpr int kStageBytes = (kRows + kColumns) * kDepthBytes;
  static constexpr int kDepth = kDepthBytes / static_cast<int>(sizeof(In));
  // a line of results, with a unit between, so that eight lanes' pairs of four lines lie in different banks
  static constexpr int kLineBytes = kColumns * static_cast<int>(sizeof(In)) + kUnit;
  static_assert(kRows * kLineBytes <= kStages * kStageBytes);

  struct alignas(16) Shared {
    unsigned char stage[kStages][kStageBytes];  // rows, then columns; at a tile's end the results
    int64_t in[kRows];                          // where the row's first tap lies
    int64_t out[kRows];                         // where its result lies; -1: there is no such row
    uint32_t inside[kRows];  // taps that lie inside the picture: of lines, and from bit 16 of columns
    float bias[kColumns];
  };
};

// Where along the depth a thread copies from: channel and tap of its unit, or of its first number.
struct DepthPlace {
  int c, h, w;

  __device__ DepthPlace(int at, int inner, const Walk& walk_w) {
    const int tap = at / inner;
    c = at - tap * inner;
    h = walk_w.count > 0 ? tap / walk_w.count : 0;
    w = tap - h * walk_w.count;
  }
  // taps, channels: of the distance
  __device__ void move(int taps, int channels, int inner, int taps_w) {
    c += channels;
    w += taps;
    if (c >= inner) {
      c -= inner;
      ++w;
    }
    while (w >= taps_w) {
      w -= taps_w;
      ++h;
    }
  }
  // to the next tap of the same channels, and behind the last tap to the channels that are `channels` further
  __device__ void move_tap(int channels, int taps_h, int taps_w) {
    if (++w == taps_w) {
      w = 0;
      ++h;
    }
    if (h == taps_h) {
      h = 0;
      c += channels;
    }
  }
};

template <class In, int kTile>
__global__ void __launch_bounds__((ProductShape<In, kTile>::kThreads), (ProductShape<In, kTile>::kSize.blocks))
    task_product_kernel(const __grid_constant__ ProductArguments p) {
  using Shape = ProductShape<In, kTile>;
  using Shared = typename Shape::Shared;
  constexpr int kPer = kPer16<In>;
  constexpr int kThreads = Shape::kThreads, kRows = Shape::kRows, kColumns = Shape::kColumns;
  // a thread copies the same unit of several rows and columns
  constexpr int kApart = kThreads / 4, kRowsOfThread = kRows / kApart, kColumnsOfThread = kColumns / kApart;
  static_assert(kApart % 8 == 0 && kRowsOfThread * kApart == kRows && kColumnsOfThread * kApart == kColumns);
  FASTMTL_BIG_SHARED(Shared, shared);
  const int tid = static_cast<int>(threadIdx.x), lane = tid % kWarp, warp = tid / kWarp;
  const int warp_row = warp / Shape::kWarpsAcross * Shape::kSize.warp_rows;
  const int warp_column = warp % Shape::kWarpsAcross * Shape::kSize.warp_columns;

  const int class_h = static_cast<int>(blockIdx.y) / p.w.classes;
  const int class_w = static_cast<int>(blockIdx.y) - class_h * p.w.classes;
  const Walk walk_h(p.h, class_h, p.backward), walk_w(p.w, class_w, p.backward);
  const int pixels = walk_h.rows * walk_w.rows;
  if (pixels <= 0) return;
  const int depth = walk_h.count * walk_w.count * p.inner;
  const int all_steps = (depth + Shape::kDepth - 1) / Shape::kDepth;
  const bool taps_inside = p.inner % Shape::kDepth == 0;
  const int step_taps = Shape::kDepth / p.inner, step_channels = Shape::kDepth - step_taps * p.inner;
  const int64_t per_tap_h = walk_h.per_tap * p.in_strides.h, per_tap_w = walk_w.per_tap * p.in_strides.w;
  const int tiles_across = (p.columns + kColumns - 1) / kColumns;
  const auto* in = static_cast<const In*>(p.in);
  auto* out = static_cast<In*>(p.out);

  for (int64_t tile = blockIdx.x;; tile += gridDim.x) {
    const int64_t tile_down = tile / tiles_across;
    const int first_column = static_cast<int>(tile - tile_down * tiles_across) * kColumns;
    const Piece piece = find_piece(p.batch, pixels, tile_down, kRows);
    if (piece.rows <= 0) break;
    const bool has_task = piece.task < p.batch.num_tasks;

    // rows
    const Rows rows(piece, pixels, walk_w.rows);
    for (int k = tid; k < kRows; k += kThreads) {
      int64_t from = 0, to = -1;
      uint32_t inside = 0;
      if (k < piece.rows) {
        const Place place = rows.at(k);
        const int64_t n = p.batch.order[place.sample];
        const int h = place.h * walk_h.per_row + walk_h.origin, w = place.w * walk_w.per_row + walk_w.origin;
        from = n * p.in_strides.n + h * p.in_strides.h + w * p.in_strides.w;
        to = n * p.out_strides.n + (place.h * p.h.classes + class_h) * p.out_strides.h +
             (place.w * p.w.classes + class_w) * p.out_strides.w;
        for (int tap = 0; tap < walk_h.count; ++tap)
          inside |= static_cast<uint32_t>(static_cast<unsigned>(h + tap * walk_h.per_tap) <
                                          static_cast<unsigned>(p.h.in_size))
                    << tap;
        for (int tap = 0; tap < walk_w.count; ++tap)
          inside |= static_cast<uint32_t>(static_cast<unsigned>(w + tap * walk_w.per_tap) <
                                          static_cast<unsigned>(p.w.in_size))
                    << (16 + tap);
      }
      shared.in[k] = from;
      shared.out[k] = to;
      shared.inside[k] = inside;
    }
    for (int k = tid; k < kColumns; k += kThreads) {
      const bool is_there = p.bias.data != nullptr && has_task && first_column + k < p.columns;
      shared.bias[k] = is_there ? value_at(p.bias, piece.task * p.bias_task_stride + first_column + k) : 0.0f;
    }
    block_barrier();

    // what this thread copies
    const int mine = tid / 4, unit = tid % 4;
    const In* from[kRowsOfThread];
    uint32_t inside[kRowsOfThread];
#pragma unroll
    for (int k = 0; k < kRowsOfThread; ++k) {
      from[k] = in + shared.in[mine + k * kApart];
      inside[k] = shared.inside[mine + k * kApart];
    }
    const int slot = !has_task                   ? 0
                     : p.weights.slot != nullptr ? p.weights.slot[piece.task]
                     : p.weights.own             ? piece.task
                                                 : 0;
    const In* weights = static_cast<const In*>(p.weights.data) + slot * p.weights.slot_stride +
                        (first_column + mine) * p.weights.column_stride;
    const int64_t weights_apart = kApart * p.weights.column_stride;
    const int columns_left = p.columns - first_column - mine;
    DepthPlace at(unit * kPer, p.inner, walk_w);
    const int to = place_by_depth(mine, unit);
    // not aligned, a unit may span taps that are not next to each other in the filter
    auto weights_at = [&](const DepthPlace& place) {
      const int tap_h = walk_h.first + place.h * walk_h.step, tap_w = walk_w.first + place.w * walk_w.step;
      return static_cast<int64_t>(tap_h * p.w.taps + tap_w) * p.inner + place.c;
    };
    auto copy = [&](int stage) {
      unsigned char* into = shared.stage[stage] + to;
      const bool is_there = at.h < walk_h.count;
      if constexpr (Shape::kSize.aligned16) {
        const int64_t moved = at.h * per_tap_h + at.w * per_tap_w + at.c;
        const uint32_t needed = 1u << (at.h % 16) | 0x10000u << (at.w % 16);
#pragma unroll
        for (int k = 0; k < kRowsOfThread; ++k) {
          const bool ok = is_there && (inside[k] & needed) == needed;
          copy_async<true>(into + k * kApart * kDepthBytes, ok ? from[k] + moved : in, ok ? kUnit : 0);
        }
      } else {
        Vector<In, kPer> value[kRowsOfThread] = {};
        DepthPlace one = at;
#pragma unroll
        for (int e = 0; e < kPer; ++e) {
          const int64_t moved = one.h * per_tap_h + one.w * per_tap_w + one.c;
          const uint32_t needed = 1u << (one.h % 16) | 0x10000u << (one.w % 16);
#pragma unroll
          for (int k = 0; k < kRowsOfThread; ++k)
            if (one.h < walk_h.count && (inside[k] & needed) == needed) value[k].v[e] = from[k][moved];
          one.move(0, 1, p.inner, walk_w.count);
        }
#pragma unroll
        for (int k = 0; k < kRowsOfThread; ++k) memcpy(into + k * kApart * kDepthBytes, &value[k], kUnit);
      }
      into += kRows * kDepthBytes;
      if constexpr (Shape::kSize.aligned16) {
        const In* weights_here = weights + weights_at(at);
#pragma unroll
        for (int k = 0; k < kColumnsOfThread; ++k) {
          const bool ok = is_there && k * kApart < columns_left;
          copy_async(into + k * kApart * kDepthBytes, ok ? weights_here + k * weights_apart : p.weights.data,
                     ok ? kUnit : 0);
        }
      } else {
        Vector<In, kPer> value[kColumnsOfThread] = {};
        DepthPlace one = at;
#pragma unroll
        for (int e = 0; e < kPer; ++e) {
          const In* weights_here = weights + weights_at(one);
#pragma unroll
          for (int k = 0; k < kColumnsOfThread; ++k)
            if (one.h < walk_h.count && k * kApart < columns_left) value[k].v[e] = weights_here[k * weights_apart];
          one.move(0, 1, p.inner, walk_w.count);
        }
#pragma unroll
        for (int k = 0; k < kColumnsOfThread; ++k) memcpy(into + k * kApart * kDepthBytes, &value[k], kUnit);
      }
      if (taps_inside) at.move_tap(Shape::kDepth, walk_h.count, walk_w.count);
      else at.move(step_taps, step_channels, p.inner, walk_w.count);
    };

    // rows of no task become NaN: no weight is read for them
    const int steps = has_task ? all_steps : 0;
    WarpTile<In, Shape::kSize.warp_rows, Shape::kSize.warp_columns> sum, total;
    sum.fill(has_task ? 0.0f : NAN);
    if constexpr (sizeof(In) == 4) total.fill(0.0f);
#pragma unroll
    for (int k = 0; k < Shape::kStages - 1; ++k) {
      if (k < steps) copy(k);
      commit_copies();
    }
    int stage = 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      wait_for_copies<Shape::kStages - 2>();
      block_barrier();
      const int next = stage == 0 ? Shape::kStages - 1 : stage - 1;  // whose numbers all threads have used
      if (step + Shape::kStages - 1 < steps) copy(next);
      commit_copies();
      const unsigned char* here = shared.stage[stage];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        add_by_depth(sum, here + warp_row * kDepthBytes, here + (kRows + warp_column) * kDepthBytes, half);
      stage = stage + 1 < Shape::kStages ? stage + 1 : 0;
      if constexpr (sizeof(In) == 4)
        if (step % kStepsOfSum == kStepsOfSum - 1) total.add_and_clear(sum);
    }
    if constexpr (sizeof(In) == 4) sum.add_and_clear(total);
    block_barrier();

    // results, by way of shared memory, so that whole lines are written
    unsigned char* lines = shared.stage[0];
#pragma unroll
    for (int m = 0; m < decltype(sum)::kM; ++m)
#pragma unroll
      for (int n = 0; n < decltype(sum)::kN; ++n)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int row = warp_row + m * 16 + k * 8 + lane / 4, column = warp_column + n * 8 + lane % 4 * 2;
          Vector<In, 2> pair;
#pragma unroll
          for (int e = 0; e < 2; ++e) pair.v[e] = narrow<In>(sum.sum[m][n][2 * k + e] + shared.bias[column + e]);
          memcpy(lines + row * Shape::kLineBytes + column * sizeof(In), &pair, sizeof(pair));
        }
    block_barrier();
    constexpr int kUnits = kColumns / kPer;
    for (int k = tid; k < kRows * kUnits; k += kThreads) {
      const int row = k / kUnits, column = k % kUnits * kPer;
      const int64_t where = shared.out[row];
      const int left = p.columns - first_column - column;
      if (where < 0 || left <= 0) continue;
      Vector<In, kPer> unit_of_row;
      memcpy(&unit_of_row, lines + row * Shape::kLineBytes + column * sizeof(In), kUnit);
      In* target = out + where + first_column + column;
      if (p.out_aligned16 && left >= kPer) {
        store16(target, unit_of_row);
      } else {
#pragma unroll
        for (int e = 0; e < kPer; ++e)
          if (e < left) target[e] = unit_of_row.v[e];
      }
    }
    block_barrier();
  }
}

}  // namespace fastmtl::cuda
