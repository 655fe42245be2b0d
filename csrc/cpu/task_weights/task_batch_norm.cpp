// Batch norm of a batch that mixes tasks: each task's samples, wherever they lie, by their own statistics. Two passes
// over x forward and two over x and the gradient backward, one each by given statistics; nothing is gathered. Which
// sums are made together depends on the sizes alone, so the bits of a result do not depend on the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "cpu/simd/kernels.h"
#include "cpu/task_weights/batch.h"
#include "cpu/task_weights/pictures.h"

namespace fastmtl::cpu {
namespace {

// elements of one task's channels that a thread takes from each sample at a time, where channels are runs of pixels
constexpr int64_t kRunElements = 4096;
constexpr int64_t kMaxChannels = 64;
// rows of pixels with partial sums of their own, where channels lie side by side
constexpr int64_t kMinRows = 32, kMaxRows = 256;
constexpr int64_t kRowElements = 8192;

Pictures pictures_of(const Tensor& x, bool rows) {
  const DType dtype = dtype_of(x);
  int64_t pixels = 1;
  for (int64_t d = 2; d < x.dim(); ++d) pixels *= x.size(d);
  return {x.size(0), x.size(1), pixels, rows, dtype, size_of(dtype)};
}

// a [T, C] table of S, or null
template <class S>
S* table_of(const Tensor& x, const Batch& batch, const Pictures& p) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == batch.num_tasks && x.size(1) == p.channels && x.is_contiguous() &&
                      dtype_of(x) == wide(p.dtype),
                  "fastmtl: expected a contiguous [", batch.num_tasks, ", ", p.channels, "] table");
  return static_cast<S*>(const_cast<void*>(x.const_data_ptr()));
}
template <class S>
const S* table_of(const std::optional<Tensor>& x, const Batch& batch, const Pictures& p) {
  return x.has_value() ? table_of<S>(*x, batch, p) : nullptr;
}

// two sums of each channel in double: mean and squared deviations of `count` values, or plain sums
struct Sums {
  double first = 0, second = 0;
  // of mean and deviations; Chan, Golub and LeVeque 1983
  void join(int64_t count, double mean, double square, int64_t more) {
    const double total = static_cast<double>(count + more), d = mean - first;
    first += d * static_cast<double>(more) / total;
    second += square + d * d * static_cast<double>(count) * static_cast<double>(more) / total;
  }
  void add(double a, double b) {
    first += a;
    second += b;
  }
};

// --- channels that are runs of pixels: a thread takes some channels of a task through all its samples

// run(task, first channel, end): channels of each task in blocks that do not depend on the threads
template <class F>
void for_each_block(const Batch& batch, const Pictures& p, const F& run) {
  const int64_t size = std::clamp<int64_t>(kRunElements / std::max<int64_t>(p.pixels, 1), 1, kMaxChannels);
  const int64_t blocks = (p.channels + size - 1) / size;
  // all tasks of a block of channels side by side: tasks differ in size, threads should not
  over(blocks * batch.num_tasks, [&](int64_t first, int64_t end) {
    for (int64_t k = first; k < end; ++k) {
      const int64_t t = k % batch.num_tasks, c = k / batch.num_tasks * size;
      if (batch.count(t) > 0) run(t, c, std::min(c + size, p.channels));
    }
  });
}

// visit(channel, offset in bytes, elements, values of this channel before it)
template <class F>
void for_each_run(const Batch& batch, const Pictures& p, int64_t task, int64_t first, int64_t end, const F& visit) {
  for (int64_t i = 0; i < batch.count(task); ++i) {
    const int64_t sample = batch.order[batch.offsets[task] + i];
    for (int64_t c = first; c < end; ++c)
      for (int64_t at = 0; at < p.pixels; at += kBlock)
        visit(c, sample * p.of_sample() + (c * p.pixels + at) * p.bytes, std::min(kBlock, p.pixels - at),
              i * p.pixels + at);
  }
}

// --- channels side by side: chunks of rows of one task, with partial sums

