// Causal attention over the paged cache in the canonical split order (reference.py defines it).
//
// Work is done on transposed score tiles: 16 keys x 16 query rows, a lane is a query row, so that no sum
// ever runs across lanes. The query heads that share a KV head are packed into the rows. One code path
// serves prefill, chunks of it, and decode.
#pragma once
#include <cmath>
#include "dot.h"
#include "parallel.h"

namespace {

constexpr int SPLIT = 256;              // keys of one split, counted from position 0
constexpr int QUERY_TILES = 4;          // tiles of 16 query rows that share one pass over a split
constexpr int QUERY_ROWS = 16 * QUERY_TILES;
constexpr float LOWEST = -__builtin_inff();

struct Attention {
  const u16* q;  // (T, H, D)
  const u16* kv;
  i64 block_stride, kv_stride, head_stride, token_stride;  // elements
  const i32 *query_start, *context_len, *block_table;
  i64 table_stride;
  i64 num_sequences, H, G, D, block_size;
  i64 window;   // keys that a row sees, its own included; larger than any context: all
  float scale;  // > 0
  u16* out;     // (T, H, D)

  i64 heads_per_kv() const { return H / G; }
  i64 value_tiles() const { return D / 16; }
  i64 groups() const { return (D + GROUP - 1) / GROUP; }

  // Up to QUERY_ROWS rows (token-major, then head) of one sequence and one KV head.
  struct Task {
    i32 sequence, kv_head, first_row, num_rows;
    i32 first_split, end_split;  // those before are out of every row's window

    i64 num_splits() const { return end_split - first_split; }
  };

  i64 num_tokens(i64 b) const { return query_start[b + 1] - query_start[b]; }
  i32 position(const Task& t, int row) const {
    const i64 token = (t.first_row + row) / heads_per_kv();
    return static_cast<i32>(context_len[t.sequence] - num_tokens(t.sequence) + token);
  }
  i32 lowest_position(const Task& t) const { return position(t, 0); }
  i32 highest_position(const Task& t) const { return position(t, t.num_rows - 1); }
  i64 first_visible(i64 position) const { return position < window ? 0 : position - window + 1; }
  // Where work begins: groups of keys that no row sees would add zeros to sums that are zero.
  i64 first_key(const Task& t) const { return first_visible(lowest_position(t)) / GROUP * GROUP; }
  i64 row_offset(const Task& t, int row) const {
    const i64 flat = t.first_row + row, R = heads_per_kv();
    return ((query_start[t.sequence] + flat / R) * H + t.kv_head * R + flat % R) * D;
  }
  const u16* key(const Task& t, i64 position) const {
    const i64 block = block_table[t.sequence * table_stride + position / block_size];
    return kv + block * block_stride + t.kv_head * head_stride + position % block_size * token_stride;
  }
  const u16* value(const Task& t, i64 position) const { return key(t, position) + kv_stride; }

  // Brings 16 keys' rows of a block into the L2 cache while something else is computed: the hardware does
  // not foresee the next block.
  void prefetch(const u16* rows) const {
    const char* first = reinterpret_cast<const char*>(rows);
    for (i64 line = 0; line < 16 * token_stride * 2; line += 64) __builtin_prefetch(first + line, 0, 2);
  }

  // One split of one task: per query row the maximum, the sum of weights and the weighted values.
  struct Part {
    float *best, *total;  // [QUERY_ROWS]
    float* weighted;      // [query tile][value tile][16 rows][16]
  };
  i64 part_floats() const { return QUERY_ROWS * (2 + D); }
  Part part_at(float* memory) const { return {memory, memory + QUERY_ROWS, memory + 2 * QUERY_ROWS}; }

