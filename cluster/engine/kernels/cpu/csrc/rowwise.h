// Operations on single rows: norms, rotary embedding, embedding rows, softmax. A sum over a row is
// sixteen lane chains (lane = column mod 16) and then `sum_lanes`.
#pragma once
#include <cmath>
#include "parallel.h"

namespace {

// A row of bf16 or fp32 numbers.
struct Row {
  const void* data;
  bool is_float;
  Row at(i64 offset) const {
    return {is_float ? static_cast<const void*>(static_cast<const float*>(data) + offset)
                     : static_cast<const void*>(static_cast<const u16*>(data) + offset),
            is_float};
  }
  V16 get(i64 offset, i64 left) const {
    return is_float ? load_upto(static_cast<const float*>(data) + offset, left)
                    : load_upto(static_cast<const u16*>(data) + offset, left);
  }
};

inline float inverse_rms(const Row& x, i64 K, float eps) {
  V16 sum = {};
  for (i64 k = 0; k < K; k += LANES) {
    const V16 v = x.get(k, K - k);
    sum = sum + v * v;
  }
  return 1.0f / sqrtf(sum_lanes(sum) / static_cast<float>(K) + eps);
}

template <class Out> inline void normalise(const Row& x, const Row& weight, i64 K, float eps, Out* out) {
  const V16 inverse = splat(inverse_rms(x, K, eps));
  for (i64 k = 0; k < K; k += LANES) store_upto(out + k, x.get(k, K - k) * inverse * weight.get(k, K - k), K - k);
}

template <class Out> inline void rms_norm(Row x, Row weight, float eps, i64 T, i64 K, Out* out, int threads) {
  for_each_row(threads, T, K, [&](i64 t) { normalise(x.at(t * K), weight, K, eps, out + t * K); });
}

inline void add_rms_norm(float* residual, Row update, Row weight, float eps, i64 T, i64 K, u16* out, int threads) {
  for_each_row(threads, T, K, [&](i64 t) {
    float* row = residual + t * K;
    for (i64 k = 0; k < K; k += LANES) {
      const V16 sum = load_upto(row + k, K - k) + update.get(t * K + k, K - k);
      store_upto(row + k, sum, K - k);
    }
    normalise({row, true}, weight, K, eps, out + t * K);
  });
}

inline void embedding(const i64* ids, const u16* table, i64 T, i64 K, float* out, int threads) {
  for_each_row(threads, T, K, [&](i64 t) {
    for (i64 k = 0; k < K; k += LANES) store_upto(out + t * K + k, load_upto(table + ids[t] * K + k, K - k), K - k);
  });
}

// (T, J, K) rows of J experts -> (T, K): each row times its weight, added from 0 over ascending j.
inline void combine(const float* rows, const float* weights, i64 T, i64 J, i64 K, float* out, int threads) {
  for_each_row(threads, T, J * K, [&](i64 t) {
    for (i64 k = 0; k < K; k += LANES) {
      V16 total = {};
      for (i64 j = 0; j < J; j++)
        total = total + splat(weights[t * J + j]) * load_upto(rows + (t * J + j) * K + k, K - k);
      store_upto(out + t * K + k, total, K - k);
    }
  });
}

constexpr i64 MAX_HEAD_SIZE = 256;

// Half-split rotation: element i of the first half goes with element i of the second.
inline void rotate(const float* x, const float* cos_sin, i64 D, u16* out) {
  const i64 half = D / 2;
  for (i64 i = 0; i < half; i += LANES) {
    const i64 left = half - i;
    const V16 first = load_upto(x + i, left), second = load_upto(x + half + i, left);
    const V16 cos = load_upto(cos_sin + i, left), sin = load_upto(cos_sin + half + i, left);
    store_upto(out + i, first * cos - second * sin, left);
    store_upto(out + half + i, second * cos + first * sin, left);
  }
}

struct RopeAndCache {
  const float* qkv;  // (T, (H + 2G) * D)
  u16* kv;
  i64 block_stride, kv_stride, head_stride, token_stride;  // elements
  const i64 *slots, *positions;
  const float* cos_sin;  // (P, D)
  Row q_norm, k_norm;    // data may be null
  float eps;
  i64 T, H, G, D, block_size;
  u16* q;  // (T, H, D)

