// The dot chains of the three instruction classes, as one block operation:
//
//     C[i][j] (16 x 16 fp32) = A[i] (rows x 32 groups, bf16) * B[j] (packed)
//
// for NA row tiles and NB column tiles, every output element one chain over all groups. A packed column
// tile is [group of 32 k][pair of k][16 columns][2] bf16: 1 KiB a group, contiguous. Linear weights,
// transposed queries and interleaved values all have this form.
#pragma once
#include "vector.h"

namespace {

constexpr int GROUP = 32;              // k of one group
constexpr i64 PACKED_GROUP = 16 * 32;  // elements of one group of a packed column tile
constexpr i64 TILE = 16 * 16;          // floats of one tile of C

// Row tiles of a block; the last one may have fewer than 16 rows. Row r of group g begins at
// tile + g * group_stride + r * row_stride: plain rows (strides GROUP, K), or a packed copy in which a
// tile's group is 1 KiB in one piece (strides PACKED_GROUP, GROUP).
struct RowTiles {
  const u16* tile[4];
  int rows[4];
  i64 row_stride, group_stride;
};

#if defined(TANDEM_DOT_AMX)

#define TANDEM_ZERO(t) asm volatile("tilezero %%tmm%c0" ::"i"(t))
#define TANDEM_LOAD(t, p, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(static_cast<i64>(stride)), "i"(t) : "memory")
#define TANDEM_STORE(t, p) \
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(static_cast<i64>(64)), "i"(t) : "memory")
#define TANDEM_DOT(c, a, b) asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b))

struct Dot {
  static constexpr int ROW_TILES = 2, COLUMN_TILES = 2;  // block of a large product
  static constexpr bool LIKES_PACKED_ROWS = true;        // 512 x 1024 x 576: 0.41 ms against 0.49 ms, the copy included

  // Tile registers: C in 0..3 as [i][j], then A, then B, as many of each as fit.
  struct Scope {
    u32 current = ~0u;
    ~Scope() {
      if (current != ~0u) asm volatile("tilerelease");
    }
    // Registers of row tile i get rows[i] rows, all others 16.
    template <int NA, int NB> void configure(const int* rows) {
      u32 key = NA * 8 + NB;
      for (int i = 0; i < NA; i++) key = key * 32 + rows[i];
      bool is_full = true;
      for (int i = 0; i < NA; i++) is_full &= rows[i] == 16;
      if (is_full) key = 0;
      if (key == current) return;
      current = key;
      struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        u16 column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } config;
      for (int i = 0; i < NA && !is_full; i++) {
        for (int j = 0; j < NB; j++) config.rows[i * NB + j] = static_cast<uint8_t>(rows[i]);
        config.rows[4 + i] = static_cast<uint8_t>(rows[i]);
      }
      asm volatile("ldtilecfg %0" ::"m"(config));
    }
  };

  template <int NA, int NB>
  static void block(Scope& scope, const RowTiles& a, const u16* const* b, i64 groups, float* c) {
    static_assert(NA * NB <= 4 && (NA <= 2 || NB == 1));
    scope.configure<NA, NB>(a.rows);
    const i64 stride = a.row_stride * 2;
    zero<NA, NB>();
    if constexpr (NB == 1) {  // the column tile stays, the row tiles take turns
      for (i64 g = 0; g < groups; g++) {
        TANDEM_LOAD(7, b[0] + g * PACKED_GROUP, 64);
        TANDEM_LOAD(4, a.tile[0] + g * a.group_stride, stride);
        TANDEM_DOT(0, 4, 7);
        if constexpr (NA > 1) { TANDEM_LOAD(5, a.tile[1] + g * a.group_stride, stride); TANDEM_DOT(1, 5, 7); }
        if constexpr (NA > 2) { TANDEM_LOAD(6, a.tile[2] + g * a.group_stride, stride); TANDEM_DOT(2, 6, 7); }
        if constexpr (NA > 3) { TANDEM_LOAD(4, a.tile[3] + g * a.group_stride, stride); TANDEM_DOT(3, 4, 7); }
      }
    } else if constexpr (NA == 1) {
      for (i64 g = 0; g < groups; g++) {
        TANDEM_LOAD(4, a.tile[0] + g * a.group_stride, stride);
        TANDEM_LOAD(5, b[0] + g * PACKED_GROUP, 64);
        TANDEM_DOT(0, 4, 5);
        TANDEM_LOAD(6, b[1] + g * PACKED_GROUP, 64);
        TANDEM_DOT(1, 4, 6);
        if constexpr (NB > 2) { TANDEM_LOAD(7, b[2] + g * PACKED_GROUP, 64); TANDEM_DOT(2, 4, 7); }
        if constexpr (NB > 3) { TANDEM_LOAD(5, b[3] + g * PACKED_GROUP, 64); TANDEM_DOT(3, 4, 5); }
      }
    } else {
      for (i64 g = 0; g < groups; g++) {
        TANDEM_LOAD(4, a.tile[0] + g * a.group_stride, stride);
        TANDEM_LOAD(6, b[0] + g * PACKED_GROUP, 64);
        TANDEM_DOT(0, 4, 6);
        TANDEM_LOAD(7, b[1] + g * PACKED_GROUP, 64);
        TANDEM_DOT(1, 4, 7);
        TANDEM_LOAD(5, a.tile[1] + g * a.group_stride, stride);
        TANDEM_DOT(2, 5, 6);
        TANDEM_DOT(3, 5, 7);
      }
    }
    TANDEM_STORE(0, c);
    if constexpr (NA * NB > 1) TANDEM_STORE(1, c + TILE);
    if constexpr (NA * NB > 2) TANDEM_STORE(2, c + 2 * TILE);
    if constexpr (NA * NB > 3) TANDEM_STORE(3, c + 3 * TILE);
  }

 private:
  template <int NA, int NB> static void zero() {
    TANDEM_ZERO(0);
    if constexpr (NA * NB > 1) TANDEM_ZERO(1);
    if constexpr (NA * NB > 2) TANDEM_ZERO(2);
    if constexpr (NA * NB > 3) TANDEM_ZERO(3);
  }
};