  struct Workspace {
    u16 *queries, *padded_keys, *values, *weights;
    float *scores, *part, *sum;
  };
  Workspace workspace() const {
    const i64 padded = groups() * GROUP;
    const i64 sizes[] = {QUERY_ROWS * padded * 2, padded == D ? 0 : SPLIT * padded * 2, SPLIT * D * 2,
                         16 * SPLIT * 2,          SPLIT * 16 * 4,                        part_floats() * 4, part_floats() * 4};
    i64 total = 0;
    for (i64 size : sizes) total += (size + 63) / 64 * 64;
    char* next = thread_scratch().reserve(total);
    char* place[7];
    for (int i = 0; i < 7; i++) place[i] = next, next += (sizes[i] + 63) / 64 * 64;
    return {reinterpret_cast<u16*>(place[0]),   reinterpret_cast<u16*>(place[1]),   reinterpret_cast<u16*>(place[2]),
            reinterpret_cast<u16*>(place[3]),   reinterpret_cast<float*>(place[4]), reinterpret_cast<float*>(place[5]),
            reinterpret_cast<float*>(place[6])};
  }

  static int tiles(const Task& t) { return (t.num_rows + 15) / 16; }

  // Query rows as packed column tiles: [tile][group][pair of d][16 rows][2]; missing rows are zero.
  void pack_queries(const Task& t, const Workspace& ws) const {
    alignas(64) u16 padded[GROUP] = {};
    for (int tile = 0; tile < tiles(t); tile++)
      for (i64 g = 0; g < groups(); g++) {
        U16 rows[16];
        for (int r = 0; r < 16; r++) {
          const int row = tile * 16 + r;
          if (row >= t.num_rows) { rows[r] = U16{}; continue; }
          const u16* from = q + row_offset(t, row) + g * GROUP;
          const i64 left = D - g * GROUP;
          if (left >= GROUP) { rows[r] = load_u(from); continue; }
          memcpy(padded, from, left * 2);
          rows[r] = load_u(padded);
        }
        transpose(rows);
        for (int pair = 0; pair < 16; pair++) store_u(ws.queries + ((tile * groups() + g) * 16 + pair) * 32, rows[pair]);
      }
  }

  // Values start .. end of a split as packed column tiles [value tile][group of 32 keys]...; keys from
  // `end` on are zero: their memory may be stale.
  void interleave_values(const Task& t, i64 start, i64 end, i64 key_groups, const Workspace& ws, const Task* next = nullptr,
                         i64 next_start = 0) const {
    for (i64 first = 0; first < key_groups * 16; first += 8) {  // 8 pairs: 16 keys of one block
      const u16* values = start + 2 * first < end ? value(t, start + 2 * first) : nullptr;
      if (next && next_start + 2 * first <= highest_position(*next)) prefetch(key(*next, next_start + 2 * first));
      for (i64 tile = 0; tile < value_tiles(); tile++)
        for (i64 pair = first; pair < first + 8; pair++) {
          const i64 left = end - (start + 2 * pair);
          const u16* even = values + 2 * (pair - first) * token_stride + tile * 16;
          const U16 low = left > 0 ? load_h(even) : U16{};
          const U16 high = left > 1 ? load_h(even + token_stride) : U16{};
          store_u(ws.values + tile * SPLIT * 16 + pair * 32, low | high << 16);
        }
    }
  }

  // Scores of one query tile: [key][16 rows].
  void score(typename Dot::Scope& scope, const Task& t, int query_tile, i64 start, i64 num_keys, const Workspace& ws) const {
    const i64 padded = groups() * GROUP, key_tiles = (num_keys + 15) / 16;
    const u16* queries = ws.queries + query_tile * groups() * PACKED_GROUP;
    for (i64 tile = 0; tile < key_tiles; tile += 4) {
      const int here = static_cast<int>(key_tiles - tile < 4 ? key_tiles - tile : 4);
      RowTiles keys = {{}, {16, 16, 16, 16}, padded == D ? token_stride : padded, GROUP};
      for (int i = 0; i < here; i++)
        keys.tile[i] = padded == D ? key(t, start + (tile + i) * 16) : ws.padded_keys + (tile + i) * 16 * padded;
      block_rows(scope, here, keys, queries, groups(), ws.scores + tile * TILE);
    }
  }

  void pad_keys(const Task& t, i64 start, i64 num_keys, const Workspace& ws) const {
    const i64 padded = groups() * GROUP;
    memset(ws.padded_keys, 0, SPLIT * padded * 2);
    for (i64 k = 0; k < num_keys; k++) memcpy(ws.padded_keys + k * padded, key(t, start + k), D * 2);
  }

