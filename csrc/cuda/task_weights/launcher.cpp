// From Python's tensors to the kernels of a whole layer: staging and product forward; staging, product and weight
// gradients backward. Everything is read where Python holds it, in each call anew, and memory for what lies between two
// launches is asked for once a call.
#include "cuda/task_weights/launcher.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/python_calls.h"
#include "cpu/python_tensors.h"
#include "cuda/task_weights/functions.h"

namespace fastmtl::cuda {

#if !defined(FASTMTL_WITH_CUDA)
const ConvFunctions* conv_functions() { return nullptr; }
#endif

namespace {

using cpu::Kept;
using cpu::PythonTensor;

const ConvFunctions* given = nullptr;

const ConvFunctions& functions() {
  const ConvFunctions* found = given ? given : conv_functions();
  if (!found) throw std::runtime_error("fastmtl: the extension was built without CUDA");
  return *found;
}

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error("fastmtl: " + what); }

void expect(bool holds, const char* what) {
  if (!holds) fail(what);
}

// --- what Python holds

// Tensors of one device, by their names in messages.
class Reader {
 public:
  explicit Reader(int32_t kind) : kind_(kind) {}

  PythonTensor tensor(PyObject* x, const char* name) {
    std::optional<PythonTensor> found = cpu::read_tensor(x, kind_);
    if (!found) fail(std::string(name) + ": expected a dense tensor with memory on the device of the kernels");
    if (device_ < 0) device_ = found->device;
    if (found->device != device_)
      fail(std::string(name) + ": expected device " + std::to_string(device_) + " as the other tensors, got " +
           std::to_string(found->device));
    return *found;
  }
  PythonTensor floats(PyObject* x, const char* name) {
    const PythonTensor found = tensor(x, name);
    if (!found.dtype) fail(std::string(name) + ": expected floats");
    return found;
  }
  std::optional<PythonTensor> optional(PyObject* x, const char* name) {
    if (x == Py_None) return std::nullopt;
    return floats(x, name);
  }
  int device() const { return device_; }

 private:
  int32_t kind_, device_ = -1;
};

std::vector<int64_t> read_numbers(PyObject* list) {
  expect(PyList_Check(list) || PyTuple_Check(list), "expected a list of numbers");
  std::vector<int64_t> found;
  for (Py_ssize_t k = 0; k < PySequence_Fast_GET_SIZE(list); ++k)
    found.push_back(PyLong_AsSsize_t(PySequence_Fast_GET_ITEM(list, k)));
  expect(!PyErr_Occurred(), "expected a list of numbers");
  return found;
}

// the tensors of a list, which `kept` keeps, since other threads may change it meanwhile
std::vector<PythonTensor> read_list(PyObject* list, Reader& reader, Kept& kept, const char* name) {
  expect(PyList_Check(list) || PyTuple_Check(list), "expected a list of tensors");
  std::vector<PyObject*> items;
  for (Py_ssize_t k = 0; k < PySequence_Fast_GET_SIZE(list); ++k) {
    items.push_back(PySequence_Fast_GET_ITEM(list, k));
    kept.add(items.back());
  }
  std::vector<PythonTensor> found;
  found.reserve(items.size());
  for (PyObject* x : items) found.push_back(reader.floats(x, name));
  return found;
}

// `[N, C, H, W]` with channels next to each other, or rows as pictures of one line
struct Pictures {
  void* data;
  DType dtype;
  int64_t n, c, h, w;
  PictureStrides strides;
};

// none: its channels lie apart, or its rows do
std::optional<Pictures> pictures_of(const PythonTensor& x, bool linear, int64_t samples) {
  Pictures p{x.data, *x.dtype, samples, 0, 0, 0, {}};
  if (linear) {
    expect(x.dims >= 2 && samples > 0, "x: expected rows");
    if (!x.is_contiguous()) return std::nullopt;
    p.c = x.shape[x.dims - 1];
    p.h = 1;
    p.w = p.c == 0 ? 0 : x.numel() / p.c / samples;
    expect(p.n * p.c * p.w == x.numel(), "x: expected as many rows for each sample");
    p.strides = {p.n == 1 ? 0 : p.w * p.c, 0, p.w == 1 ? 0 : p.c};
    return p;
  }
  expect(x.dims == 4 && x.shape[0] == samples, "x: expected shape [N, C, H, W]");
  if (x.shape[1] > 1 && x.strides[1] != 1) return std::nullopt;
  p.c = x.shape[1];
  p.h = x.shape[2];
  p.w = x.shape[3];
  auto stride = [&](int d) { return x.shape[d] == 1 ? 0 : x.strides[d]; };
  p.strides = {stride(0), stride(2), stride(3)};
  return p;
}

// The strides of one filter, the last dimensions of a tensor
FilterStrides filter_strides(const PythonTensor& w, bool linear) {
  const int64_t* s = w.strides + (w.dims - (linear ? 2 : 4));
  return linear ? FilterStrides{s[0], s[1], 0, 0} : FilterStrides{s[0], s[1], s[2], s[3]};
}

bool same(const FilterStrides& a, const FilterStrides& b) {
  return a.co == b.co && a.ci == b.ci && a.kh == b.kh && a.kw == b.kw;
}

// One filter for each task, or none for some
struct Filters {
  std::vector<PythonTensor> held;
  std::vector<int64_t> tasks;  // of those; none: one [T, ...] tensor
  std::vector<int64_t> words;  // addresses by task, 0: none
  FilterStrides strides{};

