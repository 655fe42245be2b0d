// Low-rank deltas of a batch that mixes tasks: y += s_t (x A_t^T) B_t^T row by row, and its backward. The rows stay
// where they lie, and the r numbers to which a row shrinks never leave the cache. Which sums are made together depends
// on sizes alone, so the bits of a result do not depend on the number of threads.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "common/abi.h"
#include "cpu/simd/kernels.h"
#include "cpu/task_weights/batch.h"

namespace fastmtl::cpu {
namespace {

// rows that go through both factors before the next ones do, so that they are still in the cache
constexpr int64_t kRows = 32;
// rows with sums of their own, for each number of the rank: so sums are little beside the rows
constexpr int64_t kPartOfRank = 8, kMinPart = 128, kMaxPart = 1024;
// multiplications that are worth a thread of their own
constexpr int64_t kWorth = 1 << 18;

int64_t padded(int64_t length) { return (length + kTablePad - 1) / kTablePad * kTablePad; }

// `[N, rows, C]`, of which the elements of a row lie side by side
struct Samples {
  char* data;
  int64_t count, rows, columns, of_sample, of_row;  // the last two in bytes
  DType dtype;
};

Samples samples_of(const Tensor& x, const void* data) {
  STD_TORCH_CHECK(x.dim() == 3 && (x.stride(2) == 1 || x.size(2) <= 1),
                  "fastmtl: expected samples of dense rows, [N, rows, C]");
  const DType dtype = dtype_of(x);
  const int64_t bytes = size_of(dtype);
  return {static_cast<char*>(const_cast<void*>(data)),
          x.size(0),
          x.size(1),
          x.size(2),
          x.stride(0) * bytes,
          x.stride(1) * bytes,
          dtype};
}

// A or B of one task
struct Factor {
  const char* data = nullptr;  // null: the task has none
  int64_t stride[2] = {};      // in elements
  int64_t size[2] = {};
  DType dtype = DType::f32;
};

std::vector<Factor> factors_of(const std::vector<Tensor>& held, const std::vector<int64_t>& tasks, int64_t num_tasks) {
  std::vector<Factor> found(static_cast<size_t>(num_tasks));
  if (held.empty()) return found;
  auto read = [](const Tensor& x, int64_t skip, int64_t first) {
    const DType dtype = dtype_of(x);
    return Factor{static_cast<const char*>(x.const_data_ptr()) + skip * size_of(dtype),
                  {x.stride(first), x.stride(first + 1)},
                  {x.size(first), x.size(first + 1)},
                  dtype};
  };
  if (held.size() == 1 && tasks.empty()) {
    STD_TORCH_CHECK(held[0].dim() == 3 && held[0].size(0) == num_tasks, "fastmtl: expected factors of ", num_tasks,
                    " tasks");
    for (int64_t t = 0; t < num_tasks; ++t) found[static_cast<size_t>(t)] = read(held[0], t * held[0].stride(0), 1);
    return found;
  }
  STD_TORCH_CHECK(held.size() == tasks.size(), "fastmtl: expected a task for each factor");
  for (size_t k = 0; k < held.size(); ++k) {
    STD_TORCH_CHECK(held[k].dim() == 2 && tasks[k] >= 0 && tasks[k] < num_tasks, "fastmtl: factors that do not fit");
    found[static_cast<size_t>(tasks[k])] = read(held[k], 0, 0);
  }
  return found;
}

// the low-rank deltas of all tasks
struct Deltas {
  std::vector<Factor> a, b;
  std::vector<double> scaling;  // none: ones
  int64_t rank(int64_t task) const { return a[static_cast<size_t>(task)].size[0]; }
  bool exists(int64_t task) const { return a[static_cast<size_t>(task)].data != nullptr; }
  double scale(int64_t task) const { return scaling.empty() ? 1.0 : scaling[static_cast<size_t>(task)]; }
  // a scaling that is not a number is open
  bool is_open(int64_t task) const { return exists(task) && scale(task) != 0; }
};

Deltas deltas_of(const std::vector<Tensor>& A, const std::vector<Tensor>& B, const std::vector<int64_t>& tasks,
                 const std::vector<double>& scaling, int64_t num_tasks, int64_t num_in, int64_t num_out, DType dtype) {
  Deltas found{factors_of(A, tasks, num_tasks), factors_of(B, tasks, num_tasks), scaling};
  STD_TORCH_CHECK(scaling.empty() || static_cast<int64_t>(scaling.size()) == num_tasks,
                  "fastmtl: expected a scaling for each of ", num_tasks, " tasks");
  // a number that is 0 in the dtype of sums closes, too
  if (dtype != DType::f64)
    for (double& s : found.scaling) s = static_cast<double>(static_cast<float>(s));
  for (size_t t = 0; t < found.a.size(); ++t) {
    const Factor &a = found.a[t], &b = found.b[t];
    STD_TORCH_CHECK((a.data == nullptr) == (b.data == nullptr) &&
                        (!a.data || (a.size[1] == num_in && b.size[0] == num_out && a.size[0] == b.size[1])),
                    "fastmtl: factors that do not fit");
  }
  return found;
}

// rows of a factor as S, [rows][padded(columns)], with zeros behind each; `turned`: its columns are the rows
template <class S>
void pack(const Factor& w, bool turned, std::vector<S>& table) {
  const int64_t rows = w.size[turned], columns = w.size[!turned], stride = padded(columns);
  const int64_t along = w.stride[!turned], bytes = size_of(w.dtype);
  table.resize(static_cast<size_t>(std::max<int64_t>(rows * stride, 1)));
  for (int64_t r = 0; r < rows; ++r) {
    const char* from = w.data + r * w.stride[turned] * bytes;
    S* to = table.data() + r * stride;
    if (bytes == sizeof(S)) {
      const S* row = reinterpret_cast<const S*>(from);
      for (int64_t k = 0; k < columns; ++k) to[k] = row[k * along];
    } else if constexpr (sizeof(S) == sizeof(float)) {
      // 16 bits
      uint16_t room[kBlock];
      for (int64_t k = 0; k < columns; k += kBlock) {
        const int64_t length = std::min(kBlock, columns - k);
        for (int64_t i = 0; i < length; ++i) std::memcpy(room + i, from + (k + i) * along * bytes, sizeof(uint16_t));
        kernels().widen[static_cast<int>(w.dtype)](room, to + k, length);
      }
    } else {
      // float32 beside float64 is refused before
      STD_TORCH_CHECK(false, "fastmtl: expected factors in the dtype of x");
    }
    std::fill(to + columns, to + stride, S(0));
  }
}

// some rows of one task: its samples' rows in order
struct Part {
  int64_t task, first, count;
};

// the parts of tasks that `takes` something
template <class F>
std::vector<Part> parts_of(const Batch& batch, int64_t per_sample, const Deltas& deltas, const F& takes) {
  std::vector<Part> parts;
  for (int64_t t = 0; t < batch.num_tasks; ++t) {
    const int64_t rows = batch.count(t) * per_sample;
    if (rows == 0 || !takes(t)) continue;
    const int64_t rank = deltas.exists(t) ? deltas.rank(t) : 1;
    const int64_t most = std::clamp(kPartOfRank * rank, kMinPart, kMaxPart);
    for (int64_t first = 0; first < rows; first += most) parts.push_back({t, first, std::min(most, rows - first)});
  }
  return parts;
}

template <class F>
void over_parts(const std::vector<Part>& parts, const Deltas& deltas, int64_t columns, const F& run) {
  int64_t work = 0;
  for (const Part& part : parts) work += part.count * columns * (deltas.exists(part.task) ? deltas.rank(part.task) : 1);
  const int64_t count = static_cast<int64_t>(parts.size());
  if (count == 0) return;
  const int64_t each = std::max<int64_t>(1, work / count);
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, kWorth / each), run);
}