  // Scores -> weights [row][key] in bf16 (0 up to the end of the last group), maximum and sum per row.
  void softmax(const Task& t, int query_tile, i64 start, i64 num_keys, i64 key_groups, const Workspace& ws, const Part& part) const {
    alignas(64) i32 positions[16], firsts[16];
    bool sees_all = true;
    for (int r = 0; r < 16; r++) {
      const int row = query_tile * 16 + r;
      positions[r] = row < t.num_rows ? position(t, row) : INT32_MAX;
      firsts[r] = row < t.num_rows ? static_cast<i32>(first_visible(positions[r])) : 0;
      sees_all &= positions[r] >= start + num_keys - 1 && firsts[r] <= start;
    }
    I16 last, first;
    memcpy(&last, positions, 64);
    memcpy(&first, firsts, 64);
    if (!sees_all)
      for (i64 k = 0; k < num_keys; k++) {
        const I16 key = splat(static_cast<i32>(start + k));
        store(ws.scores + k * 16, (last >= key) & (first <= key) ? load(ws.scores + k * 16) : splat(LOWEST));
      }
    for (i64 k = num_keys; k < key_groups * GROUP; k++) store(ws.scores + k * 16, splat(LOWEST));
    V16 best = splat(LOWEST);
    for (i64 k = 0; k < num_keys; k++) best = larger(load(ws.scores + k * 16), best);
    best = best * scale;  // rounding keeps the order: this is the maximum of the scaled scores
    const V16 shift = best == splat(LOWEST) ? V16{} : best;
    V16 total = {};
    for (i64 group = 0; group < key_groups; group++) {
      if (query_tile == 0)  // the values are needed next
        for (i64 k = group * GROUP; k < num_keys && k < group * GROUP + GROUP; k += 16) prefetch(value(t, start + k));
      U16 pairs[16];
#pragma GCC unroll 16
      for (int pair = 0; pair < 16; pair++) {
        const float* scores = ws.scores + (group * GROUP + 2 * pair) * 16;
        const V16 even = exp_nonpositive(load(scores) * scale - shift);
        const V16 odd = exp_nonpositive(load(scores + 16) * scale - shift);
        total = total + even;
        total = total + odd;
        pairs[pair] = bf16_pair(even, odd);
      }
      transpose(pairs);
      for (int r = 0; r < 16; r++) store_u(ws.weights + r * SPLIT + group * GROUP, pairs[r]);
    }
    store(part.best + query_tile * 16, best);
    store(part.total + query_tile * 16, total);
  }

  void weigh(typename Dot::Scope& scope, i64 key_groups, const Workspace& ws, float* weighted) const {
    const RowTiles weights = {{ws.weights}, {16}, SPLIT, GROUP};
    for (i64 tile = 0; tile < value_tiles(); tile += 4) {
      const int here = static_cast<int>(value_tiles() - tile < 4 ? value_tiles() - tile : 4);
      const u16* columns[4];
      for (int j = 0; j < here; j++) columns[j] = ws.values + (tile + j) * SPLIT * 16;
      block_columns<1>(scope, here, weights, columns, key_groups, weighted + tile * TILE);
    }
  }

  // 0 * inf is NaN: are there values that some rows of the task must not meet, not even with weight 0?
  bool has_dangerous_values(const Task& t, i64 start, i64 end) const {
    const i64 after = lowest_position(t) + 1, before = first_visible(highest_position(t));
    return has_infinite_values(t, start, before < end ? before : end) || has_infinite_values(t, after > start ? after : start, end);
  }
  bool has_infinite_values(const Task& t, i64 start, i64 end) const {  // or NaN
    for (i64 position = start; position < end; position++) {
      const u16* v = value(t, position);
      for (i64 d = 0; d < D; d++)
        if ((v[d] & 0x7f80) == 0x7f80) return true;
    }
    return false;
  }