  bool stacked() const { return tasks.empty() && !held.empty(); }
};

// What a layer is told, as both directions have it.
struct Layer {
  bool linear = false;
  int64_t num_samples = 0, num_tasks = 0;
  std::optional<PythonTensor> weight, gate, bias;
  Filters delta;
  const int64_t *order = nullptr, *offsets = nullptr;
  std::vector<int64_t> moves;  // stride, padding, dilation; height and width each

  TaskBatch batch() const { return {order, offsets, num_samples, static_cast<int>(num_tasks), 1}; }
};
constexpr Py_ssize_t kLayerArguments = 8;

// whether all lie alike
bool read_filters(PyObject* list, PyObject* tasks, Reader& reader, Kept& kept, const Layer& layer, const char* name,
                  Filters* found) {
  found->held = read_list(list, reader, kept, name);
  found->tasks = read_numbers(tasks);
  if (found->held.empty()) return true;
  const bool stacked = found->tasks.empty();
  const int64_t dims = (layer.linear ? 2 : 4) + stacked;
  expect(stacked ? found->held.size() == 1 : found->held.size() == found->tasks.size(),
         "delta: expected one tensor for each of its tasks, or one for all");
  const PythonTensor& first = found->held[0];
  for (const PythonTensor& w : found->held) {
    expect(w.dims == dims && w.dtype == first.dtype && std::equal(w.shape, w.shape + dims, first.shape),
           "delta: expected filters of one shape and dtype");
  }
  found->strides = filter_strides(first, layer.linear);
  if (stacked) {
    expect(first.shape[0] == layer.num_tasks, "delta: expected one filter for each task");
    return true;
  }
  found->words.assign(static_cast<size_t>(layer.num_tasks), 0);
  for (size_t k = 0; k < found->held.size(); ++k) {
    const int64_t t = found->tasks[k];
    expect(t >= 0 && t < layer.num_tasks, "delta: expected tasks of the batch");
    found->words[static_cast<size_t>(t)] = reinterpret_cast<intptr_t>(found->held[k].data);
    if (!same(filter_strides(found->held[k], layer.linear), found->strides)) return false;
  }
  return true;
}

bool read_layer(PyObject* const* args, Reader& reader, Kept& kept, Layer* layer) {
  layer->linear = args[7] == Py_None;
  layer->moves = layer->linear ? std::vector<int64_t>{1, 1, 0, 0, 1, 1} : read_numbers(args[7]);
  expect(layer->moves.size() == 6, "expected stride, padding and dilation");
  const PythonTensor order = reader.tensor(args[5], "order"), offsets = reader.tensor(args[6], "offsets");
  expect(order.is_int64 && offsets.is_int64 && order.dims == 1 && offsets.dims == 1 && offsets.shape[0] >= 2,
         "order, offsets: expected a plan as task_plan makes it");
  if (!order.is_contiguous() || !offsets.is_contiguous()) return false;
  layer->num_samples = order.shape[0];
  layer->num_tasks = offsets.shape[0] - 1;
  layer->order = static_cast<const int64_t*>(order.data);
  layer->offsets = static_cast<const int64_t*>(offsets.data);
  layer->weight = reader.optional(args[0], "weight");
  layer->gate = reader.optional(args[3], "gate");
  layer->bias = reader.optional(args[4], "bias");
  if (layer->gate) {
    expect(layer->gate->dims == 1 && layer->gate->shape[0] == layer->num_tasks, "gate: expected shape [T]");
    if (!layer->gate->is_contiguous()) return false;
  }
  if (layer->bias && !layer->bias->is_contiguous()) return false;
  return read_filters(args[1], args[2], reader, kept, *layer, "delta", &layer->delta);
}

// paddings and dilations from here on are nobody's, and places computed with them stay in 64 bits
constexpr int64_t kFar = int64_t{1} << 29;

// x and y, or their gradients, as the filters `[Cout, Cin, kh, kw]` have it
ConvShape shape_of(const Layer& layer, const PythonTensor& filter, const Pictures& x, const Pictures& y) {
  const int64_t* size = filter.shape + (filter.dims - (layer.linear ? 2 : 4));
  const int64_t kernel[] = {layer.linear ? 1 : size[2], layer.linear ? 1 : size[3]};
  expect(x.c == size[1] && y.c == size[0], "x, weight: expected channels that agree");
  const int64_t in[] = {x.h, x.w}, out[] = {y.h, y.w};
  for (int d = 0; d < 2; ++d) {
    expect(layer.moves[2 + d] >= 0 && layer.moves[2 + d] < kFar && layer.moves[4 + d] >= 1 && layer.moves[4 + d] < kFar,
           "expected a padding and a dilation below 2^29");
    const int64_t stride = layer.moves[d],
                  room = in[d] + 2 * layer.moves[2 + d] - layer.moves[4 + d] * (kernel[d] - 1) - 1;
    expect(stride >= 1 && room >= 0 && out[d] == room / stride + 1,
           "expected pictures that the filter's moves agree with");
  }
  auto number = [](int64_t n) { return static_cast<int>(n); };
  return {number(x.c),
          number(y.c),
          number(x.h),
          number(x.w),
          number(y.h),
          number(y.w),
          number(kernel[0]),
          number(kernel[1]),
          number(layer.moves[0]),
          number(layer.moves[1]),
          number(layer.moves[2]),
          number(layer.moves[3]),
          number(layer.moves[4]),
          number(layer.moves[5])};
}

const PythonTensor& like(const Layer& layer, const Filters& grads) {
  if (layer.weight) return *layer.weight;
  if (!layer.delta.held.empty()) return layer.delta.held[0];
  expect(!grads.held.empty(), "weight, delta: expected at least one");
  return grads.held[0];
}

bool beside(const PythonTensor& p, DType x) { return *p.dtype == x || (*p.dtype == DType::f32 && size_of(x) == 2); }

// that weights, deltas, gate and bias are of one layer of x's; and the gradients, of those that are there
void check_layer(const Layer& layer, const Filters& grads, const PythonTensor& one, DType x) {
  const int64_t dims = layer.linear ? 2 : 4;
  expect(beside(one, x), "weight: expected the dtype of x, or float32 beside one of 16 bits");
  auto fits = [&](const PythonTensor& w) {
    return w.dtype == one.dtype && w.dims >= dims &&
           std::equal(w.shape + (w.dims - dims), w.shape + w.dims, one.shape + (one.dims - dims));
  };
  expect(!layer.weight || layer.weight->dims == dims, "weight: expected one filter");
  for (const Filters* filters : {&layer.delta, &grads})
    expect(filters->held.empty() || fits(filters->held[0]), "delta: expected the shape and dtype of the weight");
  for (const std::optional<PythonTensor>* p : {&layer.gate, &layer.bias})
    expect(!*p || beside(**p, x), "gate, bias: expected the dtype of x, or float32 beside one of 16 bits");
  for (const int64_t t : grads.tasks)
    expect(layer.delta.held.empty() || layer.delta.words.empty() || layer.delta.words[static_cast<size_t>(t)] != 0,
           "grad_delta: expected tasks that have a delta");
}

Values values_of(const std::optional<PythonTensor>& x) {
  return x ? Values{x->data, *x->dtype} : Values{nullptr, DType::f32};
}

// --- a call on its device

// how a message begins by which Python knows that memory was lacking
const std::string kNoMemory = "fastmtl: out of memory: no workspace of ";

// What the call holds until its launches are queued
struct Queue {
  const ConvFunctions& f;
  int device;
  Stream stream;
  std::vector<std::shared_ptr<const int64_t>> tables{};

