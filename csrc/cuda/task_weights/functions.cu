// The table of functions as it is on a CUDA device.
#include "cuda/task_weights/functions.h"

#include <torch/csrc/stable/accelerator.h>

#include <map>
#include <mutex>

#include "cuda/runtime.h"
#include "cuda/task_weights/kernel_functions.h"

namespace fastmtl::cuda {
namespace {

// asked once for each device
int num_sms(int device) {
  static std::mutex* const mutex = new std::mutex;
  static std::map<int, int>* const known = new std::map<int, int>;
  const std::lock_guard<std::mutex> lock(*mutex);
  int& found = (*known)[device];
  if (found == 0) check(cudaDeviceGetAttribute(&found, cudaDevAttrMultiProcessorCount, device), "device attribute");
  return found;
}

ConvFunctions make() {
  ConvFunctions f = kernel_functions();
  f.device_kind = 2;
  f.on_device = [](int device, const std::function<void(Stream)>& run) {
    const torch::stable::accelerator::DeviceGuard guard(device);
    run(current_stream(device));
  };
  f.num_sms = &num_sms;
  f.check = [](const char* what) { check(cudaGetLastError(), what); };
  f.table = [](int device, Stream stream, const std::vector<int64_t>& words) {
    return device_table(device, static_cast<cudaStream_t>(stream), words);
  };
  return f;
}

}  // namespace

const ConvFunctions* conv_functions() {
  static const ConvFunctions* const it = new ConvFunctions(make());
  return it;
}

}  // namespace fastmtl::cuda
