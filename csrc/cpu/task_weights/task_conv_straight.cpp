// A layer with per-task weights of whose batch the direct product serves every segment: one call of Python's forward
// and one backward. Everything is read where Python holds it, in each call anew.
#include "cpu/task_weights/straight.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/pages.h"
#include "cpu/python_calls.h"
#include "cpu/task_weights/task_conv.h"

namespace fastmtl::cpu {
namespace {

constexpr int64_t kHuge = int64_t{4} << 20;  // bytes of a result that asks for huge pages

// --- what Python holds

// float32, at least two numbers: the memory of a single one may hold its negative
std::optional<PythonTensor> read_floats(PyObject* tensor) {
  std::optional<PythonTensor> x = read_tensor(tensor);
  if (!x || x->dtype != DType::f32) return std::nullopt;
  return x->numel() > 1 ? x : std::nullopt;
}

// the last four dimensions, without gaps in NCHW, or with the channels of a pixel side by side
bool lies(const PythonTensor& x, bool last) {
  const int64_t* size = x.shape + (x.dims - 4);
  const int64_t* stride = x.strides + (x.dims - 4);
  const int64_t c = size[1], h = size[2], w = size[3];
  const int64_t expected[] = {c * h * w, last ? 1 : h * w, last ? w * c : w, last ? c : 1};
  for (int d = 0; d < 4; ++d)
    if (size[d] > 1 && stride[d] != expected[d]) return false;
  return true;
}

// `[N, C, H, W]` as it lies, or rows as pictures of one line
std::optional<Image> read_pictures(PyObject* tensor, bool linear, int64_t samples) {
  const std::optional<PythonTensor> x = read_floats(tensor);
  if (!x) return std::nullopt;
  Image image{static_cast<float*>(x->data), {}, {}};
  if (!linear) {
    if (x->dims != 4 || x->shape[0] != samples || !(lies(*x, false) || lies(*x, true))) return std::nullopt;
    std::copy_n(x->shape, 4, image.size);
    std::copy_n(x->strides, 4, image.stride);
    return image;
  }
  if (x->dims < 2 || !x->is_contiguous() || samples < 1) return std::nullopt;
  const int64_t columns = x->shape[x->dims - 1];
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x->dims; ++d) rows *= x->shape[d];
  if (columns < 1 || rows % samples) return std::nullopt;
  rows /= samples;
  const int64_t size[] = {samples, columns, 1, rows}, stride[] = {rows * columns, 1, rows * columns, columns};
  std::copy_n(size, 4, image.size);
  std::copy_n(stride, 4, image.stride);
  return image;
}

// the tensors of a list or tuple, which `kept` keeps; none where one is None
bool read_items(PyObject* list, Kept& kept, std::vector<PyObject*>* found) {
  if (!PyList_Check(list) && !PyTuple_Check(list)) return false;
  for (Py_ssize_t k = 0; k < PySequence_Fast_GET_SIZE(list); ++k) {
    found->push_back(PySequence_Fast_GET_ITEM(list, k));
    kept.add(found->back());
  }
  std::vector<const void*> own;
  own.reserve(found->size());
  for (PyObject* tensor : *found) own.push_back(prefetch_tensor(tensor));
  for (const void* tensor : own) prefetch_storage(tensor);
  return true;
}

bool read_numbers(PyObject* list, std::vector<int64_t>* found) {
  if (!PyList_Check(list) && !PyTuple_Check(list)) return false;
  for (Py_ssize_t k = 0; k < PySequence_Fast_GET_SIZE(list); ++k)
    found->push_back(PyLong_AsSsize_t(PySequence_Fast_GET_ITEM(list, k)));
  return !PyErr_Occurred();
}

// --- a layer

struct Part {
  int64_t task;  // whose weight its samples see; -1: W itself
  const int64_t* samples;
  int64_t count;
};

struct Layer {
  bool linear = false, stacked = false;
  int64_t num_tasks = 0, num_samples = 0;
  Filter filter{};
  Weights shared;                  // its size, and W, if there is one
  std::vector<int64_t> positions;  // of the deltas' tasks
  std::vector<float*> deltas;      // by task
  const float* gates = nullptr;    // none: all 1
  const int64_t *order = nullptr, *offsets = nullptr;

