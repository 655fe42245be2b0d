// Weight gradients of all tasks at once: each by torch's own op, on one thread. A task has few samples, which divide
// badly among threads, while the tasks divide well.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <exception>
#include <mutex>
#include <numeric>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "common/abi.h"
#include "cpu/simd/kernels.h"
#include "cpu/task_weights/batch.h"

// torch's own OpenMP runtime, found through libtorch; null where torch was built without one
extern "C" {
__attribute__((weak)) void omp_set_num_threads(int);
__attribute__((weak)) int omp_get_max_threads(void);
}

namespace fastmtl::cpu {
namespace {

using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;

// oneDNN makes a primitive for as many threads as OpenMP would give, and waits for all of them: inside a parallel
// region there is one, and it must know
class OneThread {
 public:
  OneThread() : before_(omp_get_max_threads()) { omp_set_num_threads(1); }
  ~OneThread() { omp_set_num_threads(before_); }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  int before_;
};

// run(k) for each of the present tasks, the one with most samples first, in turn on whichever thread is free; with
// fewer tasks than threads in turn on all threads
template <typename Run>
void for_each_task(const Batch& batch, const std::vector<int64_t>& present, const Run& run) {
  std::vector<size_t> longest(present.size());
  std::iota(longest.begin(), longest.end(), size_t{0});
  std::stable_sort(longest.begin(), longest.end(),
                   [&](size_t a, size_t b) { return batch.count(present[a]) > batch.count(present[b]); });
  if (!omp_set_num_threads || !omp_get_max_threads || present.size() < torch::stable::get_num_threads()) {
    for (size_t k : longest) run(k);
    return;
  }
  std::atomic<size_t> next{0};
  std::exception_ptr error;
  std::mutex guard;
  torch::stable::parallel_for(0, static_cast<int64_t>(present.size()), 1, [&](int64_t, int64_t) {
    try {
      const OneThread alone;
      for (size_t k = next++; k < longest.size(); k = next++) run(longest[k]);
    } catch (...) {
      std::lock_guard<std::mutex> lock(guard);
      error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

// `[n, c, h, w]` pictures, each without gaps in memory: channels last, or NCHW
class Pictures {
 public:
  // `joined`: the samples of a call are one long picture, where each pixel is seen alone
  Pictures(Tensor x, bool channels_last, bool joined) : x_(std::move(x)), joined_(joined) {
    STD_TORCH_CHECK(x_.dim() == 4, "fastmtl: pictures must have four dimensions");
    channels_ = x_.size(1), height_ = x_.size(2), wide_ = x_.size(3);
    width_ = channels_ * height_ * wide_;
    if (channels_last) inner_ = {1, wide_ * channels_, channels_};
    else inner_ = {height_ * wide_, wide_, 1};
    for (int d = 0; d < 3; ++d)
      STD_TORCH_CHECK(x_.size(d + 1) == 1 || x_.stride(d + 1) == inner_[d], "fastmtl: pictures with gaps");
    stride_ = x_.size(0) > 1 ? x_.stride(0) : width_;
    STD_TORCH_CHECK(!joined_ || (channels_last && stride_ == width_), "fastmtl: pictures that can't be joined");
    size_ = size_of(dtype_of(x_));
  }

  int64_t bytes() const { return width_ * size_; }
  int64_t channels() const { return channels_; }

  // adds the sum of each channel over samples that lie `stride` elements apart
  void add_sums(const void* data, int64_t stride, int64_t count, double* sum) const {
    const SumKernels& kernel = kernels().sums;
    const int dtype = static_cast<int>(dtype_of(x_));
    const int64_t pixels = height_ * wide_;
    const bool rows = inner_[0] == 1;
    if (rows && stride == width_) {
      kernel.column_sums[dtype](data, count * pixels, channels_, sum);
      return;
    }
    for (int64_t k = 0; k < count; ++k) {
      const char* sample = static_cast<const char*>(data) + k * stride * size_;
      if (rows) kernel.column_sums[dtype](sample, pixels, channels_, sum);
      else kernel.run_sums[dtype](sample, channels_, pixels, sum);
    }
  }

  // sum: not null: the sums of their channels are added to it, too
  Tensor neighbours(int64_t first, int64_t count, double* sum = nullptr) const {
    if (sum) add_sums(static_cast<const char*>(x_.const_data_ptr()) + first * stride_ * size_, stride_, count, sum);
    return pictures(x_, first * stride_, stride_, count);
  }

  // copied, into memory that is in the cache when the call reads it
  Tensor gathered(const int64_t* samples, int64_t count, double* sum = nullptr) const {
    const Tensor rows = torch::stable::new_empty(x_, {count, width_});
    const char* in = static_cast<const char*>(x_.const_data_ptr());
    char* out = static_cast<char*>(rows.mutable_data_ptr());
    for (int64_t k = 0; k < count; ++k) {
      std::memcpy(out + k * bytes(), in + samples[k] * stride_ * size_, static_cast<size_t>(bytes()));
      if (sum) add_sums(out + k * bytes(), width_, 1, sum);
    }
    return pictures(rows, 0, width_, count);
  }

 private:
  Tensor pictures(const Tensor& from, int64_t offset, int64_t stride, int64_t count) const {
    std::array<int64_t, 4> sizes{count, channels_, height_, wide_};
    std::array<int64_t, 4> strides{stride, inner_[0], inner_[1], inner_[2]};
    if (joined_) {
      const int64_t length = count * height_ * wide_;
      sizes = {1, channels_, 1, length}, strides = {length * channels_, 1, length * channels_, channels_};
    }
    AtenTensorHandle found = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch__reinterpret_tensor(from.get(), 4, sizes.data(), strides.data(), offset, &found));
    return Tensor(found);
  }

  Tensor x_;
  bool joined_;
  int64_t channels_, height_, wide_, width_, stride_, size_;
  std::array<int64_t, 3> inner_;
};

template <class Value>
void add_values(const Tensor& sum, const Tensor& x) {
  Value* out = static_cast<Value*>(sum.mutable_data_ptr());
  const Value* in = static_cast<const Value*>(x.const_data_ptr());
  for (int64_t i = 0; i < x.numel(); ++i) out[i] += in[i];
}

// of results of the same op: the same dense layout
void add(const Tensor& sum, const Tensor& x) {
  for (int64_t d = 0; d < sum.dim(); ++d)
    STD_TORCH_CHECK(sum.stride(d) == x.stride(d), "fastmtl: gradients of different layouts");
  if (dtype_of(sum) == DType::f64) add_values<double>(sum, x);
  else add_values<float>(sum, x);
}

// one task's sums in double as a row of `sums`, `[T, C]` in at least float
void write_sums(const std::vector<double>& total, int64_t task, const Tensor& sums) {
  const int64_t first = task * static_cast<int64_t>(total.size());
  if (dtype_of(sums) == DType::f64) {
    std::copy(total.begin(), total.end(), static_cast<double*>(sums.mutable_data_ptr()) + first);
  } else {
    float* out = static_cast<float*>(sums.mutable_data_ptr()) + first;
    for (size_t c = 0; c < total.size(); ++c) out[c] = static_cast<float>(total[c]);
  }
}

void check_sums(const std::optional<Tensor>& sums, int64_t num_tasks, int64_t channels, DType of) {
  STD_TORCH_CHECK(!sums || (sums->dim() == 2 && sums->size(0) == num_tasks && sums->size(1) == channels &&
                            sums->is_contiguous() && dtype_of(*sums) == wide(of)),
                  "fastmtl: expected contiguous sums of ", num_tasks, " tasks");
}

// of each task with samples, in turn, the weight gradient; into the rows of `sums`, if asked for, those of the bias: a
// pass over samples that the call reads next, since oneDNN's own sums cost several times as much. Samples that are no
// neighbours are gathered, or go in a call for each run of neighbours, where that is cheaper: a call costs as much as
// `call_bytes` copied. `weight`: of the shape and layout of a gradient
std::vector<Tensor> convolution_weight_grads(Tensor grad_out, Tensor x, Tensor weight, Tensor order, Tensor offsets,
                                             std::vector<int64_t> stride, std::vector<int64_t> padding,
                                             std::vector<int64_t> dilation, int64_t groups, std::optional<Tensor> sums,
                                             bool channels_last, bool joined, int64_t call_bytes) {
  STD_TORCH_CHECK(grad_out.size(0) == x.size(0) && dtype_of(grad_out) == dtype_of(x),
                  "fastmtl: gradients and inputs that do not fit");
  const Batch batch = batch_of(order, offsets, x.size(0));
  const Pictures source(x, channels_last, joined), back(grad_out, channels_last, joined);
  check_sums(sums, batch.num_tasks, back.channels(), dtype_of(grad_out));
  const bool narrow = wide(dtype_of(x)) != dtype_of(x);  // sums of several calls would be rounded
  const std::vector<int64_t> no_padding(stride.size(), 0);
  const bool asked[] = {false, true, false};
  const torch::headeronly::HeaderOnlyArrayRef<bool> wanted(asked, 3);
  const auto differentiate = [&](const Tensor& g, const Tensor& pictures) {
    std::array<StableIValue, 11> stack{from(g),          from(pictures), from(weight),   from(std::nullopt),
                                       from(stride),     from(padding),  from(dilation), from(false),
                                       from(no_padding), from(groups),   from(wanted)};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
    to<Tensor>(stack[0]);  // not asked for, but owned
    to<Tensor>(stack[2]);
    return to<Tensor>(stack[1]);
  };
  std::vector<int64_t> present;
  for (int64_t t = 0; t < batch.num_tasks; ++t)
    if (batch.count(t)) present.push_back(t);
  std::vector<std::optional<Tensor>> grads(present.size());
  for_each_task(batch, present, [&](size_t k) {
    const int64_t *first = batch.order + batch.offsets[present[k]], *end = first + batch.count(present[k]);
    const int64_t count = end - first;
    std::vector<double> total(sums ? back.channels() : 0, 0.0);
    double* sum = sums ? total.data() : nullptr;
    int64_t runs = 1;
    for (const int64_t* s = first + 1; s < end; ++s) runs += s[0] != s[-1] + 1;
    if (runs > 1 && (narrow || (runs - 1) * call_bytes > 2 * count * (source.bytes() + back.bytes()))) {
      grads[k] = differentiate(back.gathered(first, count, sum), source.gathered(first, count));
      first = end;
    }
    while (first < end) {
      const int64_t* next = first + 1;
      while (next < end && *next == next[-1] + 1) ++next;
      const Tensor grad =
          differentiate(back.neighbours(*first, next - first, sum), source.neighbours(*first, next - first));
      if (grads[k].has_value()) add(*grads[k], grad);
      else grads[k] = grad;
      first = next;
    }
    if (sums) write_sums(total, present[k], *sums);
  });
  std::vector<Tensor> out;
  for (auto& grad : grads) out.push_back(*grad);
  return out;
}

// the samples of one task as rows `[m r, C]`: a slice of the batch, or gathered, into a buffer that stays in the cache
Tensor task_rows(Tensor& x, Tensor& order, const Batch& batch, int64_t task) {
  const int64_t first = batch.offsets[task], count = batch.count(task), sample = batch.order[first];
  Tensor rows;
  if (batch.order[first + count - 1] == sample + count - 1) {
    rows = torch::stable::narrow(x, 0, sample, count);
  } else {
    std::array<StableIValue, 3> stack{from(x), from(int64_t{0}), from(torch::stable::narrow(order, 0, first, count))};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::index_select", "", stack.data(), TORCH_ABI_VERSION));
    rows = to<Tensor>(stack[0]);
  }
  return torch::stable::view(rows, {count * x.size(1), x.size(2)});
}

// of each task with samples, in turn, `grad_out[task]^T x[task]` of contiguous `[n, r, C]`; into the rows of `sums`, if
// asked for, the sums of `grad_out[task]` over its rows, which the product reads next
std::vector<Tensor> linear_weight_grads(Tensor grad_out, Tensor x, Tensor order, Tensor offsets,
                                        std::optional<Tensor> sums) {
  STD_TORCH_CHECK(x.dim() == 3 && grad_out.dim() == 3 && x.is_contiguous() && grad_out.is_contiguous() &&
                      grad_out.size(0) == x.size(0),
                  "fastmtl: rows that do not fit");
  const Batch batch = batch_of(order, offsets, x.size(0));
  const DType dtype = dtype_of(grad_out);
  check_sums(sums, batch.num_tasks, grad_out.size(2), dtype);
  std::vector<int64_t> present;
  for (int64_t t = 0; t < batch.num_tasks; ++t)
    if (batch.count(t)) present.push_back(t);
  std::vector<std::optional<Tensor>> grads(present.size());
  for_each_task(batch, present, [&](size_t k) {
    const Tensor back = task_rows(grad_out, order, batch, present[k]);
    if (sums) {
      std::vector<double> total(static_cast<size_t>(back.size(1)), 0.0);
      kernels().sums.column_sums[static_cast<int>(dtype)](back.const_data_ptr(), back.size(0), back.size(1),
                                                          total.data());
      write_sums(total, present[k], *sums);
    }
    std::array<StableIValue, 2> stack{from(torch::stable::transpose(back, 0, 1)),
                                      from(task_rows(x, order, batch, present[k]))};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "", stack.data(), TORCH_ABI_VERSION));
    grads[k] = to<Tensor>(stack[0]);
  });
  std::vector<Tensor> out;
  for (auto& grad : grads) out.push_back(*grad);
  return out;
}

}  // namespace
}  // namespace fastmtl::cpu

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  m.impl("_convolution_weight_grads", TORCH_BOX(&fastmtl::cpu::convolution_weight_grads));
  m.impl("_linear_weight_grads", TORCH_BOX(&fastmtl::cpu::linear_weight_grads));
}
