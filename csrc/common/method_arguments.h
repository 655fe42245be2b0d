// What a call for a method's weights reads from torch's tensors.
#pragma once

#include <optional>

#include "common/rows.h"
#include "common/solvers/methods.h"

namespace fastmtl {

struct MethodArguments {
  solvers::Request request;
  solvers::Entries gram;
  int num_tasks;
  const uint8_t* present;     // null: all
  const double* preferences;  // null: all equal
  double* out;
  int num_groups;  // problems that have all but `gram` and `out` in common
};

// A [T, T] float32 or float64 matrix whose rows are dense, or the first of several.
inline solvers::Entries read_entries(const Tensor& x, int64_t T) {
  const DType dtype = dtype_of(x);
  const int64_t row = x.dim() - 2;
  STD_TORCH_CHECK((row == 0 || row == 1) && x.size(row) == T && x.size(row + 1) == T &&
                      (T == 1 || x.stride(row + 1) == 1) && (dtype == DType::f32 || dtype == DType::f64),
                  "fastmtl: expected a [T, T] float32 or float64 matrix with dense rows");
  return {x.const_data_ptr(), row == 1 ? T : x.stride(0), dtype == DType::f64};
}

inline int64_t read_num_tasks(const Tensor& gram) {
  STD_TORCH_CHECK(gram.dim() == 2 && gram.size(0) >= 1 && gram.size(0) <= kMaxTasks,
                  "fastmtl: the Gram matrix must be [T, T], T from 1 to 128");
  return gram.size(0);
}

inline const uint8_t* read_flags(const std::optional<Tensor>& present, int64_t T) {
  if (!present.has_value()) return nullptr;
  STD_TORCH_CHECK(present->numel() == T && present->scalar_type() == torch::headeronly::ScalarType::Bool &&
                      present->is_contiguous(),
                  "fastmtl: the flags must be a contiguous [T] bool tensor");
  return static_cast<const uint8_t*>(present->const_data_ptr());
}

inline void check_numbers(const Tensor& x, int64_t count, const char* what) {
  STD_TORCH_CHECK(x.numel() == count && dtype_of(x) == DType::f64 && x.is_contiguous(), "fastmtl: ", what,
                  " must be contiguous float64 numbers, ", count, " of them");
}

inline const double* read_numbers(const std::optional<Tensor>& x, int64_t count, const char* what) {
  if (!x.has_value()) return nullptr;
  check_numbers(*x, count, what);
  return static_cast<const double*>(x->const_data_ptr());
}

inline double* changed_numbers(Tensor& x, int64_t count, const char* what) {
  check_numbers(x, count, what);
  return static_cast<double*>(x.mutable_data_ptr());
}

// method: a `solvers::Kind`. The tensors must outlive what is returned.
inline MethodArguments read_method(const Tensor& gram, int64_t method, const std::vector<double>& options,
                                   double rounding, const std::optional<Tensor>& present,
                                   const std::optional<Tensor>& preferences, const std::optional<Tensor>& per_task,
                                   Tensor& out) {
  const int64_t dims = gram.dim();
  STD_TORCH_CHECK(dims == 2 || (dims == 3 && gram.size(0) >= 1 && gram.is_contiguous()),
                  "fastmtl: the Gram matrix must be [T, T], or contiguous [L, T, T]");
  const int64_t T = gram.size(dims - 1), L = dims == 2 ? 1 : gram.size(0);
  STD_TORCH_CHECK(T >= 1 && T <= kMaxTasks, "fastmtl: expected 1 to 128 tasks, got ", T);
  STD_TORCH_CHECK(method >= 0 && method < solvers::kKinds, "fastmtl: no method has number ", method);
  STD_TORCH_CHECK(options.size() <= solvers::kMostOptions, "fastmtl: expected at most ", solvers::kMostOptions,
                  " options, got ", options.size());
  MethodArguments read{{static_cast<solvers::Kind>(method), {}, rounding},
                       read_entries(gram, T),
                       static_cast<int>(T),
                       read_flags(present, T),
                       read_numbers(preferences, T, "the preferences"),
                       changed_numbers(out, L * T, "the weights"),
                       static_cast<int>(L)};
  for (size_t k = 0; k < options.size(); ++k) read.request.options[k] = options[k];
  read.request.per_task = read_numbers(per_task, T, "the numbers by task");
  return read;
}

// What a step changes in place; see `solvers::Request`.
struct StepTensors {
  std::optional<Tensor> kept, counted, average;
};

// The same of a method that changes what it keeps, or whose weights are averaged.
inline MethodArguments read_step(const Tensor& gram, const std::optional<Tensor>& also, int64_t method,
                                 const std::vector<double>& options, double rounding,
                                 const std::optional<Tensor>& present, const std::optional<Tensor>& preferences,
                                 const std::optional<Tensor>& per_task, const std::optional<Tensor>& vectors,
                                 double momentum, StepTensors& step, Tensor& out) {
  MethodArguments read = read_method(gram, method, options, rounding, present, preferences, per_task, out);
  STD_TORCH_CHECK(read.num_groups == 1, "fastmtl: a step is of one Gram matrix");
  solvers::Request& request = read.request;
  const solvers::Kind kind = request.kind;
  const int64_t T = read.num_tasks;
  const bool descends = kind == solvers::Kind::sdmgrad || kind == solvers::Kind::modo;
  const bool counts = kind == solvers::Kind::pcd || kind == solvers::Kind::pareto;
  STD_TORCH_CHECK(!step.kept.has_value() || descends || counts, "fastmtl: method ", method, " keeps nothing");
  STD_TORCH_CHECK(step.counted.has_value() == (counts && step.kept.has_value()), "fastmtl: counts of method ", method);
  STD_TORCH_CHECK((kind == solvers::Kind::pareto) == vectors.has_value(), "fastmtl: vectors are Pareto MTL's");
  if (also.has_value()) request.also = read_entries(*also, T);
  if (step.average.has_value()) {
    request.average = changed_numbers(*step.average, T, "the average");
    request.momentum = momentum;
  }
  if (kind == solvers::Kind::pareto) {
    STD_TORCH_CHECK(options.size() == 2 && step.kept.has_value() && per_task.has_value() && vectors->dim() == 2 &&
                        vectors->size(1) == T && T + vectors->size(0) <= kMaxTasks && options[0] >= 0 &&
                        options[0] < static_cast<double>(vectors->size(0)),
                    "fastmtl: expected [K, T] vectors, K + T up to 128, an index of one, losses and a state");
    request.pareto = {read_numbers(vectors, vectors->numel(), "the vectors"),
                      static_cast<int>(vectors->size(0)),
                      static_cast<int>(options[0]),
                      request.per_task,
                      options[1],
                      changed_numbers(*step.kept, 1, "the phase"),
                      changed_numbers(*step.counted, 1, "the steps")};
  } else if (step.kept.has_value()) {
    request.kept = changed_numbers(*step.kept, T, "what is kept");
    if (counts) request.counted = changed_numbers(*step.counted, T, "the counts");
  }
  return read;
}

}  // namespace fastmtl