  // As `weigh`, but every row meets the values of its own visible positions only.
  void weigh_row_by_row(typename Dot::Scope& scope, const Task& t, int query_tile, i64 start, i64 end, i64 key_groups,
                        const Workspace& ws, float* weighted) const {
    float* all = ws.scores;  // this tile's are no longer needed, and D <= 256 fits
    for (int r = 0; r < 16 && query_tile * 16 + r < t.num_rows; r++) {
      const i64 last = position(t, query_tile * 16 + r);
      interleave_values(t, start, last + 1 < end ? last + 1 : end, key_groups, ws);
      clear_values(first_visible(last) - start, key_groups, ws);
      weigh(scope, key_groups, ws, all);
      for (i64 tile = 0; tile < value_tiles(); tile++) memcpy(weighted + tile * TILE + r * 16, all + tile * TILE + r * 16, 64);
    }
  }

  // Zeroes the first `count` of the interleaved values.
  void clear_values(i64 count, i64 key_groups, const Workspace& ws) const {
    if (count > key_groups * GROUP) count = key_groups * GROUP;
    for (i64 tile = 0; tile < value_tiles(); tile++)
      for (i64 key = 0; key < count; key++)
        for (i64 lane = 0; lane < 16; lane++) ws.values[tile * SPLIT * 16 + key / 2 * 32 + lane * 2 + key % 2] = 0;
  }

  void compute_split(typename Dot::Scope& scope, const Task& t, i64 split, const Workspace& ws, const Part& part,
                     const Task* following = nullptr) const {
    const i64 start = split == t.first_split ? first_key(t) : split * SPLIT;
    const i64 visible = highest_position(t) + 1, split_end = (split + 1) * SPLIT;
    const i64 end = visible < split_end ? visible : split_end;
    const i64 num_keys = end - start, key_groups = (num_keys + GROUP - 1) / GROUP;
    const bool is_dangerous = has_dangerous_values(t, start, end);
    if (groups() * GROUP != D) pad_keys(t, start, num_keys, ws);
    for (int tile = 0; tile < tiles(t); tile++) {
      score(scope, t, tile, start, num_keys, ws);
      softmax(t, tile, start, num_keys, key_groups, ws, part);
      if (tile == 0 && !is_dangerous) {
        const bool is_last = split + 1 == t.end_split;
        const i64 next_start = !is_last ? split_end : following ? first_key(*following) : 0;
        interleave_values(t, start, end, key_groups, ws, is_last ? following : &t, next_start);
      }
      float* weighted = part.weighted + tile * value_tiles() * TILE;
      if (is_dangerous) weigh_row_by_row(scope, t, tile, start, end, key_groups, ws, weighted);
      else weigh(scope, key_groups, ws, weighted);
    }
  }

  // sum = sum (+) part, for the rows that see any key of the split; sum = part where it is their first.
  void merge(const Task& t, i64 split, const Part& sum, const Part& part) const {
    for (int tile = 0; tile < tiles(t); tile++) {
      alignas(64) float scale_sum[16], scale_part[16], best[16], total[16];
      const V16 best_sum = load(sum.best + tile * 16), best_part = load(part.best + tile * 16);
      const V16 best_both = larger(best_sum, best_part);
      const V16 a = exp_nonpositive(best_sum - best_both), b = exp_nonpositive(best_part - best_both);
      store(scale_sum, a), store(scale_part, b), store(best, best_both);
      store(total, load(sum.total + tile * 16) * a + load(part.total + tile * 16) * b);
      for (int r = 0; r < 16; r++) {
        const int row = tile * 16 + r;
        if (row >= t.num_rows || position(t, row) < split * SPLIT) continue;
        const i64 row_split = first_visible(position(t, row)) / SPLIT;
        if (row_split > split) continue;
        const bool is_first = row_split == split;
        sum.best[row] = is_first ? part.best[row] : best[r];
        sum.total[row] = is_first ? part.total[row] : total[r];
        for (i64 column = 0; column < value_tiles(); column++) {
          float* to = sum.weighted + (tile * value_tiles() + column) * TILE + r * 16;
          const float* from = part.weighted + (tile * value_tiles() + column) * TILE + r * 16;
          if (is_first) store(to, load(from) + 0.0f);
          else store(to, load(to) * splat(scale_sum[r]) + (load(from) + 0.0f) * splat(scale_part[r]));
        }
      }
    }
  }

  // + 0 turns -0 into +0: a row must not show how many masked keys followed in its tile.
  void begin(const Task& t, const Part& sum) const {
    const i64 count = tiles(t) * value_tiles() * TILE;
    for (i64 i = 0; i < count; i += LANES) store(sum.weighted + i, load(sum.weighted + i) + 0.0f);
  }