// where `count` rows of a task lie, from its row `first` on
template <class P>
void find_rows(const Batch& batch, const Samples& x, int64_t task, int64_t first, int64_t count, P** rows) {
  const int64_t* samples = batch.order + batch.offsets[task];
  int64_t sample = first / x.rows, row = first % x.rows;
  for (int64_t i = 0; i < count; ++i) {
    rows[i] = x.data + samples[sample] * x.of_sample + row * x.of_row;
    if (++row == x.rows) {
      row = 0;
      ++sample;
    }
  }
}

// both factors of the task that a thread is at, as tables: A, [r][Cin], and B turned, [r][Cout]
template <class S>
class Tables {
 public:
  explicit Tables(const Deltas& deltas) : deltas_(deltas) {}
  // whether it is another task than before
  bool take(int64_t task, bool read) {
    if (task == task_) return false;
    task_ = task;
    if (read) {
      pack(deltas_.a[static_cast<size_t>(task)], false, a);
      pack(deltas_.b[static_cast<size_t>(task)], true, b);
    }
    return true;
  }
  std::vector<S> a, b;

 private:
  const Deltas& deltas_;
  int64_t task_ = -1;
};

// --- forward

template <class S>
void forward(const Samples& x, const Samples& y, const Batch& batch, const Deltas& deltas, const S* bias) {
  const LowRank& kernel = kernels().low_rank;
  const int dtype = static_cast<int>(x.dtype);
  const int64_t in = padded(x.columns), out = padded(y.columns);
  const std::vector<Part> parts =
      parts_of(batch, x.rows, deltas, [&](int64_t task) { return bias || deltas.is_open(task); });
  over_parts(parts, deltas, x.columns + y.columns, [&](int64_t begin, int64_t end) {
    Tables<S> tables(deltas);
    std::vector<S> z;
    char *from[kRows], *to[kRows];
    for (int64_t p = begin; p < end; ++p) {
      const Part& part = parts[static_cast<size_t>(p)];
      const bool open = deltas.is_open(part.task);
      const int64_t rank = open ? deltas.rank(part.task) : 0, wide = rank + (bias != nullptr);
      if (tables.take(part.task, open)) {
        z.resize(static_cast<size_t>(kRows * wide));
        if (bias) {
          // one more row of B, which each row of y has once
          tables.b.resize(static_cast<size_t>(wide * out));
          S* last = tables.b.data() + rank * out;
          std::copy_n(bias + part.task * y.columns, y.columns, last);
          std::fill(last + y.columns, last + out, S(0));
        }
      }
      const S scale = static_cast<S>(deltas.scale(part.task));
      for (int64_t m = 0; m < part.count; m += kRows) {
        const int count = static_cast<int>(std::min(kRows, part.count - m));
        find_rows(batch, y, part.task, part.first + m, count, to);
        if (open) {
          find_rows(batch, x, part.task, part.first + m, count, from);
          kernel.shrink[dtype](reinterpret_cast<const void* const*>(from), count, x.columns, tables.a.data(), in,
                               static_cast<int>(rank), z.data(), wide);
        }
        for (int64_t i = 0; i < count; ++i) {
          S* row = z.data() + i * wide;
          for (int64_t r = 0; r < rank; ++r) row[r] *= scale;
          if (bias) row[rank] = S(1);
        }
        kernel.expand[dtype](reinterpret_cast<void* const*>(to), count, y.columns, tables.b.data(), out,
                             static_cast<int>(wide), z.data(), wide);
      }
    }
  });
}