  int64_t size() const { return shared.rows * shared.length; }
  int64_t count(int64_t t) const { return offsets[t + 1] - offsets[t]; }
  float gate(int64_t t) const { return gates ? gates[t] : 1.0f; }
  bool is_open(int64_t t) const { return deltas[t] && gate(t) != 0; }
  Part part(int64_t t) const { return {t, order + offsets[t], count(t)}; }
  Weights weights(int64_t t) const {
    Weights found = shared;
    if (t >= 0) {
      found.delta = reinterpret_cast<const char*>(deltas[t]);
      found.gate = gate(t);
    }
    return found;
  }
  // the samples of some tasks, in the order of the batch
  template <class Choose>
  std::vector<int64_t> samples(const Choose& choose) const {
    std::vector<int64_t> found;
    for (int64_t t = 0; t < num_tasks; ++t)
      if (choose(t)) found.insert(found.end(), order + offsets[t], order + offsets[t + 1]);
    std::sort(found.begin(), found.end());
    return found;
  }

  // whether a tensor lies as a weight of this layer, or `T` of them
  bool is_weight(const std::optional<PythonTensor>& w, bool several) const {
    const int64_t dims = (linear ? 2 : 4) + several;
    if (!w || w->dims != dims || (several && w->shape[0] != num_tasks)) return false;
    const int64_t* size = w->shape + several;
    if (size[0] != shared.rows || size[1] != filter.channels) return false;
    if (linear) return w->is_contiguous();
    if (size[2] != filter.kernel[0] || size[3] != filter.kernel[1]) return false;
    return several ? (!filter.last || filter.taps() == 1) && w->is_contiguous() : lies(*w, filter.last);
  }
};

// What both directions are told, in this order: weight, deltas, their tasks (none: one `[T, ...]` tensor), gate, order,
// offsets, geometry (stride, padding, dilation, height and width each; None: a linear layer), and the number of
// channels of x, once that is known.
constexpr Py_ssize_t kLayerArguments = 7;

bool read_layer(PyObject* const* args, int64_t num_tasks, Kept& kept, Layer* layer) {
  const bool has_weight = args[0] != Py_None;
  layer->linear = args[6] == Py_None;
  layer->num_tasks = num_tasks;
  std::vector<PyObject*> items;
  if (!read_items(args[1], kept, &items) || !read_numbers(args[2], &layer->positions)) return false;
  layer->stacked = layer->positions.empty() && items.size() == 1;
  if (!layer->stacked && layer->positions.size() != items.size()) return false;
  // its size, from W or the first delta
  if (!has_weight && items.empty()) return false;
  const std::optional<PythonTensor> weight = has_weight ? read_floats(args[0]) : std::nullopt;
  const std::optional<PythonTensor> like = has_weight ? weight : read_floats(items[0]);
  const int64_t skip = !has_weight && layer->stacked, dims = layer->linear ? 2 : 4;
  if (!like || like->dims != dims + skip) return false;
  const int64_t* size = like->shape + skip;
  Filter& f = layer->filter;
  f = {size[1], {1, 1}, {1, 1}, {0, 0}, {1, 1}, true};
  if (!layer->linear) {
    std::vector<int64_t> moves;
    if (!read_numbers(args[6], &moves) || moves.size() != 6) return false;
    f = {size[1], {size[2], size[3]}, {moves[0], moves[1]}, {moves[2], moves[3]}, {moves[4], moves[5]}, true};
    // rows of a filter of one pixel are the same either way, and quicker to read as channels_last
    f.last = f.taps() == 1 ? lies(*like, true) : !lies(*like, false);
    if (skip && f.taps() > 1) f.last = false;
  }
  layer->shared.rows = size[0];
  layer->shared.length = f.length();
  if (layer->size() < 1) return false;
  if (has_weight) {
    if (!layer->is_weight(weight, false)) return false;
    layer->shared.weight = static_cast<const char*>(weight->data);
  }
  layer->deltas.assign(static_cast<size_t>(num_tasks), nullptr);
  for (size_t k = 0; k < items.size(); ++k) {
    const std::optional<PythonTensor> delta = read_floats(items[k]);
    if (!layer->is_weight(delta, layer->stacked)) return false;
    float* data = static_cast<float*>(delta->data);
    if (layer->stacked) {
      for (int64_t t = 0; t < num_tasks; ++t) layer->deltas[t] = data + t * layer->size();
      continue;
    }
    const int64_t t = layer->positions[k];
    if (t < 0 || t >= num_tasks) return false;
    layer->deltas[t] = data;
  }
  if (args[3] != Py_None) {
    const std::optional<PythonTensor> gate = read_floats(args[3]);
    if (!gate || !gate->is_vector(num_tasks)) return false;
    layer->gates = static_cast<const float*>(gate->data);
  }
  const std::optional<PythonTensor> order = read_tensor(args[4]);
  if (!order || !order->is_int64 || order->dims != 1) return false;
  layer->num_samples = order->shape[0];
  const std::optional<Sorted> batch = sorted_of(args[4], args[5], num_tasks, layer->num_samples);
  if (!batch) return false;
  layer->order = batch->order;
  layer->offsets = batch->offsets;
  return true;
}

// whether ids have the shape of leading dimensions of x
bool leads(PyObject* ids_, PyObject* x_, bool linear, int64_t samples) {
  const std::optional<PythonTensor> ids = read_tensor(ids_), x = read_tensor(x_);
  if (!ids || !x || ids->dims < 1 || (linear ? ids->dims >= x->dims : ids->dims != 1)) return false;
  int64_t count = 1;
  for (int64_t d = 0; d < ids->dims; ++d) {
    if (ids->shape[d] != x->shape[d]) return false;
    count *= ids->shape[d];
  }
  return count == samples;
}

// whether x and y are those of the layer
bool agree(const Image& x, const Image& y, const Layer& layer) {
  if (x.size[1] != layer.filter.channels || y.size[1] != layer.shared.rows || x.size[0] != y.size[0]) return false;
  const Filter& f = layer.filter;
  for (int d = 0; d < 2; ++d) {
    const int64_t room = x.size[2 + d] + 2 * f.padding[d] - f.dilation[d] * (f.kernel[d] - 1) - 1;
    if (f.stride[d] < 1 || f.dilation[d] < 1 || f.padding[d] < 0 || room < 0) return false;
    if (y.size[2 + d] != room / f.stride[d] + 1) return false;
  }
  return true;
}

bool few(int64_t samples, const Image& y, int64_t limit) {
  return limit < 0 || samples * y.size[2] * y.size[3] <= limit;
}

// the limit of a batch: `times` as high where more than half of its segments keep to it (`Ways.beside_others`)
int64_t limit_beside_others(int64_t limit, int64_t times, const Layer& layer, const Image& y) {
  if (limit <= 0) return limit;
  int64_t segments = 0, below = 0, closed = 0;
  auto tell = [&](int64_t samples) {
    ++segments;
    below += few(samples, y, limit);
  };
  for (int64_t t = 0; t < layer.num_tasks; ++t) {
    if (!layer.is_open(t)) closed += layer.count(t);
    else if (layer.count(t)) tell(layer.count(t));
  }
  if (closed) tell(closed);
  return 2 * below > segments ? times * limit : limit;
}

RowMap rows_of(const Part& part, const Image& y) { return {part.samples, part.count, y.size[2], y.size[3]}; }

void advise(const Image& x) {
  const int64_t bytes = x.size[0] * x.size[1] * x.size[2] * x.size[3] * static_cast<int64_t>(sizeof(float));
  if (bytes >= kHuge) advise_huge_pages(x.data, bytes);
}

// --- forward

// (*layer, number of tasks, ids, x, bias, limit, how many times as high beside others, y)
bool run_forward(PyObject* const* args) {
  Kept kept;
  Layer layer;
  const int64_t num_tasks = PyLong_AsSsize_t(args[7]);
  if (num_tasks < 1 || !read_layer(args, num_tasks, kept, &layer)) return false;
  if (!leads(args[8], args[9], layer.linear, layer.num_samples)) return false;
  const std::optional<Image> x = read_pictures(args[9], layer.linear, layer.num_samples);
  const std::optional<Image> y = read_pictures(args[13], layer.linear, layer.num_samples);
  if (!x || !y || !agree(*x, *y, layer)) return false;
  const int64_t limit = limit_beside_others(PyLong_AsSsize_t(args[11]), PyLong_AsSsize_t(args[12]), layer, *y);
  const float* bias = nullptr;
  bool bias_by_task = false;
  if (args[10] != Py_None) {
    const std::optional<PythonTensor> read = read_floats(args[10]);
    if (!read || read->dims < 1 || read->dims > 2 || !read->is_contiguous()) return false;
    bias_by_task = read->dims == 2;
    if (read->shape[read->dims - 1] != layer.shared.rows || (bias_by_task && read->shape[0] != num_tasks)) return false;
    bias = static_cast<const float*>(read->data);
  }
  const std::vector<int64_t> closed = layer.samples([&](int64_t t) { return !layer.is_open(t); });
  std::vector<Part> parts;
  for (int64_t t = 0; t < num_tasks; ++t)
    if (layer.count(t) && layer.is_open(t)) parts.push_back(layer.part(t));
  if (!closed.empty()) parts.push_back({-1, closed.data(), static_cast<int64_t>(closed.size())});
  for (const Part& part : parts)
    if (!few(part.count, *y, limit) || (part.task < 0 && !layer.shared.weight)) return false;
  unlocked([&] {
    advise(*y);
    for (const Part& part : parts) {
      const float* added = bias;
      if (bias_by_task) added = part.task < 0 ? nullptr : bias + part.task * layer.shared.rows;
      direct_forward(*x, layer.filter, rows_of(part, *y), layer.weights(part.task), added, *y);
    }
    if (!bias_by_task || closed.empty()) return;
    // those that share W, each its own
    for (int64_t t = 0; t < num_tasks; ++t) {
      if (layer.is_open(t)) continue;
      for (int64_t k = layer.offsets[t]; k < layer.offsets[t + 1]; ++k)
        for (int64_t h = 0; h < y->size[2]; ++h)
          for (int64_t w = 0; w < y->size[3]; ++w) {
            float* pixel = y->data + layer.order[k] * y->stride[0] + h * y->stride[2] + w * y->stride[3];
            for (int64_t n = 0; n < layer.shared.rows; ++n) pixel[n * y->stride[1]] += bias[t * layer.shared.rows + n];
          }
    }
  });
  return true;
}

// --- backward

// the gradients that are wanted
struct Wanted {
  std::optional<Image> x;
  float *weight = nullptr, *gate = nullptr, *bias = nullptr;
  bool bias_by_task = false;
  std::vector<float*> deltas;  // by task
};

// memory for the gradient of a weight, or of `T` of them
float* read_gradient(PyObject* tensor, const Layer& layer, bool several) {
  const std::optional<PythonTensor> read = read_floats(tensor);
  return layer.is_weight(read, several) ? static_cast<float*>(read->data) : nullptr;
}

bool read_wanted(PyObject* const* args, const Layer& layer, Kept& kept, Wanted* wanted) {
  if (args[0] != Py_None) {
    wanted->x = read_pictures(args[0], layer.linear, layer.num_samples);
    if (!wanted->x) return false;
  }
  if (args[1] != Py_None) {
    wanted->weight = read_gradient(args[1], layer, false);
    if (!wanted->weight) return false;
  }
  std::vector<PyObject*> items;
  if (!read_items(args[2], kept, &items)) return false;
  wanted->deltas.assign(static_cast<size_t>(layer.num_tasks), nullptr);
  if (!items.empty() && items.size() != (layer.stacked ? 1 : layer.positions.size())) return false;
  for (size_t k = 0; k < items.size(); ++k) {
    if (items[k] == Py_None) continue;
    float* data = read_gradient(items[k], layer, layer.stacked);
    if (!data) return false;
    if (!layer.stacked) wanted->deltas[layer.positions[k]] = data;
    for (int64_t t = 0; layer.stacked && t < layer.num_tasks; ++t) wanted->deltas[t] = data + t * layer.size();
  }
  if (args[3] != Py_None) {
    const std::optional<PythonTensor> gate = read_floats(args[3]);
    if (!gate || !gate->is_vector(layer.num_tasks)) return false;
    wanted->gate = static_cast<float*>(gate->data);
  }
  if (args[4] != Py_None) {
    const std::optional<PythonTensor> bias = read_floats(args[4]);
    if (!bias || bias->dims < 1 || bias->dims > 2 || !bias->is_contiguous()) return false;
    wanted->bias_by_task = bias->dims == 2;
    if (bias->shape[bias->dims - 1] != layer.shared.rows) return false;
    if (wanted->bias_by_task && bias->shape[0] != layer.num_tasks) return false;
    wanted->bias = static_cast<float*>(bias->data);
  }
  return true;
}

// sums over the pixels of samples, in double; of all tasks together, or of each
void bias_gradient(const Image& g, const Layer& layer, const Wanted& wanted) {
  const int64_t channels = layer.shared.rows, pixels = g.size[2] * g.size[3];
  constexpr int64_t kChannels = 64;
  auto run = [&](int64_t first, int64_t end) {
    for (int64_t c0 = first * kChannels; c0 < std::min(end * kChannels, channels); c0 += kChannels) {
      const int64_t count = std::min(kChannels, channels - c0);
      double sums[kChannels] = {};
      for (int64_t t = 0; t < layer.num_tasks; ++t) {
        for (int64_t k = layer.offsets[t]; k < layer.offsets[t + 1]; ++k)
          for (int64_t p = 0; p < pixels; ++p) {
            const float* at = g.data + layer.order[k] * g.stride[0] + c0 * g.stride[1] + p / g.size[3] * g.stride[2] +
                              p % g.size[3] * g.stride[3];
            for (int64_t c = 0; c < count; ++c) sums[c] += at[c * g.stride[1]];
          }
        if (!wanted.bias_by_task && t + 1 < layer.num_tasks) continue;
        float* to = wanted.bias + (wanted.bias_by_task ? t * channels : 0) + c0;
        for (int64_t c = 0; c < count; ++c) to[c] = static_cast<float>(std::exchange(sums[c], 0.0));
      }
    }
  };
  const int64_t parts = (channels + kChannels - 1) / kChannels;
  const int64_t each = layer.num_samples * pixels * std::min(kChannels, channels);
  torch::stable::parallel_for(0, parts, std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(each, 1)), run);
}

