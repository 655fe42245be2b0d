// Tiles, pieces and memory of the task convolution's launches, from what the host knows. No CUDA call.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "cuda/task_weights/kernels_task.h"

namespace fastmtl::cuda {

constexpr int64_t round_up(int64_t x, int64_t y) { return ceil_div(x, y) * y; }

constexpr int64_t kAlignBytes = 256;             // of parts of a workspace
constexpr int64_t kMostSplits = 65535;           // blocks along y
constexpr int64_t kMostRows = int64_t{1} << 30;  // of a piece
// Of 16 bits: tensor cores cut digits off when they add, and only float32's sums are added to a total in between. What
// pieces leave is added in float32.
constexpr int64_t kMostNarrowRows = 8192;

inline bool on_16_bytes(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether every channel's place that is a multiple of 16 bytes lies on 16 bytes
inline bool is_aligned16(const void* data, const PictureStrides& strides, int channels, DType dtype) {
  const int64_t per16 = 16 / size_of(dtype);
  return on_16_bytes(data) && channels % per16 == 0 && strides.n % per16 == 0 && strides.h % per16 == 0 &&
         strides.w % per16 == 0;
}

inline const char* refusal_of(DType dtype, const ConvShape& s, int num_tasks) {
  constexpr int64_t kMost = int64_t{1} << 31;
  if (dtype == DType::f64) return "float64";
  if (num_tasks < 1 || num_tasks > kMaxConvTasks) return "the number of tasks";
  if (s.kh > kMaxTaps || s.kw > kMaxTaps) return "the number of taps";
  if (s.stride_h > 8 || s.stride_w > 8) return "the stride";
  if (int64_t{s.height} * s.width >= kMost || int64_t{s.out_height} * s.out_width >= kMost)
    return "the size of pictures";
  if (int64_t{s.features + 8} * (s.channels + 8) * s.kh * s.kw >= kMost) return "the size of filters";
  return nullptr;
}

// How many tasks a batch can hold, and rows of an average one
struct BatchSize {
  int64_t rows, parts, rows_of_task;

  BatchSize(const TaskBatch& batch, int64_t pixels)
      : rows(batch.num_samples * pixels),
        parts(std::max<int64_t>(1, std::min<int64_t>(batch.num_tasks, batch.num_samples))),
        rows_of_task(ceil_div(rows, parts)) {}
  // as many pieces as there can be, where no piece holds two tasks; samples of no task are one more
  int64_t most_pieces(const TaskBatch& batch, int64_t rows_of_piece) const {
    if (rows == 0) return 0;
    return ceil_div(rows, rows_of_piece) + std::min<int64_t>(batch.num_tasks + 1, batch.num_samples) - 1;
  }
  // if all are equally large
  int64_t likely_pieces(int64_t rows_of_piece) const { return parts * ceil_div(rows_of_task, rows_of_piece); }
};

// --- staging

struct StageLayout {
  int columns, inner, slots, per16;
  int64_t depth, column_stride, slot_stride, slot_bytes, bytes;

  explicit StageLayout(const StageParams& p) {
    const ConvShape& s = p.shape;
    columns = p.for_input_gradient ? s.channels : s.features;
    inner = p.for_input_gradient ? s.features : s.channels;
    slots = p.delta.any ? p.batch.num_tasks + 1 : 1;
    per16 = static_cast<int>(16 / size_of(p.dtype));
    depth = int64_t{s.kh} * s.kw * inner;
    column_stride = round_up(depth, per16);
    slot_stride = columns * column_stride;
    slot_bytes = round_up(int64_t{4} * p.batch.num_tasks, kAlignBytes);
    bytes = slot_bytes + slots * slot_stride * size_of(p.dtype);
  }
};

// Whether a filter lies in the order [columns, kh, kw, inner], without gaps
inline bool is_dense(const StageParams& p, const StageLayout& layout, const FilterStrides& strides) {
  const bool back = p.for_input_gradient;
  const int64_t column = back ? strides.ci : strides.co, inner = back ? strides.co : strides.ci;
  auto is = [](int64_t size, int64_t stride, int64_t wanted) { return size <= 1 || stride == wanted; };
  return is(layout.columns, column, layout.depth) && is(layout.inner, inner, 1) &&
         is(p.shape.kw, strides.kw, layout.inner) && is(p.shape.kh, strides.kh, int64_t{p.shape.kw} * layout.inner);
}

inline bool deltas_aligned16(const StageParams& p) {
  const TaskPointers& d = p.delta;
  if (d.stacked != nullptr) return on_16_bytes(d.stacked) && d.task_stride * size_of(p.weight_dtype) % 16 == 0;
  if (d.table != nullptr) return d.table_aligned16;
  for (int64_t address : d.listed)
    if (address % 16 != 0) return false;
  return true;
}

inline bool lies_in_line(const StageParams& p, const StageLayout& layout) {
  if (layout.column_stride != layout.depth) return false;
  if (p.weight != nullptr && !(on_16_bytes(p.weight) && is_dense(p, layout, p.weight_strides))) return false;
  return !p.delta.any || (deltas_aligned16(p) && is_dense(p, layout, p.delta_strides));
}

// Whether a filter's taps lie inside, [.., Cin, kh, kw] without gaps
inline bool has_taps_inside(const ConvShape& s, const FilterStrides& strides) {
  const int64_t taps = int64_t{s.kh} * s.kw;
  return taps > 1 && (s.channels == 1 || strides.ci == taps) && (s.kw == 1 || strides.kw == 1) &&
         (s.kh == 1 || strides.kh == s.kw);
}

inline bool has_taps_inside(const StageParams& p) {
  return (p.weight == nullptr || has_taps_inside(p.shape, p.weight_strides)) &&
         (!p.delta.any || has_taps_inside(p.shape, p.delta_strides));
}

// --- product

struct ProductPlan {
  int tile;
  int64_t blocks, classes;
  int inner, columns;
  bool out_aligned16;
};

inline const TileSize& product_tile(DType dtype, int tile) {
  return dtype == DType::f32 ? kProductTile32[tile] : kProductTile16[tile];
}

// How fast a tile's main loop is beside tensor cores that never wait: a smaller tile of 16 bits loads more from shared
// memory for a product. Of an H100, by the table of docs/kernels/task-kernels-cuda.md, until a GPU has measured it.
inline double tile_rate(DType dtype, const TileSize& tile) {
  if (dtype == DType::f32 || tile.warp_columns == 64) return 1.0;
  return tile.warp_rows == 64 ? 0.71 : 0.53;
}

inline ProductPlan plan_product(const ProductParams& p, int num_sms, const Choice& choice) {
  const ConvShape& s = p.shape;
  const bool back = p.input_gradient;
  ProductPlan plan{};
  plan.inner = back ? s.features : s.channels;
  plan.columns = back ? s.channels : s.features;
  plan.classes = back ? int64_t{s.stride_h} * s.stride_w : 1;
  plan.out_aligned16 = is_aligned16(p.out, p.out_strides, plan.columns, p.dtype);
  const int64_t pixels =
      back ? ceil_div(s.height, s.stride_h) * ceil_div(s.width, s.stride_w) : int64_t{s.out_height} * s.out_width;
  const BatchSize load(p.batch, pixels);
  if (load.rows == 0 || plan.columns == 0) return plan;
  const int last = kProductTiles - 1;
  if (!is_aligned16(p.in, p.in_strides, plan.inner, p.dtype)) {
    plan.tile = last;
  } else if (choice.tile >= 0) {
    plan.tile = choice.tile;
  } else {
    const double taps = static_cast<double>(s.kh * s.kw) / static_cast<double>(plan.classes);
    const double steps = taps * plan.inner * static_cast<double>(size_of(p.dtype)) / kDepthBytes;
    double least = 0.0;
    for (int k = p.dtype == DType::f32 ? 1 : 0; k < last; ++k) {
      const TileSize& tile = product_tile(p.dtype, k);
      const int64_t tiles = load.likely_pieces(tile.rows) * ceil_div(plan.columns, tile.columns) * plan.classes;
      const auto busiest = static_cast<double>(ceil_div(tiles, num_sms));
      // of a tile that has its multiprocessor for itself nothing hides the latencies
      const double time = std::max(busiest, 1.5) * tile.rows * tile.columns * (steps / tile_rate(p.dtype, tile) + 8.0);
      if (least == 0.0 || time < least) {
        least = time;
        plan.tile = k;
      }
    }
  }
  const TileSize& tile = product_tile(p.dtype, plan.tile);
  const int64_t most = load.most_pieces(p.batch, tile.rows) * ceil_div(plan.columns, tile.columns);
  const int64_t wanted = choice.blocks > 0 ? choice.blocks : ceil_div(int64_t{num_sms} * tile.blocks, plan.classes);
  plan.blocks = std::min(most, wanted);
  return plan;
}

// --- weight gradients

inline const TileSize& piece_tile(DType dtype, int tile) {
  return dtype == DType::f32 ? kPieceTile32[tile] : kPieceTile16[tile];
}

// Where everything lies in the workspace, in bytes, and what else follows from a plan.
struct WeightGradLayout {
  bool wants_filter, grad_out_aligned16, taps_inside;
  int64_t size, tiles, finish_blocks, bias_columns;
  int per;
  int64_t parts, gate_parts, chunks, bias_parts, bytes;

  WeightGradLayout(const WeightGradParams& p, const WeightGradPlan& plan) {
    const ConvShape& s = p.shape;
    const bool wants_gates = p.grad_gate != nullptr && p.delta.any;
    wants_filter = p.grad_weight != nullptr || p.grad_delta.any || wants_gates;
    grad_out_aligned16 = is_aligned16(p.grad_out, p.grad_out_strides, s.features, p.dtype);
    const int64_t depth = int64_t{s.kh} * s.kw * s.channels;
    size = depth * s.features;
    const TileSize& tile = piece_tile(p.dtype, plan.tile);
    tiles = ceil_div(s.features, tile.rows) * ceil_div(depth, tile.columns);
    const FilterStrides& written = p.grad_delta.any ? p.grad_delta_strides : p.grad_weight_strides;
    taps_inside = has_taps_inside(s, written);
    per = s.channels % 4 == 0 && !taps_inside ? 4 : 1;
    finish_blocks = ceil_div(size, int64_t{kThreads} * per);
    bias_columns = kWarp * (grad_out_aligned16 ? 16 / size_of(p.dtype) : 1);
    bytes = 0;
    auto take = [&](int64_t floats) {
      const int64_t at = bytes;
      bytes += round_up(4 * floats, kAlignBytes);
      return at;
    };
    parts = take(wants_filter ? plan.splits * size : 0);
    gate_parts = take(wants_gates ? p.batch.num_tasks * finish_blocks : 0);
    chunks = take(p.grad_weight != nullptr && plan.chunks > 1 ? plan.chunks * size : 0);
    bias_parts = take(p.grad_bias != nullptr ? plan.bias_splits * s.features : 0);
  }
};

// Rows of a piece: `wanted` of them in all, of a multiple of `step` rows
inline int64_t rows_of_piece(const BatchSize& load, const TaskBatch& batch, int64_t wanted, int64_t step,
                             int64_t most = kMostRows) {
  int64_t rows = round_up(std::max<int64_t>(1, ceil_div(load.rows, std::max<int64_t>(1, wanted))), step);
  rows = std::min(rows, most);
  while (load.most_pieces(batch, rows) > kMostSplits) rows *= 2;
  return rows;
}

// The same of weight gradients, whose smaller tiles load more for a product, too. A tile of whole taps reads a
// picture's lines for all of them, and is near the largest one on both cards of the table; of other columns it is not.
inline double piece_rate(DType dtype, const TileSize& tile, int channels, int64_t depth) {
  if (dtype == DType::f32 || tile.warp_columns == 64) return 1.0;
  if (tile.warp_columns != 48) return 0.5;
  const bool of_whole_taps = channels < tile.columns && tile.columns % channels == 0 && depth >= tile.columns;
  return of_whole_taps ? 0.93 : 0.75;
}

inline WeightGradPlan plan_pieces(const WeightGradParams& p, int num_sms, const Choice& choice) {
  const ConvShape& s = p.shape;
  WeightGradPlan plan{};
  plan.together = !p.grad_delta.any && !(p.grad_gate != nullptr && p.delta.any);
  const TaskBatch together{p.batch.order, p.batch.offsets, p.batch.num_samples, 1, p.batch.num_tasks * p.batch.step};
  const TaskBatch& batch = plan.together ? together : p.batch;
  const int64_t pixels = int64_t{s.out_height} * s.out_width, depth = int64_t{s.kh} * s.kw * s.channels;
  const BatchSize load(batch, pixels);
  const int step_rows = p.dtype == DType::f32 ? 16 : 32;
  int first = p.dtype == DType::f32 ? 2 : 0, last = kPieceTiles - 2;  // tiles to choose from
  if (!is_aligned16(p.x, p.x_strides, s.channels, p.dtype) ||
      !is_aligned16(p.grad_out, p.grad_out_strides, s.features, p.dtype))
    first = last = kPieceTiles - 1;
  else if (choice.tile >= 0) first = last = choice.tile;

  // The least of a model, in microseconds: steps of the busiest multiprocessor, and parts that are written and read.
  double least = 0.0;
  for (int k = first; k <= last; ++k) {
    const TileSize& tile = piece_tile(p.dtype, k);
    const int64_t tiles = std::max<int64_t>(1, ceil_div(s.features, tile.rows) * ceil_div(depth, tile.columns));
    const double step_us = 0.25 * (p.dtype == DType::f32 ? 3.0 : 1.0) * tile.rows * tile.columns / (128 * 128) /
                           piece_rate(p.dtype, tile, s.channels, depth);
    for (int64_t waves = 0; waves <= 4; ++waves) {  // 0: a piece for each task
      const int64_t wanted = std::max(load.parts, waves * num_sms * tile.blocks / tiles);
      const int64_t rows = choice.split_rows > 0 ? round_up(choice.split_rows, step_rows)
                                                 : rows_of_piece(load, batch, wanted, 4 * step_rows,
                                                                 p.dtype == DType::f32 ? kMostRows : kMostNarrowRows);
      const int64_t pieces = load.likely_pieces(rows), blocks = pieces * tiles;
      const auto busiest = std::max(static_cast<double>(ceil_div(blocks, num_sms)), 1.5);
      const double steps = static_cast<double>(std::min(rows, load.rows_of_task)) / step_rows;
      const double time =
          busiest * (steps + 12.0) * step_us + 8.0 * static_cast<double>(pieces * depth * s.features) / 3e6;
      if (least == 0.0 || time < least) {
        least = time;
        plan.tile = k;
        plan.split_rows = rows;
      }
    }
  }
  plan.splits = load.most_pieces(batch, plan.split_rows);
  const WeightGradLayout layout(p, plan);
  int64_t chunks =
      choice.chunks > 0 ? choice.chunks : ceil_div(4 * int64_t{num_sms}, std::max<int64_t>(1, layout.finish_blocks));
  chunks = std::min<int64_t>(chunks, batch.num_tasks);
  plan.chunk_tasks = static_cast<int>(ceil_div(batch.num_tasks, chunks));
  plan.chunks = static_cast<int>(ceil_div(batch.num_tasks, plan.chunk_tasks));
  const TaskBatch& bias_batch = p.grad_bias_by_task ? p.batch : together;
  const BatchSize bias_load(bias_batch, pixels);
  plan.bias_split_rows =
      choice.split_rows > 0
          ? choice.split_rows
          : rows_of_piece(bias_load, bias_batch,
                          8 * int64_t{num_sms} / std::max<int64_t>(1, ceil_div(s.features, layout.bias_columns)), 32);
  plan.bias_splits = bias_load.most_pieces(bias_batch, plan.bias_split_rows);
  plan.workspace_bytes = WeightGradLayout(p, plan).bytes;
  return plan;
}

}  // namespace fastmtl::cuda
