// Sixteen fp32 lanes, the same results with every instruction set.
//
// GCC's generic vectors are lowered to whatever the translation unit's target offers (AVX-512, two AVX2
// halves, or scalars). Only fma has to be spelled out. The build forbids contraction (-ffp-contract=off),
// so a fused operation happens exactly where `fma` is written.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using i32 = int32_t;
using i64 = int64_t;
using u16 = uint16_t;  // a bf16 value
using u32 = uint32_t;

constexpr int LANES = 16;
typedef float V16 __attribute__((vector_size(64)));
typedef i32 I16 __attribute__((vector_size(64)));
typedef u32 U16 __attribute__((vector_size(64)));
typedef u16 H16 __attribute__((vector_size(32)));

#define TANDEM_16(x) {x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}
inline V16 splat(float x) { return V16 TANDEM_16(x); }
inline I16 splat(i32 x) { return I16 TANDEM_16(x); }
inline U16 splat(u32 x) { return U16 TANDEM_16(x); }
inline V16 as_float(U16 x) { return (V16)x; }
inline U16 as_bits(V16 x) { return (U16)x; }
inline float bits_to_float(u32 x) { float y; memcpy(&y, &x, 4); return y; }
inline u32 float_to_bits(float x) { u32 y; memcpy(&y, &x, 4); return y; }

inline V16 load(const float* p) { V16 x; memcpy(&x, p, 64); return x; }
inline void store(float* p, V16 x) { memcpy(p, &x, 64); }
inline U16 load_u(const void* p) { U16 x; memcpy(&x, p, 64); return x; }
inline void store_u(void* p, U16 x) { memcpy(p, &x, 64); }

inline V16 widen(H16 x) { return as_float(__builtin_convertvector(x, U16) << 16); }
inline V16 load(const u16* p) { H16 x; memcpy(&x, p, 32); return widen(x); }
inline U16 load_h(const u16* p) { H16 x; memcpy(&x, p, 32); return __builtin_convertvector(x, U16); }

// fp32 bits -> bf16, to nearest even, NaN stays a (quiet) NaN, denormals are kept.
inline U16 bf16_bits(V16 x) {
  const U16 bits = as_bits(x);
  const U16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return x == x ? rounded : (bits >> 16) | 0x40u;
}
// The same for two values as the low and the high half of a lane. None may be denormal, nor a NaN with
// bits below the bf16 ones (arithmetic on bf16 values never makes one).
inline U16 bf16_pair(V16 low, V16 high) {
#if defined(__AVX512BF16__)
  typedef u16 H32 __attribute__((vector_size(64)));
  const H32 halves = (H32)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  return (U16)__builtin_shufflevector(halves, halves, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25,
                                      10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
  const U16 a = as_bits(low), b = as_bits(high);
  return (a + 0x7fffu + ((a >> 16) & 1u)) >> 16 | ((b + 0x7fffu + ((b >> 16) & 1u)) & 0xffff0000u);
#endif
}
inline void store(u16* p, V16 x) {
  const H16 y = __builtin_convertvector(bf16_bits(x), H16);
  memcpy(p, &y, 32);
}

// The first n < 16 lanes; the others are 0.
template <class T> inline V16 load_some(const T* p, i64 n) {
  alignas(64) T part[LANES] = {};
  memcpy(part, p, n * sizeof(T));
  return load(part);
}
template <class T> inline void store_some(T* p, V16 x, i64 n) {
  alignas(64) T part[LANES];
  store(part, x);
  memcpy(p, part, n * sizeof(T));
}
template <class T> inline V16 load_upto(const T* p, i64 n) { return n >= LANES ? load(p) : load_some(p, n); }
template <class T> inline void store_upto(T* p, V16 x, i64 n) {
  if (n >= LANES) store(p, x);
  else store_some(p, x, n);
}

inline V16 fma(V16 a, V16 b, V16 c) {
#if defined(__AVX512F__)
  return (V16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  V16 r;
  __m256 x[2], y[2], z[2];
  memcpy(x, &a, 64), memcpy(y, &b, 64), memcpy(z, &c, 64);
  for (int i = 0; i < 2; i++) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
  memcpy(&r, z, 64);
  return r;
#else
  V16 r;
  for (int i = 0; i < LANES; i++) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
#endif
}

// a > b ? a : b, also in that a NaN makes it b.
inline V16 larger(V16 a, V16 b) {
#if defined(__AVX512F__)
  return (V16)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

// Lanes are halved 8, 4, 2, 1: the fixed tree that ends every row-wise sum.
inline float sum_lanes(V16 x) {
  alignas(64) float lane[LANES];
  store(lane, x);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lane[i] = lane[i] + lane[i + half];
  return lane[0];
}

// One butterfly of a 16 x 16 transposition: exchanges bit D of row and column index.
constexpr int kept(int d, int c) { return (c & d) ? 16 + c - d : c; }
constexpr int taken(int d, int c) { return (c & d) ? 16 + c : c + d; }
#define TANDEM_COLUMNS(f, d)                                                                              \
  f(d, 0), f(d, 1), f(d, 2), f(d, 3), f(d, 4), f(d, 5), f(d, 6), f(d, 7), f(d, 8), f(d, 9), f(d, 10),     \
      f(d, 11), f(d, 12), f(d, 13), f(d, 14), f(d, 15)
template <int D> inline void exchange(U16 (&row)[16]) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++)
    if (!(i & D)) {
      const U16 a = row[i], b = row[i + D];
      row[i] = __builtin_shufflevector(a, b, TANDEM_COLUMNS(kept, D));
      row[i + D] = __builtin_shufflevector(a, b, TANDEM_COLUMNS(taken, D));
    }
}
inline void transpose(U16 (&row)[16]) {
  exchange<1>(row);
  exchange<2>(row);
  exchange<4>(row);
  exchange<8>(row);
}

// exp as in arithmetic.py. `exp_nonpositive` is for arguments that cannot exceed EXP_HIGHEST.
constexpr float EXP_LOWEST = -87.33f, EXP_HIGHEST = 88.37f;
inline V16 exp_nonpositive(V16 x) {
  // 1.5 * 2^23: adding it rounds to an integer, to nearest even. + 127: then the sum's low bits are the
  // biased exponent of the power of two.
  constexpr float ROUND = 12582912.0f + 127.0f;
  const V16 shifted = fma(x, splat(0x1.715476p+0f), splat(ROUND));
  const V16 n = shifted - ROUND;
  V16 r = fma(n, splat(-0x1.62e4p-1f), x);
  r = fma(n, splat(-0x1.7f7d1cp-20f), r);
  V16 p = splat(0x1.6a1080p-10f);
  p = fma(p, r, splat(0x1.1245c8p-7f));
  p = fma(p, r, splat(0x1.55593cp-5f));
  p = fma(p, r, splat(0x1.555482p-3f));
  p = fma(p, r, splat(0x1.fffffcp-2f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  const V16 power = as_float(as_bits(shifted) << 23);
  return x < splat(EXP_LOWEST) ? V16{} : p * power;
}
inline V16 exp_any(V16 x) {
  return x > splat(EXP_HIGHEST) ? splat(__builtin_inff()) : exp_nonpositive(x);
}
inline V16 silu_mul(V16 gate, V16 up) { return gate / (exp_any(-gate) + 1.0f) * up; }

}  // namespace
