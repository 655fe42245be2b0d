// Convolution of a few samples of one task with `W + s Delta`, and its backward: one matrix product over the pixels
// (rows) of those samples, wherever they lie in the batch. The weight is read once, added on the way into the cache,
// and never written: for layers with large weights and few rows that is what counts. oneDNN would reorder it first.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "cpu/pages.h"
#include "cpu/simd/kernels.h"
#include "cpu/task_weights/packing.h"
#include "cpu/task_weights/task_conv.h"

namespace fastmtl::cpu {
namespace {

constexpr int64_t kDotRows = 12;           // rows of the weight staged at a time for the forward product, in L1
constexpr int64_t kDotPanels = 8;          // panels in a pass of it: 2 KB of a row
constexpr int64_t kBackRows = 64;          // rows of the weight staged at a time for the input gradient
constexpr int64_t kBackPanels = 4;         // panels in a pass of it
constexpr int64_t kOuterFloats = 1 << 17;  // of the input that a pass of the weight gradient keeps in L2

}  // namespace

void direct_forward(const Image& x, const Filter& f, const RowMap& map, const Weights& weights, const float* bias,
                    const Image& y) {
  const Kernels& kernel = kernels();
  const int64_t rows = map.count(), num_out = weights.rows, panels = f.panels();
  const auto a = buffer<float>(panels * rows * kPanel);
  pack_input<true>(x, f, map, panels * kPanel, a.get());
  const auto out = buffer<float>(rows * num_out);
  const int64_t blocks = (num_out + kDotRows - 1) / kDotRows;
  over(blocks, kDotRows * f.length() * rows, kProducts, [&](int64_t first, int64_t end) {
    const auto staged = buffer<float>(kDotRows * kDotPanels * kPanel);
    for (int64_t p = 0; p < panels; p += kDotPanels) {
      const int64_t count = std::min(kDotPanels, panels - p);
      for (int64_t block = first; block < end; ++block) {
        const int64_t n = block * kDotRows, num = std::min(kDotRows, num_out - n);
        for (int64_t i = 0; i < num; ++i)
          weights.stage(kernel, n + i, p * kPanel, count * kPanel, kDotRows, staged.get() + i * kDotPanels * kPanel);
        if (p == 0)
          for (int64_t m = 0; m < rows; ++m)
            for (int64_t i = 0; i < num; ++i) out[m * num_out + n + i] = bias ? bias[n + i] : 0.0f;
        kernel.tiles.dot(staged.get(), kDotPanels * kPanel, static_cast<int>(num), a.get() + p * rows * kPanel, rows,
                         rows, count, out.get() + n, num_out);
      }
    }
  });
  over(rows, num_out, kMoves, [&](int64_t first, int64_t end) {
    for (int64_t m = first; m < end; ++m) {
      int64_t sample, h, w;
      map.find(m, &sample, &h, &w);
      float* pixel = y.data + sample * y.stride[0] + h * y.stride[2] + w * y.stride[3];
      const float* row = out.get() + m * num_out;
      if (y.stride[1] == 1) std::copy(row, row + num_out, pixel);
      else
        for (int64_t n = 0; n < num_out; ++n) pixel[n * y.stride[1]] = row[n];
    }
  });
}

namespace {

// g: [ceil(num_out / kTall)][rows][kTall] (by_row false) or [ceil(rows / kTall)][num_out][kTall]
Buffer<float> pack_grad(const Image& g, const RowMap& map, bool by_row) {
  const int64_t rows = map.count(), num_out = g.size[1];
  const int64_t tiles = ((by_row ? rows : num_out) + kTall - 1) / kTall;
  auto packed = buffer<float>(tiles * kTall * (by_row ? num_out : rows));
  over(rows, num_out, kMoves, [&](int64_t first, int64_t end) {
    for (int64_t m = first; m < end; ++m) {
      int64_t sample, h, w;
      map.find(m, &sample, &h, &w);
      const float* pixel = g.data + sample * g.stride[0] + h * g.stride[2] + w * g.stride[3];
      for (int64_t n = 0; n < num_out; ++n) {
        const int64_t outer = by_row ? m : n, inner = by_row ? n : m;
        const int64_t width = by_row ? num_out : rows;
        packed[(outer / kTall * width + inner) * kTall + outer % kTall] = pixel[n * g.stride[1]];
      }
    }
  });
  return packed;
}

}  // namespace

void direct_input_gradient(const Image& g, const Filter& f, const RowMap& map, const Weights& weights,
                           const Image& dx) {
  const Kernels& kernel = kernels();
  const int64_t rows = map.count(), num_out = weights.rows, panels = f.panels();
  const Buffer<float> packed = pack_grad(g, map, true);
  const auto da = buffer<float>(panels * rows * kPanel);
  over((panels + kBackPanels - 1) / kBackPanels, kBackPanels * kPanel * num_out * rows, kProducts,
       [&](int64_t first, int64_t end) {
         const auto staged = buffer<float>(kBackRows * kBackPanels * kPanel);
         for (int64_t group = first; group < end; ++group) {
           const int64_t p = group * kBackPanels, count = std::min(kBackPanels, panels - p),
                         width = kBackPanels * kPanel;
           std::fill(da.get() + p * rows * kPanel, da.get() + (p + count) * rows * kPanel, 0.0f);
           for (int64_t n = 0; n < num_out; n += kBackRows) {
             const int64_t num = std::min(kBackRows, num_out - n);
             for (int64_t i = 0; i < num; ++i)
               weights.stage(kernel, n + i, p * kPanel, count * kPanel, kBackRows, staged.get() + i * width);
             for (int64_t q = 0; q < count; ++q)
               for (int64_t m = 0; m < rows; m += kTall)
                 kernel.tiles.back(
                     staged.get() + q * kPanel, width, num, packed.get() + (m / kTall * num_out + n) * kTall,
                     static_cast<int>(std::min<int64_t>(kTall, rows - m)), da.get() + ((p + q) * rows + m) * kPanel);
           }
         }
       });
  unpack_input(da.get(), f, map, dx, nullptr);
}

double direct_weight_gradient(const Image& x, const Image& g, const Filter& f, const RowMap& map,
                              const Weights& weights, const Spread& spread) {
  const Kernels& kernel = kernels();
  const int64_t rows = map.count(), num_out = weights.rows, panels = f.panels();
  const auto a = buffer<float>(panels * rows * kPanel);
  pack_input<true>(x, f, map, panels * kPanel, a.get());
  const Buffer<float> packed = pack_grad(g, map, false);
  const int64_t tiles = (num_out + kTall - 1) / kTall, size = size_of(weights.dtype);
  const int64_t pass = std::max<int64_t>(1, kOuterFloats / (rows * kPanel));
  // one per tile, added up in order: the same whatever the threads
  std::vector<double> products(static_cast<size_t>(tiles), 0.0);
  over(tiles, kTall * f.length() * rows, kProducts, [&](int64_t first, int64_t end) {
    alignas(64) float e[kTall * kPanel];
    for (int64_t p = 0; p < panels; p += pass)
      for (int64_t tile = first; tile < end; ++tile) {
        const int64_t n = tile * kTall, num = std::min<int64_t>(kTall, num_out - n);
        for (int64_t q = p; q < std::min(p + pass, panels); ++q) {
          kernel.tiles.outer(a.get() + q * rows * kPanel, rows, packed.get() + tile * rows * kTall,
                             static_cast<int>(num), e);
          const int64_t length = std::min(kPanel, f.length() - q * kPanel);
          for (int64_t i = 0; i < num; ++i) {
            const int64_t at = (n + i) * f.length() + q * kPanel;
            products[tile] += kernel.tiles.spread[static_cast<int>(weights.dtype)](
                e + i * kPanel, length, weights.gate, spread.gate ? weights.delta + at * size : nullptr,
                spread.weight ? spread.weight + at : nullptr, spread.add,
                spread.delta ? spread.delta + at * size : nullptr);
          }
        }
      }
#if defined(__x86_64__)
    __builtin_ia32_sfence();
#endif
  });
  double total = 0;
  for (double product : products) total += product;
  return total;
}

namespace {

template <class T>
ImageOf<T> image_of(const Tensor& x, const void* data) {
  constexpr bool kFloats = std::is_same_v<T, float>;
  STD_TORCH_CHECK(x.dim() == 4 && dtype_of(x) == (kFloats ? DType::f32 : DType::bf16), "fastmtl: expected a 4-D ",
                  kFloats ? "float32" : "bfloat16", " tensor");
  ImageOf<T> image{static_cast<T*>(const_cast<void*>(data)), {}, {}};
  auto size = x.sizes(), stride = x.strides();
  for (int d = 0; d < 4; ++d) {
    image.size[d] = size[d];
    image.stride[d] = stride[d];
  }
  return image;
}

// whether a product is one of pairs, by its x: bfloat16 has no other here
bool by_pairs(const Tensor& x) {
  if (dtype_of(x) != DType::bf16) return false;
  STD_TORCH_CHECK(pair_kernels(), "fastmtl: bfloat16 where there are no products of pairs");
  return true;
}

// geometry: kh, kw, stride, padding, dilation (height, width each), and 1 if rows of the weight run channels last
Filter filter_of(const std::vector<int64_t>& geometry, int64_t channels) {
  STD_TORCH_CHECK(geometry.size() == 9, "fastmtl: expected 9 numbers of geometry, got ", geometry.size());
  const auto& v = geometry;
  return {channels, {v[0], v[1]}, {v[2], v[3]}, {v[4], v[5]}, {v[6], v[7]}, v[8] != 0};
}

// rows `[Cout, length]` without gaps
const char* rows_of(const Tensor& w, const Filter& f, Weights* weights) {
  STD_TORCH_CHECK(w.dim() == 2 && w.is_contiguous() && w.size(1) == f.length() && dtype_of(w) != DType::f64,
                  "fastmtl: expected weights as contiguous rows of ", f.length(), " elements");
  weights->dtype = dtype_of(w);
  weights->rows = w.size(0);
  weights->length = f.length();
  return static_cast<const char*>(w.const_data_ptr());
}

// Segments of a batch, each with samples and a weight of its own: segment k has those from bounds[k] to bounds[k + 1]
// of `samples`, and `W + gates[k] deltas[k]`, or W alone behind the last delta.
struct Segments {
  const std::vector<int64_t>& samples;
  const std::vector<int64_t>& bounds;
  const std::vector<Tensor>& deltas;
  const std::vector<double>& gates;
  Weights shared;

