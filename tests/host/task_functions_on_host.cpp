// The launcher's table of functions (csrc/cuda/task_weights/functions.h) on CPU tensors: the kernels run on the host.
#include <atomic>
#include <mutex>

#include "cuda/task_weights/kernel_functions.h"

using namespace fastmtl::cuda;

namespace {

std::atomic<int64_t> tables{0};
std::atomic<int> sms{3};

ConvFunctions on_host() {
  ConvFunctions f = kernel_functions();
  f.device_kind = 1;
  f.on_device = [](int, const std::function<void(Stream)>& run) {
    // a block's threads are fibers of one thread, and its shared memory is static
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    run(nullptr);
  };
  f.num_sms = [](int) { return sms.load(); };
  f.check = [](const char*) {};
  f.table = [](int, Stream, const std::vector<int64_t>& words) {
    ++tables;
    const auto held = std::make_shared<std::vector<int64_t>>(words);
    return std::shared_ptr<const int64_t>(held, held->data());
  };
  return f;
}

}  // namespace

extern "C" {

const void* host_conv_functions() {
  static const ConvFunctions it = on_host();
  return &it;
}

// how many tables were made
int64_t host_conv_tables() { return tables; }

// how many multiprocessors the device is said to have
void host_conv_sms(int64_t count) { sms = static_cast<int>(count); }

// in which order blocks and threads take turns, see cuda_on_host.h
void host_conv_schedule(uint64_t schedule) { cuda_on_host::schedule = schedule; }
}
