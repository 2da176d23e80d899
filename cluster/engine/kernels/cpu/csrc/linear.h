// y = x Wᵀ: the weight is packed in column tiles, see dot.h; column tile t holds outputs 16t .. 16t+15.
#pragma once
#include "dot.h"
#include "parallel.h"

namespace {

// (N, K) bf16 rows -> ceil(N/16) column tiles of ceil(K/32) groups, padded with zeros.
inline void pack_weight(const u16* w, i64 ldw, i64 N, i64 K, u16* packed, int threads) {
  const i64 groups = (K + GROUP - 1) / GROUP;
  for_each_task<NoScope>(threads, (N + 15) / 16, [&](i64 tile, NoScope&) {
    u16* out = packed + tile * groups * PACKED_GROUP;
    memset(out, 0, groups * PACKED_GROUP * 2);
    for (i64 n = tile * 16; n < N && n < tile * 16 + 16; n++)
      for (i64 k = 0; k < K; k++) out[(k / 2) * 32 + (n % 16) * 2 + k % 2] = w[n * ldw + k];
  });
}

struct Linear {
  const u16* x;  // (M, K)
  i64 ldx, M;
  const u16* w;
  i64 N, K;
  const void* bias;  // (N) or null
  bool bias_is_float;
  void* out;  // (M, N), or (M, N/2) with silu_mul
  bool out_is_float;
  bool silu_mul;  // gate tiles first, then as many up tiles; N/2 is a multiple of 16
  bool rows_are_packed = false;

  i64 groups() const { return (K + GROUP - 1) / GROUP; }
  i64 units() const { return silu_mul ? N / 32 : (N + 15) / 16; }  // column tiles of the result
  i64 columns() const { return silu_mul ? N / 2 : N; }
  int tiles_per_unit() const { return silu_mul ? 2 : 1; }

  template <class Out> void write(Out* y, i64 column, V16 value) const { store_upto(y + column, value, columns() - column); }

  void finish(const float* c, int rows, i64 first_row, int tiles, i64 unit) const {
    const int units_here = tiles / tiles_per_unit();
    for (int r = 0; r < rows; r++)
      for (int u = 0; u < units_here; u++) {
        const i64 column = (unit + u) * 16;
        V16 value = load(c + u * TILE + r * 16);
        if (silu_mul) value = ::silu_mul(value, load(c + (units_here + u) * TILE + r * 16));
        if (bias && bias_is_float) value = value + load_upto(static_cast<const float*>(bias) + column, N - column);
        if (bias && !bias_is_float) value = value + load_upto(static_cast<const u16*>(bias) + column, N - column);
        const i64 row = (first_row + r) * columns();
        if (out_is_float) write(static_cast<float*>(out) + row, column, value);
        else write(static_cast<u16*>(out) + row, column, value);
      }
  }

  // Column tile pointers of `units_here` units: the gates (or plain tiles), then the ups.
  int tile_pointers(i64 unit, int units_here, const u16** b) const {
    const i64 tile_size = groups() * PACKED_GROUP;
    for (int u = 0; u < units_here; u++) b[u] = w + (unit + u) * tile_size;
    if (!silu_mul) return units_here;
    for (int u = 0; u < units_here; u++) b[units_here + u] = w + (units() + unit + u) * tile_size;
    return 2 * units_here;
  }

  // The rows of one to two tiles from `row` on.
  RowTiles rows_from(i64 row, i64 end) const {
    const i64 left = end - row;
    RowTiles a = {{}, {left < 16 ? static_cast<int>(left) : 16, left < 32 ? static_cast<int>(left - 16) : 16}, ldx, GROUP};
    if (rows_are_packed) a.row_stride = GROUP, a.group_stride = PACKED_GROUP;
    for (int i = 0; i < 2; i++) a.tile[i] = x + (row + 16 * i) * ldx;  // a packed tile takes as much as 16 rows
    return a;
  }