  TaskPointers pointers(const Filters& filters) {
    if (filters.held.empty()) return TaskPointers{};
    const PythonTensor& first = filters.held[0];
    if (filters.stacked()) return TaskPointers::of_stacked(first.data, first.strides[0]);
    if (filters.words.size() <= kListed)
      return TaskPointers::of_list(filters.words.data(), static_cast<int>(filters.words.size()));
    const bool aligned16 =
        std::all_of(filters.words.begin(), filters.words.end(), [](int64_t word) { return word % 16 == 0; });
    tables.push_back(f.table(device, stream, filters.words));
    return TaskPointers::of_table(tables.back().get(), aligned16);
  }

  torch::stable::Tensor memory(int64_t bytes) const {
    using torch::headeronly::DeviceType;
    const bool host = f.device_kind == cpu::kOnCpu;
    const torch::stable::Device where(host ? DeviceType::CPU : DeviceType::CUDA, host ? 0 : device);
    try {
      return torch::stable::empty({std::max<int64_t>((bytes + 7) / 8, 1)}, torch::headeronly::ScalarType::Long,
                                  std::nullopt, where);
    } catch (const std::exception&) {
      // whose text names a file of torch's and no size
      throw std::runtime_error(kNoMemory + std::to_string(bytes) + " bytes");
    }
  }
};

StageParams stage_params(const Layer& layer, const ConvShape& shape, DType dtype, const TaskPointers& delta,
                         bool back) {
  StageParams p{};
  p.batch = layer.batch();
  p.shape = shape;
  p.for_input_gradient = back;
  p.dtype = dtype;
  p.weight_dtype = *like(layer, {}).dtype;
  if (layer.weight) {
    p.weight = layer.weight->data;
    p.weight_strides = filter_strides(*layer.weight, layer.linear);
  }
  p.delta = delta;
  p.delta_strides = layer.delta.strides;
  p.gate = values_of(layer.gate);
  return p;
}

ProductParams product_params(const Layer& layer, const ConvShape& shape, const Pictures& in, const Pictures& out,
                             bool back) {
  ProductParams p{};
  p.batch = layer.batch();
  p.shape = shape;
  p.input_gradient = back;
  p.dtype = in.dtype;
  p.in = in.data;
  p.in_strides = in.strides;
  p.out = out.data;
  p.out_strides = out.strides;
  return p;
}

void check_bias(const PythonTensor& bias, const Layer& layer, int64_t features) {
  expect(
      (bias.dims == 1 || (bias.dims == 2 && bias.shape[0] == layer.num_tasks)) && bias.shape[bias.dims - 1] == features,
      "bias: expected shape [Cout] or [T, Cout]");
}

// --- forward

bool run_forward(PyObject* const* args) {
  const ConvFunctions& f = functions();
  Reader reader(f.device_kind);
  Kept kept;
  Layer layer;
  if (!read_layer(args, reader, kept, &layer)) return false;
  const std::optional<Pictures> x = pictures_of(reader.floats(args[8], "x"), layer.linear, layer.num_samples);
  const std::optional<Pictures> y = pictures_of(reader.floats(args[9], "y"), layer.linear, layer.num_samples);
  if (!x || !y) return false;
  expect(x->dtype == y->dtype, "y: expected the dtype of x");
  const PythonTensor& one = like(layer, {});
  check_layer(layer, {}, one, x->dtype);
  const ConvShape shape = shape_of(layer, one, *x, *y);
  if (layer.bias) check_bias(*layer.bias, layer, y->c);
  cpu::unlocked([&] {
    f.on_device(reader.device(), [&](Stream stream) {
      Queue queue{f, reader.device(), stream};
      const StageParams stage = stage_params(layer, shape, x->dtype, queue.pointers(layer.delta), false);
      ProductParams p = product_params(layer, shape, *x, *y, false);
      std::optional<torch::stable::Tensor> memory;
      if (!f.weights_as_they_are(stage, &p.weights)) {
        memory = queue.memory(f.stage_bytes(stage));
        p.weights = f.stage(stage, memory->mutable_data_ptr(), stream);
        f.check("task_conv stage launch");
      }
      p.bias = values_of(layer.bias);
      p.bias_task_stride = layer.bias && layer.bias->dims == 2 ? shape.features : 0;
      f.product(p, f.num_sms(reader.device()), stream);
      f.check("task_conv product launch");
    });
  });
  return true;
}

// --- backward

bool run_backward(PyObject* const* args) {
  const ConvFunctions& f = functions();
  Reader reader(f.device_kind);
  Kept kept;
  Layer layer;
  if (!read_layer(args, reader, kept, &layer)) return false;
  const std::optional<Pictures> x = pictures_of(reader.floats(args[8], "x"), layer.linear, layer.num_samples);
  const std::optional<Pictures> grad_out =
      pictures_of(reader.floats(args[9], "grad_out"), layer.linear, layer.num_samples);
  if (!x || !grad_out) return false;
  expect(x->dtype == grad_out->dtype, "grad_out: expected the dtype of x");
  std::optional<Pictures> grad_x;
  if (args[10] != Py_None) {
    grad_x = pictures_of(reader.floats(args[10], "grad_x"), layer.linear, layer.num_samples);
    if (!grad_x) return false;
    expect(grad_x->dtype == x->dtype && grad_x->c == x->c && grad_x->h == x->h && grad_x->w == x->w,
           "grad_x: expected the shape and dtype of x");
  }
  const std::optional<PythonTensor> grad_weight = reader.optional(args[11], "grad_weight");
  Filters grads;
  if (!read_filters(args[12], args[13], reader, kept, layer, "grad_delta", &grads)) return false;
  const std::optional<PythonTensor> grad_gate = reader.optional(args[14], "grad_gate");
  const std::optional<PythonTensor> grad_bias = reader.optional(args[15], "grad_bias");
  const PythonTensor& one = like(layer, grads);
  check_layer(layer, grads, one, x->dtype);
  const ConvShape shape = shape_of(layer, one, *x, *grad_out);
  const int64_t dims = layer.linear ? 2 : 4;
  for (const std::optional<PythonTensor>* each :
       std::initializer_list<const std::optional<PythonTensor>*>{&grad_weight, &layer.weight})
    expect(!*each || ((*each)->dims == dims && (*each)->dtype == one.dtype &&
                      std::equal((*each)->shape, (*each)->shape + dims, one.shape + (one.dims - dims))),
           "grad_weight: expected the shape and dtype of the weight");
  expect(!grad_gate || (layer.gate && grad_gate->is_vector(layer.num_tasks) && grad_gate->dtype == layer.gate->dtype),
         "grad_gate: expected the shape and dtype of the gate");
  if (grad_bias) {
    check_bias(*grad_bias, layer, shape.features);
    expect(layer.bias && grad_bias->dims == layer.bias->dims && grad_bias->dtype == layer.bias->dtype,
           "grad_bias: expected the shape and dtype of the bias");
    expect(grad_bias->is_contiguous(), "grad_bias: expected contiguous memory");
  }
  cpu::unlocked([&] {
    f.on_device(reader.device(), [&](Stream stream) {
      Queue queue{f, reader.device(), stream};
      const int num_sms = f.num_sms(reader.device());
      const TaskPointers delta = queue.pointers(layer.delta);
      WeightGradParams w{};
      w.batch = layer.batch();
      w.shape = shape;
      w.dtype = x->dtype;
      w.x = x->data;
      w.x_strides = x->strides;
      w.grad_out = grad_out->data;
      w.grad_out_strides = grad_out->strides;
      w.weight_dtype = *one.dtype;
      w.delta = delta;
      w.delta_strides = layer.delta.strides;
      w.gate = values_of(layer.gate);
      w.grad_delta = queue.pointers(grads);
      w.grad_delta_strides = grads.strides;
      if (grad_weight) {
        w.grad_weight = grad_weight->data;
        w.grad_weight_strides = filter_strides(*grad_weight, layer.linear);
      }
      if (grad_gate) w.grad_gate = grad_gate->data;
      if (grad_bias) {
        w.grad_bias = grad_bias->data;
        w.grad_bias_dtype = *grad_bias->dtype;
        w.grad_bias_by_task = grad_bias->dims == 2;
      }
      const bool of_weights = grad_weight || !grads.held.empty() || grad_gate || grad_bias;
      WeightGradPlan plan{};
      int64_t bytes = 0;
      if (of_weights) {
        plan = f.plan_weight_grads(w, num_sms);
        bytes = plan.workspace_bytes;
      }
      StageParams stage{};
      if (grad_x) {
        stage = stage_params(layer, shape, x->dtype, delta, true);
        bytes = std::max(bytes, f.stage_bytes(stage));
      }
      // for both: launches of one stream come one after the other
      const torch::stable::Tensor memory = queue.memory(bytes);
      if (grad_x) {
        ProductParams p = product_params(layer, shape, *grad_out, *grad_x, true);
        if (!f.weights_as_they_are(stage, &p.weights)) {
          p.weights = f.stage(stage, memory.mutable_data_ptr(), stream);
          f.check("task_conv stage launch");
        }
        f.product(p, num_sms, stream);
        f.check("task_conv input gradient launch");
      }
      if (of_weights) {
        f.weight_grads(w, plan, memory.mutable_data_ptr(), stream);
        f.check("task_conv weight gradient launch");
      }
    });
  });
  return true;
}

// --- whether a layer's arguments fit

class Fitting {
 public:
  bool run(PyObject* const* args) {
    const bool linear = args[7] == Py_True;
    const int64_t groups = PyLong_AsSsize_t(args[8]), dims = linear ? 2 : 4;
    const auto x = read(args[9]);
    if (!x || !x->dtype || x->dims < 2 || (!linear && x->dims != 4) || groups < 1) return false;
    x_ = *x->dtype;
    // W, and the deltas in its shape and dtype
    if (args[0] != Py_None && !weight(args[0], dims, 0)) return false;
    PyObject* const deltas = args[1];
    if (PyList_Check(deltas) || PyTuple_Check(deltas)) {
      if (!count(PySequence_Fast_GET_SIZE(deltas))) return false;
      for (Py_ssize_t k = 0; k < PySequence_Fast_GET_SIZE(deltas); ++k) {
        PyObject* const one = PySequence_Fast_GET_ITEM(deltas, k);
        if (one != Py_None && !weight(one, dims, 0)) return false;
      }
    } else if (deltas != Py_None && !weight(deltas, dims, 1)) {
      return false;
    }
    if (shape_.empty()) return false;
    if (args[2] != Py_None) {
      const auto gate = read(args[2]);
      if (!gate || !beside(*gate) || gate->dims != 1 || !count(gate->shape[0])) return false;
    }
    if (args[3] != Py_None) {
      const auto bias = read(args[3]);
      if (!bias || !beside(*bias) || bias->dims < 1 || bias->dims > 2) return false;
      if (bias->shape[bias->dims - 1] != shape_[0] || (bias->dims == 2 && !count(bias->shape[0]))) return false;
    }
    const int64_t channels = x->shape[linear ? x->dims - 1 : 1];
    if (shape_[1] < 1 || channels != shape_[1] * groups || shape_[0] % groups != 0) return false;
    // the batch, sorted
    const auto ids = read(args[4]), order = read(args[5]), offsets = read(args[6]);
    if (!ids || !order || !offsets || ids->dtype || !order->is_int64 || !offsets->is_int64) return false;
    if (ids->dims < 1 || (linear ? ids->dims >= x->dims : ids->dims != 1)) return false;
    for (int64_t d = 0; d < ids->dims; ++d)
      if (ids->shape[d] != x->shape[d]) return false;
    return num_tasks_ > 0 && order->dims == 1 && order->shape[0] == ids->numel() && offsets->dims == 1 &&
           offsets->shape[0] == num_tasks_ + 1;
  }

