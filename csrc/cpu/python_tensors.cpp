#include "cpu/python_tensors.h"

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
constexpr int32_t kCpu = 1;
constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4;

struct Torch {
  PyTypeObject* tensor = nullptr;
  PyTypeObject* parameter = nullptr;
  int (*read)(void* tensor, Exported* out) = nullptr;
};

PyObject* attribute(PyObject* of, const char* name) { return of ? PyObject_GetAttrString(of, name) : nullptr; }

Torch find_torch() {
  Torch found;
  // what is found is kept for the life of the process
  PyObject* torch = PyImport_ImportModule("torch");
  PyObject* tensor = attribute(torch, "Tensor");
  PyObject* parameter = attribute(attribute(torch, "nn"), "Parameter");
  PyObject* capsule = attribute(tensor, "__dlpack_c_exchange_api__");
  if (capsule && parameter && PyType_Check(tensor) && PyType_Check(parameter) &&
      PyCapsule_IsValid(capsule, "dlpack_exchange_api")) {
    const auto* table = static_cast<ExchangeTable*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    while (table && table->major != kMajor) table = table->previous;
    found.tensor = reinterpret_cast<PyTypeObject*>(tensor);
    found.parameter = reinterpret_cast<PyTypeObject*>(parameter);
    found.read = table ? table->export_borrowed : nullptr;
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

}  // namespace

std::optional<PythonTensor> read_tensor(PyObject* tensor) {
  static const Torch torch = find_torch();
  if (!torch.read || !tensor || (Py_TYPE(tensor) != torch.tensor && Py_TYPE(tensor) != torch.parameter))
    return std::nullopt;
  Exported x{};
  if (torch.read(tensor, &x) != 0) {
    // one that a transform of functions wraps has no memory of its own
    PyErr_Clear();
    return std::nullopt;
  }
  if (x.device.type != kCpu || !x.data || (x.dims > 0 && (!x.shape || !x.strides))) return std::nullopt;
  const bool is_int64 = x.element.code == kInt && x.element.bits == 64 && x.element.lanes == 1;
  return PythonTensor{static_cast<char*>(x.data) + x.byte_offset, x.dims, x.shape, x.strides, is_int64,
                      float_type(x.element)};
}

PyObject* tensor_of(PyObject* dict, PyObject* name) {
  if (!PyDict_Check(dict)) return nullptr;
  PyObject* found = PyDict_GetItemWithError(dict, name);
  if (!found) PyErr_Clear();
  return found;
}

}  // namespace fastmtl::cpu
