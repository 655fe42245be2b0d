// The interface of launch.h: from parameters to the launches of each dtype.
#include "cuda/task_weights/kernels_task.h"
#include "cuda/task_weights/plan.h"

namespace fastmtl::cuda {

namespace {

template <class Launch>
void for_dtype(DType dtype, const Launch& launch) {
  switch (dtype) {
    case DType::bf16: launch(__nv_bfloat16{}); break;
    case DType::f16: launch(__half{}); break;
    default: launch(float{}); break;
  }
}

unsigned blocks_of(int64_t count, int64_t per_block) { return static_cast<unsigned>(ceil_div(count, per_block)); }

}  // namespace

const char* refusal(DType dtype, const ConvShape& shape, int num_tasks) { return refusal_of(dtype, shape, num_tasks); }

bool weights_as_they_are(const StageParams& p, StagedWeights* found) {
  const StageLayout layout(p);
  if (p.for_input_gradient || p.weight_dtype != p.dtype || !lies_in_line(p, layout)) return false;
  if (p.weight != nullptr && !p.delta.any) {
    *found = {p.weight, layout.slot_stride, layout.column_stride, nullptr, false};
    return true;
  }
  if (p.weight == nullptr && p.gate.data == nullptr && p.delta.stacked != nullptr) {
    *found = {p.delta.stacked, p.delta.task_stride, layout.column_stride, nullptr, true};
    return true;
  }
  return false;
}

int64_t stage_bytes(const StageParams& p) { return StageLayout(p).bytes; }

WeightGradPlan plan_weight_grads(const WeightGradParams& p, int num_sms, const Choice& choice) {
  return plan_pieces(p, num_sms, choice);
}

StagedWeights launch_stage(const StageParams& p, void* workspace, cudaStream_t stream) {
  const StageLayout layout(p);
  StageArguments a{};
  a.batch = p.batch;
  a.weight = p.weight;
  a.weight_strides = p.weight_strides;
  a.delta = p.delta;
  a.delta_strides = p.delta_strides;
  a.gate = p.gate;
  a.out = static_cast<char*>(workspace) + layout.slot_bytes;
  a.slot = p.delta.any ? static_cast<int*>(workspace) : nullptr;
  a.columns = layout.columns;
  a.inner = layout.inner;
  a.kh = p.shape.kh;
  a.kw = p.shape.kw;
  a.column_stride = layout.column_stride;
  a.slot_stride = layout.slot_stride;
  a.shared_slot = layout.slots - 1;
  a.transposed = p.for_input_gradient;
  a.line = lies_in_line(p, layout) ? layout.slot_stride : 0;
  const int taps = p.shape.kh * p.shape.kw;
  unsigned blocks = 0;
  if (a.line > 0) {
    blocks = blocks_of(a.line, kThreads * layout.per16);
  } else if (has_taps_inside(p) && !a.transposed) {
    a.taps_inside = true;
    blocks = static_cast<unsigned>(a.columns) * blocks_of(a.inner, kStageRun / taps);
  } else {
    if (has_taps_inside(p) && layout.column_stride == layout.depth) {
      // a plain transposition: each pair of channel and tap is a column
      a.columns *= taps;
      a.column_stride = a.inner;
      a.kh = a.kw = 1;
      a.weight_strides.ci = a.delta_strides.ci = 1;
    }
    blocks = blocks_of(a.columns, kStageTile) * blocks_of(a.inner, kStageTile);
  }
  const dim3 grid{blocks, static_cast<unsigned>(layout.slots), 1};
  if (blocks > 0) for_dtype(p.dtype, [&](auto in) { launch_stage<decltype(in)>(a, p.weight_dtype, grid, stream); });
  return {a.out, layout.slot_stride, layout.column_stride, a.slot, false};
}

void launch_product(const ProductParams& p, int num_sms, const Choice& choice, cudaStream_t stream) {
  const ProductPlan plan = plan_product(p, num_sms, choice);
  if (plan.blocks == 0) return;
  const ConvShape& s = p.shape;
  const bool back = p.input_gradient;
  ProductArguments a{};
  a.batch = p.batch;
  a.in = p.in;
  a.out = p.out;
  a.in_strides = p.in_strides;
  a.out_strides = p.out_strides;
  a.weights = p.weights;
  if (!back) a.bias = p.bias;
  a.bias_task_stride = p.bias_task_stride;
  a.h = {s.kh,
         back ? s.out_height : s.height,
         back ? s.height : s.out_height,
         back ? s.stride_h : 1,
         s.stride_h,
         s.pad_h,
         s.dilation_h};
  a.w = {s.kw,
         back ? s.out_width : s.width,
         back ? s.width : s.out_width,
         back ? s.stride_w : 1,
         s.stride_w,
         s.pad_w,
         s.dilation_w};
  a.inner = plan.inner;
  a.columns = plan.columns;
  a.backward = back;
  a.out_aligned16 = plan.out_aligned16;
  const dim3 grid{static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.classes), 1};
  for_dtype(p.dtype, [&](auto in) { launch_product<decltype(in)>(a, plan.tile, grid, stream); });
}

