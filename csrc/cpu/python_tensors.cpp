#include "cpu/python_tensors.h"

#include <cstddef>

namespace fastmtl::cpu {
namespace {

// what DLPack 1.x lays down; torch's own copy of its header is not for users of the stable ABI
struct Device {
  int32_t type, id;
};
struct Element {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Exported {
  void* data;
  Device device;
  int32_t dims;
  Element element;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct ExchangeTable {
  uint32_t major, minor;
  ExchangeTable* previous;
  void* allocate;
  void* to_managed;
  void* from_managed;
  int (*export_borrowed)(void* tensor, Exported* out);  // 0, or a Python error is set
  void* current_stream;
};
constexpr uint32_t kMajor = 1;
constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4;

struct Torch {
  PyTypeObject* tensor = nullptr;
  PyTypeObject* parameter = nullptr;
  int (*read)(void* tensor, Exported* out) = nullptr;
  // words of a tensor object at which torch's own tensor lies, and of that at which its storage does; 0: unknown. Only
  // what is asked for ahead of time hangs on them
  size_t of_tensor = 0, of_storage = 0;
};

PyObject* attribute(PyObject* of, const char* name) { return of ? PyObject_GetAttrString(of, name) : nullptr; }

PyObject* called(PyObject* of, const char* method) { return of ? PyObject_CallMethod(of, method, nullptr) : nullptr; }

// the address that torch's own objects tell Python as `_cdata`; 0: none
uintptr_t address(PyObject* of) {
  PyObject* number = attribute(of, "_cdata");
  void* found = number && PyLong_Check(number) ? PyLong_AsVoidPtr(number) : nullptr;
  Py_XDECREF(number);
  return reinterpret_cast<uintptr_t>(found);
}

// the word, of the first few behind a head, that holds an address; 0: none
size_t word_of(const void* object, uintptr_t wanted) {
  const auto* words = static_cast<const uintptr_t*>(object);
  for (size_t k = 1; wanted && k < 4; ++k)
    if (words[k] == wanted) return k;
  return 0;
}

Torch find_torch() {
  Torch found;
  // what is found is kept for the life of the process
  PyObject* module = PyImport_ImportModule("torch");
  PyObject* tensor = attribute(module, "Tensor");
  PyObject* parameter = attribute(attribute(module, "nn"), "Parameter");
  PyObject* capsule = attribute(tensor, "__dlpack_c_exchange_api__");
  if (capsule && parameter && PyType_Check(tensor) && PyType_Check(parameter) &&
      PyCapsule_IsValid(capsule, "dlpack_exchange_api")) {
    const auto* table = static_cast<ExchangeTable*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    while (table && table->major != kMajor) table = table->previous;
    found.tensor = reinterpret_cast<PyTypeObject*>(tensor);
    found.parameter = reinterpret_cast<PyTypeObject*>(parameter);
    found.read = table ? table->export_borrowed : nullptr;
    PyObject* sample = PyObject_CallFunction(tensor, "(i)", 1);
    PyObject* storage = called(sample, "untyped_storage");
    const uintptr_t own = address(sample);
    found.of_tensor = sample ? word_of(sample, own) : 0;
    found.of_storage = own ? word_of(reinterpret_cast<const void*>(own), address(storage)) : 0;
    Py_XDECREF(storage);
    Py_XDECREF(sample);
  }
  PyErr_Clear();
  return found;
}

std::optional<DType> float_type(const Element& e) {
  if (e.lanes != 1) return std::nullopt;
  if (e.code == kBfloat && e.bits == 16) return DType::bf16;
  if (e.code != kFloat) return std::nullopt;
  if (e.bits == 32) return DType::f32;
  if (e.bits == 64) return DType::f64;
  return e.bits == 16 ? std::optional(DType::f16) : std::nullopt;
}

// written once, while the module is imported: a static of a function would be guarded by a lock that a thread could
// wait for while it holds the interpreter's
Torch known;

bool is_tensor(PyObject* x) { return Py_TYPE(x) == known.tensor || Py_TYPE(x) == known.parameter; }

}  // namespace

int64_t PythonTensor::numel() const {
  int64_t count = 1;
  for (int64_t d = 0; d < dims; ++d) count *= shape[d];
  return count;
}

bool PythonTensor::is_contiguous() const {
  int64_t expected = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    if (shape[d] > 1 && strides[d] != expected) return false;
    expected *= shape[d];
  }
  return true;
}

void set_up_tensors() { known = find_torch(); }

bool is_negated(PyObject* tensor) {
  PyObject* found = called(tensor, "is_neg");
  const bool negated = found != Py_False;
  Py_XDECREF(found);
  PyErr_Clear();
  return negated;
}

std::optional<PythonTensor> read_tensor(PyObject* tensor, int32_t device_kind) {
  if (!known.read || !is_tensor(tensor)) return std::nullopt;
  Exported x{};
  if (known.read(tensor, &x) != 0) {
    // one that a transform of functions wraps has no memory of its own
    PyErr_Clear();
    return std::nullopt;
  }
  if ((device_kind != kAnywhere && x.device.type != device_kind) || !x.data || (x.dims > 0 && (!x.shape || !x.strides)))
    return std::nullopt;
  const bool is_int64 = x.element.code == kInt && x.element.bits == 64 && x.element.lanes == 1;
  return PythonTensor{static_cast<char*>(x.data) + x.byte_offset,
                      x.dims,
                      x.shape,
                      x.strides,
                      is_int64,
                      float_type(x.element),
                      x.device.type,
                      x.device.id};
}

PyObject* value_of(PyObject* dict, PyObject* name) {
  PyObject* found = PyDict_GetItemWithError(dict, name);
  if (!found) PyErr_Clear();
  return found;
}

const void* prefetch_tensor(PyObject* tensor) {
  if (!known.of_tensor || !is_tensor(tensor)) return nullptr;
  const auto* own = reinterpret_cast<const char* const*>(tensor)[known.of_tensor];
  for (int line = 0; line < 4; ++line) __builtin_prefetch(own + 64 * line);
  return own;
}

void prefetch_storage(const void* tensor) {
  if (!tensor || !known.of_storage) return;
  __builtin_prefetch(static_cast<const char* const*>(tensor)[known.of_storage]);
}

}  // namespace fastmtl::cpu
