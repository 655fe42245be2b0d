// What Python calls past torch's dispatcher; fastmtl/ops/task_weights/cpu says what they take.
#pragma once

// must come before any standard header
#include <Python.h>

#include <optional>

#include "cpu/python_tensors.h"

namespace fastmtl::cpu {

// samples in the order of their tasks
struct Sorted {
  const int64_t* order;
  const int64_t* offsets;
  int64_t num_tasks;
};

// A plan of all samples; none: it is not one of so many tasks and samples.
std::optional<Sorted> sorted_of(PyObject* order, PyObject* offsets, int64_t num_tasks, int64_t samples);

// (name) -> bool: whether the environment has such a variable. `os.environ.get` raises and catches an error to say no
PyObject* has_variable(PyObject* module, PyObject* name);

// (gates, names, present, limit) -> bool, or None
PyObject* all_closed(PyObject* module, PyObject* const* args, Py_ssize_t count);

// (x, y, names, weight, bias, mean, var, order, offsets, eps) -> bool
PyObject* task_batch_norm_given(PyObject* module, PyObject* const* args, Py_ssize_t count);

// A layer with per-task weights, forward and backward -> bool: whether the direct product serves all of it, and did it.
// (weight, deltas, tasks, gate, order, offsets, geometry, num_tasks, ids, x, bias, limit, times, y)
PyObject* task_conv_few(PyObject* module, PyObject* const* args, Py_ssize_t count);

// (weight, deltas, tasks, gate, order, offsets, geometry, x, grad_out, limit_x, limit_weight, times, grad_x,
// grad_weight, grad_deltas, grad_gate, grad_bias)
PyObject* task_conv_few_backward(PyObject* module, PyObject* const* args, Py_ssize_t count);

}  // namespace fastmtl::cpu