struct Chunk {
  int64_t task, first, count;  // rows of the task: its samples' pixels in order
};

std::vector<Chunk> chunks_of(const Batch& batch, const Pictures& p) {
  const int64_t columns = std::clamp<int64_t>(p.channels, 1, kNormColumns);
  const int64_t most = std::clamp(kRowElements / columns, kMinRows, kMaxRows);
  std::vector<Chunk> chunks;
  for (int64_t t = 0; t < batch.num_tasks; ++t) {
    const int64_t rows = batch.count(t) * p.pixels;
    for (int64_t first = 0; first < rows; first += most) chunks.push_back({t, first, std::min(most, rows - first)});
  }
  return chunks;
}

// where the rows of a chunk lie
template <class P>
void find_rows(const Batch& batch, const Pictures& p, const Chunk& chunk, P* data, P** rows) {
  const int64_t* samples = batch.order + batch.offsets[chunk.task];
  for (int64_t r = 0; r < chunk.count; ++r) {
    const int64_t row = chunk.first + r;
    rows[r] = data + samples[row / p.pixels] * p.of_sample() + row % p.pixels * p.channels * p.bytes;
  }
}

// run(task, where its channels begin in a table), over the tasks that have samples
template <class F>
void over_tasks(const Batch& batch, const Pictures& p, const F& run) {
  over(batch.num_tasks, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      if (batch.count(t) > 0) run(t, t * p.channels);
  });
}

// run(first channel, columns)
template <class F>
void for_each_column_block(const Pictures& p, const F& run) {
  for (int64_t c = 0; c < p.channels; c += kNormColumns) run(c, std::min(kNormColumns, p.channels - c));
}

// sums of each (task, channel) from those of chunks, in order; gather(sums, values before, chunk, first, second)
template <class F>
std::vector<Sums> join_chunks(const std::vector<Chunk>& chunks, const std::vector<double>& partial, const Batch& batch,
                              const Pictures& p, const F& gather) {
  std::vector<Sums> sums(static_cast<size_t>(batch.num_tasks * p.channels));
  over((p.channels + kNormColumns - 1) / kNormColumns, [&](int64_t first, int64_t end) {
    for (size_t k = 0; k < chunks.size(); ++k)
      for (int64_t c = first * kNormColumns; c < std::min(end * kNormColumns, p.channels); ++c) {
        const double* part = partial.data() + 2 * static_cast<int64_t>(k) * p.channels;
        gather(sums[static_cast<size_t>(chunks[k].task * p.channels + c)], chunks[k], part[c], part[p.channels + c]);
      }
  });
  return sums;
}

// --- forward