// --- backward

// where results go; null: not wanted
template <class S>
struct Gradients {
  std::vector<S*> a, b;  // by task: [r, Cin], [Cout, r]
  double* scaling;       // [T]
  S* bias;               // [T, Cout]
};

// what one part adds up
template <class S>
struct PartSums {
  S* a = nullptr;  // [r][padded(Cin)]
  S* b = nullptr;  // [r, and one more for the bias][padded(Cout)]
  double scaling = 0;
};

template <class S>
void backward(const Samples& g, const Samples& x, const std::optional<Samples>& grad_x, const Batch& batch,
              const Deltas& deltas, const Gradients<S>& grads) {
  const LowRank& kernel = kernels().low_rank;
  const int dtype = static_cast<int>(x.dtype);
  const int64_t in = padded(x.columns), out = padded(g.columns);
  auto wants_a = [&](int64_t t) { return grads.a[static_cast<size_t>(t)] && deltas.is_open(t); };
  auto wants_b = [&](int64_t t) { return grads.b[static_cast<size_t>(t)] && deltas.is_open(t); };
  auto wants_scaling = [&](int64_t t) { return grads.scaling && deltas.exists(t); };
  auto moves = [&](int64_t t) { return grad_x.has_value() && deltas.is_open(t); };
  const std::vector<Part> parts = parts_of(batch, x.rows, deltas, [&](int64_t t) {
    return moves(t) || wants_a(t) || wants_b(t) || wants_scaling(t) || grads.bias;
  });
  const size_t num_parts = parts.size();
  std::vector<PartSums<S>> sums(num_parts);
  std::vector<int64_t> begins(static_cast<size_t>(batch.num_tasks) + 1, 0);  // of each task's parts
  int64_t floats = 0;
  auto rows_of_b = [&](int64_t t) { return (wants_b(t) ? deltas.rank(t) : 0) + (grads.bias != nullptr); };
  for (const Part& part : parts) {
    ++begins[static_cast<size_t>(part.task) + 1];
    floats += (wants_a(part.task) ? deltas.rank(part.task) * in : 0) + rows_of_b(part.task) * out;
  }
  for (size_t t = 1; t < begins.size(); ++t) begins[t] += begins[t - 1];
  std::unique_ptr<S[]> memory(new S[static_cast<size_t>(std::max<int64_t>(floats, 1))]);
  S* free = memory.get();
  for (size_t p = 0; p < num_parts; ++p) {
    const int64_t t = parts[p].task;
    if (wants_a(t)) sums[p].a = free, free += deltas.rank(t) * in;
    if (rows_of_b(t) > 0) sums[p].b = free, free += rows_of_b(t) * out;
  }

  over_parts(parts, deltas, 2 * (x.columns + g.columns), [&](int64_t begin, int64_t end) {
    Tables<S> tables(deltas);
    std::vector<S> z, u;
    char *rows_g[kRows], *rows_x[kRows], *rows_out[kRows];
    for (int64_t p = begin; p < end; ++p) {
      const Part& part = parts[static_cast<size_t>(p)];
      PartSums<S>& sum = sums[static_cast<size_t>(p)];
      const int64_t t = part.task;
      const bool has_b = wants_b(t), of_scaling = wants_scaling(t), has_a = sum.a != nullptr, has_bias = grads.bias;
      const bool needs_u = moves(t) || has_a || of_scaling, needs_z = has_b || of_scaling;
      const int64_t rank = needs_u || needs_z ? deltas.rank(t) : 0, wide = rank + 1;
      if (tables.take(t, needs_u || needs_z)) {
        z.resize(static_cast<size_t>(kRows * wide));
        u.resize(static_cast<size_t>(kRows * wide));
      }
      if (has_a) std::fill_n(sum.a, rank * in, S(0));
      if (sum.b) std::fill_n(sum.b, rows_of_b(t) * out, S(0));
      const S scale = static_cast<S>(deltas.scale(t));
      for (int64_t m = 0; m < part.count; m += kRows) {
        const int count = static_cast<int>(std::min(kRows, part.count - m));
        find_rows(batch, g, t, part.first + m, count, rows_g);
        auto* of_g = reinterpret_cast<const void* const*>(rows_g);
        auto* of_x = reinterpret_cast<const void* const*>(rows_x);
        if (needs_z || has_a) find_rows(batch, x, t, part.first + m, count, rows_x);
        if (needs_u)
          kernel.shrink[dtype](of_g, count, g.columns, tables.b.data(), out, static_cast<int>(rank), u.data(), wide);
        if (needs_z)
          kernel.shrink[dtype](of_x, count, x.columns, tables.a.data(), in, static_cast<int>(rank), z.data(), wide);
        for (int64_t i = 0; i < count; ++i) {
          S *own_u = u.data() + i * wide, *own_z = z.data() + i * wide;
          if (of_scaling)
            for (int64_t r = 0; r < rank; ++r)
              sum.scaling += static_cast<double>(own_u[r]) * static_cast<double>(own_z[r]);
          if (needs_u)
            for (int64_t r = 0; r < rank; ++r) own_u[r] *= scale;
          if (needs_z)
            for (int64_t r = 0; r < rank; ++r) own_z[r] *= scale;
          own_z[rank] = S(1);
        }
        if (moves(t)) {
          find_rows(batch, *grad_x, t, part.first + m, count, rows_out);
          kernel.expand[dtype](reinterpret_cast<void* const*>(rows_out), count, x.columns, tables.a.data(), in,
                               static_cast<int>(rank), u.data(), wide);
        }
        if (has_a) kernel.collect[dtype](of_x, count, x.columns, u.data(), wide, static_cast<int>(rank), sum.a, in);
        if (sum.b) {
          const int64_t first = has_b ? 0 : rank;
          kernel.collect[dtype](of_g, count, g.columns, z.data() + first, wide,
                                static_cast<int>(rank - first + has_bias), sum.b, out);
        }
      }
    }
  });

  // the parts of a task in their order
  over(batch.num_tasks, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const size_t first = static_cast<size_t>(begins[static_cast<size_t>(t)]);
      const size_t last = static_cast<size_t>(begins[static_cast<size_t>(t) + 1]);
      auto add = [&](S* PartSums<S>::* member, int64_t count) {
        if (first == last || !(sums[first].*member)) return;
        S* to = sums[first].*member;
        for (size_t p = first + 1; p < last; ++p) {
          const S* from = sums[p].*member;
          for (int64_t k = 0; k < count; ++k) to[k] += from[k];
        }
      };
      const int64_t rank = deltas.exists(t) ? deltas.rank(t) : 0;
      add(&PartSums<S>::a, rank * in);
      add(&PartSums<S>::b, rows_of_b(t) * out);
      const S* of_a = first < last ? sums[first].a : nullptr;
      const S* of_b = first < last ? sums[first].b : nullptr;
      if (S* to = grads.a[static_cast<size_t>(t)]; to)
        for (int64_t r = 0; r < rank; ++r)
          for (int64_t k = 0; k < x.columns; ++k) to[r * x.columns + k] = of_a ? of_a[r * in + k] : S(0);
      const bool has_b = of_b && wants_b(t);
      if (S* to = grads.b[static_cast<size_t>(t)]; to)
        for (int64_t n = 0; n < g.columns; ++n)
          for (int64_t r = 0; r < rank; ++r) to[n * rank + r] = has_b ? of_b[r * out + n] : S(0);
      if (grads.bias)
        for (int64_t n = 0; n < g.columns; ++n)
          grads.bias[t * g.columns + n] = of_b ? of_b[(has_b ? rank : 0) * out + n] : S(0);
      if (grads.scaling) {
        double total = 0;
        for (size_t p = first; p < last; ++p) total += sums[p].scaling;
        grads.scaling[t] = total;
      }
    }
  });
}

