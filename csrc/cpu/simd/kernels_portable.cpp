// Any CPU: groups of 4 floats or 2 doubles that the compiler keeps in whatever vectors the target has.
#include <cstring>

#include "cpu/simd/kernels.h"

namespace fastmtl::cpu::portable {
namespace {

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

constexpr int kTileA = 4, kTileB = 2;

float from_bf16(uint16_t bits) {
  const uint32_t bits32 = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &bits32, 4);
  return x;
}
uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return static_cast<uint16_t>((bits | 0x400000) >> 16);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
float from_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
  float x;
  if (exponent == 0) {
    x = static_cast<float>(mantissa) * 0x1p-24f;  // subnormal or zero
    return sign ? -x : x;
  }
  const uint32_t bits =
      exponent == 31 ? sign | 0x7f800000 | (mantissa << 13) : sign | ((exponent + 112) << 23) | (mantissa << 13);
  std::memcpy(&x, &bits, 4);
  return x;
}
uint16_t to_f16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | ((magnitude >> 13) & 0x3ff));
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to infinity
  if (magnitude < 0x38800000) {                                              // subnormal: count steps of 2^-24
    float a;
    std::memcpy(&a, &magnitude, 4);
    const float scaled = a * 0x1p24f;  // exact; below 1024
    uint32_t steps = static_cast<uint32_t>(scaled);
    const float rest = scaled - static_cast<float>(steps);
    if (rest > 0.5f || (rest == 0.5f && (steps & 1))) ++steps;
    return static_cast<uint16_t>(sign | steps);
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rounded >> 13) - (112 << 10)));
}

template <class S, int N>
struct Lanes {
  S v[N];
  static constexpr int64_t kLanes = N;
  static Lanes zero() { return set1(0); }
  static Lanes set1(S x) {
    Lanes r;
    for (int i = 0; i < N; ++i) r.v[i] = x;
    return r;
  }
  static Lanes load(const S* p) {
    Lanes r;
    for (int i = 0; i < N; ++i) r.v[i] = p[i];
    return r;
  }
  static Lanes load(const BF16* p) {
    Lanes r;
    for (int i = 0; i < N; ++i) r.v[i] = from_bf16(p[i].bits);
    return r;
  }
  static Lanes load(const F16* p) {
    Lanes r;
    for (int i = 0; i < N; ++i) r.v[i] = from_f16(p[i].bits);
    return r;
  }
  void store(S* p) const {
    for (int i = 0; i < N; ++i) p[i] = v[i];
  }
  void store(BF16* p) const {
    for (int i = 0; i < N; ++i) p[i].bits = to_bf16(v[i]);
  }
  void store(F16* p) const {
    for (int i = 0; i < N; ++i) p[i].bits = to_f16(v[i]);
  }
  // NaN: zero
  Lanes positive() const {
    Lanes r;
    for (int i = 0; i < N; ++i) r.v[i] = v[i] > 0 ? v[i] : S(0);
    return r;
  }
  template <class P>
  void stream(P* p) const {
    store(p);
  }
  static void totals(Lanes a, Lanes b, Lanes c, Lanes d, double* out) {
    for (int k = 0; k < 4; ++k) out[k] = 0;
    for (int i = 0; i < N; ++i) {
      out[0] += a.v[i];
      out[1] += b.v[i];
      out[2] += c.v[i];
      out[3] += d.v[i];
    }
  }
};
template <class S, int N>
inline Lanes<S, N> fma(Lanes<S, N> a, Lanes<S, N> b, Lanes<S, N> c) {
  for (int i = 0; i < N; ++i) c.v[i] += a.v[i] * b.v[i];
  return c;
}
using VF = Lanes<float, 4>;
using VD = Lanes<double, 2>;

#include "cpu/simd/kernels.inc"

}  // namespace
}  // namespace fastmtl::cpu::portable

namespace fastmtl::cpu {
using namespace portable;
extern const Kernels kPortable = FASTMTL_KERNELS("portable", nullptr);
}  // namespace fastmtl::cpu
