// What Python calls for a layer with per-task weights on a GPU, past torch's dispatcher;
// fastmtl/ops/task_weights/cuda.py says what these take. They throw, in words, where arguments do not fit, and return
// False where one lies in memory in a way that the kernels do not read: the caller then copies it.
#pragma once

// must come before any standard header
#include <Python.h>

namespace fastmtl::cuda {

// (weight, deltas, tasks, gate, bias, order, offsets, moves, x, y) -> bool
PyObject* task_conv_launch(PyObject* module, PyObject* const* args, Py_ssize_t count);

// (weight, deltas, tasks, gate, bias, order, offsets, moves, x, grad_out, grad_x, grad_weight, grad_deltas, grad_tasks,
// grad_gate, grad_bias) -> bool
PyObject* task_conv_launch_backward(PyObject* module, PyObject* const* args, Py_ssize_t count);

// (weight, deltas, gate, bias, ids, order, offsets, linear, groups, x) -> bool: whether the arguments of a layer fit
// each other, as its checks in Python have it, which say what does not; but for the geometry. deltas: a list of tensors
// and Nones, one tensor for all tasks, or None. On any device.
PyObject* task_layer_fits(PyObject* module, PyObject* const* args, Py_ssize_t count);

// (dtype, 14 sizes of a ConvShape, num_tasks) -> why these kernels do not take it, or None
PyObject* task_conv_refusal(PyObject* module, PyObject* const* args, Py_ssize_t count);

// (address) -> None: a table of functions to use in the place of CUDA's; 0: CUDA's again
PyObject* use_conv_functions(PyObject* module, PyObject* address);

}  // namespace fastmtl::cuda