// --- from torch's tensors

// what each task's gradient is written into, of S; null for those that are not wanted
template <class S>
std::vector<S*> targets_of(const std::vector<Tensor>& grads, const std::vector<int64_t>& positions,
                           const std::vector<int64_t>& tasks, const std::vector<Factor>& factors, DType dtype) {
  std::vector<S*> found(factors.size(), nullptr);
  STD_TORCH_CHECK(grads.size() == positions.size(), "fastmtl: expected a position for each gradient");
  for (size_t k = 0; k < grads.size(); ++k) {
    STD_TORCH_CHECK(grads[k].is_contiguous() && dtype_of(grads[k]) == dtype,
                    "fastmtl: expected contiguous gradients in the dtype of sums");
    S* data = static_cast<S*>(grads[k].mutable_data_ptr());
    const bool stacked = tasks.empty();
    const size_t first = stacked ? 0 : static_cast<size_t>(tasks.at(static_cast<size_t>(positions[k])));
    const int64_t size = factors.at(first).size[0] * factors.at(first).size[1];
    const size_t count = stacked ? factors.size() : 1;
    STD_TORCH_CHECK(grads[k].numel() == size * static_cast<int64_t>(count), "fastmtl: gradients that do not fit");
    for (size_t i = 0; i < count; ++i) found[first + i] = data + static_cast<int64_t>(i) * size;
  }
  return found;
}

