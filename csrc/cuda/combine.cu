#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "combine.cuh"
#include "rows.h"

// a CPU-only torch has no such function: the library must load all the same
#pragma weak aoti_torch_get_current_cuda_stream

namespace fastmtl::cuda {

std::vector<int> architectures() {
  std::vector<int> result;
  for (int arch : {__CUDA_ARCH_LIST__}) result.push_back(arch / 10);
  return result;
}

namespace {

void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "fastmtl: ", what, ": ", cudaGetErrorString(error));
}

cudaStream_t current_stream(int device) {
  STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream != nullptr, "fastmtl: CUDA tensors, but this torch has no CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// enough blocks to fill the card a few times over
unsigned max_blocks(int device) {
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "multiprocessor count");
  return static_cast<unsigned>(multiprocessors) * 8;
}

template <class In, int kVector>
void launch(const CombineParams& p, int num_out, unsigned most_blocks, cudaStream_t stream) {
  constexpr int kThreads = 256;
  const int64_t blocks = (p.numel + int64_t{kThreads} * kVector - 1) / (int64_t{kThreads} * kVector);
  const auto grid = static_cast<unsigned>(std::min<int64_t>(blocks, most_blocks));
  switch (num_out) {
    case 1: combine_fwd_kernel<In, kVector, 1><<<grid, kThreads, 0, stream>>>(p); break;
    case 2: combine_fwd_kernel<In, kVector, 2><<<grid, kThreads, 0, stream>>>(p); break;
    case 3: combine_fwd_kernel<In, kVector, 3><<<grid, kThreads, 0, stream>>>(p); break;
    default: combine_fwd_kernel<In, kVector, 4><<<grid, kThreads, 0, stream>>>(p); break;
  }
  check(cudaGetLastError(), "combine launch");
}

// 16 bytes at once where every row allows it, and the rest of the row one by one
template <class In>
void combine_param(CombineParams p, int num_out, unsigned most_blocks, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(In);
  bool wide = p.numel >= kVector;
  for (int r = 0; r < p.num_rows; ++r)
    wide = wide && p.row_stride[r] == 1 && reinterpret_cast<uintptr_t>(p.row[r]) % 16 == 0;
  for (int o = 0; o < num_out; ++o) wide = wide && reinterpret_cast<uintptr_t>(p.out[o]) % 16 == 0;
  const int64_t whole = wide ? p.numel / kVector * kVector : 0;
  if (whole > 0) {
    CombineParams body = p;
    body.numel = whole;
    launch<In, kVector>(body, num_out, most_blocks, stream);
  }
  if (whole < p.numel) {
    p.numel -= whole;
    for (int r = 0; r < p.num_rows; ++r) p.row[r] = static_cast<const In*>(p.row[r]) + whole * p.row_stride[r];
    for (int o = 0; o < num_out; ++o) p.out[o] = static_cast<In*>(p.out[o]) + whole;
    launch<In, 1>(p, num_out, most_blocks, stream);
  }
}

void combine_op(Tensor weights, const std::vector<Tensor>& tensors, const std::vector<int64_t>& index,
                int64_t num_params, const std::vector<Tensor>& out) {
  STD_TORCH_CHECK(weights.dim() == 2 && dtype_of(weights) == DType::f64 && weights.is_contiguous(),
                  "fastmtl: kernel weights must be a contiguous [K, T] float64 tensor");
  if (tensors.empty() || weights.size(0) == 0) return;
  const int device = weights.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const unsigned most_blocks = max_blocks(device);
  const int64_t num_tasks = weights.size(1), num_out = weights.size(0);
  const Rows rows = read_rows(tensors, index, num_tasks, num_params, out);
  const double* w = static_cast<const double*>(weights.const_data_ptr());
  for (const Param& param : rows.params) {
    STD_TORCH_CHECK(static_cast<int64_t>(param.out.size()) == num_out, "fastmtl: expected ", num_out,
                    " outputs a parameter, got ", param.out.size());
    CombineParams p{};
    p.numel = param.numel;
    p.num_tasks = static_cast<int>(num_tasks);
    p.num_rows = static_cast<int>(param.rows.size());
    for (int r = 0; r < p.num_rows; ++r) {
      p.row[r] = param.rows[r].data;
      p.row_stride[r] = param.rows[r].stride;
      p.task[r] = static_cast<uint8_t>(param.rows[r].task);
    }
    for (int64_t o = 0; o < num_out; o += 4) {
      const int group = static_cast<int>(std::min<int64_t>(4, num_out - o));
      std::copy_n(param.out.begin() + o, group, p.out);
      p.weights = w + o * num_tasks;
      switch (param.dtype) {
        case DType::f32: combine_param<float>(p, group, most_blocks, stream); break;
        case DType::f64: combine_param<double>(p, group, most_blocks, stream); break;
        case DType::bf16: combine_param<__nv_bfloat16>(p, group, most_blocks, stream); break;
        case DType::f16: combine_param<__half>(p, group, most_blocks, stream); break;
      }
    }
  }
}

}  // namespace
}  // namespace fastmtl::cuda

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CUDA, m) { m.impl("_combine", TORCH_BOX(&fastmtl::cuda::combine_op)); }
