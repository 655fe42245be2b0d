// The table's half that is the kernels': for sources that are linked with them.
#pragma once

#include "cuda/task_weights/functions.h"

namespace fastmtl::cuda {

inline ConvFunctions kernel_functions() {
  ConvFunctions f{};
  note_bytes(f.bytes);
  f.refusal = &refusal;
  f.weights_as_they_are = &weights_as_they_are;
  f.stage_bytes = &stage_bytes;
  f.stage = [](const StageParams& p, void* workspace, Stream stream) {
    return launch_stage(p, workspace, static_cast<cudaStream_t>(stream));
  };
  f.product = [](const ProductParams& p, int num_sms, Stream stream) {
    launch_product(p, num_sms, Choice{}, static_cast<cudaStream_t>(stream));
  };
  f.plan_weight_grads = [](const WeightGradParams& p, int num_sms) { return plan_weight_grads(p, num_sms, Choice{}); };
  f.weight_grads = [](const WeightGradParams& p, const WeightGradPlan& plan, void* workspace, Stream stream) {
    launch_weight_grads(p, plan, workspace, static_cast<cudaStream_t>(stream));
  };
  return f;
}

}  // namespace fastmtl::cuda