// y += s_t (x A_t^T) B_t^T, and each task's bias
void task_lora(const Tensor& x_, const std::vector<Tensor>& A, const std::vector<Tensor>& B,
               const std::vector<int64_t>& tasks, const std::vector<double>& scaling, const std::optional<Tensor>& bias,
               const Tensor& order, const Tensor& offsets, const Tensor& y_) {
  const Samples x = samples_of(x_, x_.const_data_ptr()), y = samples_of(y_, y_.mutable_data_ptr());
  STD_TORCH_CHECK(x.count == y.count && x.rows == y.rows && x.dtype == y.dtype, "fastmtl: rows that do not fit");
  const Batch batch = batch_of(order, offsets, x.count);
  const Deltas deltas = deltas_of(A, B, tasks, scaling, batch.num_tasks, x.columns, y.columns, x.dtype);
  if (bias.has_value())
    STD_TORCH_CHECK(bias->dim() == 2 && bias->size(0) == batch.num_tasks && bias->size(1) == y.columns &&
                        bias->is_contiguous() && dtype_of(*bias) == wide(x.dtype),
                    "fastmtl: expected a bias for each task");
  const void* own = bias.has_value() ? bias->const_data_ptr() : nullptr;
  if (x.dtype == DType::f64) forward<double>(x, y, batch, deltas, static_cast<const double*>(own));
  else forward<float>(x, y, batch, deltas, static_cast<const float*>(own));
}