  void write(const Task& t, const Part& sum) const {
    for (int row = 0; row < t.num_rows; row++)
      for (i64 column = 0; column < value_tiles(); column++)
        store(out + row_offset(t, row) + column * 16,
              load(sum.weighted + (row / 16 * value_tiles() + column) * TILE + row % 16 * 16) / splat(sum.total[row]));
  }

  i64 list_tasks(Task* list) const {  // null: only count
    i64 count = 0;
    for (i64 b = num_sequences - 1; b >= 0; b--) {
      const i64 rows = num_tokens(b) * heads_per_kv();
      for (i64 first = (rows - 1) / QUERY_ROWS * QUERY_ROWS; first >= 0 && rows > 0; first -= QUERY_ROWS)  // longest first
        for (i64 g = 0; g < G; g++, count++) {
          if (!list) continue;
          Task& t = list[count];
          const i64 here = rows - first < QUERY_ROWS ? rows - first : QUERY_ROWS;
          t = {static_cast<i32>(b), static_cast<i32>(g), static_cast<i32>(first), static_cast<i32>(here), 0, 0};
          t.first_split = static_cast<i32>(first_visible(lowest_position(t)) / SPLIT);
          t.end_split = highest_position(t) / SPLIT + 1;
        }
    }
    return count;
  }

  void run_task(typename Dot::Scope& scope, const Task& t, const Task* following) const {
    const Workspace ws = workspace();
    const Part sum = part_at(ws.sum), part = part_at(ws.part);
    pack_queries(t, ws);
    compute_split(scope, t, t.first_split, ws, sum, following);
    begin(t, sum);
    for (i64 split = t.first_split + 1; split < t.end_split; split++) {
      compute_split(scope, t, split, ws, part, following);
      merge(t, split, sum, part);
    }
    write(t, sum);
  }

  // Few tasks, long contexts: the splits are computed side by side, then folded in order.
  void run_by_splits(int threads, const Task* tasks, i64 num_tasks, i64 num_parts) const {
    float* parts = static_cast<float*>(aligned_alloc(64, num_parts * part_floats() * 4));
    if (!parts) abort();
    for_each_task<Dot::Scope>(threads, num_parts, [&](i64 index, Dot::Scope& scope) {
      i64 task = 0, place = index;
      while (place >= tasks[task].num_splits()) place -= tasks[task++].num_splits();
      const Task& t = tasks[task];
      const Workspace ws = workspace();
      pack_queries(t, ws);
      compute_split(scope, t, t.first_split + place, ws, part_at(parts + index * part_floats()));
    });
    FloatingPointMode mode;
    for (i64 task = 0, first = 0; task < num_tasks; first += tasks[task++].num_splits()) {
      const Task& t = tasks[task];
      const Part sum = part_at(parts + first * part_floats());
      begin(t, sum);
      for (i64 place = 1; place < t.num_splits(); place++)
        merge(t, t.first_split + place, sum, part_at(parts + (first + place) * part_floats()));
      write(t, sum);
    }
    free(parts);
  }

  void run(int threads) const {
    const i64 num_tasks = list_tasks(nullptr);
    Task* tasks = static_cast<Task*>(malloc((num_tasks + 1) * sizeof(Task)));
    if (!tasks) abort();
    list_tasks(tasks);
    i64 num_parts = 0, num_rows = 0;
    for (i64 i = 0; i < num_tasks; i++) num_parts += tasks[i].num_splits(), num_rows += tasks[i].num_rows * tasks[i].num_splits();
    constexpr i64 WORTH_A_THREAD = 2;  // splits
    if (num_parts < 2 * WORTH_A_THREAD) threads = 1;
    if (threads > 1 && num_tasks < 4 * threads && num_parts > num_tasks) run_by_splits(threads, tasks, num_tasks, num_parts);
    else for_each_task<Dot::Scope>(threads, num_tasks, [&](i64 task, Dot::Scope& scope) {
      run_task(scope, tasks[task], task + threads < num_tasks ? &tasks[task + threads] : nullptr);
    });
    free(tasks);
  }
};

}  // namespace
