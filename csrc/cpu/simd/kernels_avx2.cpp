// AVX2 + FMA + F16C: 8 floats, 4 doubles, 16 registers.
#if defined(__x86_64__)

#include <immintrin.h>

#include "cpu/simd/kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace fastmtl::cpu::avx2 {
namespace {

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

constexpr int kTileA = 4, kTileB = 3;  // 12 accumulators + 3 + 1 = 16 registers

struct VF {
  __m256 v;
  static constexpr int64_t kLanes = 8;
  static VF zero() { return {_mm256_setzero_ps()}; }
  static VF set1(float x) { return {_mm256_set1_ps(x)}; }
  static VF load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static VF load(const BF16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
  }
  static VF load(const F16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
  // round to nearest even; a NaN stays a NaN
  __m128i bf16() const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const __m256i top = _mm256_srli_epi32(
        _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan)), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(top, top), 0xd8);
    return _mm256_castsi256_si128(packed);
  }
  // NaN: zero
  VF positive() const { return {_mm256_max_ps(v, _mm256_setzero_ps())}; }
  __m128i f16() const { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(BF16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bf16()); }
  void store(F16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), f16()); }
  void stream(float* p) const { _mm256_stream_ps(p, v); }
  void stream(BF16* p) const { _mm_stream_si128(reinterpret_cast<__m128i*>(p), bf16()); }
  void stream(F16* p) const { _mm_stream_si128(reinterpret_cast<__m128i*>(p), f16()); }
  static void totals(VF a, VF b, VF c, VF d, double* out) {
    const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));
    _mm256_storeu_pd(out, _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(sums)),
                                        _mm256_cvtps_pd(_mm256_extractf128_ps(sums, 1))));
  }
};
inline VF fma(VF a, VF b, VF c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }

struct VD {
  __m256d v;
  static constexpr int64_t kLanes = 4;
  static VD zero() { return {_mm256_setzero_pd()}; }
  static VD set1(double x) { return {_mm256_set1_pd(x)}; }
  static VD load(const double* p) { return {_mm256_loadu_pd(p)}; }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  void stream(double* p) const { _mm256_stream_pd(p, v); }
  VD positive() const { return {_mm256_max_pd(v, _mm256_setzero_pd())}; }
  static void totals(VD a, VD b, VD c, VD d, double* out) {
    const __m256d ab = _mm256_hadd_pd(a.v, b.v), cd = _mm256_hadd_pd(c.v, d.v);
    _mm256_storeu_pd(out, _mm256_add_pd(_mm256_permute2f128_pd(ab, cd, 0x20), _mm256_permute2f128_pd(ab, cd, 0x31)));
  }
};
inline VD fma(VD a, VD b, VD c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }

#include "cpu/simd/kernels.inc"

}  // namespace
}  // namespace fastmtl::cpu::avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace fastmtl::cpu {
using namespace avx2;
extern const Kernels kAvx2 = FASTMTL_KERNELS("avx2", nullptr);
}  // namespace fastmtl::cpu

#endif
