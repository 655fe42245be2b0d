// gram and combine, of all parameters or of groups of them, the methods' weights, the coefficients of PCGrad and
// GradVac and the fused pcgrad: from torch's tensors to parameter structs and launches.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <string>

#include "common/gradvac_arguments.h"
#include "common/group_arguments.h"
#include "common/method_arguments.h"
#include "common/rows.h"
#include "cuda/gradients/group_parts.h"
#include "cuda/gradients/launch.h"
#include "cuda/runtime.h"

namespace fastmtl::cuda {

std::vector<int> architectures() {
  std::vector<int> result;
  for (int arch : {__CUDA_ARCH_LIST__}) result.push_back(arch / 10);
  return result;
}

std::vector<std::string> kernels() {
  return {"combine", "combine_groups",      "gradvac_coefficients", "gram",        "gram_groups", "method_weights",
          "pcgrad",  "pcgrad_coefficients", "pcgrad_project",       "task_conv2d", "task_linear"};
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

// The tables of parts that are cut, which must outlive the launches' queueing.
std::vector<DeviceTable> write_tables(std::vector<GroupedPart>& parts, int device, cudaStream_t stream) {
  std::vector<DeviceTable> tables;
  for (GroupedPart& it : parts) {
    STD_TORCH_CHECK(it.cut.columns_per_slot <= kMost32 / 2, "fastmtl: too many columns");
    tables.push_back(device_table(device, stream, it.part.words));
    it.use_table(tables.back().get());
  }
  return tables;
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

// the order, given or to be drawn
void take_order(const OrderArguments& read, Solve& s) {
  s.draw = read.draws;
  s.order = read.visits;
  s.num_visits = read.num_visits;
  s.key = read.key;
  s.state = read.state;
}

void read_randomness(const std::optional<Tensor>& order, int64_t key, const std::optional<Tensor>& state, int64_t T,
                     int device, Solve& s) {
  if (order.has_value()) check_device(*order, device, "the order");
  if (state.has_value()) check_device(*state, device, "the state");
  take_order(read_order(order, key, state, T), s);
}

void read_present(const std::vector<int64_t>& present, int64_t T, Solve& s) {
  STD_TORCH_CHECK(present.empty() || static_cast<int64_t>(present.size()) == T, "fastmtl: expected ", T, " flags");
  for (size_t t = 0; t < present.size(); ++t)
    if (present[t] == 0) s.absent[t / 64] |= uint64_t{1} << (t % 64);
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

void gram_groups_op(const std::vector<Tensor>& tensors, const std::vector<int64_t>& index, int64_t num_tasks,
                    int64_t num_params, const std::vector<int64_t>& groups, Tensor out) {
  const int device = out.get_device_index();
  check_devices(tensors, device, "the gradients");
  const int64_t L = check_group_grams(out, num_tasks);
  check_groups(groups, num_params, L);
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  Rows rows = read_rows(tensors, index, num_tasks, num_params, {});
  sort_by_group(rows.params, groups, L);
  std::vector<GroupedPart> parts = grouped_parts_of(rows.params, rows.num_tasks, L);
  const GramGroupsPlan plan = plan_gram_groups(parts, 0, 0);
  STD_TORCH_CHECK(plan.num_slots <= kMost32 / plan.blocks_per_slot, "fastmtl: too many columns");
  const std::vector<DeviceTable> tables = write_tables(parts, device, stream);
  const Tensor memory = workspace(device, 8 * plan.words());
  const Tickets taken = tickets(device, stream, parts.size(), plan.num_tickets);
  for (const GroupedPart& it : parts) {
    if (it.num_slots == 0) continue;
    GramGroupsParams p = plan.params(it, static_cast<double*>(memory.mutable_data_ptr()), taken.counters);
    p.gram = out.mutable_data_ptr();
    p.gram_is_double = dtype_of(out) == DType::f64;
    launch_gram_groups(it.part.dtype, p, it.num_slots, stream);
    check(cudaGetLastError(), "gram_groups launch");
  }
}

void combine_groups_op(Tensor weights, const std::vector<Tensor>& tensors, const std::vector<int64_t>& index,
                       int64_t num_params, const std::vector<int64_t>& groups, const std::vector<Tensor>& out) {
  STD_TORCH_CHECK(weights.dim() == 2 && dtype_of(weights) == DType::f64 && weights.is_contiguous(),
                  "fastmtl: the weights must be a contiguous [L, T] float64 tensor");
  check_groups(groups, num_params, weights.size(0));
  if (tensors.empty()) return;
  const int device = weights.get_device_index();
  check_devices(tensors, device, "the gradients");
  check_devices(out, device, "the results");
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  Rows rows = read_rows(tensors, index, weights.size(1), num_params, out);
  check_outputs(rows, 1);
  sort_by_group(rows.params, groups, weights.size(0));
  std::vector<GroupedPart> parts = grouped_parts_of(rows.params, rows.num_tasks, weights.size(0));
  plan_combine_groups(parts, 0);
  const std::vector<DeviceTable> tables = write_tables(parts, device, stream);
  for (const GroupedPart& it : parts) {
    if (it.num_slots == 0) continue;
    launch_combine_groups(it.part.dtype, {it.part.grads, it.cut, static_cast<const double*>(weights.const_data_ptr())},
                          it.num_slots, stream);
    check(cudaGetLastError(), "combine_groups launch");
  }
}

void coefficients_op(Tensor gram, Tensor order, bool include_self, Tensor out) {
  const int64_t T = gram.size(0);
  const int device = gram.get_device_index();
  STD_TORCH_CHECK(T >= 1 && T <= kMaxTasks && dtype_of(gram) == DType::f64 && dtype_of(out) == DType::f64,
                  "fastmtl: expected float64 matrices of 1 to 128 tasks");
  check_square(gram, T, "the Gram matrix");
  check_square(out, T, "the result");
  check_device(out, device, "the result");
  Solve s{};
  s.wanted = s.project = true;
  s.include_self = include_self;
  read_randomness(order, 0, std::nullopt, T, device, s);
  s.result = static_cast<double*>(out.mutable_data_ptr());
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const auto* m = static_cast<const double*>(gram.const_data_ptr());
  const Tensor memory = workspace(device, 8 * int64_t{more_words(static_cast<int>(T))});
  launch_coefficients(m, static_cast<int>(T), static_cast<double*>(memory.mutable_data_ptr()), s, stream);
  check(cudaGetLastError(), "pcgrad_coefficients launch");
}

void gradvac(const GradVacArguments& read, int device) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int64_t T = read.num_tasks;
  GradVacParams p{read.method, read.gram, read.num_tasks,   Solve{},      read.present, read.targets,
                  nullptr,     read.out,  read.new_targets, read.weights, read.kept,    read.mean};
  take_order(read.order, p.order);
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

// gram [L, T, T], weights [L, T]
void pcgrad_weights_op(Tensor gram, const std::optional<Tensor>& order, int64_t key, const std::optional<Tensor>& state,
                       bool include_self, const std::vector<int64_t>& present, bool mean, Tensor weights) {
  const int device = gram.get_device_index();
  STD_TORCH_CHECK(gram.dim() == 3 && gram.size(1) == gram.size(2) && gram.size(1) >= 1 && gram.size(1) <= kMaxTasks &&
                      gram.size(0) <= kMost32 && dtype_of(gram) == DType::f64 && gram.is_contiguous(),
                  "fastmtl: the Gram matrices must be a contiguous [L, T, T] float64 tensor, T from 1 to 128");
  const int64_t L = gram.size(0), T = gram.size(1);
  check_device(weights, device, "the weights");
  STD_TORCH_CHECK(weights.numel() == L * T && dtype_of(weights) == DType::f64 && weights.is_contiguous(),
                  "fastmtl: the weights must be a contiguous [L, T] float64 tensor");
  if (L == 0) return;
  Solve s{};
  s.wanted = true;
  s.include_self = include_self;
  s.mean = mean;
  s.result = static_cast<double*>(weights.mutable_data_ptr());
  read_randomness(order, key, state, T, device, s);
  read_present(present, T, s);
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  SolveGroupsParams p{s, static_cast<const double*>(gram.const_data_ptr()), static_cast<int>(T), nullptr, nullptr};
  std::optional<Tensor> memory;
  if (T > 16) {
    memory = workspace(device, 8 * L * order_at(static_cast<int>(T)));
    p.more = static_cast<double*>(memory->mutable_data_ptr());
  }
  std::optional<Tickets> taken;
  if (s.draw && s.state != nullptr) {
    taken = tickets(device, stream, 1);
    p.ticket = taken->counters;
  }
  launch_pcgrad_weights(p, static_cast<int>(L), stream);
  check(cudaGetLastError(), "pcgrad_weights launch");
}

void gradvac_op(Tensor gram, Tensor order, Tensor targets, double beta, bool always, double rounding, Tensor out,
                Tensor new_targets) {
  const int device = gram.get_device_index();
  check_devices({gram, order, targets, out, new_targets}, device, "all that the solver reads");
  gradvac(read_gradvac(gram, order, targets, beta, always, rounding, out, new_targets), device);
}

void gradvac_step_op(Tensor gram, Tensor targets, const std::optional<Tensor>& order, int64_t key,
                     const std::optional<Tensor>& state, const std::optional<Tensor>& present, double beta, bool always,
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
  const int64_t L = read.num_groups;
  MethodParams p{read.request, read.gram, T,       read.present, read.preferences,
                 nullptr,      nullptr,   nullptr, read.out,     read.num_groups};
  const int64_t scratch = L * blocks * block_scratch(read.request.rows(T)), parts = blocks > 1 ? L * blocks * T : 0;
  std::optional<Tensor> memory;
  std::optional<Tickets> taken;
  if (scratch + parts > 0) {
    memory = workspace(device, 8 * (scratch + parts));
    p.scratch = static_cast<double*>(memory->mutable_data_ptr());
    p.parts = p.scratch + scratch;
  }
  if (blocks > 1) {
    taken = tickets(device, stream, 1, read.num_groups);
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
  read_randomness(order, key, state, num_tasks, device, s);
  read_present(present, num_tasks, s);
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
  m.impl("_gram_groups", TORCH_BOX(&fastmtl::cuda::gram_groups_op));
  m.impl("_combine_groups", TORCH_BOX(&fastmtl::cuda::combine_groups_op));
  m.impl("_pcgrad_coefficients", TORCH_BOX(&fastmtl::cuda::coefficients_op));
  m.impl("_gradvac_coefficients", TORCH_BOX(&fastmtl::cuda::gradvac_op));
  m.impl("_gradvac_step", TORCH_BOX(&fastmtl::cuda::gradvac_step_op));
  m.impl("_method_weights", TORCH_BOX(&fastmtl::cuda::method_weights_op));
  m.impl("_method_step", TORCH_BOX(&fastmtl::cuda::method_step_op));
  m.impl("_pcgrad_weights", TORCH_BOX(&fastmtl::cuda::pcgrad_weights_op));
  m.impl("_pcgrad", TORCH_BOX(&fastmtl::cuda::pcgrad_op));
}