  // Rows m0 .. m1, units u0 .. u1 of the result.
  void compute(typename Dot::Scope& scope, i64 m0, i64 m1, i64 u0, i64 u1) const {
    alignas(64) float c[4 * TILE];
    const int row_tiles = m1 - m0 > 16 ? Dot::ROW_TILES : 1;
    const int step = (row_tiles > 1 ? Dot::COLUMN_TILES : 4) / tiles_per_unit();
    for (i64 unit = u0; unit < u1; unit += step) {
      const int units_here = static_cast<int>(unit + step <= u1 ? step : u1 - unit);
      const u16* b[4];
      const int tiles = tile_pointers(unit, units_here, b);
      for (i64 row = m0; row < m1;) {
        const RowTiles a = rows_from(row, m1);
        if constexpr (Dot::ROW_TILES == 2) {
          if (m1 - row > 16) {
            block_columns<2>(scope, tiles, a, b, groups(), c);
            finish(c, 16, row, tiles, unit);
            finish(c + tiles * TILE, a.rows[1], row + 16, tiles, unit);
            row += 32;
            continue;
          }
        }
        block_columns<1>(scope, tiles, a, b, groups(), c);
        finish(c, a.rows[0], row, tiles, unit);
        row += 16;
      }
    }
  }

  // Copies x: rows padded to whole groups and, if wanted, each tile's groups in one piece.
  void copy_rows(int threads, bool pack) {
    const i64 padded = groups() * GROUP, tiles = (M + 15) / 16;
    u16* copy = reinterpret_cast<u16*>(thread_scratch().reserve(tiles * 16 * padded * 2));
    const i64 row_stride = pack ? GROUP : padded, group_stride = pack ? PACKED_GROUP : GROUP;
    for_each_task<NoScope>(threads, tiles, [&](i64 tile, NoScope&) {
      for (i64 row = tile * 16; row < M && row < tile * 16 + 16; row++)
        for (i64 g = 0; g < groups(); g++) {
          u16* to = copy + tile * 16 * padded + row % 16 * row_stride + g * group_stride;
          const u16* from = x + row * ldx + g * GROUP;
          const i64 left = K - g * GROUP;
          if (left >= GROUP) store_u(to, load_u(from));
          else memset(to, 0, GROUP * 2), memcpy(to, from, left * 2);
        }
    });
    x = copy;
    ldx = padded;
    rows_are_packed = pack;
  }

  void run(int threads) {
    constexpr i64 FEW_ROWS = 64, ROWS_OF_TASK = 256, UNITS_OF_TASK = 4;
    constexpr i64 WORTH_A_PIECE = 64 * 1024;  // bytes of weight; less than that is done sooner than a helper comes
    const i64 total = units();
    const bool pack = Dot::LIKES_PACKED_ROWS && M > FEW_ROWS;
    if (pack || K % GROUP) copy_rows(threads, pack);  // a group must be readable to its end
    if (M <= FEW_ROWS) {
      const i64 parts = pieces(threads, N * K * 2 * ((M + 15) / 16) / WORTH_A_PIECE);
      return for_each_task<Dot::Scope>(threads, parts, [&](i64 part, Dot::Scope& scope) {
        compute(scope, 0, M, total * part / parts, total * (part + 1) / parts);
      });
    }
    const i64 row_parts = (M + ROWS_OF_TASK - 1) / ROWS_OF_TASK, unit_parts = (total + UNITS_OF_TASK - 1) / UNITS_OF_TASK;
    const i64 rows_each = ((M + row_parts - 1) / row_parts + 31) / 32 * 32;
    for_each_task<Dot::Scope>(threads, row_parts * unit_parts, [&](i64 task, Dot::Scope& scope) {
      const i64 m0 = task / unit_parts * rows_each, u0 = task % unit_parts * UNITS_OF_TASK;
      const i64 m1 = m0 + rows_each < M ? m0 + rows_each : M, u1 = u0 + UNITS_OF_TASK < total ? u0 + UNITS_OF_TASK : total;
      if (m0 < m1) compute(scope, m0, m1, u0, u1);
    });
  }
};

}  // namespace