template <class S>
void forward(const Tensor& x_, const Pictures& p, const Batch& batch, const S* weight, const S* bias, bool of_batch,
             double eps, S* mean, S* var, const Tensor& y_) {
  const Norms& kernel = kernels().norms;
  const int dtype = static_cast<int>(p.dtype);
  const char* x = static_cast<const char*>(x_.const_data_ptr());
  char* y = static_cast<char*>(y_.mutable_data_ptr());
  auto keep = [&](int64_t task, int64_t c, const Sums& sums) {
    const double count = static_cast<double>(batch.count(task) * p.pixels);
    mean[task * p.channels + c] = static_cast<S>(sums.first);
    var[task * p.channels + c] = static_cast<S>(sums.second / count);
  };
  auto scale_of = [&](int64_t at) {
    return (weight ? static_cast<double>(weight[at]) : 1.0) / std::sqrt(static_cast<double>(var[at]) + eps);
  };
  if (!p.rows) {
    for_each_block(batch, p, [&](int64_t task, int64_t first, int64_t end) {
      double scale[kMaxChannels];
      if (of_batch) {
        Sums sums[kMaxChannels];
        for_each_run(batch, p, task, first, end, [&](int64_t c, int64_t at, int64_t length, int64_t before) {
          double m, s;
          kernel.run_moments[dtype](x + at, length, &m, &s);
          sums[c - first].join(before, m, s, length);
        });
        for (int64_t c = first; c < end; ++c) keep(task, c, sums[c - first]);
      }
      for (int64_t c = first; c < end; ++c) scale[c - first] = scale_of(task * p.channels + c);
      for_each_run(batch, p, task, first, end, [&](int64_t c, int64_t at, int64_t length, int64_t) {
        const int64_t entry = task * p.channels + c;
        kernel.run_affine[dtype](x + at, length, static_cast<double>(mean[entry]), scale[c - first],
                                 bias ? static_cast<double>(bias[entry]) : 0.0, y + at);
      });
    });
    return;
  }
  const std::vector<Chunk> chunks = chunks_of(batch, p);
  const int64_t num_chunks = static_cast<int64_t>(chunks.size());
  if (of_batch) {
    std::vector<double> partial(static_cast<size_t>(2 * num_chunks * p.channels));
    over(num_chunks, [&](int64_t begin, int64_t end) {
      const char* rows[kMaxRows];
      for (int64_t k = begin; k < end; ++k) {
        const Chunk& chunk = chunks[static_cast<size_t>(k)];
        find_rows(batch, p, chunk, x, rows);
        double* part = partial.data() + 2 * k * p.channels;
        for_each_column_block(p, [&](int64_t c, int64_t columns) {
          kernel.rows_moments[dtype](reinterpret_cast<const void* const*>(rows), static_cast<int>(chunk.count), c,
                                     columns, part + c, part + p.channels + c);
        });
      }
    });
    const std::vector<Sums> sums = join_chunks(
        chunks, partial, batch, p,
        [](Sums& sum, const Chunk& chunk, double m, double s) { sum.join(chunk.first, m, s, chunk.count); });
    for (int64_t t = 0; t < batch.num_tasks; ++t)
      for (int64_t c = 0; c < p.channels && batch.count(t) > 0; ++c)
        keep(t, c, sums[static_cast<size_t>(t * p.channels + c)]);
  }
  std::vector<S> scale(static_cast<size_t>(batch.num_tasks * p.channels)), zero(static_cast<size_t>(kNormColumns));
  over_tasks(batch, p, [&](int64_t, int64_t at) {
    kernel.scales[dtype](weight ? weight + at : nullptr, var + at, eps, p.channels, scale.data() + at);
  });
  over(num_chunks, [&](int64_t begin, int64_t end) {
    const char* rows[kMaxRows];
    char* to[kMaxRows];
    for (int64_t k = begin; k < end; ++k) {
      const Chunk& chunk = chunks[static_cast<size_t>(k)];
      find_rows(batch, p, chunk, x, rows);
      find_rows(batch, p, chunk, y, to);
      for_each_column_block(p, [&](int64_t c, int64_t columns) {
        const int64_t entry = chunk.task * p.channels + c;
        kernel.rows_affine[dtype](reinterpret_cast<const void* const*>(rows), static_cast<int>(chunk.count), c, columns,
                                  mean + entry, scale.data() + entry, bias ? bias + entry : zero.data(),
                                  reinterpret_cast<void* const*>(to));
      });
    }
  });
}

// --- backward

// dx = g * of_g + (x - mean) * of_x + constant
struct Gradient {
  double of_g, of_x, constant;
};

template <class S>
struct BackwardTables {
  const S* weight;
  const S* mean;
  const S* var;
  S* grad_weight;
  S* grad_bias;
  double eps;
  bool of_batch;
  // from the sums of g and of g (x - mean): what dx is made of, and the gradients of weight and bias
  Gradient finish(int64_t entry, const Sums& sums, int64_t count) const {
    const double scale = 1.0 / std::sqrt(static_cast<double>(var[entry]) + eps);
    const double of_g = weight ? scale * static_cast<double>(weight[entry]) : scale;
    grad_weight[entry] = static_cast<S>(sums.second * scale);
    grad_bias[entry] = static_cast<S>(sums.first);
    const double n = static_cast<double>(count);
    return {of_g, -of_g * scale * scale * sums.second / n, -of_g * sums.first / n};
  }
  double scale_of(int64_t entry) const {
    const double scale = 1.0 / std::sqrt(static_cast<double>(var[entry]) + eps);
    return weight ? scale * static_cast<double>(weight[entry]) : scale;
  }
};