  void head(const float* x, const Row& norm, const float* cos_sin_row, u16* out) const {
    alignas(64) float normalised[MAX_HEAD_SIZE];
    if (norm.data) {
      normalise({x, true}, norm, D, eps, normalised);
      x = normalised;
    }
    rotate(x, cos_sin_row, D, out);
  }

  void run(int threads) const {
    for_each_row(threads, T, (H + 2 * G) * D, [&](i64 t) {
      const float* row = qkv + t * (H + 2 * G) * D;
      const float* cos_sin_row = cos_sin + positions[t] * D;
      for (i64 h = 0; h < H; h++) head(row + h * D, q_norm, cos_sin_row, q + (t * H + h) * D);
      if (slots[t] < 0) return;
      u16* keys = kv + slots[t] / block_size * block_stride + slots[t] % block_size * token_stride;
      for (i64 g = 0; g < G; g++) {
        head(row + (H + g) * D, k_norm, cos_sin_row, keys + g * head_stride);
        const float* v = row + (H + G + g) * D;
        for (i64 d = 0; d < D; d += LANES) store_upto(keys + kv_stride + g * head_stride + d, load_upto(v + d, D - d), D - d);
      }
    });
  }
};

// The first n < 16 lanes, the others -inf.
inline V16 load_tail(const float* p, i64 n) {
  alignas(64) float part[LANES];
  store(part, splat(-__builtin_inff()));
  memcpy(part, p, n * sizeof(float));
  return load(part);
}
inline V16 load_logits(const float* row, i64 v, i64 V) { return v + LANES <= V ? load(row + v) : load_tail(row + v, V - v); }

// The maximum of a row; NaN if any of it is NaN.
inline float row_maximum(const float* row, i64 V) {
  V16 best = splat(-__builtin_inff());
  I16 is_nan = {};
  for (i64 v = 0; v < V; v += LANES) {
    const V16 x = load_logits(row, v, V);
    is_nan |= x != x;
    best = larger(x, best);
  }
  float result = best[0];
  bool any_nan = false;
  for (int i = 0; i < LANES; i++) {
    result = best[i] > result ? best[i] : result;
    any_nan |= is_nan[i] != 0;
  }
  return any_nan ? __builtin_nanf("") : result;
}

inline float softmax_sum(const float* row, i64 V, float best, float* weights) {
  const V16 shift = splat(best == -__builtin_inff() ? 0.0f : best);
  V16 sum = {};
  for (i64 v = 0; v < V; v += LANES) {
    const V16 weight = exp_nonpositive(load_logits(row, v, V) - shift);
    if (weights) store_upto(weights + v, weight, V - v);
    sum = sum + weight;
  }
  return sum_lanes(sum);
}

inline void log_softmax_stats(const float* logits, i64 ld, i64 T, i64 V, float* best, float* log_sum, int threads) {
  for_each_row(threads, T, V, [&](i64 t) {
    best[t] = row_maximum(logits + t * ld, V);
    log_sum[t] = static_cast<float>(static_cast<double>(best[t]) + log(static_cast<double>(softmax_sum(logits + t * ld, V, best[t], nullptr))));
  });
}

inline void softmax(const float* logits, i64 ld, i64 T, i64 V, float* out, int threads) {
  for_each_row(threads, T, V, [&](i64 t) {
    const float* row = logits + t * ld;
    const V16 total = splat(softmax_sum(row, V, row_maximum(row, V), out + t * V));
    for (i64 v = 0; v < V; v += LANES) store_upto(out + t * V + v, load_upto(out + t * V + v, V - v) / total, V - v);
  });
}

inline void argmax(const float* logits, i64 ld, i64 T, i64 V, i64* out, int threads) {
  for_each_row(threads, T, V, [&](i64 t) {
    const float* row = logits + t * ld;
    V16 best = splat(-__builtin_inff());
    I16 place = splat(INT32_MAX), here;
    for (int i = 0; i < LANES; i++) here[i] = i;
    for (i64 v = 0; v < V; v += LANES, here += LANES) {
      const V16 x = load_logits(row, v, V);
      const I16 is_better = x > best;
      best = is_better ? x : best;
      place = is_better ? here : place;
    }
    int winner = 0;
    for (int i = 1; i < LANES; i++)
      if (best[i] > best[winner] || (best[i] == best[winner] && place[i] < place[winner])) winner = i;
    out[t] = place[winner] == INT32_MAX ? 0 : place[winner];
  });
}

}  // namespace
