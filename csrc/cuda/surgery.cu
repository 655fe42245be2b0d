// gram, combine, pcgrad_coefficients and the fused pcgrad: from torch's tensors to parameter structs and launches.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <string>

#include "launch.h"
#include "plan.h"
#include "rows.h"
#include "runtime.h"

namespace fastmtl::cuda {

std::vector<int> architectures() {
  std::vector<int> result;
  for (int arch : {__CUDA_ARCH_LIST__}) result.push_back(arch / 10);
  return result;
}

std::vector<std::string> kernels() { return {"combine", "gram", "pcgrad", "pcgrad_coefficients"}; }

namespace {

using torch::headeronly::ScalarType;

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

bool is_wide(const Param& p) {
  bool wide = true;
  for (const Row& row : p.rows) wide = wide && row.stride == 1 && is_aligned(row.data);
  for (const void* out : p.out) wide = wide && is_aligned(out);
  return wide;
}

// the parameters of one dtype
struct Part {
  DType dtype;
  Grads grads;
  std::optional<Tensor> table;  // keeps grads.table alive
};

int64_t counted(int64_t numel) { return ceil_div(numel, kAlign) * kAlign; }

// one bank without a table, whose rows and outputs lie at equal distances
Part bank_part(const Param& p, int num_tasks) {
  auto at = [](const void* x) { return reinterpret_cast<intptr_t>(x); };
  Grads g{};
  g.bank = p.rows[0].data;
  g.row_stride = num_tasks > 1 ? at(p.rows[1].data) - at(p.rows[0].data) : 0;
  g.column_stride = p.rows[0].stride;
  g.numel = p.numel;
  g.num_out = static_cast<int>(p.out.size());
  if (g.num_out > 0) g.out = p.out[0];
  if (g.num_out > 1) g.out_stride = at(p.out[1]) - at(p.out[0]);
  g.wide = is_wide(p);
  g.num_params = 1;
  g.num_tasks = num_tasks;
  g.columns = counted(p.numel);
  return {p.dtype, g, std::nullopt};
}

Part list_part(const std::vector<const Param*>& params, int num_tasks, int device, cudaStream_t stream) {
  const int64_t n = static_cast<int64_t>(params.size()), T = num_tasks;
  const int64_t num_out = static_cast<int64_t>(params[0]->out.size());
  std::vector<int64_t> words(3 * n + 1 + (2 * T + num_out) * n, 0);
  int64_t* offset = words.data();
  int64_t* numel = offset + n + 1;
  int64_t* wide = numel + n;
  int64_t* row = wide + n;
  int64_t* stride = row + n * T;
  int64_t* out = stride + n * T;
  for (int64_t i = 0; i < n; ++i) {
    const Param& p = *params[i];
    offset[i + 1] = offset[i] + counted(p.numel);
    numel[i] = p.numel;
    wide[i] = is_wide(p);
    for (const Row& r : p.rows) {
      row[i * T + r.task] = reinterpret_cast<intptr_t>(r.data);
      stride[i * T + r.task] = r.stride;
    }
    for (int64_t k = 0; k < num_out; ++k) out[i * num_out + k] = reinterpret_cast<intptr_t>(p.out[k]);
  }
  Part part{params[0]->dtype, Grads{}, device_table(device, stream, words)};
  part.grads.table = static_cast<const int64_t*>(part.table->const_data_ptr());
  part.grads.num_params = static_cast<int>(n);
  part.grads.num_tasks = num_tasks;
  part.grads.num_out = static_cast<int>(num_out);
  part.grads.columns = offset[n];
  return part;
}

// one part per dtype; at least one, which may have no column
std::vector<Part> parts_of(const Rows& rows, bool is_bank, int device, cudaStream_t stream) {
  std::vector<Part> parts;
  if (is_bank && !rows.params.empty()) {
    parts.push_back(bank_part(rows.params[0], rows.num_tasks));
    return parts;
  }
  for (DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16}) {
    std::vector<const Param*> params;
    for (const Param& p : rows.params)
      if (p.dtype == dtype) params.push_back(&p);
    if (!params.empty()) parts.push_back(list_part(params, rows.num_tasks, device, stream));
  }
  if (parts.empty()) {
    Grads none{};
    none.num_tasks = rows.num_tasks;
    none.num_params = 1;
    parts.push_back({DType::f32, none, std::nullopt});
  }
  return parts;
}

// The Gram matrix into `out` (if any), then the T x T problem, in one launch per dtype.
void gram(const std::vector<Part>& parts, Tensor* out, const Solve& solve, int device, cudaStream_t stream) {
  const int T = parts[0].grads.num_tasks;
  const int64_t square = static_cast<int64_t>(T) * T, entries = num_entries(T);
  std::vector<Slots> slots;
  int64_t total = 0;
  for (const Part& part : parts) {
    slots.push_back(gram_slots(part.grads.columns));
    total += slots.back().count;
  }
  GramParams p{};
  p.num_slots = static_cast<int>(total);
  p.slots_per_group = slots_per_group(T, total);
  p.num_groups = static_cast<int>(ceil_div(total, p.slots_per_group));
  p.blocks_per_slot = blocks_per_slot(T);
  p.tickets = tickets(device, stream);
  p.solve = solve;
  // partial sums, the groups' sums, and the solver's four squares
  const Tensor memory = workspace(device, 8 * ((total + p.num_groups) * entries + 4 * square));
  p.partial = static_cast<double*>(memory.mutable_data_ptr());
  p.group_partial = p.partial + total * entries;
  p.gram64 = p.group_partial + p.num_groups * entries;
  if (out != nullptr) {
    p.gram = out->mutable_data_ptr();
    p.gram_is_double = dtype_of(*out) == DType::f64;
  }
  for (size_t k = 0; k < parts.size(); ++k) {
    p.grads = parts[k].grads;
    p.columns_per_slot = slots[k].columns;
    const int count = static_cast<int>(slots[k].count);
    switch (parts[k].dtype) {
      case DType::f32: launch_gram<float>(p, count, stream); break;
      case DType::f64: launch_gram<double>(p, count, stream); break;
      case DType::bf16: launch_gram<__nv_bfloat16>(p, count, stream); break;
      case DType::f16: launch_gram<__half>(p, count, stream); break;
    }
    check(cudaGetLastError(), "gram launch");
    p.first_slot += count;
  }
}

void combine(const std::vector<Part>& parts, const double* weights, cudaStream_t stream) {
  for (const Part& part : parts) {
    if (part.grads.columns == 0 || part.grads.num_out == 0) continue;
    const Slots slots = combine_slots(part.grads.columns);
    const CombineParams p{part.grads, slots.columns, weights};
    switch (part.dtype) {
      case DType::f32: launch_combine<float>(p, slots.count, stream); break;
      case DType::f64: launch_combine<double>(p, slots.count, stream); break;
      case DType::bf16: launch_combine<__nv_bfloat16>(p, slots.count, stream); break;
      case DType::f16: launch_combine<__half>(p, slots.count, stream); break;
    }
    check(cudaGetLastError(), "combine launch");
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
  gram(parts_of(rows, index.empty(), device, stream), &out, Solve{}, device, stream);
}

void combine_op(Tensor weights, const std::vector<Tensor>& tensors, const std::vector<int64_t>& index,
                int64_t num_params, const std::vector<Tensor>& out) {
  STD_TORCH_CHECK(weights.dim() == 2 && dtype_of(weights) == DType::f64 && weights.is_contiguous(),
                  "fastmtl: kernel weights must be a contiguous [K, T] float64 tensor");
  if (tensors.empty() || weights.size(0) == 0) return;
  const int device = weights.get_device_index();
  check_devices(tensors, device, "the gradients");
  check_devices(out, device, "the results");
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const Rows rows = read_rows(tensors, index, weights.size(1), num_params, out);
  check_outputs(rows, weights.size(0));
  combine(parts_of(rows, index.empty(), device, stream), static_cast<const double*>(weights.const_data_ptr()), stream);
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
  s.order = read_order(order, T, device);
  s.num_visits = order.size(1);
  s.result = static_cast<double*>(out.mutable_data_ptr());
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const auto* m = static_cast<const double*>(gram.const_data_ptr());
  const int tasks = static_cast<int>(T);
  if (T <= 16) pcgrad_coefficients_kernel<16, 1><<<1, kThreads, 0, stream>>>(m, tasks, s);
  else if (T <= 64) pcgrad_coefficients_kernel<4, 16><<<1, kThreads, 0, stream>>>(m, tasks, s);
  else pcgrad_coefficients_kernel<4, 32><<<1, kThreads, 0, stream>>>(m, tasks, s);
  check(cudaGetLastError(), "pcgrad_coefficients launch");
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
  s.draw = !order.has_value();
  if (!s.draw) {
    s.order = read_order(*order, num_tasks, device);
    s.num_visits = order->size(1);
  }
  s.key = static_cast<uint64_t>(key);
  if (state.has_value()) {
    check_device(*state, device, "the state");
    STD_TORCH_CHECK(state->numel() == 2 && state->is_contiguous() && state->scalar_type() == ScalarType::Long,
                    "fastmtl: the state must be a contiguous [2] int64 tensor");
    s.state = static_cast<int64_t*>(state->mutable_data_ptr());
  }
  STD_TORCH_CHECK(present.empty() || static_cast<int64_t>(present.size()) == num_tasks, "fastmtl: expected ", num_tasks,
                  " flags");
  for (size_t t = 0; t < present.size(); ++t)
    if (present[t] == 0) s.absent[t / 64] |= uint64_t{1} << (t % 64);
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const Rows rows = read_rows(tensors, index, num_tasks, num_params, out);
  check_outputs(rows, num_out);
  const std::vector<Part> parts = parts_of(rows, index.empty(), device, stream);
  gram(parts, &gram_out, s, device, stream);
  combine(parts, s.result, stream);
}

}  // namespace
}  // namespace fastmtl::cuda

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CUDA, m) {
  m.impl("_gram", TORCH_BOX(&fastmtl::cuda::gram_op));
  m.impl("_combine", TORCH_BOX(&fastmtl::cuda::combine_op));
  m.impl("_pcgrad_coefficients", TORCH_BOX(&fastmtl::cuda::coefficients_op));
  m.impl("_pcgrad", TORCH_BOX(&fastmtl::cuda::pcgrad_op));
}
