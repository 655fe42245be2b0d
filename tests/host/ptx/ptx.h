// What kernels translated from PTX by translate.py call. Light, since every kernel is a translation unit of its own;
// the fibers, tensor cores and checks are behind it, in ptx.cpp.
#pragma once

#include <cstdint>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;

// A kernel's argument that is a struct: by value like the struct itself.
template <u32 kBytes>
struct alignas(8) Bytes {
  u8 byte[kBytes];
};

namespace ptx {

extern bool fault_reached;  // a fault that translate.py has planted was run

// Begins a kernel's thread: shared memory is what the kernel declares, and behind it what the launch asks for. Returns
// where shared memory begins.
u64 enter(const char* kernel, u32 static_bytes);

struct Special {
  u32 tid, ntid, ctaid[3], nctaid[3];
};
Special special();

// --- memory. Whether the access is in bounds, aligned and, if that is built in, free of races; then a load's place, or
// the store. `used`: bytes that the kernel makes use of; where: the instruction.
const void* shared_at(u32 offset, u32 bytes, u32 used, const char* where);
const void* global_at(u64 address, u32 bytes, u32 used, const char* where);
const void* generic_at(u64 address, u32 bytes, u32 used, const char* where);
void store_shared(u32 offset, const void* from, u32 bytes, const char* where);
void store_global(u64 address, const void* from, u32 bytes, const char* where);
void store_generic(u64 address, const void* from, u32 bytes, const char* where);
void* atomic_at(u64 address, u32 bytes, bool acq_rel, const char* where);
const void* param_at(u64 address, u32 bytes, const void* params, u64 params_bytes, const char* where);

// --- synchronisation
void barrier();
void warp_barrier(u32 mask);
void fence();
void wait_for_launch_before();
// a store by a kernel that waits for the launch in front of it
void check_waited(const char* where);
void copy_async(u32 to, u64 from, u32 bytes, u32 taken, const char* where);
void commit_copies();
void wait_for_copies(u32 most, const char* where);

// --- warps. mode: 'u'p, 'd'own, 'b'fly, 'i'dx
u32 shuffle(char mode, u32 value, u32 b, u32 c, u32 mask, bool* in_range);
u32 ballot(bool vote, u32 mask);
u32 reduce(char op, u32 value, bool is_signed, u32 mask);  // 'a'dd, 'n': min, 'x': max, '&', '|', '^'
void load_matrix(u32 (&to)[4], u32 offset, int count, bool transposed, const char* where);

// d += a b
void mma_tf32(f32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]);
void mma_bf16(f32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]);
void mma_f16(f32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]);
void mma_f64(f64 (&d)[2], f64 a, f64 b);

// --- numbers
u16 to_bf16(f32 x);
u16 to_f16(f32 x);
f32 from_bf16(u16 x);
f32 from_f16(u16 x);

// cvt.rna: the digits that tf32 lacks are zero
inline u32 to_tf32(f32 x) {
  const u32 bits = __builtin_bit_cast(u32, x);
  return __builtin_isfinite(x) ? (bits + 0x1000) & ~0x1FFFu : bits;
}

// div.full may be off by two units in the last place, and here it is, either way
inline f32 divide_full(f32 x, f32 y) {
  const f32 quotient = x / y;
  if (!__builtin_isnormal(quotient)) return quotient;
  const u32 bits = __builtin_bit_cast(u32, quotient);
  return __builtin_bit_cast(f32, __builtin_parity(bits) != 0 ? bits + 2 : bits - 2);
}

template <class U>
inline U shift_left(U x, u32 n) {
  return n < 8 * sizeof(U) ? static_cast<U>(x << n) : U(0);
}
template <class T>
inline T shift_right(T x, u32 n) {
  return n < 8 * sizeof(T) ? static_cast<T>(x >> n) : static_cast<T>(x < 0 ? -1 : 0);
}
inline u32 funnel_left(u32 low, u32 high, u32 n) { return n == 0 ? high : n < 32 ? high << n | low >> (32 - n) : low; }
inline u32 funnel_right(u32 low, u32 high, u32 n) { return n == 0 ? low : n < 32 ? low >> n | high << (32 - n) : high; }

// PTX ISA: conversions to integers saturate, and NaN becomes zero
template <class T, class F>
inline T to_integer(F x) {
  constexpr bool kSigned = static_cast<T>(-1) < 0;
  constexpr u64 kHalf = u64{1} << (8 * sizeof(T) - 1);
  constexpr T kLeast = kSigned ? static_cast<T>(kHalf) : T(0);
  const F end = static_cast<F>(kHalf) * (kSigned ? 1 : 2);
  if (x != x) return 0;
  if (x >= end) return static_cast<T>(~kLeast);
  return x <= static_cast<F>(kLeast) ? kLeast : static_cast<T>(x);
}

// byte k of the result: byte of {b, a} by the k-th digit of the selector, whose highest bit says "its sign alone"
inline u32 permute(u32 a, u32 b, u32 selector) {
  const u64 bytes = u64{b} << 32 | a;
  u32 result = 0;
  for (u32 k = 0; k < 4; ++k) {
    const u32 digit = selector >> 4 * k & 15;
    u32 byte = bytes >> 8 * (digit & 7) & 255;
    if (digit & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * k;
  }
  return result;
}

inline u32 logic(u32 a, u32 b, u32 c, u32 table) {
  u32 result = 0;
  for (u32 k = 0; k < 8; ++k)
    if (table >> k & 1) result |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
  return result;
}

template <class T>
inline T extract_bits(T from, u32 at, u32 count) {
  constexpr u32 kLast = 8 * sizeof(T) - 1;
  at &= 255;
  count &= 255;
  const u32 highest = at + count - 1 < kLast ? at + count - 1 : kLast;
  const bool sign = static_cast<T>(-1) < 0 && count != 0 && (from >> highest & 1) != 0;
  u64 result = 0;
  for (u32 k = 0; k <= kLast; ++k)
    if (k < count && at + k <= kLast ? (from >> (at + k) & 1) != 0 : sign) result |= u64{1} << k;
  return static_cast<T>(result);
}

inline u32 insert_bits(u32 from, u32 into, u32 at, u32 count) {
  at &= 255;
  count &= 255;
  const u32 mask = at > 31 ? 0 : shift_left<u32>(count > 31 ? ~0u : (1u << count) - 1, at);
  return (into & ~mask) | (shift_left<u32>(from, at) & mask);
}

}  // namespace ptx
