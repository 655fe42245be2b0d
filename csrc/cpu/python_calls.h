// What all functions share that Python calls past torch's dispatcher.
#pragma once

// must come before any standard header
#include <Python.h>

#include <exception>

namespace fastmtl::cpu {

// Runs without the interpreter's lock; what is thrown there is thrown here.
template <class F>
void unlocked(const F& run) {
  PyThreadState* state = PyEval_SaveThread();
  std::exception_ptr error;
  try {
    run();
  } catch (...) {
    error = std::current_exception();
  }
  PyEval_RestoreThread(state);
  if (error) std::rethrow_exception(error);
}

// run(args) as a function of Python, which tells whether it was done; null: a Python error is set.
template <class F>
PyObject* answered(const F& run, PyObject* const* args, Py_ssize_t count, Py_ssize_t expected) {
  if (count != expected) {
    PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", expected, count);
    return nullptr;
  }
  try {
    const bool done = run(args);
    return PyErr_Occurred() ? nullptr : PyBool_FromLong(done);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

}  // namespace fastmtl::cpu
