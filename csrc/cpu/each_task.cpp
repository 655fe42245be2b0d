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

std::vector<Tensor> convolution_weight_grads(std::vector<Tensor> grad_out, std::vector<Tensor> x, Tensor weight,
                                             std::vector<int64_t> stride, std::vector<int64_t> padding,
                                             std::vector<int64_t> dilation, int64_t groups) {
  STD_TORCH_CHECK(grad_out.size() == x.size(), "fastmtl: gradients and inputs of the same tasks");
  const std::vector<int64_t> no_padding(stride.size(), 0);
  static constexpr bool kWanted[] = {false, true, false};
  const torch::headeronly::HeaderOnlyArrayRef<bool> wanted(kWanted, 3);
  return for_each_task(x.size(), [&](size_t k) {
    std::array<StableIValue, 11> stack{from(grad_out[k]), from(x[k]),    from(weight),   from(std::nullopt),
                                       from(stride),      from(padding), from(dilation), from(false),
                                       from(no_padding),  from(groups),  from(wanted)};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
    to<Tensor>(stack[0]);  // not asked for, but owned
    to<Tensor>(stack[2]);
    return to<Tensor>(stack[1]);
  });
}

std::vector<Tensor> products(std::vector<Tensor> a, std::vector<Tensor> b) {
  STD_TORCH_CHECK(a.size() == b.size(), "fastmtl: factors of the same tasks");
  return for_each_task(a.size(), [&](size_t k) {
    std::array<StableIValue, 2> stack{from(a[k]), from(b[k])};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "", stack.data(), TORCH_ABI_VERSION));
    return to<Tensor>(stack[0]);
  });
}

}  // namespace
}  // namespace fastmtl::cpu

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  m.impl("_convolution_weight_grads", TORCH_BOX(&fastmtl::cpu::convolution_weight_grads));
  m.impl("_products", TORCH_BOX(&fastmtl::cpu::products));
}
