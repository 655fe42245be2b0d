// The kernels of launch.h and what a call asks of its device, as a table of functions: those of CUDA, or of a run on
// the host. So the launcher is one and the same piece of code in a build with CUDA, in the tests that run the kernels
// on CPU tensors, and where its own time is measured with launches that do nothing.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "cuda/task_weights/launch.h"

namespace fastmtl::cuda {

// a stream, of whatever type that has there
using Stream = void*;

struct ConvFunctions {
  int64_t bytes[5];     // of the structs that go through, as the other side has them
  int32_t device_kind;  // see python_tensors.h
  // runs with that device and its current stream
  void (*on_device)(int device, const std::function<void(Stream)>& run);
  int (*num_sms)(int device);
  // throws if a launch has failed
  void (*check)(const char* what);
  // words in the device's memory until what is queued next has run
  std::shared_ptr<const int64_t> (*table)(int device, Stream stream, const std::vector<int64_t>& words);

  const char* (*refusal)(DType dtype, const ConvShape& shape, int num_tasks);
  bool (*weights_as_they_are)(const StageParams& p, StagedWeights* found);
  int64_t (*stage_bytes)(const StageParams& p);
  StagedWeights (*stage)(const StageParams& p, void* workspace, Stream stream);
  void (*product)(const ProductParams& p, int num_sms, Stream stream);
  WeightGradPlan (*plan_weight_grads)(const WeightGradParams& p, int num_sms);
  void (*weight_grads)(const WeightGradParams& p, const WeightGradPlan& plan, void* workspace, Stream stream);
};

inline void note_bytes(int64_t (&bytes)[5]) {
  const int64_t found[] = {sizeof(StageParams), sizeof(StagedWeights), sizeof(ProductParams), sizeof(WeightGradParams),
                           sizeof(WeightGradPlan)};
  for (int k = 0; k < 5; ++k) bytes[k] = found[k];
}

// null: built without CUDA
const ConvFunctions* conv_functions();

}  // namespace fastmtl::cuda