template <class S>
void backward(const Tensor& g_, const Tensor& x_, const Pictures& p, const Batch& batch,
              const BackwardTables<S>& tables, bool sums_wanted, const std::optional<Tensor>& grad_x) {
  const Norms& kernel = kernels().norms;
  const int dtype = static_cast<int>(p.dtype);
  const char* x = static_cast<const char*>(x_.const_data_ptr());
  const char* g = static_cast<const char*>(g_.const_data_ptr());
  char* out = grad_x.has_value() ? static_cast<char*>(grad_x->mutable_data_ptr()) : nullptr;
  const bool sums_needed = sums_wanted || (tables.of_batch && out);
  if (!p.rows) {
    for_each_block(batch, p, [&](int64_t task, int64_t first, int64_t end) {
      const int64_t count = batch.count(task) * p.pixels;
      Sums sums[kMaxChannels];
      Gradient of[kMaxChannels];
      for (int64_t c = first; c < end; ++c) of[c - first] = {tables.scale_of(task * p.channels + c), 0, 0};
      auto gather = [&](int64_t c, int64_t at, int64_t length) {
        kernel.run_products[dtype](g + at, x + at, length, static_cast<double>(tables.mean[task * p.channels + c]),
                                   &sums[c - first].first, &sums[c - first].second);
      };
      if (!tables.of_batch) {
        // given statistics do not depend on x, of which dx is not made: it may not be finite
        for_each_run(batch, p, task, first, end, [&](int64_t c, int64_t at, int64_t length, int64_t) {
          if (sums_needed) gather(c, at, length);
          if (out) kernel.run_affine[dtype](g + at, length, 0.0, of[c - first].of_g, 0.0, out + at);
        });
      } else if (sums_needed) {
        for_each_run(batch, p, task, first, end,
                     [&](int64_t c, int64_t at, int64_t length, int64_t) { gather(c, at, length); });
      }
      for (int64_t c = first; c < end && sums_needed; ++c)
        of[c - first] = tables.finish(task * p.channels + c, sums[c - first], count);
      if (!out || !tables.of_batch) return;
      for_each_run(batch, p, task, first, end, [&](int64_t c, int64_t at, int64_t length, int64_t) {
        const Gradient& d = of[c - first];
        kernel.run_gradient[dtype](g + at, x + at, length, static_cast<double>(tables.mean[task * p.channels + c]),
                                   d.of_g, d.of_x, d.constant, out + at);
      });
    });
    return;
  }
  const std::vector<Chunk> chunks = chunks_of(batch, p);
  const int64_t num_chunks = static_cast<int64_t>(chunks.size());
  const size_t entries = static_cast<size_t>(batch.num_tasks * p.channels),
               of_statistics = tables.of_batch ? entries : 0;
  std::vector<S> of_g(entries), of_x(of_statistics), constant(of_statistics), zero(static_cast<size_t>(kNormColumns));
  if (out && !tables.of_batch)
    over_tasks(batch, p, [&](int64_t, int64_t at) {
      kernel.scales[dtype](tables.weight ? tables.weight + at : nullptr, tables.var + at, tables.eps, p.channels,
                           of_g.data() + at);
    });
  // the gradients of the sums of chunks, and dx where it does not depend on them; then dx where it does
  std::vector<double> partial(sums_needed ? static_cast<size_t>(2 * num_chunks * p.channels) : 0);
  auto walk = [&](bool gather, bool write) {
    over(num_chunks, [&](int64_t begin, int64_t end) {
      const char *rows[kMaxRows], *grads[kMaxRows];
      char* to[kMaxRows];
      for (int64_t k = begin; k < end; ++k) {
        const Chunk& chunk = chunks[static_cast<size_t>(k)];
        const int count = static_cast<int>(chunk.count);
        find_rows(batch, p, chunk, g, grads);
        if (write) find_rows(batch, p, chunk, out, to);
        if (gather || tables.of_batch) find_rows(batch, p, chunk, x, rows);
        const auto* of_rows = reinterpret_cast<const void* const*>(rows);
        const auto* of_grads = reinterpret_cast<const void* const*>(grads);
        auto* target = reinterpret_cast<void* const*>(to);
        double* part = partial.data() + 2 * k * p.channels;
        for_each_column_block(p, [&](int64_t c, int64_t columns) {
          const int64_t entry = chunk.task * p.channels + c;
          if (gather)
            kernel.rows_products[dtype](of_grads, of_rows, count, c, columns, tables.mean + entry, part + c,
                                        part + p.channels + c);
          if (!write) return;
          if (!tables.of_batch)
            kernel.rows_affine[dtype](of_grads, count, c, columns, zero.data(), of_g.data() + entry, zero.data(),
                                      target);
          else
            kernel.rows_gradient[dtype](of_grads, of_rows, count, c, columns, tables.mean + entry, of_g.data() + entry,
                                        of_x.data() + entry, constant.data() + entry, target);
        });
      }
    });
  };
  if (!tables.of_batch) walk(sums_needed, out != nullptr);
  else if (sums_needed) walk(true, false);
  if (sums_needed) {
    const std::vector<Sums> sums =
        join_chunks(chunks, partial, batch, p, [](Sums& sum, const Chunk&, double a, double b) { sum.add(a, b); });
    over_tasks(batch, p, [&](int64_t t, int64_t at) {
      for (int64_t c = 0; c < p.channels; ++c) {
        const size_t entry = static_cast<size_t>(at + c);
        const Gradient d = tables.finish(at + c, sums[entry], batch.count(t) * p.pixels);
        if (!tables.of_batch) continue;
        of_g[entry] = static_cast<S>(d.of_g);
        of_x[entry] = static_cast<S>(d.of_x);
        constant[entry] = static_cast<S>(d.constant);
      }
    });
  }
  if (out && tables.of_batch) walk(false, true);
}