void launch_weight_grads(const WeightGradParams& p, const WeightGradPlan& plan, void* workspace, cudaStream_t stream) {
  const ConvShape& s = p.shape;
  const WeightGradLayout layout(p, plan);
  auto memory = [&](int64_t offset) { return reinterpret_cast<float*>(static_cast<char*>(workspace) + offset); };
  const TaskBatch together{p.batch.order, p.batch.offsets, p.batch.num_samples, 1, p.batch.num_tasks * p.batch.step};
  const TaskBatch batch = plan.together ? together : p.batch;
  const bool wants_gates = p.grad_gate != nullptr && p.delta.any;

  if (layout.wants_filter && layout.size > 0) {
    if (plan.splits > 0) {
      PiecesArguments a{};
      a.batch = batch;
      a.x = p.x;
      a.grad_out = p.grad_out;
      a.x_strides = p.x_strides;
      a.grad_out_strides = p.grad_out_strides;
      a.shape = s;
      a.split_rows = plan.split_rows;
      a.gate = p.gate;
      a.grad_delta = p.grad_delta;
      a.delta_only = p.grad_weight == nullptr && !wants_gates;
      a.parts = memory(layout.parts);
      const dim3 grid{static_cast<unsigned>(layout.tiles), static_cast<unsigned>(plan.splits), 1};
      for_dtype(p.dtype, [&](auto in) { launch_pieces<decltype(in)>(a, plan.tile, grid, stream); });
    }
    FinishArguments f{};
    f.batch = batch;
    f.parts = memory(layout.parts);
    f.pixels = s.out_height * s.out_width;
    f.split_rows = plan.split_rows;
    f.size = layout.size;
    f.channels = s.channels;
    f.kh = s.kh;
    f.kw = s.kw;
    f.taps_inside = layout.taps_inside;
    f.chunk_tasks = plan.chunk_tasks;
    if (!plan.together) f.gate = p.gate;
    if (wants_gates) {
      f.delta = p.delta;
      f.gate_parts = memory(layout.gate_parts);
    }
    f.delta_strides = p.delta_strides;
    f.grad_delta = p.grad_delta;
    f.grad_delta_strides = p.grad_delta_strides;
    if (p.grad_weight != nullptr) {
      if (plan.chunks > 1) f.chunks = memory(layout.chunks);
      else f.grad_weight = p.grad_weight;
    }
    f.grad_weight_strides = p.grad_weight_strides;
    const dim3 grid{static_cast<unsigned>(layout.finish_blocks), static_cast<unsigned>(plan.chunks), 1};
    for_dtype(p.weight_dtype, [&](auto w) { launch_finish<decltype(w)>(f, layout.per, grid, stream); });
    if (f.chunks != nullptr) {
      const ChunksArguments c{f.chunks, plan.chunks,        layout.size,   s.channels,           s.kh,
                              s.kw,     layout.taps_inside, p.grad_weight, p.grad_weight_strides};
      const unsigned blocks = blocks_of(layout.size, kThreads);
      for_dtype(p.weight_dtype, [&](auto w) { launch_chunks<decltype(w)>(c, blocks, stream); });
    }
  }
  if (p.grad_gate != nullptr) {
    const bool is_zero = !wants_gates || layout.size == 0;
    const GatesArguments g{memory(layout.gate_parts), is_zero ? 0 : layout.finish_blocks, p.grad_gate};
    const auto blocks = static_cast<unsigned>(p.batch.num_tasks);
    for_dtype(p.gate.dtype, [&](auto w) { launch_gates<decltype(w)>(g, blocks, stream); });
  }
  if (p.grad_bias != nullptr && s.features > 0) {
    const TaskBatch bias_batch = p.grad_bias_by_task ? p.batch : together;
    if (plan.bias_splits > 0) {
      const BiasArguments b{
          bias_batch,  p.grad_out,           p.grad_out_strides,       s.features, s.out_height * s.out_width,
          s.out_width, plan.bias_split_rows, memory(layout.bias_parts)};
      const dim3 grid{blocks_of(s.features, layout.bias_columns), static_cast<unsigned>(plan.bias_splits), 1};
      for_dtype(p.dtype, [&](auto in) { launch_bias<decltype(in)>(b, layout.grad_out_aligned16, grid, stream); });
    }
    // as of a filter of one tap and one channel, of which each task's sum is its delta's gradient
    FinishArguments f{};
    f.batch = bias_batch;
    f.parts = memory(layout.bias_parts);
    f.pixels = s.out_height * s.out_width;
    f.split_rows = plan.bias_split_rows;
    f.size = s.features;
    f.channels = f.kh = f.kw = 1;
    f.chunk_tasks = 1;
    f.grad_delta = TaskPointers::of_stacked(p.grad_bias, s.features);
    f.grad_delta_strides = {1, 0, 0, 0};
    const dim3 grid{blocks_of(s.features, kThreads), static_cast<unsigned>(bias_batch.num_tasks), 1};
    for_dtype(p.grad_bias_dtype, [&](auto w) { launch_finish<decltype(w)>(f, 1, grid, stream); });
  }
}

}  // namespace fastmtl::cuda
