// Drawing a token by Gumbel-max, and probability mass in integers. Single IEEE operations in the order
// of cluster/engine/sampling/{noise,elementary,filters}.py, which these must equal bit for bit.
#pragma once
#include "parallel.h"

namespace {

constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;

// Natural logarithm of positive normal numbers (Cephes logf).
inline V16 log_positive(V16 x) {
  const U16 bits = as_bits(x), mantissa = bits & 0x7fffffu;
  const U16 is_upper = (U16)(mantissa > splat(0x3504f3u)) & 1u;
  const V16 exponent = __builtin_convertvector((I16)((bits >> 23) - 127u + is_upper), V16);
  const V16 f = as_float(mantissa | (127u - is_upper) << 23) - 1.0f;
  const V16 square = f * f;
  V16 y = f * 7.0376836292e-2f;
  y = (y + -1.1514610310e-1f) * f;
  y = (y + 1.1676998740e-1f) * f;
  y = (y + -1.2420140846e-1f) * f;
  y = (y + 1.4249322787e-1f) * f;
  y = (y + -1.6668057665e-1f) * f;
  y = (y + 2.0000714765e-1f) * f;
  y = (y + -2.4999993993e-1f) * f;
  y = y + 3.3333331174e-1f;
  y = y * f * square;
  y = y + exponent * LN2_LOW;
  y = y - square * 0.5f;
  y = y + f;
  return y + exponent * LN2_HIGH;
}

// exp of numbers <= 0; all below -87 count as -87 (Cephes expf).
inline V16 exp_of_nonpositive(V16 x) {
  const V16 clamped = x < splat(-87.0f) ? splat(-87.0f) : x;
  const V16 moved = clamped * 1.44269504088896341f + 0.5f;
  const V16 truncated = __builtin_convertvector(__builtin_convertvector(moved, I16), V16);
  const V16 power = truncated > moved ? truncated - 1.0f : truncated;
  const V16 reduced = clamped - power * LN2_HIGH - power * LN2_LOW;
  V16 y = reduced * 1.9875691500e-4f;
  y = (y + 1.3981999507e-3f) * reduced;
  y = (y + 8.3334519073e-3f) * reduced;
  y = (y + 4.1665795894e-2f) * reduced;
  y = (y + 1.6666665459e-1f) * reduced;
  y = y + 5.0000001201e-1f;
  y = y * reduced * reduced + reduced + 1.0f;
  return y * as_float((U16)((__builtin_convertvector(power, I16) + 127) << 23));
}

// The two halves of the 64-bit products of 32-bit lanes.
inline void multiply(U16 a, u32 factor, U16& high, U16& low) {
#if defined(__AVX512F__)
  const __m512i f = _mm512_set1_epi32(static_cast<int>(factor));
  const __m512i even = _mm512_mul_epu32((__m512i)a, f), odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), f);
  high = (U16)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
  low = (U16)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
#elif defined(__AVX2__)
  __m256i in[2], highs[2], lows[2];
  memcpy(in, &a, 64);
  const __m256i f = _mm256_set1_epi32(static_cast<int>(factor));
  for (int i = 0; i < 2; i++) {
    const __m256i even = _mm256_mul_epu32(in[i], f), odd = _mm256_mul_epu32(_mm256_srli_epi64(in[i], 32), f);
    highs[i] = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    lows[i] = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  }
  memcpy(&high, highs, 64), memcpy(&low, lows, 64);
#else
  low = a * factor;
  for (int i = 0; i < LANES; i++) high[i] = static_cast<u32>(static_cast<uint64_t>(a[i]) * factor >> 32);
#endif
}

struct RandomBits {
  U16 word[4];
};

