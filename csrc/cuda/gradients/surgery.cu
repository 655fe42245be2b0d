// gram, combine, the methods' weights, the coefficients of PCGrad and GradVac and the fused pcgrad: from torch's
// tensors to parameter structs and launches.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <string>

#include "common/gradvac_arguments.h"
#include "common/method_arguments.h"
#include "common/rows.h"
#include "cuda/gradients/launch.h"
#include "cuda/gradients/parts.h"
#include "cuda/runtime.h"

namespace fastmtl::cuda {

std::vector<int> architectures() {
  std::vector<int> result;
  for (int arch : {__CUDA_ARCH_LIST__}) result.push_back(arch / 10);
  return result;
}

std::vector<std::string> kernels() {
  return {"combine", "gradvac_coefficients", "gram",          "method_weights",
          "pcgrad",  "pcgrad_coefficients",  "pcgrad_project"};
}

namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kMost32 = std::numeric_limits<int32_t>::max();

// what the kernels need of the caller's gradients; the tables must outlive the launches' queueing
struct Parts {
  std::vector<Part> parts;
  std::vector<DeviceTable> tables;
};

Parts read_parts(const Rows& rows, bool is_bank, int device, cudaStream_t stream) {
  Parts result{parts_of(rows.params, rows.num_tasks, is_bank), {}};
  for (Part& part : result.parts) {
    if (part.words.empty()) continue;
    result.tables.push_back(device_table(device, stream, part.words));
    part.grads.table = result.tables.back().get();
  }
  return result;
}

// The Gram matrix into `out`, then the T x T problem, if it is wanted, in one launch per dtype. next_is_early: combine
// comes next, and is early.
void gram(const std::vector<Part>& parts, Tensor& out, const Solve& solve, bool next_is_early, int device,
          cudaStream_t stream) {
  std::vector<Slots> slots;
  int64_t total = 0;
  for (const Part& part : parts) {
    slots.push_back(gram_slots(part.grads.columns, part.grads.num_tasks));
    total += slots.back().count;
    STD_TORCH_CHECK(slots.back().columns <= kMost32 / 2, "fastmtl: too many columns");  // positions in a slot are int
  }
  // a column of stride 0 may be repeated as often as one likes
  STD_TORCH_CHECK(total <= kMost32 / blocks_per_slot(parts[0].grads.num_tasks), "fastmtl: too many columns");
  GramPlan plan = plan_gram(parts, slots, slots_per_group(parts[0].grads.num_tasks, total));
  const Tensor memory = workspace(device, 8 * plan.words);
  plan.use_memory(static_cast<double*>(memory.mutable_data_ptr()));
  const Tickets taken = tickets(device, stream, parts.size());
  plan.params.tickets = taken.counters;
  plan.params.solve = solve;
  plan.params.next_is_early = next_is_early;
  plan.params.gram = out.mutable_data_ptr();
  plan.params.gram_is_double = dtype_of(out) == DType::f64;
  for_each_launch(plan, parts, [&](DType dtype, const GramParams& p, int count) {
    launch_gram(dtype, p, count, stream);
    check(cudaGetLastError(), "gram launch");
  });
}

// early: the first launch may begin while the Gram matrix's last block still solves
void combine(const std::vector<Part>& parts, const double* weights, bool early, cudaStream_t stream) {
  for (const Part& part : parts) {
    if (part.grads.columns == 0 || part.grads.num_out == 0) continue;
    const CombineCut cut = combine_cut(part.grads.columns, part.grads.num_tasks, part.grads.num_out);
    launch_combine(part.dtype, {part.grads, cut.slots.columns, weights}, cut, early, stream);
    check(cudaGetLastError(), "combine launch");
    early = false;  // what follows waits for this one
  }
}

void check_device(const Tensor& x, int device, const char* what) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == device, "fastmtl: ", what, " must be on device ", device);
}

void check_devices(const std::vector<Tensor>& tensors, int device, const char* what) {
  for (const Tensor& x : tensors) check_device(x, device, what);
}

void check_square(const Tensor& x, int64_t T, const char* what) {
  STD_TORCH_CHECK(x.numel() == T * T && x.is_contiguous(), "fastmtl: ", what, " must be a contiguous [T, T] tensor");
}

