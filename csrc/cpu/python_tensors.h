// Tensors of Python as memory, past torch's dispatcher, on whose way to a kernel a list of tensors takes longer than a
// small layer does. They are read by the table of C functions that `torch.Tensor` offers: DLPack's exchange protocol,
// whose layout is fixed within a major version.
#pragma once

// must come before any standard header
#include <Python.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "common/params.h"

namespace fastmtl::cpu {

// A dense tensor. It owns nothing: all of it holds while the tensor is alive and nobody changes it.
struct PythonTensor {
  void* data;
  int64_t dims;
  const int64_t* shape;
  const int64_t* strides;  // in elements
  bool is_int64;
  std::optional<DType> dtype;   // of floats
  int32_t device_kind, device;  // and its number
  int64_t numel() const;
  bool is_contiguous() const;  // strides of dimensions of size 1 do not count
  bool is_vector(int64_t size) const { return dims == 1 && shape[0] == size && (strides[0] == 1 || size <= 1); }
};

// To be called while the module is imported.
void set_up_tensors();

// kinds of devices, by DLPack
constexpr int32_t kAnywhere = 0, kOnCpu = 1, kOnCuda = 2;

// None: it is no plain tensor or parameter, does not lie in memory on such a device, or torch offers no such table.
// Needs the interpreter's lock; leaves no error behind. Of a tensor that `is_negated` the memory holds the negatives.
std::optional<PythonTensor> read_tensor(PyObject* tensor, int32_t device_kind = kOnCpu);

// Whether torch negates the numbers whenever they are read, as it does with the imaginary part of a conjugate. Only
// views of every other number, single numbers, and what `as_strided` makes of one are such ones. Other threads may run
// meanwhile: what was read before holds no longer, and objects that nobody keeps may be gone.
bool is_negated(PyObject* tensor);

// Python objects that stay alive meanwhile
class Kept {
 public:
  Kept() = default;
  Kept(const Kept&) = delete;
  Kept& operator=(const Kept&) = delete;
  ~Kept() {
    for (PyObject* x : kept_) Py_DECREF(x);
  }
  void add(PyObject* x) { kept_.push_back(Py_NewRef(x)); }

 private:
  std::vector<PyObject*> kept_;
};

// A value of a dict, borrowed; null: it has none under this name.
PyObject* value_of(PyObject* dict, PyObject* name);

// Ask for what `read_tensor` will read behind the object: torch's own tensor, which is returned, and that one's
// storage.
const void* prefetch_tensor(PyObject* tensor);
void prefetch_storage(const void* tensor);

// Reads those of some tasks, by their names in a dict: visit(tensor, what it is, position) of each position, in order,
// until it returns false; `kept` keeps them. Each takes some five lines of memory that a network's other layers have
// driven out of the cache, so that all are asked for before the first is read. Whether it came to the end.
template <class Visit>
bool read_tensors(PyObject* dict, PyObject* names, const std::vector<int64_t>& positions, Kept& kept,
                  const Visit& visit) {
  if (!PyDict_Check(dict)) return false;
  std::vector<PyObject*> found;
  found.reserve(positions.size());
  for (const int64_t t : positions) {
    found.push_back(value_of(dict, PyTuple_GET_ITEM(names, t)));
    if (!found.back()) return false;
    kept.add(found.back());
    __builtin_prefetch(found.back());
  }
  std::vector<const void*> own;
  own.reserve(positions.size());
  for (PyObject* tensor : found) own.push_back(prefetch_tensor(tensor));
  for (const void* tensor : own) prefetch_storage(tensor);
  for (size_t k = 0; k < found.size(); ++k)
    if (!visit(found[k], read_tensor(found[k]), positions[k])) return false;
  return true;
}

}  // namespace fastmtl::cpu
