// A table of 64-bit words into device memory by launches that carry them as arguments: nothing is copied from the host,
// and the call may be captured.
#pragma once

#include <algorithm>
#include <vector>

#include "cuda/device.cuh"

namespace fastmtl::cuda {

template <int kWords>
struct TableWords {
  int64_t* table;
  int count;
  int64_t word[kWords];
};

template <int kWords>
__global__ void __launch_bounds__(kThreads) write_table_kernel(const __grid_constant__ TableWords<kWords> words) {
  const int k = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (k < words.count) words.table[k] = words.word[k];
}

// Words a launch: what 4 KiB of arguments hold, and 32,764 bytes, which they may be since CUDA 12.1; one between, since
// all of them are copied, however few are used.
constexpr int kFewWords = 480, kSomeWords = 1536, kMostWords = 4093;
static_assert(sizeof(TableWords<kFewWords>) <= 4096 && sizeof(TableWords<kMostWords>) <= 32764);

template <int kWords>
void write_words(int64_t* table, const int64_t* words, int count, cudaStream_t stream) {
  TableWords<kWords> part;
  part.table = table;
  part.count = count;
  std::copy_n(words, count, part.word);
  // few threads a block: lanes that read different words of the arguments take turns
  const unsigned blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
  FASTMTL_LAUNCH(blocks, stream, (part), write_table_kernel<kWords>);
}

// large: whether a launch may have more than 4 KiB of arguments. launched() after each launch.
template <class Launched>
void write_table(int64_t* table, const std::vector<int64_t>& words, bool large, cudaStream_t stream,
                 const Launched& launched) {
#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
  large = false;
#endif
  const size_t most = large ? kMostWords : kFewWords;
  for (size_t first = 0; first < words.size(); first += most) {
    const int64_t* from = words.data() + first;
    const int count = static_cast<int>(std::min(most, words.size() - first));
    if (count <= kFewWords) write_words<kFewWords>(table + first, from, count, stream);
#if !defined(CUDART_VERSION) || CUDART_VERSION >= 12010
    else if (count <= kSomeWords) write_words<kSomeWords>(table + first, from, count, stream);
    else write_words<kMostWords>(table + first, from, count, stream);
#endif
    launched();
  }
}

}  // namespace fastmtl::cuda
