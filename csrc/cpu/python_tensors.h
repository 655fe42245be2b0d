// Tensors of Python as memory, past torch's dispatcher, on whose way to a kernel a list of tensors takes longer than a
// small layer does. They are read by the table of C functions that `torch.Tensor` offers: DLPack's exchange protocol,
// whose layout is fixed within a major version.
#pragma once

// must come before any standard header
#include <Python.h>

#include <cstdint>
#include <optional>

#include "common/params.h"

namespace fastmtl::cpu {

// A dense tensor on the CPU. It owns nothing: all of it holds while the tensor is alive and nobody changes it.
struct PythonTensor {
  void* data;
  int64_t dims;
  const int64_t* shape;
  const int64_t* strides;  // in elements
  bool is_int64;
  std::optional<DType> dtype;  // of floats
  bool is_vector(int64_t size) const { return dims == 1 && shape[0] == size && (strides[0] == 1 || size <= 1); }
};

// None: it is no plain tensor or parameter, does not lie in memory on the CPU, or torch offers no such table. Needs the
// interpreter's lock; leaves no error behind.
std::optional<PythonTensor> read_tensor(PyObject* tensor);

// A value of a dict of tensors, borrowed; null: it has none under this name, or is no dict.
PyObject* tensor_of(PyObject* dict, PyObject* name);

}  // namespace fastmtl::cpu
