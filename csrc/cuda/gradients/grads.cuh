// T gradient rows of n parameters, as the kernels see them: one bank, or a table of pointers in device memory.
//
// Their columns are counted through: parameter after parameter, each rounded up to a multiple of kAlign, so that a
// range of columns starts on a 16-byte boundary in every parameter that it touches.
#pragma once

#include "cuda/device.cuh"

namespace fastmtl::cuda {

constexpr int64_t kAlign = 64;
// parameters whose pointers a block fetches at once
constexpr int kBatch = 4;

struct Grads {
  // a bank: row t starts row_stride bytes after row t - 1, its elements lie column_stride elements apart
  const void* bank;
  int64_t row_stride, column_stride;
  int64_t numel;
  void* out;           // K rows of stride 1
  int64_t out_stride;  // bytes from row to row
  bool aligned16;      // every row and output has stride 1 and starts on a 16-byte boundary
  // lists: 64-bit words; null for a bank. Offsets [n + 1] in counted columns, numel [n], aligned16 [n], row pointers
  // [n][T] (0: a zero gradient), strides [n][T], outputs [n][K]
  const int64_t* table;
  int num_params;
  int num_tasks;
  int num_out;
  int64_t columns;  // counted through, padding included
};

// some of one parameter's columns
struct Segment {
  int64_t begin, end;
  bool aligned16;
};

template <int kRows, int kOutputs>
struct Batch {
  Segment segment[kBatch];
  const void* row[kBatch][kRows];
  int64_t stride[kBatch][kRows];
  void* out[kBatch][kOutputs < 1 ? 1 : kOutputs];
  int found;
};

// Calls visit(k) for each parameter within the counted columns [low, high), whose pointers are then in batch...[k].
// row_of(r): the task in row r, out of range for none. Outputs first_out, ... of every parameter are fetched too.
// All threads of the block call this together.
template <int kRows, int kOutputs, class RowOf, class Visit>
__device__ inline void for_each_segment(const Grads& g, int64_t low, int64_t high, int first_out, const RowOf& row_of,
                                        Batch<kRows, kOutputs>& batch, const Visit& visit) {
  const int tid = threadIdx.x;
  const int n = g.num_params, T = g.num_tasks;
  const int64_t* offset = g.table;
  if (high > g.columns) high = g.columns;
  if (low >= high) return;
  int param = 0;
  if (offset != nullptr) {
    for (int k = tid; k < n; k += kThreads)
      if (offset[k] <= low && low < offset[k + 1]) batch.found = k;
    __syncthreads();
    param = batch.found;
  }
  const int64_t* numel = offset + n + 1;
  const int64_t* aligned16 = numel + n;
  const int64_t* rows = aligned16 + n;
  const int64_t* strides = rows + static_cast<int64_t>(n) * T;
  const int64_t* outs = strides + static_cast<int64_t>(n) * T;
  while (true) {
    if (tid < kBatch) {
      Segment s{0, 0, false};
      if (offset == nullptr) {
        if (tid == 0) s = {low, high < g.numel ? high : g.numel, g.aligned16};
      } else if (param + tid < n) {
        const int64_t start = offset[param + tid], size = numel[param + tid];
        s.begin = low > start ? low - start : 0;
        s.end = high - start < size ? high - start : size;
        s.aligned16 = aligned16[param + tid] != 0;
      }
      batch.segment[tid] = s;
    }
    for (int k = tid; k < kBatch * kRows; k += kThreads) {
      const int i = k / kRows, r = k % kRows, t = row_of(r);
      const void* row = nullptr;
      int64_t stride = 0;
      if (t >= 0 && t < T && param + i < n) {
        if (offset == nullptr) {
          row = static_cast<const char*>(g.bank) + t * g.row_stride;
          stride = g.column_stride;
        } else {
          row = reinterpret_cast<const void*>(rows[static_cast<int64_t>(param + i) * T + t]);
          stride = strides[static_cast<int64_t>(param + i) * T + t];
        }
      }
      batch.row[i][r] = row;
      batch.stride[i][r] = stride;
    }
    if constexpr (kOutputs > 0) {
      for (int k = tid; k < kBatch * kOutputs; k += kThreads) {
        const int i = k / kOutputs, o = first_out + k % kOutputs;
        void* out = nullptr;
        if (o < g.num_out && param + i < n) {
          if (offset == nullptr) out = static_cast<char*>(g.out) + o * g.out_stride;
          else out = reinterpret_cast<void*>(outs[static_cast<int64_t>(param + i) * g.num_out + o]);
        }
        batch.out[i][k % kOutputs] = out;
      }
    }
    __syncthreads();
    for (int k = 0; k < kBatch; ++k)
      if (batch.segment[k].begin < batch.segment[k].end) visit(k);
    param += kBatch;
    if (param >= n || (offset != nullptr && offset[param] >= high)) return;
    __syncthreads();  // before the batch is overwritten
  }
}

}  // namespace fastmtl::cuda