// adds to grad_x what the deltas give, and writes the gradients of A and B at the wanted positions, of each task's
// scaling and of each task's bias
void task_lora_backward(const Tensor& g_, const Tensor& x_, const std::vector<Tensor>& A, const std::vector<Tensor>& B,
                        const std::vector<int64_t>& tasks, const std::vector<double>& scaling, const Tensor& order,
                        const Tensor& offsets, const std::optional<Tensor>& grad_x, const std::vector<Tensor>& grad_a,
                        const std::vector<int64_t>& wanted_a, const std::vector<Tensor>& grad_b,
                        const std::vector<int64_t>& wanted_b, const std::optional<Tensor>& grad_scaling,
                        const std::optional<Tensor>& grad_bias) {
  const Samples x = samples_of(x_, x_.const_data_ptr()), g = samples_of(g_, g_.const_data_ptr());
  STD_TORCH_CHECK(x.count == g.count && x.rows == g.rows && x.dtype == g.dtype, "fastmtl: rows that do not fit");
  const Batch batch = batch_of(order, offsets, x.count);
  const Deltas deltas = deltas_of(A, B, tasks, scaling, batch.num_tasks, x.columns, g.columns, x.dtype);
  std::optional<Samples> to;
  if (grad_x.has_value()) {
    to = samples_of(*grad_x, grad_x->mutable_data_ptr());
    STD_TORCH_CHECK(to->count == x.count && to->rows == x.rows && to->columns == x.columns && to->dtype == x.dtype,
                    "fastmtl: rows that do not fit");
  }
  const DType sums = wide(x.dtype);
  if (grad_scaling.has_value())
    STD_TORCH_CHECK(grad_scaling->is_contiguous() && grad_scaling->numel() == batch.num_tasks &&
                        dtype_of(*grad_scaling) == DType::f64,
                    "fastmtl: expected a float64 for each scaling");
  if (grad_bias.has_value())
    STD_TORCH_CHECK(
        grad_bias->is_contiguous() && grad_bias->numel() == batch.num_tasks * g.columns && dtype_of(*grad_bias) == sums,
        "fastmtl: expected a bias for each task");
  auto run = [&]<class S>(S) {
    backward<S>(
        g, x, to, batch, deltas,
        {targets_of<S>(grad_a, wanted_a, tasks, deltas.a, sums), targets_of<S>(grad_b, wanted_b, tasks, deltas.b, sums),
         grad_scaling.has_value() ? static_cast<double*>(grad_scaling->mutable_data_ptr()) : nullptr,
         grad_bias.has_value() ? static_cast<S*>(grad_bias->mutable_data_ptr()) : nullptr});
  };
  if (x.dtype == DType::f64) run(0.0);
  else run(0.0f);
}

// --- what a call is asked before it runs

bool is_dense_on_cpu(const Tensor& x) {
  int32_t layout = -1;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(x.get(), &layout));
  return x.device().type() == torch::headeronly::DeviceType::CPU && layout == aoti_torch_layout_strided();
}

bool is_float(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Half;
}

