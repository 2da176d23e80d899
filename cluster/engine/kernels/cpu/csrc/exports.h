// The C interface of one instruction set; a translation unit sets its target, defines TANDEM_ISA and
// includes this. Sizes are in elements, pointers are to contiguous rows unless a stride is given.
#pragma once
#include "attention.h"
#include "linear.h"
#include "rowwise.h"

#define TANDEM_JOIN_(a, b, c) a##b##c
#define TANDEM_JOIN(a, b, c) TANDEM_JOIN_(a, b, c)
#define TANDEM_EXPORT(name) extern "C" __attribute__((visibility("default"))) void TANDEM_JOIN(TANDEM_ISA, _, name)

TANDEM_EXPORT(pack)(const u16* w, i64 ldw, i64 N, i64 K, u16* packed, i64 threads) {
  pack_weight(w, ldw, N, K, packed, static_cast<int>(threads));
}

TANDEM_EXPORT(linear)(const u16* x, i64 M, i64 K, const u16* w, i64 N, const void* bias, i64 bias_is_float, void* out,
                      i64 out_is_float, i64 silu, i64 threads) {
  Linear{x, K, M, w, N, K, bias, bias_is_float != 0, out, out_is_float != 0, silu != 0}.run(static_cast<int>(threads));
}

// silu(gate) * up for (T, 2F) fp32 rows [gate; up], where F is no multiple of 16.
TANDEM_EXPORT(silu_mul)(const float* gate_up, i64 T, i64 F, u16* out, i64 threads) {
  for_each_row(static_cast<int>(threads), T, F, [&](i64 t) {
    const float* row = gate_up + t * 2 * F;
    for (i64 f = 0; f < F; f += LANES)
      store_upto(out + t * F + f, silu_mul(load_upto(row + f, F - f), load_upto(row + F + f, F - f)), F - f);
  });
}

TANDEM_EXPORT(embedding)(const i64* ids, const u16* table, i64 T, i64 K, float* out, i64 threads) {
  embedding(ids, table, T, K, out, static_cast<int>(threads));
}

TANDEM_EXPORT(rms_norm)(const void* x, i64 x_is_float, const void* weight, i64 weight_is_float, float eps, i64 T, i64 K,
                        void* out, i64 out_is_float, i64 threads) {
  const Row row{x, x_is_float != 0}, scale{weight, weight_is_float != 0};
  if (out_is_float) rms_norm(row, scale, eps, T, K, static_cast<float*>(out), static_cast<int>(threads));
  else rms_norm(row, scale, eps, T, K, static_cast<u16*>(out), static_cast<int>(threads));
}

TANDEM_EXPORT(add_rms_norm)(float* residual, const void* update, i64 update_is_float, const void* weight,
                            i64 weight_is_float, float eps, i64 T, i64 K, u16* out, i64 threads) {
  add_rms_norm(residual, {update, update_is_float != 0}, {weight, weight_is_float != 0}, eps, T, K, out, static_cast<int>(threads));
}

TANDEM_EXPORT(rope_and_cache)(const float* qkv, u16* kv, i64 block_stride, i64 kv_stride, i64 head_stride, i64 token_stride,
                              const i64* slots, const i64* positions, const float* cos_sin, const void* q_norm,
                              const void* k_norm, i64 norms_are_float, float eps, i64 T, i64 H, i64 G, i64 D,
                              i64 block_size, u16* q, i64 threads) {
  RopeAndCache{qkv, kv, block_stride, kv_stride, head_stride, token_stride, slots, positions, cos_sin,
               {q_norm, norms_are_float != 0}, {k_norm, norms_are_float != 0}, eps, T, H, G, D, block_size, q}
      .run(static_cast<int>(threads));
}

TANDEM_EXPORT(attention)(const u16* q, const u16* kv, i64 block_stride, i64 kv_stride, i64 head_stride, i64 token_stride,
                         const i32* query_start, const i32* context_len, const i32* block_table, i64 table_stride,
                         i64 num_sequences, i64 H, i64 G, i64 D, i64 block_size, i64 window, float scale, u16* out,
                         i64 threads) {
  Attention{q, kv, block_stride, kv_stride, head_stride, token_stride, query_start, context_len, block_table, table_stride,
            num_sequences, H, G, D, block_size, window, scale, out}
      .run(static_cast<int>(threads));
}

TANDEM_EXPORT(log_softmax_stats)(const float* logits, i64 ld, i64 T, i64 V, float* best, float* log_sum, i64 threads) {
  log_softmax_stats(logits, ld, T, V, best, log_sum, static_cast<int>(threads));
}

TANDEM_EXPORT(softmax)(const float* logits, i64 ld, i64 T, i64 V, float* out, i64 threads) {
  softmax(logits, ld, T, V, out, static_cast<int>(threads));
}

TANDEM_EXPORT(argmax)(const float* logits, i64 ld, i64 T, i64 V, i64* out, i64 threads) {
  argmax(logits, ld, T, V, out, static_cast<int>(threads));
}

TANDEM_EXPORT(combine)(const float* rows, const float* weights, i64 T, i64 J, i64 K, float* out, i64 threads) {
  combine(rows, weights, T, J, K, out, static_cast<int>(threads));
}