void check_gram(const Tensor& x, int64_t T) {
  check_square(x, T, "the Gram matrix");
  const DType dtype = dtype_of(x);
  STD_TORCH_CHECK(dtype == DType::f32 || dtype == DType::f64, "fastmtl: the Gram matrix must be float32 or float64");
}

void check_outputs(const Rows& rows, int64_t num_out) {
  for (const Param& p : rows.params)
    STD_TORCH_CHECK(static_cast<int64_t>(p.out.size()) == num_out, "fastmtl: expected ", num_out,
                    " outputs a parameter, got ", p.out.size());
}

const int64_t* read_order(const Tensor& order, int64_t T, int device) {
  check_device(order, device, "the order");
  STD_TORCH_CHECK(
      order.dim() == 2 && order.size(0) == T && order.is_contiguous() && order.scalar_type() == ScalarType::Long,
      "fastmtl: the order must be a contiguous [T, K] int64 tensor");
  return static_cast<const int64_t*>(order.const_data_ptr());
}

void gram_op(const std::vector<Tensor>& tensors, const std::vector<int64_t>& index, int64_t num_tasks,
             int64_t num_params, Tensor out) {
  const int device = out.get_device_index();
  check_devices(tensors, device, "the gradients");
  check_gram(out, num_tasks);
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const Rows rows = read_rows(tensors, index, num_tasks, num_params, {});
  gram(read_parts(rows, index.empty(), device, stream).parts, out, Solve{}, false, device, stream);
}

void combine_op(Tensor weights, const std::vector<Tensor>& tensors, const std::vector<int64_t>& index,
                int64_t num_params, const std::vector<Tensor>& out) {
  STD_TORCH_CHECK(weights.dim() == 2 && dtype_of(weights) == DType::f64 && weights.is_contiguous(),
                  "fastmtl: kernel weights must be a contiguous [K, T] float64 tensor");
  STD_TORCH_CHECK(weights.size(0) <= kMost32, "fastmtl: too many outputs");
  if (tensors.empty() || weights.size(0) == 0) return;
  const int device = weights.get_device_index();
  check_devices(tensors, device, "the gradients");
  check_devices(out, device, "the results");
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const Rows rows = read_rows(tensors, index, weights.size(1), num_params, out);
  check_outputs(rows, weights.size(0));
  combine(read_parts(rows, index.empty(), device, stream).parts, static_cast<const double*>(weights.const_data_ptr()),
          false, stream);
}

// order: none is drawn from key and state
void read_visits(Solve& s, const std::optional<Tensor>& order, int64_t key, const std::optional<Tensor>& state,
                 int64_t T, int device) {
  s.draw = !order.has_value();
  if (!s.draw) {
    s.order = read_order(*order, T, device);
    s.num_visits = order->size(1);
  }
  s.key = static_cast<uint64_t>(key);
  if (!state.has_value()) return;
  check_device(*state, device, "the state");
  STD_TORCH_CHECK(state->numel() == 2 && state->is_contiguous() && state->scalar_type() == ScalarType::Long,
                  "fastmtl: the state must be a contiguous [2] int64 tensor");
  s.state = static_cast<int64_t*>(state->mutable_data_ptr());
}

// The coefficients or the weights of a Gram matrix.
void solve_alone(const Tensor& gram, Solve s, Tensor& out) {
  const int64_t T = gram.size(0);
  const int device = gram.get_device_index();
  STD_TORCH_CHECK(T >= 1 && T <= kMaxTasks && dtype_of(gram) == DType::f64 && dtype_of(out) == DType::f64,
                  "fastmtl: expected float64 matrices of 1 to 128 tasks");
  check_square(gram, T, "the Gram matrix");
  STD_TORCH_CHECK(out.numel() == (s.project ? T * T : T) && out.is_contiguous(), "fastmtl: no room for the result");
  check_device(out, device, "the result");
  s.wanted = true;
  s.result = static_cast<double*>(out.mutable_data_ptr());
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const auto* m = static_cast<const double*>(gram.const_data_ptr());
  const Tensor memory = workspace(device, 8 * int64_t{more_words(static_cast<int>(T))});
  launch_coefficients(m, static_cast<int>(T), static_cast<double*>(memory.mutable_data_ptr()), s, stream);
  check(cudaGetLastError(), "pcgrad_coefficients launch");
}

