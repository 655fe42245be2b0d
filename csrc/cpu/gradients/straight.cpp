#include "cpu/gradients/straight.h"

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/gradients/gram.h"
#include "cpu/python_calls.h"
#include "cpu/python_tensors.h"

namespace fastmtl::cpu {
namespace {

// A bank whose rows have no gaps; with `out` its one result. A single column, or row of one number, is the op's: its
// memory may hold the negative.
std::optional<Rows> read_bank(PyObject* grads, PyObject* out) {
  const std::optional<PythonTensor> bank = read_tensor(grads);
  if (!bank || !bank->dtype || bank->dims != 2) return std::nullopt;
  const int64_t num_tasks = bank->shape[0], columns = bank->shape[1];
  if (num_tasks < 1 || num_tasks > kMaxTasks || columns < 2 || bank->strides[1] != 1) return std::nullopt;
  Rows rows;
  rows.num_tasks = static_cast<int>(num_tasks);
  Param p;
  p.numel = columns;
  p.dtype = *bank->dtype;
  const char* data = static_cast<const char*>(bank->data);
  for (int t = 0; t < rows.num_tasks; ++t) p.rows.push_back({data + t * bank->strides[0] * size_of(p.dtype), 1, t});
  if (out) {
    const std::optional<PythonTensor> result = read_tensor(out);
    if (!result || result->dtype != p.dtype || !result->is_vector(columns)) return std::nullopt;
    p.out.push_back(result->data);
  }
  rows.params.push_back(std::move(p));
  return rows;
}

bool run_gram(PyObject* const* args) {
  const std::optional<Rows> rows = read_bank(args[0], nullptr);
  const std::optional<PythonTensor> out = read_tensor(args[1]);
  if (!rows || !out || out->dtype != wide(rows->params[0].dtype) || !out->is_contiguous() ||
      out->numel() != int64_t{rows->num_tasks} * rows->num_tasks)
    return false;
  unlocked([&] {
    const std::vector<double> m = gram(*rows);
    if (out->dtype == DType::f64) std::copy(m.begin(), m.end(), static_cast<double*>(out->data));
    else
      std::transform(m.begin(), m.end(), static_cast<float*>(out->data),
                     [](double x) { return static_cast<float>(x); });
  });
  return true;
}

bool run_combine(PyObject* const* args) {
  const std::optional<Rows> rows = read_bank(args[1], args[2]);
  const std::optional<PythonTensor> given = read_tensor(args[0]);
  // a single weight may be held as its negative
  if (!rows || rows->num_tasks < 2 || !given || !given->is_vector(rows->num_tasks)) return false;
  std::vector<double> weights(static_cast<size_t>(rows->num_tasks));
  if (given->dtype == DType::f64) std::copy_n(static_cast<const double*>(given->data), weights.size(), weights.begin());
  else if (given->dtype == DType::f32)
    std::copy_n(static_cast<const float*>(given->data), weights.size(), weights.begin());
  else return false;
  unlocked([&] { combine(weights.data(), 1, *rows); });
  return true;
}

bool run_pcgrad(PyObject* const* args) {
  const std::optional<Rows> rows = read_bank(args[0], args[4]);
  if (!rows || !PyBool_Check(args[2]) || !PyBool_Check(args[3])) return false;
  const int64_t key = PyLong_AsLongLong(args[1]);
  const bool include_self = args[2] == Py_True, mean = args[3] == Py_True;
  if (PyErr_Occurred()) return false;
  unlocked([&] { combine(pcgrad_weights(gram(*rows), rows->num_tasks, key, include_self, mean).data(), 1, *rows); });
  return true;
}

}  // namespace

PyObject* gram_bank(PyObject*, PyObject* const* args, Py_ssize_t count) { return answered(run_gram, args, count, 2); }

PyObject* combine_bank(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return answered(run_combine, args, count, 3);
}

PyObject* pcgrad_bank(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return answered(run_pcgrad, args, count, 5);
}

}  // namespace fastmtl::cpu
