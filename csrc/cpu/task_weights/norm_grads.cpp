// Backward passes of group and layer norm whose gradients of weight and bias are those of each task: x and the gradient
// are read from memory once, and a second time while they are in the cache. Which sums are made together depends on the
// sizes alone, so the bits of a result do not depend on the number of threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/simd/kernels.h"
#include "cpu/task_weights/batch.h"

namespace fastmtl::cpu {
namespace {

// of which sums are made in float
constexpr int64_t kFloatRows = 64;
// elements that have sums of their own
constexpr int64_t kChunkElements = 32768;

// some samples of one task, or rows of its samples, in their order
struct Chunk {
  int64_t task, first, end;
};

// of `each` per sample, each of `elements`
std::vector<Chunk> chunks_of(const Batch& batch, int64_t each, int64_t elements) {
  const int64_t most = std::max<int64_t>(kChunkElements / std::max<int64_t>(elements, 1), 1);
  std::vector<Chunk> chunks;
  for (int64_t t = 0; t < batch.num_tasks; ++t)
    for (int64_t first = 0, count = batch.count(t) * each; first < count; first += most)
      chunks.push_back({t, first, std::min(first + most, count)});
  return chunks;
}

// [T, C] sums of weight and bias, from `2 C` of each chunk
template <class S>
void add_chunks(const std::vector<Chunk>& chunks, const std::vector<double>& partial, int64_t num_tasks,
                int64_t channels, S* of_weight, S* of_bias) {
  std::vector<double> total(static_cast<size_t>(2 * channels));
  size_t k = 0;
  for (int64_t t = 0; t < num_tasks; ++t) {
    std::fill(total.begin(), total.end(), 0.0);
    for (; k < chunks.size() && chunks[k].task == t; ++k)
      for (size_t c = 0; c < total.size(); ++c) total[c] += partial[total.size() * k + c];
    for (int64_t c = 0; c < channels; ++c) {
      if (of_weight) of_weight[t * channels + c] = static_cast<S>(total[static_cast<size_t>(c)]);
      if (of_bias) of_bias[t * channels + c] = static_cast<S>(total[static_cast<size_t>(channels + c)]);
    }
  }
}

const void* data_of(const Tensor& x, int64_t numel, DType dtype) {
  STD_TORCH_CHECK(x.is_contiguous() && x.numel() == numel && dtype_of(x) == dtype, "fastmtl: expected ", numel,
                  " contiguous numbers in the dtype of x");
  return x.const_data_ptr();
}

const void* data_of(const std::optional<Tensor>& x, int64_t numel, DType dtype) {
  return x ? data_of(*x, numel, dtype) : nullptr;
}

template <class S>
S* changed(std::optional<Tensor>& x, int64_t numel, DType dtype) {
  data_of(x, numel, dtype);
  return x ? static_cast<S*>(x->mutable_data_ptr()) : nullptr;
}

template <class F>
void with_type(DType dtype, const F& run) {
  STD_TORCH_CHECK(dtype == DType::f32 || dtype == DType::f64, "fastmtl: expected float32 or float64");
  if (dtype == DType::f64) run(0.0);
  else run(0.0f);
}

// x, grad_out, grad_x: [N, C, ...]; mean, rstd: [N, groups]; grad_weight, grad_bias: [T, C]. All contiguous, all of one
// dtype. A sample that no task has gets no grad_x.
void group_norm_backward(const Tensor& grad_out, const Tensor& x, const Tensor& mean_, const Tensor& rstd_,
                         const std::optional<Tensor>& weight_, const Tensor& order, const Tensor& offsets,
                         int64_t groups, std::optional<Tensor> grad_x, std::optional<Tensor> grad_weight,
                         std::optional<Tensor> grad_bias) {
  const DType dtype = dtype_of(x);
  const int64_t samples = x.size(0), channels = x.size(1), numel = x.numel();
  STD_TORCH_CHECK(groups > 0 && channels % groups == 0 && numel > 0, "fastmtl: expected samples and whole groups");
  const int64_t each = channels / groups, pixels = numel / (samples * channels);
  const Batch batch = batch_of(order, offsets, samples);
  const Norms& kernel = kernels().norms;
  const int type = static_cast<int>(dtype);
  with_type(dtype, [&]<class S>(S) {
    const S* in = static_cast<const S*>(data_of(x, numel, dtype));
    const S* g = static_cast<const S*>(data_of(grad_out, numel, dtype));
    const S* mean = static_cast<const S*>(data_of(mean_, samples * groups, dtype));
    const S* rstd = static_cast<const S*>(data_of(rstd_, samples * groups, dtype));
    const S* weight = static_cast<const S*>(data_of(weight_, channels, dtype));
    S* out = changed<S>(grad_x, numel, dtype);
    S* of_weight = changed<S>(grad_weight, batch.num_tasks * channels, dtype);
    S* of_bias = changed<S>(grad_bias, batch.num_tasks * channels, dtype);
    const std::vector<Chunk> chunks = chunks_of(batch, 1, channels * pixels);
    const size_t size = static_cast<size_t>(channels);
    std::vector<double> partial(2 * size * chunks.size(), 0.0);
    over(static_cast<int64_t>(chunks.size()), [&](int64_t begin, int64_t end) {
      std::vector<double> sum(size), product(size);
      for (int64_t i = begin; i < end; ++i) {
        const Chunk& chunk = chunks[static_cast<size_t>(i)];
        double* total = partial.data() + 2 * size * static_cast<size_t>(i);
        for (int64_t k = chunk.first; k < chunk.end; ++k) {
          const int64_t sample = batch.order[batch.offsets[chunk.task] + k];
          std::fill(sum.begin(), sum.end(), 0.0);
          std::fill(product.begin(), product.end(), 0.0);
          for (int64_t group = 0; group < groups; ++group) {
            const int64_t first = group * each, at = (sample * channels + first) * pixels;
            const double m = static_cast<double>(mean[sample * groups + group]);
            const double scale = static_cast<double>(rstd[sample * groups + group]);
            kernel.channels_products[type](g + at, in + at, each, pixels, m, sum.data() + first,
                                           product.data() + first);
            double of_x = 0, centre = 0;
            for (int64_t c = first; c < first + each; ++c) {
              const size_t k = static_cast<size_t>(c);
              const double w = weight ? static_cast<double>(weight[c]) : 1.0;
              total[k] += product[k] * scale;
              total[size + k] += sum[k];
              of_x += w * product[k];
              centre += w * sum[k];
            }
            const double count = static_cast<double>(each * pixels);
            if (out)
              kernel.channels_gradient[type](g + at, in + at, each, pixels, m, weight ? weight + first : nullptr,
                                             centre / count, scale, -scale * scale * scale * of_x / count, out + at);
          }
        }
      }
    });
    add_chunks(chunks, partial, batch.num_tasks, channels, of_weight, of_bias);
  });
}

// x, grad_out, grad_x: [N, rows, C], grad_out with any strides but that of C; mean, rstd: [N, rows]; weight: [C];
// grad_weight, grad_bias: [T, C]; else as above
void layer_norm_backward(const Tensor& grad_out, const Tensor& x, const Tensor& mean_, const Tensor& rstd_,
                         const std::optional<Tensor>& weight_, const Tensor& order, const Tensor& offsets,
                         std::optional<Tensor> grad_x, std::optional<Tensor> grad_weight,
                         std::optional<Tensor> grad_bias) {
  const DType dtype = dtype_of(x);
  STD_TORCH_CHECK(x.dim() == 3 && x.numel() > 0, "fastmtl: expected rows of samples");
  const int64_t samples = x.size(0), rows = x.size(1), columns = x.size(2), numel = x.numel();
  const Batch batch = batch_of(order, offsets, samples);
  const RowGradient kernel = kernels().norms.row_gradient[static_cast<int>(dtype)];
  STD_TORCH_CHECK(grad_out.dim() == 3 && grad_out.numel() == numel && dtype_of(grad_out) == dtype &&
                      grad_out.size(0) == samples && grad_out.size(1) == rows &&
                      (columns == 1 || grad_out.stride(2) == 1),
                  "fastmtl: expected a gradient of the shape of x");
  const int64_t of_sample = grad_out.stride(0), of_row = grad_out.stride(1);
  const std::vector<Chunk> chunks = chunks_of(batch, rows, columns);
  with_type(dtype, [&]<class S>(S) {
    const S* in = static_cast<const S*>(data_of(x, numel, dtype));
    const S* g = static_cast<const S*>(grad_out.const_data_ptr());
    const S* mean = static_cast<const S*>(data_of(mean_, samples * rows, dtype));
    const S* rstd = static_cast<const S*>(data_of(rstd_, samples * rows, dtype));
    const S* weight = static_cast<const S*>(data_of(weight_, columns, dtype));
    S* out = changed<S>(grad_x, numel, dtype);
    S* of_weight = changed<S>(grad_weight, batch.num_tasks * columns, dtype);
    S* of_bias = changed<S>(grad_bias, batch.num_tasks * columns, dtype);
    const size_t width = static_cast<size_t>(columns);
    std::vector<double> partial(2 * width * chunks.size(), 0.0);
    over(static_cast<int64_t>(chunks.size()), [&](int64_t begin, int64_t end) {
      std::vector<S> sums(2 * width);
      for (int64_t k = begin; k < end; ++k) {
        const Chunk& chunk = chunks[static_cast<size_t>(k)];
        double* total = partial.data() + 2 * width * static_cast<size_t>(k);
        for (int64_t first = chunk.first; first < chunk.end; first += kFloatRows) {
          std::fill(sums.begin(), sums.end(), S(0));
          for (int64_t r = first; r < std::min(first + kFloatRows, chunk.end); ++r) {
            const int64_t sample = batch.order[batch.offsets[chunk.task] + r / rows], row = sample * rows + r % rows;
            kernel(g + sample * of_sample + r % rows * of_row, in + row * columns, columns,
                   static_cast<double>(mean[row]), static_cast<double>(rstd[row]), weight,
                   of_weight ? sums.data() : nullptr, of_bias ? sums.data() + width : nullptr,
                   out ? out + row * columns : nullptr);
          }
          for (size_t c = 0; c < 2 * width; ++c) total[c] += static_cast<double>(sums[c]);
        }
      }
    });
    add_chunks(chunks, partial, batch.num_tasks, columns, of_weight, of_bias);
  });
}

}  // namespace
}  // namespace fastmtl::cpu

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  m.impl("_group_norm_backward_by_task", TORCH_BOX(&fastmtl::cpu::group_norm_backward));
  m.impl("_layer_norm_backward_by_task", TORCH_BOX(&fastmtl::cpu::layer_norm_backward));
}