// whether a weight's dtype may stand beside that of x
bool goes_with(const Tensor& w, const Tensor& x) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = x.scalar_type();
  return is_dense_on_cpu(w) &&
         (w.scalar_type() == dtype ||
          (w.scalar_type() == ScalarType::Float && (dtype == ScalarType::BFloat16 || dtype == ScalarType::Half)));
}

// positions of all of `count` samples by task
bool is_plan(const Tensor& ids, const Tensor& order, const Tensor& offsets, int64_t num_tasks, int64_t count) {
  using torch::headeronly::ScalarType;
  for (const Tensor* x : {&order, &offsets})
    if (!is_dense_on_cpu(*x) || x->dim() != 1 || !x->is_contiguous() || x->scalar_type() != ScalarType::Long)
      return false;
  if (order.numel() != count || ids.numel() != count || offsets.numel() != num_tasks + 1) return false;
  const auto* bounds = static_cast<const int64_t*>(offsets.const_data_ptr());
  return bounds[0] == 0 && bounds[num_tasks] == count && std::is_sorted(bounds, bounds + num_tasks + 1);
}

// whether the arguments of `fastmtl.ops.task_lora` fit: it alone says what does not
bool task_lora_fits(const Tensor& x, const std::optional<Tensor>& weight, const std::vector<Tensor>& A,
                    const std::vector<Tensor>& B, const std::vector<int64_t>& tasks, int64_t num_tasks,
                    const std::optional<Tensor>& scaling, const std::optional<Tensor>& bias, const Tensor& ids,
                    const Tensor& order, const Tensor& offsets) {
  if (!is_dense_on_cpu(x) || !is_float(x.scalar_type()) || A.empty() || A.size() != B.size() || num_tasks < 1)
    return false;
  for (const std::vector<Tensor>* held : {&A, &B})
    for (const Tensor& w : *held)
      if (!goes_with(w, x) || w.scalar_type() != A[0].scalar_type()) return false;
  const bool stacked = tasks.empty();
  const int64_t first = stacked ? 1 : 0;
  if (stacked ? A.size() != 1 : A.size() != tasks.size()) return false;
  if (A[0].dim() != first + 2 || B[0].dim() != first + 2) return false;
  const int64_t num_in = A[0].size(first + 1), num_out = B[0].size(first);
  if (x.dim() < 2 || num_in == 0 || x.size(x.dim() - 1) != num_in) return false;
  for (size_t k = 0; k < A.size(); ++k) {
    const auto a = A[k].sizes(), b = B[k].sizes();
    const auto dims = static_cast<size_t>(first + 2);
    if (a.size() != dims || b.size() != dims || (stacked && (a[0] != num_tasks || b[0] != num_tasks))) return false;
    const int64_t rank = a[dims - 2];
    if (rank < 1 || b[dims - 1] != rank || a[dims - 1] != num_in || b[dims - 2] != num_out) return false;
  }
  if (weight.has_value() &&
      !(goes_with(*weight, x) && weight->dim() == 2 && weight->size(0) == num_out && weight->size(1) == num_in))
    return false;
  if (scaling.has_value() && !(goes_with(*scaling, x) && scaling->dim() == 1 && scaling->size(0) == num_tasks))
    return false;
  if (bias.has_value()) {
    const int64_t dims = bias->dim();
    if (!goes_with(*bias, x) || dims < 1 || dims > 2 || bias->size(dims - 1) != num_out ||
        (dims == 2 && bias->size(0) != num_tasks))
      return false;
  }
  if (ids.dim() < 1 || ids.dim() >= x.dim()) return false;
  int64_t count = 1;
  for (int64_t d = 0; d < ids.dim(); ++d) {
    if (ids.size(d) != x.size(d)) return false;
    count *= x.size(d);
  }
  return is_plan(ids, order, offsets, num_tasks, count);
}

}  // namespace
}  // namespace fastmtl::cpu

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  m.impl("_task_lora", TORCH_BOX(&fastmtl::cpu::task_lora));
  m.impl("_task_lora_backward", TORCH_BOX(&fastmtl::cpu::task_lora_backward));
}

// for any device and layout, of which it asks
STABLE_TORCH_LIBRARY_IMPL(fastmtl, CompositeExplicitAutograd, m) {
  m.impl("_task_lora_fits", TORCH_BOX(&fastmtl::cpu::task_lora_fits));
}
