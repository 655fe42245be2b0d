#include "cpu/task_weights/straight.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/python_calls.h"
#include "cpu/python_tensors.h"
#include "cpu/simd/kernels.h"
#include "cpu/task_weights/pictures.h"

namespace fastmtl::cpu {
namespace {

double number(const PythonTensor& x) {
  if (*x.dtype == DType::f64) return *static_cast<const double*>(x.data);
  if (*x.dtype == DType::f32) return static_cast<double>(*static_cast<const float*>(x.data));
  float wide = 0;
  kernels().widen[static_cast<int>(*x.dtype)](x.data, &wide, 1);
  return static_cast<double>(wide);
}

// --- batch norm by given statistics: nothing is summed, so each sample goes by itself, and is read once

// elements that are worth a thread of their own
constexpr int64_t kWorth = 32768;
// lines of a sample that a thread takes at a time
constexpr int64_t kMaxLines = 256;

// the numbers of one kind, by task: `[C]` each; null: a task without samples. Empty: tasks have no such numbers
struct Held {
  std::vector<const void*> data;
  DType dtype = DType::f32;
};

struct Given {
  Held weight, bias, mean, var;
  double eps = 0;
};

// what one task's samples are normalised by: the numbers of all channels, `rounds` times in a row
template <class S>
class Columns {
 public:
  Columns(const Given& given, const Pictures& p, int64_t rounds)
      : given_(given), p_(p), rounds_(rounds), room_(new S[static_cast<size_t>((4 + 3 * rounds) * p.channels)]) {}

  void take(int64_t task) {
    if (task == task_) return;
    task_ = task;
    const int64_t n = p_.channels;
    S* room = room_.get();
    const S* var = numbers(given_.var, room);
    const S* weight = given_.weight.data.empty() ? nullptr : numbers(given_.weight, room + n);
    // over the numbers that it is made of: each entry is read before it is written
    kernels().norms.scales[static_cast<int>(p_.dtype)](weight, var, given_.eps, n, room + n);
    if (given_.bias.data.empty()) std::fill_n(room + 2 * n, n, S(0));
    mean = repeated(numbers(given_.mean, room + 3 * n), 0);
    scale = repeated(room + n, 1);
    shift = repeated(given_.bias.data.empty() ? room + 2 * n : numbers(given_.bias, room + 2 * n), 2);
  }

  const S *mean = nullptr, *scale = nullptr, *shift = nullptr;

 private:
  // the task's numbers as S, in place or widened into `room`
  const S* numbers(const Held& held, S* room) const {
    const void* data = held.data[static_cast<size_t>(task_)];
    if (size_of(held.dtype) == sizeof(S)) return static_cast<const S*>(data);
    if constexpr (std::is_same_v<S, float>) {
      const char* from = static_cast<const char*>(data);
      for (int64_t c = 0; c < p_.channels; c += kBlock)
        kernels().widen[static_cast<int>(held.dtype)](from + c * size_of(held.dtype), room + c,
                                                      std::min(kBlock, p_.channels - c));
    }
    return room;
  }

  const S* repeated(const S* from, int64_t kind) {
    if (rounds_ == 1) return from;
    S* to = room_.get() + (4 + kind * rounds_) * p_.channels;
    for (int64_t r = 0; r < rounds_; ++r) std::copy_n(from, p_.channels, to + r * p_.channels);
    return to;
  }