  Segments(const std::optional<Tensor>& weight, const std::vector<Tensor>& deltas, const std::vector<double>& gates,
           const std::vector<int64_t>& samples, const std::vector<int64_t>& bounds, const Filter& f, int64_t most)
      : samples(samples), bounds(bounds), deltas(deltas), gates(gates) {
    if (weight.has_value()) shared.weight = rows_of(*weight, f, &shared);
    STD_TORCH_CHECK(!bounds.empty() && bounds.front() == 0 && bounds.back() == static_cast<int64_t>(samples.size()) &&
                        std::is_sorted(bounds.begin(), bounds.end()) && gates.size() == deltas.size(),
                    "fastmtl: segments that do not fit");
    STD_TORCH_CHECK(count() <= deltas.size() || weight.has_value(), "fastmtl: expected a weight or a delta");
    for (int64_t s : samples) STD_TORCH_CHECK(s >= 0 && s < most, "fastmtl: sample ", s, " of ", most);
  }

  size_t count() const { return bounds.size() - 1; }
  template <class T>
  RowMap rows(size_t k, const ImageOf<T>& of) const {
    return {samples.data() + bounds[k], bounds[k + 1] - bounds[k], of.size[2], of.size[3]};
  }
  Weights weights(size_t k, const Filter& f, int64_t rows) const {
    Weights found = shared;
    if (k < deltas.size()) {
      found.delta = rows_of(deltas[k], f, &found);
      found.gate = static_cast<float>(gates[k]);
      STD_TORCH_CHECK(shared.weight == nullptr || (found.dtype == shared.dtype && found.rows == shared.rows),
                      "fastmtl: a delta that is not as the weight");
    }
    STD_TORCH_CHECK(found.rows == rows, "fastmtl: expected ", rows, " rows of a weight");
    return found;
  }
};

void check_each(const std::vector<int64_t>& of, size_t count, int64_t end, const char* name) {
  STD_TORCH_CHECK(of.size() == count, "fastmtl: expected ", count, " ", name);
  for (int64_t k : of) STD_TORCH_CHECK(k >= -1 && k < end, "fastmtl: ", name, " ", k, " of ", end);
}

template <class T>
void run_forward(const Tensor& x, const std::optional<Tensor>& weight, const std::vector<Tensor>& deltas,
                 const std::vector<double>& gates, const std::optional<Tensor>& bias,
                 const std::vector<int64_t>& bias_rows, const std::vector<int64_t>& samples,
                 const std::vector<int64_t>& bounds, const std::vector<int64_t>& geometry, const Tensor& y) {
  const ImageOf<T> in = image_of<T>(x, x.const_data_ptr()), out = image_of<T>(y, y.mutable_data_ptr());
  const Filter f = filter_of(geometry, in.size[1]);
  const Segments segments(weight, deltas, gates, samples, bounds, f, std::min(in.size[0], out.size[0]));
  const float* rows = nullptr;
  if (bias.has_value()) {
    STD_TORCH_CHECK(
        bias->dim() == 2 && bias->is_contiguous() && dtype_of(*bias) == DType::f32 && bias->size(1) == out.size[1],
        "fastmtl: expected a float32 bias of ", out.size[1]);
    rows = static_cast<const float*>(bias->const_data_ptr());
  }
  check_each(bias_rows, segments.count(), rows ? bias->size(0) : 0, "bias");
  for (size_t k = 0; k < segments.count(); ++k) {
    const float* added = bias_rows[k] < 0 ? nullptr : rows + bias_rows[k] * out.size[1];
    direct_forward(in, f, segments.rows(k, out), segments.weights(k, f, out.size[1]), added, out);
  }
}

// bias: [K, Cout]; bias_rows: by segment the one that is added, or -1
void forward_op(Tensor x, std::optional<Tensor> weight, const std::vector<Tensor>& deltas,
                const std::vector<double>& gates, std::optional<Tensor> bias, const std::vector<int64_t>& bias_rows,
                const std::vector<int64_t>& samples, const std::vector<int64_t>& bounds,
                const std::vector<int64_t>& geometry, Tensor y) {
  auto run = by_pairs(x) ? &run_forward<uint16_t> : &run_forward<float>;
  run(x, weight, deltas, gates, bias, bias_rows, samples, bounds, geometry, y);
}

template <class T>
void run_backward(const Tensor& grad_out, const Tensor& x, const std::optional<Tensor>& weight,
                  const std::vector<Tensor>& deltas, const std::vector<double>& gates,
                  const std::vector<int64_t>& samples, const std::vector<int64_t>& bounds,
                  const std::vector<int64_t>& geometry, const std::optional<Tensor>& grad_x,
                  const std::vector<int64_t>& wants_x, const std::optional<Tensor>& grad_weight, bool add,
                  const std::vector<int64_t>& wants_weight, const std::vector<Tensor>& grad_deltas,
                  const std::vector<int64_t>& delta_places, const std::optional<Tensor>& grad_gate,
                  const std::vector<int64_t>& gate_places) {
  const ImageOf<T> g = image_of<T>(grad_out, grad_out.const_data_ptr()), in = image_of<T>(x, x.const_data_ptr());
  const Filter f = filter_of(geometry, in.size[1]);
  const Segments segments(weight, deltas, gates, samples, bounds, f, std::min(in.size[0], g.size[0]));
  const size_t count = segments.count();
  check_each(wants_x, count, grad_x.has_value() ? 2 : 1, "flags of dx");
  check_each(wants_weight, count, 2, "flags of dW");
  check_each(delta_places, count, static_cast<int64_t>(grad_deltas.size()), "places of dDelta");
  check_each(gate_places, count, grad_gate.has_value() ? grad_gate->size(0) : 0, "places of a gate's gradient");
  float* gate_gradients = nullptr;
  if (grad_gate.has_value()) {
    STD_TORCH_CHECK(grad_gate->dim() == 1 && grad_gate->is_contiguous() && dtype_of(*grad_gate) == DType::f32,
                    "fastmtl: expected float32 gradients of gates");
    gate_gradients = static_cast<float*>(grad_gate->mutable_data_ptr());
  }
  ImageOf<T> dx{};
  if (grad_x.has_value()) dx = image_of<T>(*grad_x, grad_x->mutable_data_ptr());
  for (size_t k = 0; k < count; ++k) {
    const RowMap map = segments.rows(k, g);
    const Weights weights = segments.weights(k, f, g.size[1]);
    if (wants_x[k] == 1) direct_input_gradient(g, f, map, weights, dx);
    if (wants_weight[k] != 1) continue;
    Spread spread;
    Weights shape;
    if (grad_weight.has_value()) {
      rows_of(*grad_weight, f, &shape);
      STD_TORCH_CHECK(shape.dtype == DType::f32 && shape.rows == weights.rows, "fastmtl: dW must be float32 rows");
      spread.weight = static_cast<float*>(grad_weight->mutable_data_ptr());
      spread.add = add;
      add = true;
    }
    if (delta_places[k] >= 0) {
      const Tensor& grad_delta = grad_deltas[static_cast<size_t>(delta_places[k])];
      rows_of(grad_delta, f, &shape);
      STD_TORCH_CHECK(shape.dtype == weights.dtype && shape.rows == weights.rows, "fastmtl: dDelta must be as Delta");
      spread.delta = static_cast<char*>(grad_delta.mutable_data_ptr());
      advise_huge_pages(spread.delta, weights.rows * weights.length * size_of(weights.dtype));
    }
    spread.gate = gate_places[k] >= 0;
    STD_TORCH_CHECK(!spread.gate || weights.delta != nullptr, "fastmtl: the gate's gradient needs a delta");
    const double product = direct_weight_gradient(in, g, f, map, weights, spread);
    if (spread.gate) gate_gradients[gate_places[k]] = static_cast<float>(product);
  }
}

// By segment: whether dx is wanted, and dW with what belongs to it; the place of dDelta in `grad_deltas`, and of the
// gate's gradient in `grad_gate`, or -1. add: to what dW holds, else the first to write it replaces that.
void backward_op(Tensor grad_out, Tensor x, std::optional<Tensor> weight, const std::vector<Tensor>& deltas,
                 const std::vector<double>& gates, const std::vector<int64_t>& samples,
                 const std::vector<int64_t>& bounds, const std::vector<int64_t>& geometry, std::optional<Tensor> grad_x,
                 const std::vector<int64_t>& wants_x, std::optional<Tensor> grad_weight, bool add,
                 const std::vector<int64_t>& wants_weight, const std::vector<Tensor>& grad_deltas,
                 const std::vector<int64_t>& delta_places, std::optional<Tensor> grad_gate,
                 const std::vector<int64_t>& gate_places) {
  auto run = by_pairs(x) ? &run_backward<uint16_t> : &run_backward<float>;
  run(grad_out, x, weight, deltas, gates, samples, bounds, geometry, grad_x, wants_x, grad_weight, add, wants_weight,
      grad_deltas, delta_places, grad_gate, gate_places);
}

// rows of `source` (in turn, or those listed) into rows of `target` (likewise); a row is dense
void copy_rows_op(Tensor source, std::optional<Tensor> from, Tensor target, std::optional<Tensor> to) {
  auto positions = [](const std::optional<Tensor>& rows, int64_t count) -> const int64_t* {
    if (!rows.has_value()) return nullptr;
    STD_TORCH_CHECK(
        rows->dim() == 1 && rows->is_contiguous() && rows->scalar_type() == torch::headeronly::ScalarType::Long,
        "fastmtl: positions must be contiguous int64");
    const int64_t* list = static_cast<const int64_t*>(rows->const_data_ptr());
    for (int64_t k = 0; k < rows->size(0); ++k)
      STD_TORCH_CHECK(list[k] >= 0 && list[k] < count, "fastmtl: sample ", list[k], " of ", count);
    return list;
  };
  const int64_t* read = positions(from, source.size(0));
  const int64_t* write = positions(to, target.size(0));
  const int64_t count = read ? from->size(0) : source.size(0), width = source.size(1);
  STD_TORCH_CHECK(source.dim() == 2 && target.dim() == 2 && target.size(1) == width &&
                      dtype_of(source) == dtype_of(target) && (write ? to->size(0) : target.size(0)) == count &&
                      (width <= 1 || (source.stride(1) == 1 && target.stride(1) == 1)),
                  "fastmtl: rows that do not fit");
  const int64_t size = size_of(dtype_of(source)), bytes = width * size;
  const char* in = static_cast<const char*>(source.const_data_ptr());
  char* out = static_cast<char*>(target.mutable_data_ptr());
  constexpr int64_t kBytesPerThread = 64 << 10;
  const int64_t grain = std::max<int64_t>(1, kBytesPerThread / std::max<int64_t>(bytes, 1));
  torch::stable::parallel_for(0, count, grain, [&](int64_t first, int64_t end) {
    for (int64_t k = first; k < end; ++k)
      std::memcpy(out + (write ? write[k] : k) * target.stride(0) * size,
                  in + (read ? read[k] : k) * source.stride(0) * size, static_cast<size_t>(bytes));
  });
}

void advise_op(Tensor x) {
  advise_huge_pages(x.mutable_data_ptr(), x.numel() * static_cast<int64_t>(size_of(dtype_of(x))));
}

}  // namespace
}  // namespace fastmtl::cpu

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  m.impl("_task_conv2d_rows", TORCH_BOX(&fastmtl::cpu::forward_op));
  m.impl("_task_conv2d_rows_backward", TORCH_BOX(&fastmtl::cpu::backward_op));
  m.impl("_copy_rows", TORCH_BOX(&fastmtl::cpu::copy_rows_op));
  m.impl("_advise_huge_pages", TORCH_BOX(&fastmtl::cpu::advise_op));
}