// --- the ops

// mean and var hold given statistics, or are written; entries of tasks without samples stay as they are
void batch_norm(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                const Tensor& order, const Tensor& offsets, bool rows, bool of_batch, double eps, const Tensor& mean,
                const Tensor& var, const Tensor& y) {
  const Pictures p = pictures_of(x, rows);
  const Batch batch = batch_of(order, offsets, p.samples);
  auto run = [&]<class S>(S) {
    forward<S>(x, p, batch, table_of<S>(weight, batch, p), table_of<S>(bias, batch, p), of_batch, eps,
               table_of<S>(mean, batch, p), table_of<S>(var, batch, p), y);
  };
  if (p.dtype == DType::f64) run(0.0);
  else run(0.0f);
}

void batch_norm_backward(const Tensor& grad_out, const Tensor& x, const std::optional<Tensor>& weight,
                         const Tensor& mean, const Tensor& var, const Tensor& order, const Tensor& offsets, bool rows,
                         bool of_batch, double eps, bool sums_wanted, const std::optional<Tensor>& grad_x,
                         const Tensor& grad_weight, const Tensor& grad_bias) {
  const Pictures p = pictures_of(x, rows);
  const Batch batch = batch_of(order, offsets, p.samples);
  STD_TORCH_CHECK(dtype_of(grad_out) == p.dtype, "fastmtl: expected a gradient in the dtype of x");
  auto run = [&]<class S>(S) {
    const BackwardTables<S> tables{table_of<S>(weight, batch, p),
                                   table_of<S>(mean, batch, p),
                                   table_of<S>(var, batch, p),
                                   table_of<S>(grad_weight, batch, p),
                                   table_of<S>(grad_bias, batch, p),
                                   eps,
                                   of_batch};
    backward<S>(grad_out, x, p, batch, tables, sums_wanted, grad_x);
  };
  if (p.dtype == DType::f64) run(0.0);
  else run(0.0f);
}

