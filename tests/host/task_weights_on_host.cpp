// Runs the kernels of the task convolution on the host, for tests/helpers/task_kernels_on_host.py, by the interface that
// the launcher uses.
#include <exception>
#include <stdexcept>
#include <string>

#include "cuda/task_weights/plan.h"

using namespace fastmtl;
using namespace fastmtl::cuda;

namespace {

thread_local std::string error;

template <class Run>
int guarded(uint64_t schedule, const Run& run) {
  cuda_on_host::schedule = schedule;
  try {
    run();
    return 0;
  } catch (const std::exception& e) {
    error = e.what();
    return 1;
  }
}

}  // namespace

extern "C" {

const char* host_error() { return error.c_str(); }

// of the structs that Python has twins of, in this order
void host_struct_bytes(int64_t* bytes) {
  const int64_t found[] = {sizeof(TaskPointers), sizeof(StageParams), sizeof(StagedWeights), sizeof(ProductParams),
                           sizeof(WeightGradParams), sizeof(WeightGradPlan), sizeof(Choice)};
  std::copy_n(found, 7, bytes);
}

int64_t host_stage_bytes(const StageParams* p) { return stage_bytes(*p); }
int host_as_they_are(const StageParams* p, StagedWeights* found) { return weights_as_they_are(*p, found) ? 1 : 0; }

int host_stage(const StageParams* p, void* workspace, StagedWeights* found, uint64_t schedule) {
  return guarded(schedule, [&] { *found = launch_stage(*p, workspace, nullptr); });
}

// tile: which one is taken
int host_product(const ProductParams* p, const Choice* choice, int64_t* tile, uint64_t schedule) {
  return guarded(schedule, [&] {
    *tile = plan_product(*p, 4, *choice).tile;
    launch_product(*p, 4, *choice, nullptr);
  });
}

void host_plan_weight_grads(const WeightGradParams* p, const Choice* choice, WeightGradPlan* plan) {
  *plan = plan_weight_grads(*p, 4, *choice);
}

int host_weight_grads(const WeightGradParams* p, const WeightGradPlan* plan, void* workspace, uint64_t schedule) {
  return guarded(schedule, [&] { launch_weight_grads(*p, *plan, workspace, nullptr); });
}
}
