// AVX-512 (F, BW, DQ, VL): 16 floats, 8 doubles, 32 registers.
#if defined(__x86_64__)

#include <immintrin.h>

#include "cpu/simd/kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c")
#endif

namespace fastmtl::cpu::avx512 {
namespace {

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

constexpr int kTileA = 6, kTileB = 4;  // 24 accumulators + 4 + 1 of 32 registers; a row from L2 serves 6 products

struct VF {
  __m512 v;
  static constexpr int64_t kLanes = 16;
  static VF zero() { return {_mm512_setzero_ps()}; }
  static VF set1(float x) { return {_mm512_set1_ps(x)}; }
  static VF load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static VF load(const BF16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
  static VF load(const F16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
  // round to nearest even; a NaN stays a NaN (vcvtneps2bf16 would flush subnormals)
  __m256i bf16() const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
  }
  // NaN: zero
  VF positive() const { return {_mm512_max_ps(v, _mm512_setzero_ps())}; }
  __m256i f16() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(BF16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bf16()); }
  void store(F16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), f16()); }
  void stream(float* p) const { _mm512_stream_ps(p, v); }
  void stream(BF16* p) const { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bf16()); }
  void stream(F16* p) const { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), f16()); }
  __m256 folded() const { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }
  static void totals(VF a, VF b, VF c, VF d, double* out) {
    const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(a.folded(), b.folded()), _mm256_hadd_ps(c.folded(), d.folded()));
    _mm256_storeu_pd(out, _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(sums)),
                                        _mm256_cvtps_pd(_mm256_extractf128_ps(sums, 1))));
  }
};
inline VF fma(VF a, VF b, VF c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

struct VD {
  __m512d v;
  static constexpr int64_t kLanes = 8;
  static VD zero() { return {_mm512_setzero_pd()}; }
  static VD set1(double x) { return {_mm512_set1_pd(x)}; }
  static VD load(const double* p) { return {_mm512_loadu_pd(p)}; }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  void stream(double* p) const { _mm512_stream_pd(p, v); }
  VD positive() const { return {_mm512_max_pd(v, _mm512_setzero_pd())}; }
  __m256d folded() const { return _mm256_add_pd(_mm512_castpd512_pd256(v), _mm512_extractf64x4_pd(v, 1)); }
  static void totals(VD a, VD b, VD c, VD d, double* out) {
    const __m256d ab = _mm256_hadd_pd(a.folded(), b.folded()), cd = _mm256_hadd_pd(c.folded(), d.folded());
    _mm256_storeu_pd(out, _mm256_add_pd(_mm256_permute2f128_pd(ab, cd, 0x20), _mm256_permute2f128_pd(ab, cd, 0x31)));
  }
};
inline VD fma(VD a, VD b, VD c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }

#include "cpu/simd/kernels.inc"

// for processors that have products of pairs; the rest of this file makes no use of these instructions
struct BF16Pair {
  uint16_t bits;
};
struct VP {
  __m512bh v;
  static constexpr int64_t kLanes = 32;
  static VP load(const BF16Pair* p) { return {(__m512bh)_mm512_loadu_si512(p)}; }
};
inline VF fma(VP a, VP b, VF c) { return {_mm512_dpbf16_ps(c.v, a.v, b.v)}; }
template <>
struct Factor<BF16Pair> {
  using V = VP;
};

void gram_pairs(const void* const* rows, int count, int64_t length, const int* task, double* total, int stride,
                const Ahead& ahead) {
  gram_block<BF16Pair>(rows, count, length, task, total, stride, ahead);
}

#include "cpu/simd/pairs.inc"

}  // namespace
}  // namespace fastmtl::cpu::avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace fastmtl::cpu {
using namespace avx512;
static const PairKernels kPairs = {&gram_pairs, FASTMTL_PAIR_TILES};
extern const Kernels kAvx512 = FASTMTL_KERNELS("avx512", &kPairs);
}  // namespace fastmtl::cpu

#endif
