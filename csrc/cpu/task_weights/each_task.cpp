// Weight gradients of all tasks at once: each by torch's own op, on one thread. A task has few samples, which divide
// badly among threads, while the tasks divide well.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <atomic>
#include <exception>
#include <mutex>
#include <optional>
#include <vector>

#include "common/abi.h"

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

// run(k) for k = 0..count-1, in turn to whichever thread is free: the first ones should be the longest
template <typename Run>
std::vector<Tensor> for_each_task(size_t count, const Run& run) {
  std::vector<std::optional<Tensor>> found(count);
  std::atomic<size_t> next{0};
  std::exception_ptr error;
  std::mutex guard;
  if (!omp_set_num_threads || !omp_get_max_threads) {
    std::vector<Tensor> out;
    for (size_t k = 0; k < count; ++k) out.push_back(run(k));
    return out;
  }
  torch::stable::parallel_for(0, static_cast<int64_t>(count), 1, [&](int64_t, int64_t) {
    try {
      const OneThread alone;
      for (size_t k = next++; k < count; k = next++) found[k] = run(k);
    } catch (...) {
      std::lock_guard<std::mutex> lock(guard);
      error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
  std::vector<Tensor> out;
  for (auto& x : found) out.push_back(*x);
  return out;
}

// the weight gradients; with `bias` those of the bias behind them, which oneDNN sums on the way
std::vector<Tensor> convolution_weight_grads(std::vector<Tensor> grad_out, std::vector<Tensor> x, Tensor weight,
                                             std::vector<int64_t> stride, std::vector<int64_t> padding,
                                             std::vector<int64_t> dilation, int64_t groups, bool bias) {
  STD_TORCH_CHECK(grad_out.size() == x.size(), "fastmtl: gradients and inputs of the same tasks");
  const std::vector<int64_t> no_padding(stride.size(), 0);
  const bool asked[] = {false, true, bias};
  const torch::headeronly::HeaderOnlyArrayRef<bool> wanted(asked, 3);
  std::vector<std::optional<Tensor>> sums(x.size());
  std::vector<Tensor> out = for_each_task(x.size(), [&](size_t k) {
    std::optional<std::vector<int64_t>> size;
    if (bias) size = std::vector<int64_t>{weight.size(0)};
    std::array<StableIValue, 11> stack{from(grad_out[k]), from(x[k]),    from(weight),   from(size),
                                       from(stride),      from(padding), from(dilation), from(false),
                                       from(no_padding),  from(groups),  from(wanted)};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
    to<Tensor>(stack[0]);  // not asked for, but owned
    Tensor sum = to<Tensor>(stack[2]);
    if (bias) sums[k] = sum;
    return to<Tensor>(stack[1]);
  });
  if (bias)
    for (auto& sum : sums) out.push_back(*sum);
  return out;
}

// the samples of one task as rows `[m r, C]`: a slice of the batch, or gathered, into a buffer that stays in the cache
Tensor task_rows(const Tensor& x, const std::optional<Tensor>& order, int64_t first, int64_t count) {
  Tensor rows = x;
  if (order.has_value()) {
    std::array<StableIValue, 3> stack{from(x), from(int64_t{0}),
                                      from(torch::stable::narrow(const_cast<Tensor&>(*order), 0, first, count))};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::index_select", "", stack.data(), TORCH_ABI_VERSION));
    rows = to<Tensor>(stack[0]);
  } else {
    rows = torch::stable::narrow(const_cast<Tensor&>(x), 0, first, count);
  }
  return torch::stable::view(rows, {count * x.size(1), x.size(2)});
}

// `grad_out[task]^T x[task]` of contiguous `[n, r, C]`; bounds: first and end of each task, in the order of `order`
std::vector<Tensor> linear_weight_grads(Tensor grad_out, Tensor x, std::optional<Tensor> order,
                                        std::vector<int64_t> bounds) {
  STD_TORCH_CHECK(
      x.dim() == 3 && grad_out.dim() == 3 && x.is_contiguous() && grad_out.is_contiguous() && bounds.size() % 2 == 0,
      "fastmtl: rows that do not fit");
  return for_each_task(bounds.size() / 2, [&](size_t k) {
    const int64_t first = bounds[2 * k], count = bounds[2 * k + 1] - first;
    const Tensor back = task_rows(grad_out, order, first, count);
    std::array<StableIValue, 2> stack{from(torch::stable::transpose(back, 0, 1)),
                                      from(task_rows(x, order, first, count))};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "", stack.data(), TORCH_ABI_VERSION));
    return to<Tensor>(stack[0]);
  });
}

}  // namespace
}  // namespace fastmtl::cpu

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  m.impl("_convolution_weight_grads", TORCH_BOX(&fastmtl::cpu::convolution_weight_grads));
  m.impl("_linear_weight_grads", TORCH_BOX(&fastmtl::cpu::linear_weight_grads));
}