// Philox4x32-10: key = seed, counter = (group, position, 0, 0).
inline RandomBits philox(U16 group, u32 position, uint64_t seed) {
  U16 c0 = group, c1 = splat(position), c2 = {}, c3 = {};
  u32 k0 = static_cast<u32>(seed), k1 = static_cast<u32>(seed >> 32);
  for (int round = 0; round < 10; round++) {
    U16 high0, low0, high1, low1;
    multiply(c0, 0xd2511f53u, high0, low0);
    multiply(c2, 0xcd9e8d57u, high1, low1);
    c0 = high1 ^ c1 ^ k0;
    c2 = high0 ^ c3 ^ k1;
    c1 = low1;
    c3 = low0;
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  return {{c0, c1, c2, c3}};
}

inline bool any(I16 mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  __m256i half[2];
  memcpy(half, &mask, 64);
  return !_mm256_testz_si256(_mm256_or_si256(half[0], half[1]), _mm256_set1_epi32(-1));
#else
  i32 all = 0;
  for (int i = 0; i < LANES; i++) all |= mask[i];
  return all != 0;
#endif
}

// The first place with the largest scaled[place] + noise. `scaled` is finite or -inf.
struct GumbelArgmax {
  const float* scaled;
  i64 count;
  float best = -__builtin_inff();
  i64 place = 0;

  void take(i64 first, U16 bits) {
    const i64 left = count - first;
    V16 z = load_upto(scaled + first, left);
    const V16 limit = splat(1.0f - 0x1p-24f);
    V16 w = (__builtin_convertvector(bits, V16) + 0.5f) * 0x1p-32f;
    w = w > limit ? limit : w;
    // The noise is -ln(-ln(1 - w)) <= -ln w <= ln 2 * -floor(log2 w): most places cannot win, whatever
    // the two logarithms are. The margin covers the rounding of noise and sum.
    const V16 halvings = __builtin_convertvector((I16)(127u - (as_bits(w) >> 23)), V16);
    if (!any(z + halvings * 0.6931472f + 0.01f > splat(best))) return;
    const V16 u = 1.0f - w, rest = 1.0f - u;
    const V16 exponential = rest == splat(0.0f) ? w : -log_positive(u) * w / rest;
    const V16 score = z + -log_positive(exponential);
    if (!any(score > splat(best))) return;
    for (i64 i = 0; i < LANES && i < left; i++)
      if (score[i] > best) best = score[i], place = first + i;
  }

  // The places are the ids 0 .. count-1: one evaluation gives the bits of 4 ids.
  void take_all(u32 position, uint64_t seed) {
    U16 group = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (i64 first = 0; first < count; first += 4 * LANES, group = group + 16u) {
      const RandomBits r = philox(group, position, seed);
#define TANDEM_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define TANDEM_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
      const U16 low02 = __builtin_shufflevector(r.word[0], r.word[2], TANDEM_LOW);
      const U16 low13 = __builtin_shufflevector(r.word[1], r.word[3], TANDEM_LOW);
      const U16 high02 = __builtin_shufflevector(r.word[0], r.word[2], TANDEM_HIGH);
      const U16 high13 = __builtin_shufflevector(r.word[1], r.word[3], TANDEM_HIGH);
      take(first, __builtin_shufflevector(low02, low13, TANDEM_LOW));
      if (first + LANES < count) take(first + LANES, __builtin_shufflevector(low02, low13, TANDEM_HIGH));
      if (first + 2 * LANES < count) take(first + 2 * LANES, __builtin_shufflevector(high02, high13, TANDEM_LOW));
      if (first + 3 * LANES < count) take(first + 3 * LANES, __builtin_shufflevector(high02, high13, TANDEM_HIGH));
#undef TANDEM_LOW
#undef TANDEM_HIGH
    }
  }

  void take_some(const i64* ids, u32 position, uint64_t seed) {
    for (i64 first = 0; first < count; first += LANES) {
      U16 id = {};
      for (i64 i = 0; i < LANES && first + i < count; i++) id[i] = static_cast<u32>(ids[first + i]);
      const RandomBits r = philox(id >> 2, position, seed);
      const U16 word = id & 3u;
      const U16 low = word == splat(0u) ? r.word[0] : r.word[1], high = word == splat(2u) ? r.word[2] : r.word[3];
      take(first, word < splat(2u) ? low : high);
    }
  }
};

// `ids` may be null: the places are the ids.
inline i64 gumbel_argmax(const float* scaled, const i64* ids, i64 count, i64 seed, i64 position) {
  FloatingPointMode mode;
  GumbelArgmax drawn{scaled, count};
  if (ids) drawn.take_some(ids, static_cast<u32>(position), static_cast<uint64_t>(seed));
  else drawn.take_all(static_cast<u32>(position), static_cast<uint64_t>(seed));
  return drawn.place;
}

// exp(scaled) in units of 2^-40, truncated.
inline void softmax_mass(const float* scaled, i64 count, i64* mass) {
  FloatingPointMode mode;
  for (i64 first = 0; first < count; first += LANES) {
    alignas(64) float weight[LANES];
    store(weight, exp_of_nonpositive(load_upto(scaled + first, count - first)) * 0x1p40f);
    const i64 left = count - first;
    for (i64 i = 0; i < LANES && i < left; i++) mass[first + i] = static_cast<i64>(weight[i]);
  }
}

}  // namespace

#define TANDEM_SAMPLING_EXPORT(result, isa, name) extern "C" __attribute__((visibility("default"))) result tandem_sampling_##isa##_##name

#define TANDEM_SAMPLING_FUNCTIONS(isa)                                                                                \
  TANDEM_SAMPLING_EXPORT(i64, isa, gumbel_argmax)                                                                     \
  (const float* scaled, const i64* ids, i64 count, i64 seed, i64 position) {                                          \
    return gumbel_argmax(scaled, ids, count, seed, position);                                                         \
  }                                                                                                                   \
  TANDEM_SAMPLING_EXPORT(void, isa, softmax_mass)(const float* scaled, i64 count, i64* mass) {                        \
    softmax_mass(scaled, count, mass);                                                                                \
  }