void coefficients_op(Tensor gram, Tensor order, bool include_self, Tensor out) {
  Solve s{};
  s.project = true;
  s.include_self = include_self;
  read_visits(s, order, 0, std::nullopt, gram.size(0), gram.get_device_index());
  solve_alone(gram, s, out);
}

void weights_op(Tensor gram, const std::optional<Tensor>& order, int64_t key, std::optional<Tensor> state,
                bool include_self, bool mean, Tensor out) {
  Solve s{};
  s.include_self = include_self;
  s.mean = mean;
  read_visits(s, order, key, state, gram.size(0), gram.get_device_index());
  solve_alone(gram, s, out);
}

void gradvac(const GradVacArguments& read, int device) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int64_t T = read.num_tasks;
  GradVacParams p{read.method, read.gram, read.num_tasks,   Solve{},      read.present, read.targets,
                  nullptr,     read.out,  read.new_targets, read.weights, read.targets, read.mean};
  p.order.draw = read.draws;
  p.order.order = read.order;
  p.order.num_visits = read.num_visits;
  p.order.key = read.key;
  p.order.state = read.state;
  const int64_t more = T > 64 ? T * leading_dimension(read.num_tasks) : 0, results = p.weights != nullptr ? T * T : 0;
  std::optional<Tensor> memory;
  if (more + results > 0) {
    memory = workspace(device, 8 * (more + 2 * results));
    p.more = static_cast<double*>(memory->mutable_data_ptr());
  }
  if (results > 0) {
    p.out = p.more + more;
    p.new_targets = p.out + results;
  }
  launch_gradvac(p, current_stream(device));
  check(cudaGetLastError(), "gradvac_coefficients launch");
}

void gradvac_op(Tensor gram, Tensor order, Tensor targets, double beta, bool always, double rounding, Tensor out,
                Tensor new_targets) {
  const int device = gram.get_device_index();
  check_devices({gram, order, targets, out, new_targets}, device, "all that the solver reads");
  gradvac(read_gradvac(gram, order, targets, beta, always, rounding, out, new_targets), device);
}

void gradvac_step_op(Tensor gram, Tensor targets, const std::optional<Tensor>& order, int64_t key,
                     std::optional<Tensor> state, const std::optional<Tensor>& present, double beta, bool always,
                     bool mean, double rounding, Tensor weights) {
  const int device = gram.get_device_index();
  check_devices({gram, targets, weights, order.value_or(gram), state.value_or(gram), present.value_or(gram)}, device,
                "all that the solver reads");
  gradvac(read_gradvac_step(gram, targets, order, key, state, present, beta, always, mean, rounding, weights), device);
}

void solve_method(const MethodArguments& read, int device) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const int T = read.num_tasks, blocks = method_blocks(read.request.kind, T);
  MethodParams p{read.request, read.gram, T, read.present, read.preferences, nullptr, nullptr, nullptr, read.out};
  const int64_t scratch = blocks * block_scratch(read.request.rows(T)), parts = blocks > 1 ? int64_t{blocks} * T : 0;
  std::optional<Tensor> memory;
  std::optional<Tickets> taken;
  if (scratch + parts > 0) {
    memory = workspace(device, 8 * (scratch + parts));
    p.scratch = static_cast<double*>(memory->mutable_data_ptr());
    p.parts = p.scratch + scratch;
  }
  if (blocks > 1) {
    taken = tickets(device, stream, 1);
    p.ticket = taken->counters;
  }
  launch_method_weights(p, stream);
  check(cudaGetLastError(), "method_weights launch");
}