 private:
  std::optional<PythonTensor> read(PyObject* tensor) {
    auto found = cpu::read_tensor(tensor, cpu::kAnywhere);
    if (!found) return found;
    if (kind_ < 0) {
      kind_ = found->device_kind;
      device_ = found->device;
    }
    if (found->device_kind != kind_ || found->device != device_) return std::nullopt;
    return found;
  }
  bool beside(const PythonTensor& p) const { return p.dtype && cuda::beside(p, x_); }
  bool count(int64_t tasks) {
    if (num_tasks_ < 0) num_tasks_ = tasks;
    return tasks == num_tasks_;
  }
  bool weight(PyObject* tensor, int64_t dims, int64_t skip) {
    const auto w = read(tensor);
    if (!w || !beside(*w) || w->dims != dims + skip || (skip && !count(w->shape[0]))) return false;
    if (shape_.empty()) {
      shape_.assign(w->shape + skip, w->shape + w->dims);
      dtype_ = *w->dtype;
      return true;
    }
    return *w->dtype == dtype_ && std::equal(shape_.begin(), shape_.end(), w->shape + skip);
  }

  int32_t kind_ = -1, device_ = -1;
  DType x_ = DType::f32, dtype_ = DType::f32;
  std::vector<int64_t> shape_;  // of one weight
  int64_t num_tasks_ = -1;
};

}  // namespace