#else  // one vector register per row and column tile

struct Dot {
  static constexpr int ROW_TILES = 1, COLUMN_TILES = 4;
  static constexpr bool LIKES_PACKED_ROWS = false;
  struct Scope {};

  template <int NA, int NB>
  static void block(Scope&, const RowTiles& a, const u16* const* b, i64 groups, float* c) {
#if defined(__AVX512F__)
    constexpr int ROWS = 4;
#else
    constexpr int ROWS = NB > 2 ? 1 : NB > 1 ? 2 : 4;  // sixteen registers of half the width
#endif
    for (int i = 0; i < NA; i++) {
      i64 row = 0;
      for (; row + ROWS <= a.rows[i]; row += ROWS) rows<ROWS, NB>(a.tile[i] + row * a.row_stride, a, b, groups, c + i * NB * TILE + row * 16);
      for (; row < a.rows[i]; row++) rows<1, NB>(a.tile[i] + row * a.row_stride, a, b, groups, c + i * NB * TILE + row * 16);
    }
  }

 private:
  template <int ROWS, int NB>
  static void rows(const u16* first, const RowTiles& a, const u16* const* b, i64 groups, float* c) {
    V16 acc[ROWS][NB] = {};
    for (i64 g = 0; g < groups; g++) {
      const u16* group = first + g * a.group_stride;
      for (i64 pair = 0; pair < 16; pair++) {
        U16 columns[NB];
#pragma GCC unroll 4
        for (int j = 0; j < NB; j++) columns[j] = load_u(b[j] + g * PACKED_GROUP + pair * 32);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
          u32 both;
          memcpy(&both, group + r * a.row_stride + pair * 2, 4);
#pragma GCC unroll 4
          for (int j = 0; j < NB; j++) acc[r][j] = step(acc[r][j], both, columns[j]);
        }
      }
    }
    for (int r = 0; r < ROWS; r++)
      for (int j = 0; j < NB; j++) store(c + j * TILE + r * 16, acc[r][j]);
  }

#if defined(TANDEM_DOT_AVX512_BF16)
  static V16 step(V16 acc, u32 row_pair, U16 column_pairs) {
    return (V16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(static_cast<i32>(row_pair)), (__m512bh)column_pairs);
  }
#else
  static V16 step(V16 acc, u32 row_pair, U16 column_pairs) {
    acc = fma(splat_bits(row_pair << 16), as_float(column_pairs << 16), acc);
    return fma(splat_bits(row_pair & 0xffff0000u), as_float(column_pairs & 0xffff0000u), acc);
  }
  static V16 splat_bits(u32 bits) { return as_float(splat(bits)); }
#endif
};

#endif

// `block` with the number of tiles known only at run time.
template <int NA>
inline void block_columns(typename Dot::Scope& scope, int columns, const RowTiles& a, const u16* const* b, i64 groups, float* c) {
  if constexpr (NA == 1) {
    if (columns == 4) return Dot::block<1, 4>(scope, a, b, groups, c);
    if (columns == 3) return Dot::block<1, 3>(scope, a, b, groups, c);
  }
  if (columns == 2) return Dot::block<NA, 2>(scope, a, b, groups, c);
  Dot::block<NA, 1>(scope, a, b, groups, c);
}
inline void block_rows(typename Dot::Scope& scope, int row_tiles, const RowTiles& a, const u16* b, i64 groups, float* c) {
  switch (row_tiles) {
    case 4: return Dot::block<4, 1>(scope, a, &b, groups, c);
    case 3: return Dot::block<3, 1>(scope, a, &b, groups, c);
    case 2: return Dot::block<2, 1>(scope, a, &b, groups, c);
    default: return Dot::block<1, 1>(scope, a, &b, groups, c);
  }
}

}  // namespace