void method_weights_op(Tensor gram, int64_t method, const std::vector<double>& options, double rounding,
                       const std::optional<Tensor>& present, const std::optional<Tensor>& preferences,
                       const std::optional<Tensor>& per_task, Tensor out) {
  const int device = gram.get_device_index();
  check_devices({gram, out, present.value_or(gram), preferences.value_or(gram), per_task.value_or(gram)}, device,
                "all that the solver reads");
  solve_method(read_method(gram, method, options, rounding, present, preferences, per_task, out), device);
}

void method_step_op(Tensor gram, const std::optional<Tensor>& also, int64_t method, const std::vector<double>& options,
                    double rounding, const std::optional<Tensor>& present, const std::optional<Tensor>& preferences,
                    const std::optional<Tensor>& per_task, const std::optional<Tensor>& vectors, double momentum,
                    std::optional<Tensor> kept, std::optional<Tensor> counted, std::optional<Tensor> average,
                    Tensor out) {
  const int device = gram.get_device_index();
  check_devices(
      {gram, out, also.value_or(gram), present.value_or(gram), preferences.value_or(gram), per_task.value_or(gram),
       vectors.value_or(gram), kept.value_or(gram), counted.value_or(gram), average.value_or(gram)},
      device, "all that the solver reads");
  StepTensors step{kept, counted, average};
  solve_method(
      read_step(gram, also, method, options, rounding, present, preferences, per_task, vectors, momentum, step, out),
      device);
}

void pcgrad_op(const std::vector<Tensor>& tensors, const std::vector<int64_t>& index, int64_t num_tasks,
               int64_t num_params, const std::optional<Tensor>& order, int64_t key, const std::optional<Tensor>& state,
               bool include_self, const std::vector<int64_t>& present, bool mean, const std::vector<Tensor>& out,
               Tensor gram_out, Tensor weights_out) {
  const int device = gram_out.get_device_index();
  check_devices(tensors, device, "the gradients");
  check_devices(out, device, "the results");
  check_device(weights_out, device, "the weights");
  check_gram(gram_out, num_tasks);
  Solve s{};
  s.wanted = true;
  s.project = weights_out.dim() == 2;
  s.include_self = include_self;
  s.mean = mean;
  const int64_t num_out = s.project ? num_tasks : 1;
  STD_TORCH_CHECK(
      weights_out.numel() == num_out * num_tasks && dtype_of(weights_out) == DType::f64 && weights_out.is_contiguous(),
      "fastmtl: the weights must be a contiguous float64 tensor");
  s.result = static_cast<double*>(weights_out.mutable_data_ptr());
  read_visits(s, order, key, state, num_tasks, device);
  STD_TORCH_CHECK(present.empty() || static_cast<int64_t>(present.size()) == num_tasks, "fastmtl: expected ", num_tasks,
                  " flags");
  for (size_t t = 0; t < present.size(); ++t)
    if (present[t] == 0) s.absent[t / 64] |= uint64_t{1} << (t % 64);
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const Rows rows = read_rows(tensors, index, num_tasks, num_params, out);
  check_outputs(rows, num_out);
  const Parts read = read_parts(rows, index.empty(), device, stream);
  const bool early = read.parts[0].grads.columns > 0 && launches_early(device);
  gram(read.parts, gram_out, s, early, device, stream);
  combine(read.parts, s.result, early, stream);
}

}  // namespace
}  // namespace fastmtl::cuda

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CUDA, m) {
  m.impl("_gram", TORCH_BOX(&fastmtl::cuda::gram_op));
  m.impl("_combine", TORCH_BOX(&fastmtl::cuda::combine_op));
  m.impl("_pcgrad_coefficients", TORCH_BOX(&fastmtl::cuda::coefficients_op));
  m.impl("_pcgrad_weights", TORCH_BOX(&fastmtl::cuda::weights_op));
  m.impl("_gradvac_coefficients", TORCH_BOX(&fastmtl::cuda::gradvac_op));
  m.impl("_gradvac_step", TORCH_BOX(&fastmtl::cuda::gradvac_step_op));
  m.impl("_method_weights", TORCH_BOX(&fastmtl::cuda::method_weights_op));
  m.impl("_method_step", TORCH_BOX(&fastmtl::cuda::method_step_op));
  m.impl("_pcgrad", TORCH_BOX(&fastmtl::cuda::pcgrad_op));
}