// (*layer, x, grad_out, limit of dx, limit of weight gradients, how many times as high beside others, *wanted), of
// these x, weight, deltas, gate and bias or None
bool run_backward(PyObject* const* args) {
  Kept kept;
  Layer layer;
  const std::optional<PythonTensor> offsets = read_tensor(args[5]);
  if (!offsets || offsets->dims != 1 || offsets->shape[0] < 2) return false;
  const int64_t num_tasks = offsets->shape[0] - 1;
  if (!read_layer(args, num_tasks, kept, &layer)) return false;
  const std::optional<Image> x = read_pictures(args[7], layer.linear, layer.num_samples);
  const std::optional<Image> g = read_pictures(args[8], layer.linear, layer.num_samples);
  Wanted wanted;
  if (!x || !g || !agree(*x, *g, layer) || !read_wanted(args + 12, layer, kept, &wanted)) return false;
  const int64_t limit_alone = PyLong_AsSsize_t(args[10]), times = PyLong_AsSsize_t(args[11]);
  const int64_t limit_x = limit_beside_others(PyLong_AsSsize_t(args[9]), times, layer, *g);
  const int64_t limit_weight = limit_beside_others(limit_alone, times, layer, *g);
  if (wanted.x && !std::equal(x->size, x->size + 4, wanted.x->size)) return false;
  if ((wanted.weight && !layer.shared.weight) || (wanted.gate && !layer.gates)) return false;

  // tasks that need a weight gradient of their own; the samples of the others are for dW alone
  auto of_own = [&](int64_t t) {
    return layer.count(t) && layer.deltas[t] && ((wanted.deltas[t] && layer.is_open(t)) || wanted.gate);
  };
  std::vector<int64_t> closed, rest;
  if (wanted.x) closed = layer.samples([&](int64_t t) { return !layer.is_open(t); });
  if (wanted.weight) rest = layer.samples([&](int64_t t) { return !of_own(t); });
  if (!closed.empty() && !layer.shared.weight) return false;
  if (!few(static_cast<int64_t>(closed.size()), *g, limit_x)) return false;
  if (!few(static_cast<int64_t>(rest.size()), *g, limit_alone)) return false;
  for (int64_t t = 0; t < num_tasks; ++t) {
    if (wanted.x && layer.is_open(t) && !few(layer.count(t), *g, limit_x)) return false;
    if (of_own(t) && !few(layer.count(t), *g, limit_weight)) return false;
  }

  unlocked([&] {
    const size_t bytes = static_cast<size_t>(layer.size()) * sizeof(float);
    if (wanted.x) advise(*wanted.x);
    if (wanted.gate) std::fill_n(wanted.gate, num_tasks, 0.0f);
    bool add = false;
    auto spread_of = [&](const Part& part, const Weights& weights, Spread spread) {
      spread.weight = wanted.weight;
      spread.add = std::exchange(add, true);
      return direct_weight_gradient(*x, *g, layer.filter, rows_of(part, *g), weights, spread);
    };
    for (int64_t t = 0; t < num_tasks; ++t) {
      float* const delta = wanted.deltas[t];
      const bool open = layer.is_open(t) && layer.count(t);
      if (delta && !open) std::memset(delta, 0, bytes);
      if (wanted.x && open)
        direct_input_gradient(*g, layer.filter, rows_of(layer.part(t), *g), layer.weights(t), *wanted.x);
      if (!of_own(t)) continue;
      Spread spread;
      spread.gate = wanted.gate != nullptr;
      if (delta && open) {
        spread.delta = reinterpret_cast<char*>(delta);
        advise_huge_pages(delta, static_cast<int64_t>(bytes));
      }
      const double product = spread_of(layer.part(t), layer.weights(t), spread);
      if (wanted.gate) wanted.gate[t] = static_cast<float>(product);
    }
    if (!closed.empty()) {
      const Part part{-1, closed.data(), static_cast<int64_t>(closed.size())};
      direct_input_gradient(*g, layer.filter, rows_of(part, *g), layer.shared, *wanted.x);
    }
    if (!rest.empty()) spread_of({-1, rest.data(), static_cast<int64_t>(rest.size())}, layer.shared, {});
    if (wanted.weight && !add) std::memset(wanted.weight, 0, bytes);
    if (wanted.bias) bias_gradient(*g, layer, wanted);
  });
  return true;
}

}  // namespace

PyObject* task_conv_few(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return answered(run_forward, args, count, kLayerArguments + 7);
}

PyObject* task_conv_few_backward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return answered(run_backward, args, count, kLayerArguments + 10);
}

}  // namespace fastmtl::cpu
