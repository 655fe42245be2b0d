// What Python calls on a `[T, P]` bank past torch's dispatcher -> bool: whether it was done. Otherwise nothing was, and
// the op serves the call. Results are contiguous.
#pragma once

// must come before any standard header
#include <Python.h>

namespace fastmtl::cpu {

// (grads, out): the Gram matrix, `[T, T]`
PyObject* gram_bank(PyObject* module, PyObject* const* args, Py_ssize_t count);

// (weights, grads, out): one sum, `[P]`
PyObject* combine_bank(PyObject* module, PyObject* const* args, Py_ssize_t count);

// (grads, key, include_self, mean, out): the update, `[P]`, in the order that the key draws
PyObject* pcgrad_bank(PyObject* module, PyObject* const* args, Py_ssize_t count);

}  // namespace fastmtl::cpu