PyObject* task_layer_fits(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return cpu::answered([](PyObject* const* a) { return Fitting().run(a); }, args, count, 10);
}

PyObject* task_conv_launch(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return cpu::answered(run_forward, args, count, kLayerArguments + 2);
}

PyObject* task_conv_launch_backward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return cpu::answered(run_backward, args, count, kLayerArguments + 8);
}

PyObject* task_conv_refusal(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr Py_ssize_t kSizes = 14;
  int sizes[kSizes + 2] = {};
  if (count != kSizes + 2) return PyErr_Format(PyExc_TypeError, "expected 16 numbers, got %zd", count);
  for (Py_ssize_t k = 0; k < count; ++k) {
    const Py_ssize_t n = PyLong_AsSsize_t(args[k]);
    if (PyErr_Occurred()) return nullptr;
    sizes[k] = static_cast<int>(std::min<Py_ssize_t>(n, 1 << 30));  // which is refused all the same
  }
  ConvShape shape;
  static_assert(sizeof(shape) == kSizes * sizeof(int));
  std::memcpy(&shape, sizes + 1, sizeof(shape));
  try {
    const char* found = functions().refusal(static_cast<DType>(sizes[0]), shape, sizes[kSizes + 1]);
    return found ? PyUnicode_FromString(found) : Py_NewRef(Py_None);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyObject* use_conv_functions(PyObject*, PyObject* address) {
  const auto* found = static_cast<const ConvFunctions*>(PyLong_AsVoidPtr(address));
  if (PyErr_Occurred()) return nullptr;
  int64_t bytes[5];
  note_bytes(bytes);
  if (found && !std::equal(bytes, bytes + 5, found->bytes)) {
    PyErr_SetString(PyExc_RuntimeError, "fastmtl: these functions were built from another launch.h");
    return nullptr;
  }
  given = found;
  Py_RETURN_NONE;
}

}  // namespace fastmtl::cuda