  const Given& given_;
  const Pictures& p_;
  int64_t rounds_, task_ = -1;
  std::unique_ptr<S[]> room_;
};

// y lies as x does
template <class S>
void normalise(const char* x, const Pictures& p, const Sorted& batch, const Given& given, char* y) {
  const Norms& kernel = kernels().norms;
  const int dtype = static_cast<int>(p.dtype);
  // lines of a sample: channels, or rows of some pixels, the last of which may be shorter
  const int64_t together = p.rows ? std::clamp<int64_t>(kNormColumns / p.channels, 1, p.pixels) : 1;
  const int64_t columns = p.rows ? p.channels * together : p.pixels;
  const int64_t lines = p.rows ? (p.pixels + together - 1) / together : p.channels;
  const int64_t last = p.channels * p.pixels - (lines - 1) * columns;
  const int64_t part = std::clamp<int64_t>(kWorth / columns, 1, std::min(lines, kMaxLines));
  const int64_t parts = (lines + part - 1) / part;
  const int64_t grain = std::max<int64_t>(1, kWorth / (part * columns));
  auto some = [&](int64_t first, int64_t end) {
    Columns<S> own(given, p, together);
    int64_t task = 0;
    for (int64_t k = first; k < end; ++k) {
      const int64_t at = k / parts, line = k % parts * part, stop = std::min(line + part, lines);
      while (batch.offsets[task + 1] <= at) ++task;
      own.take(task);
      const int64_t place = batch.order[at] * p.of_sample() + line * columns * p.bytes;
      if (!p.rows) {
        kernel.channels_affine[dtype](x + place, stop - line, columns, own.mean + line, own.scale + line,
                                      own.shift + line, y + place);
        continue;
      }
      const int64_t whole = stop - line - (stop == lines && last < columns), rest = whole * columns * p.bytes;
      kernel.pixels_affine[dtype](x + place, whole, columns, own.mean, own.scale, own.shift, y + place);
      if (line + whole < stop)
        kernel.pixels_affine[dtype](x + place + rest, 1, last, own.mean, own.scale, own.shift, y + place + rest);
    }
  };
  torch::stable::parallel_for(0, p.samples * parts, grain, some);
}

// --- their arguments

std::optional<Pictures> pictures_of(const PythonTensor& x, const PythonTensor& y) {
  if (!x.dtype || x.dtype != y.dtype || x.dims != 4 || y.dims != 4) return std::nullopt;
  const int64_t n = x.shape[0], c = x.shape[1], h = x.shape[2], w = x.shape[3];
  if (n * c * h * w == 0) return std::nullopt;
  auto lies = [&](const PythonTensor& t, int64_t of_channel, int64_t of_row, int64_t of_column) {
    const int64_t expected[] = {c * h * w, of_channel, of_row, of_column};
    for (int d = 0; d < 4; ++d)
      if (t.shape[d] != x.shape[d] || (t.shape[d] > 1 && t.strides[d] != expected[d])) return false;
    return true;
  };
  const bool runs = lies(x, h * w, w, 1) && lies(y, h * w, w, 1);
  if (!runs && !(lies(x, 1, w * c, c) && lies(y, 1, w * c, c))) return std::nullopt;
  return Pictures{n, c, h * w, !runs, *x.dtype, size_of(*x.dtype)};
}

}  // namespace

std::optional<Sorted> sorted_of(PyObject* order_, PyObject* offsets_, int64_t num_tasks, int64_t samples) {
  const std::optional<PythonTensor> order = read_tensor(order_), offsets = read_tensor(offsets_);
  if (!order || !offsets || !order->is_int64 || !offsets->is_int64 || !order->is_vector(samples) ||
      !offsets->is_vector(num_tasks + 1))
    return std::nullopt;
  const Sorted batch{static_cast<const int64_t*>(order->data), static_cast<const int64_t*>(offsets->data), num_tasks};
  if (batch.offsets[0] != 0 || batch.offsets[num_tasks] != samples) return std::nullopt;
  for (int64_t t = 0; t < num_tasks; ++t)
    if (batch.offsets[t] > batch.offsets[t + 1]) return std::nullopt;
  for (int64_t i = 0; i < samples; ++i)
    if (batch.order[i] < 0 || batch.order[i] >= samples) return std::nullopt;
  return batch;
}

namespace {

// the numbers of the tasks that have samples; whether they can be read as they lie
bool read_held(PyObject* dict, PyObject* names, const std::vector<int64_t>& present, const Pictures& p, Kept& kept,
               Held* held) {
  if (dict == Py_None) return true;
  held->data.resize(static_cast<size_t>(PyTuple_GET_SIZE(names)));
  auto read = [&](PyObject* tensor, const std::optional<PythonTensor>& x, int64_t t) {
    if (!x || !x->dtype || !x->is_vector(p.channels) || (p.channels == 1 && is_negated(tensor))) return false;
    if (t == present[0]) held->dtype = *x->dtype;
    // read next, and not all of it: the rest follows
    __builtin_prefetch(x->data);
    held->data[static_cast<size_t>(t)] = x->data;
    return *x->dtype == held->dtype;
  };
  if (!read_tensors(dict, names, present, kept, read)) return false;
  return held->dtype == DType::f32 ? p.dtype != DType::f64 : held->dtype == p.dtype;
}

bool run_batch_norm(PyObject* const* args) {
  PyObject* names = args[2];
  const std::optional<PythonTensor> x = read_tensor(args[0]), y = read_tensor(args[1]);
  if (!x || !y || !PyTuple_Check(names) || args[5] == Py_None || args[6] == Py_None) return false;
  const std::optional<Pictures> p = pictures_of(*x, *y);
  if (!p) return false;
  const std::optional<Sorted> batch = sorted_of(args[7], args[8], PyTuple_GET_SIZE(names), p->samples);
  if (!batch) return false;
  std::vector<int64_t> present;
  for (int64_t t = 0; t < batch->num_tasks; ++t)
    if (batch->offsets[t] < batch->offsets[t + 1]) present.push_back(t);
  Kept kept;
  Given given;
  Held* const held[] = {&given.weight, &given.bias, &given.mean, &given.var};
  for (int k = 0; k < 4; ++k)
    if (!read_held(args[3 + k], names, present, *p, kept, held[k])) return false;
  given.eps = PyFloat_AsDouble(args[9]);
  if (PyErr_Occurred()) return false;
  const char* from = static_cast<const char*>(x->data);
  char* to = static_cast<char*>(y->data);
  unlocked([&] {
    if (p->dtype == DType::f64) normalise<double>(from, *p, *batch, given, to);
    else normalise<float>(from, *p, *batch, given, to);
  });
  return true;
}

// whether all are; none: one can't be read
std::optional<bool> are_closed(PyObject* gates, PyObject* names, PyObject* present, PyObject* limit) {
  if (!PyTuple_Check(names) || !PyTuple_Check(present)) return std::nullopt;
  const double below = limit == Py_None ? 0 : PyFloat_AsDouble(limit);
  std::vector<int64_t> positions;
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(present); ++k) {
    positions.push_back(PyLong_AsSsize_t(PyTuple_GET_ITEM(present, k)));
    if (positions.back() < 0 || positions.back() >= PyTuple_GET_SIZE(names)) return std::nullopt;
  }
  std::optional<DType> dtype;
  std::vector<std::pair<PyObject*, PythonTensor>> found;
  Kept kept;
  const bool read_all = read_tensors(gates, names, positions, kept, [&](PyObject* tensor, const auto& gate, int64_t) {
    if (!gate || !gate->dtype || gate->dims != 0 || (dtype && dtype != gate->dtype)) return false;
    dtype = gate->dtype;
    __builtin_prefetch(gate->data);
    found.emplace_back(tensor, *gate);
    return true;
  });
  if (!read_all) return std::nullopt;
  // closed, unless their memory holds the negatives. That is asked when all numbers are read, since other threads,
  // which may write other ones or free them, run meanwhile
  std::vector<PyObject*> unsure;
  for (const auto& [tensor, gate] : found) {
    const double value = number(gate);
    // not a number closes no gate
    if (!(limit == Py_None ? value == 0 : value < below)) return false;
    if (limit != Py_None && !(-value < below)) unsure.push_back(tensor);
  }
  return std::none_of(unsure.begin(), unsure.end(), is_negated);
}

}  // namespace

PyObject* has_variable(PyObject*, PyObject* name) {
  const char* text = PyUnicode_AsUTF8(name);
  return text ? PyBool_FromLong(std::getenv(text) != nullptr) : nullptr;
}

PyObject* all_closed(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 4) return PyErr_Format(PyExc_TypeError, "expected 4 arguments, got %zd", count);
  const std::optional<bool> closed = are_closed(args[0], args[1], args[2], args[3]);
  if (PyErr_Occurred()) return nullptr;
  if (!closed) Py_RETURN_NONE;
  return PyBool_FromLong(*closed);
}

PyObject* task_batch_norm_given(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return answered(run_batch_norm, args, count, 10);
}

}  // namespace fastmtl::cpu