// --- running statistics

// where the numbers of a task lie: in one tensor of all tasks, or in one for each
template <class S>
S* numbers_of(const std::vector<Tensor>& held, int64_t task, int64_t size) {
  S* data = static_cast<S*>(held[held.size() == 1 ? 0 : static_cast<size_t>(task)].mutable_data_ptr());
  return held.size() == 1 ? data + task * size : data;
}

void check_held(const std::vector<Tensor>& held, int64_t num_tasks, int64_t size, torch::headeronly::ScalarType dtype) {
  STD_TORCH_CHECK(held.empty() || held.size() == 1 || static_cast<int64_t>(held.size()) == num_tasks,
                  "fastmtl: expected one tensor, or one for each of ", num_tasks, " tasks");
  for (const Tensor& x : held)
    STD_TORCH_CHECK(
        x.is_contiguous() && x.scalar_type() == dtype && x.numel() == (held.size() == 1 ? num_tasks * size : size),
        "fastmtl: expected contiguous statistics of the dtype of the mean");
}

void batch_norm_update(const Tensor& mean, const Tensor& var, const Tensor& offsets, int64_t values,
                       const std::optional<double>& momentum, const std::vector<Tensor>& running_mean,
                       const std::vector<Tensor>& running_var, const std::vector<Tensor>& tracked) {
  using torch::headeronly::ScalarType;
  const int64_t num_tasks = mean.size(0), channels = mean.size(1);
  STD_TORCH_CHECK(offsets.numel() == num_tasks + 1 && offsets.is_contiguous() &&
                      offsets.scalar_type() == ScalarType::Long && mean.is_contiguous() && var.is_contiguous() &&
                      var.numel() == mean.numel() && var.scalar_type() == mean.scalar_type() &&
                      (momentum.has_value() || !tracked.empty()),
                  "fastmtl: statistics that do not fit");
  check_held(running_mean, num_tasks, channels, mean.scalar_type());
  check_held(running_var, num_tasks, channels, mean.scalar_type());
  check_held(tracked, num_tasks, 1, ScalarType::Long);
  const auto* bounds = static_cast<const int64_t*>(offsets.const_data_ptr());
  auto run = [&]<class S>(S) {
    const S* means = static_cast<const S*>(mean.const_data_ptr());
    const S* variances = static_cast<const S*>(var.const_data_ptr());
    for (int64_t t = 0; t < num_tasks; ++t) {
      const double count = static_cast<double>((bounds[t + 1] - bounds[t]) * values);
      if (count < 2) continue;
      double share = momentum.value_or(0);
      if (!tracked.empty()) {
        int64_t& batches = *numbers_of<int64_t>(tracked, t, 1);
        ++batches;
        if (!momentum.has_value()) share = 1.0 / static_cast<double>(batches);
      }
      auto move = [&](const std::vector<Tensor>& held, const S* found, double factor) {
        S* to = numbers_of<S>(held, t, channels);
        for (int64_t c = 0; c < channels; ++c)
          to[c] = static_cast<S>((1 - share) * static_cast<double>(to[c]) +
                                 share * factor * static_cast<double>(found[t * channels + c]));
      };
      move(running_mean, means, 1);
      move(running_var, variances, count / (count - 1));
    }
  };
  if (dtype_of(mean) == DType::f64) run(0.0);
  else run(0.0f);
}

}  // namespace
}  // namespace fastmtl::cpu

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  m.impl("_task_batch_norm", TORCH_BOX(&fastmtl::cpu::batch_norm));
  m.impl("_task_batch_norm_backward", TORCH_BOX(&fastmtl::cpu::batch_norm_backward));
  m.impl("_task_batch_norm_update", TORCH_BOX(&fastmtl::cpu::batch_norm_update));
}
