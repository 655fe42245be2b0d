// What Python calls past torch's dispatcher; fastmtl/ops/task_weights/cpu says what they take.
#pragma once

// must come before any standard header
#include <Python.h>

namespace fastmtl::cpu {

// (name) -> bool: whether the environment has such a variable. `os.environ.get` raises and catches an error to say no
PyObject* has_variable(PyObject* module, PyObject* name);

// (gates, names, present, limit) -> bool, or None
PyObject* all_closed(PyObject* module, PyObject* const* args, Py_ssize_t count);

// (x, y, names, weight, bias, mean, var, order, offsets, eps) -> bool
PyObject* task_batch_norm_given(PyObject* module, PyObject* const* args, Py_ssize_t count);

}  // namespace fastmtl::cpu
