// SPDX-License-Identifier: Apache-2.0
// dk and dv: a block has 16 x MT x warps keys of one key head, keeps dk and dv in registers, and loops over the queries
// of all heads that share the key head. The products are transposed, keys by queries, so that P and dS are operands in
// the layout of the registers. Two regimes:   whole   the block has all keys of its sequence (windows, and up to 256
// tokens): it rotates k and q itself, and writes           dq as well: a tile's dS goes through shared memory, dS K is
// complete, nothing is summed elsewhere.   part    of a longer sequence; q and k were rotated by backward_prepare.h, dq
// is computed by backward_queries.h.
// No atomics: the same bits in every run.
//
// Shared memory, in rows of D: keys of K and V, later of dk as floats; 2 stages of BQ rows of q and dout; whole: BQ
// rows of dq as floats, keys rows of BQ elements of dS; then lse and delta of 2 x BQ rows; 3 barriers.
#pragma once

#include "rotate.h"

namespace spe::cuda::keys {

constexpr int MAX_WARPS = 8;

// Queries at a time: those of S and dP, of MT x BQ / 8 registers each, beside dk and dv of MT x D / 2.
constexpr int queries_of(int dim, int mt) { return mt == 1 && dim <= 80 ? 32 : 16; }

constexpr int shared_bytes(int dim, int mt, int warps, bool whole) {
  const int keys = 16 * mt * warps, queries = queries_of(dim, mt);
  const int of_dq = whole ? queries * 4 * dim + keys * 2 * queries : 0;
  return (2 * keys + 4 * queries) * 2 * dim + of_dq + 16 * queries + 3 * 8;
}

template <class E, int D, int MT>
SPE_KERNEL(32 * MAX_WARPS, 1) backward(SPE_PARAMS Params p) {
  constexpr int QUERIES = queries_of(D, MT);
  constexpr int Q8 = QUERIES / 8;
  const int thread = thread_index(), threads = block_size(), lane = thread & 31, warp = warp_index();
  const int warps = threads >> 5, keys = 16 * MT * warps;
  const int kv_heads = p.heads / p.group, kv_head = block_index() % kv_heads, program = block_index() / kv_heads;
  int first = 0;
  Span span;
  if (p.whole) {
    span = whole_sequence(p.sequences, program);
#pragma unroll 1
    for (int head = kv_head * p.group; head < (kv_head + 1) * p.group; ++head)
      poison_gradient(p, p.dq, span, head, thread, threads);
  } else {
    span = locate(p.sequences, program, keys, first);
  }
  poison_gradient(p, p.dk, span, kv_head, thread, threads);
  poison_gradient(p, p.dv, span, kv_head, thread, threads);
  if (first >= span.length) return;

  const Shared k_tile = shared_memory(), v_tile = k_tile + keys * Tile<D>::bytes;
  const Shared stages = v_tile + keys * Tile<D>::bytes, dq_tile = stages + 4 * QUERIES * Tile<D>::bytes;
  const Shared ds_tile = dq_tile + (p.whole ? QUERIES * FloatTile<D>::bytes : 0);
  const Shared numbers = ds_tile + (p.whole ? keys * Tile<QUERIES>::bytes : 0), barriers = numbers + 4 * QUERIES * 4;
  if (thread == 0)
    for (int i = 0; i < 3; ++i) barrier_init(barriers + 8 * i, threads);
  block_sync();

  // addresses are computed where they are needed: else they are kept in registers, which dk and dv need
  const auto rows_of = [&](const Tensor& x, int row, int of_head) {
    return x.at(opaque(span.sample), span.start + row, of_head);
  };
  const int exist = span.length - first < keys ? span.length - first : keys;
  copy_rows<D>(k_tile, rows_of(p.k, first, kv_head), p.k.token, keys, exist, thread, threads);
  copy_rows<D>(v_tile, rows_of(p.v, first, kv_head), p.v.token, keys, exist, thread, threads);
  barrier_arrive_after_copies(barriers + 16);

  // over the tiles of queries of one head after another; tiles alternate between two stages
  const int end = (kv_head + 1) * p.group;
  const auto copy = [&](int head, int row, int stage) {
    const int there = span.length - row < QUERIES ? span.length - row : QUERIES;
    const Shared to = stages + stage * 2 * QUERIES * Tile<D>::bytes;
    copy_rows<D>(to, rows_of(p.q, row, head), p.q.token, QUERIES, there, opaque(thread), threads);
    copy_rows<D>(to + QUERIES * Tile<D>::bytes, rows_of(p.dout, row, head), p.dout.token, QUERIES, there,
                 opaque(thread), threads);
    barrier_arrive_after_copies(barriers + 8 * stage);
  };
  copy(kv_head * p.group, 0, 0);
  rotate_tile<E, D>(p, k_tile, 0, exist, span.sample, span.start + first, kv_head, thread, threads,
                    [&] { barrier_wait(barriers + 16, 0); });

  float dk[MT][D / 8][4], dv[MT][D / 8][4];
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) dk[m][n][i] = dv[m][n][i] = 0.0f;

  const float scale = p.scale2;
  const int first_key = 16 * MT * warp;
  int stage = 0;
  uint32_t parity = 0;
  for (int head = kv_head * p.group, row = 0; head < end;) {
    const int there = span.length - row < QUERIES ? span.length - row : QUERIES;
    const Shared q = stages + stage * 2 * QUERIES * Tile<D>::bytes, dout = q + QUERIES * Tile<D>::bytes;
    const Shared lse = numbers + stage * 2 * QUERIES * 4, delta = lse + QUERIES * 4;
    const int64_t numbers_at =
        (static_cast<int64_t>(span.sample) * p.heads + head) * p.sequences.tokens + span.start + row;

    rotate_tile<E, D>(p, q, 0, there, span.sample, span.start + row, head, opaque(thread), threads,
                      [&] { barrier_wait(barriers + 8 * stage, parity); });
    // queries past the end have weights of 0
    if (thread < QUERIES)
      store_shared_float(lse + 4 * thread,
                         thread < there ? load_global_float(p.lse + numbers_at + thread) * LOG2_E : INFINITY);
    if (!p.whole) {
      if (thread < QUERIES)
        store_shared_float(delta + 4 * thread, thread < there ? load_global_float(p.delta + numbers_at + thread) : 0.0f);
    } else {
      for (int base = 0; base < QUERIES; base += threads / 4) {  // 4 lanes a row
        const int i = base + (thread >> 2);
        float sum = 0.0f;
        if (i < there)
          for (int chunk = lane & 3; chunk < D / 8; chunk += 4)
            sum += dot<E>(load_shared4(dout + Tile<D>::at(i, chunk)),
                          load_global4(rows_of(p.out, row + i, head) + 8 * chunk));
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        if (i < QUERIES && (lane & 3) == 0) store_shared_float(delta + 4 * i, sum);
      }
    }
    block_sync();  // q is rotated, lse and delta are loaded; the stage before has been read
    const bool same_head = row + QUERIES < span.length;
    const int next_head = same_head ? head : head + 1, next_row = same_head ? row + QUERIES : 0;
    if (next_head < end) copy(next_head, next_row, stage ^ 1);

    // S and dP, keys by queries
    float s[Q8 / 2][MT][2][4], dp[Q8 / 2][MT][2][4];
#pragma unroll
    for (int b = 0; b < Q8 / 2; ++b)
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int i = 0; i < 8; ++i) s[b][m][i >> 2][i & 3] = dp[b][m][i >> 2][i & 3] = 0.0f;
    multiply_rows<E, D, MT, Q8 / 2>(s, k_tile + first_key * Tile<D>::bytes, 16 * Tile<D>::bytes, q, 0, lane);
    multiply_rows<E, D, MT, Q8 / 2>(dp, v_tile + first_key * Tile<D>::bytes, 16 * Tile<D>::bytes, dout, 0, lane);
#pragma unroll
    for (int b = 0; b < Q8 / 2; ++b)
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int column = 16 * b + 8 * n + 2 * (lane & 3);
        const Float2 of_lse = load_shared_float2(lse + 4 * column), of_delta = load_shared_float2(delta + 4 * column);
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& weight = s[b][m][n][i];
            weight = exp2(weight * scale - of_lse.f[i & 1]);
            // k = 0 there, but the weight may be infinite
            const int row_of_m = first + first_key + 16 * m;
            if (row_of_m + 16 > span.length && row_of_m + (lane >> 2) + 8 * (i >> 1) >= span.length) weight = 0.0f;
            dp[b][m][n][i] = weight * (dp[b][m][n][i] - of_delta.f[i & 1]);
          }
      }
#pragma unroll
    for (int b = 0; b < Q8 / 2; ++b) {
      uint32_t weights[MT][4], ds[MT][4];
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        as_operand<E>(weights[m], s[b][m][0], s[b][m][1]);
        as_operand<E>(ds[m], dp[b][m][0], dp[b][m][1]);
        if (p.whole) {  // two queries of a key in a word
          const int g = lane >> 2, byte = (lane & 3) * 4, key = first_key + 16 * m;
          store_shared(ds_tile + Tile<QUERIES>::at(key + g, 2 * b) + byte, ds[m][0]);
          store_shared(ds_tile + Tile<QUERIES>::at(key + g + 8, 2 * b) + byte, ds[m][1]);
          store_shared(ds_tile + Tile<QUERIES>::at(key + g, 2 * b + 1) + byte, ds[m][2]);
          store_shared(ds_tile + Tile<QUERIES>::at(key + g + 8, 2 * b + 1) + byte, ds[m][3]);
        }
      }
      multiply_columns<E, D, MT>(dv, weights, dout, 16 * b, lane);
      multiply_columns<E, D, MT>(dk, ds, q, 16 * b, lane);
    }

    if (p.whole) {
      block_sync();  // dS is complete
      // dq = dS K, 16 queries by 16 channels at a time
      constexpr int COLUMNS = (D + 15) / 16;
      for (int unit = warp; unit < QUERIES / 16 * COLUMNS; unit += warps) {
        const int b = unit / COLUMNS, c = unit % COLUMNS;
        const bool two = 2 * c + 1 < D / 8;
        float d[2][4];
#pragma unroll
        for (int i = 0; i < 8; ++i) d[i >> 2][i & 3] = 0.0f;
        for (int key = 0; key < span.length; key += 16) {
          uint32_t a[4], w[4];
          const Lane at = by_chunks(lane);
          load_matrix4_transposed(a, ds_tile + Tile<QUERIES>::at(key + at.row, 2 * b + at.chunk));
          if (two) {
            load_matrix4_transposed(w, k_tile + Tile<D>::at(key + by_rows(lane).row, 2 * c + by_rows(lane).chunk));
            multiply<E>(d[1], a, w[2], w[3]);
          } else {
            uint32_t half[2];
            load_matrix2_transposed(half, k_tile + Tile<D>::at(key + (lane & 15), 2 * c));
            w[0] = half[0], w[1] = half[1];
          }
          multiply<E>(d[0], a, w[0], w[1]);
        }
        store_floats<D>(dq_tile, 16 * b, 2 * c, d[0], p.scale, lane);
        if (two) store_floats<D>(dq_tile, 16 * b, 2 * c + 1, d[1], p.scale, lane);
      }
      block_sync();
      store_inverse_rotated<E, D>(p, dq_tile, there, rows_of(p.dq, row, head), p.dq.token, span.sample,
                                  span.start + row, head, opaque(thread), threads);
    }
    head = next_head, row = next_row;
    stage ^= 1;
    parity ^= stage == 0;
  }

#pragma unroll
  for (int m = 0; m < MT; ++m) {
    const int row = first + first_key + 16 * m + (lane >> 2);
    uint16_t* out = rows_of(p.dv, row, kv_head);
    store_rows<E, D>(dv[m], 1.0f, 1.0f, out, out + 8 * static_cast<int64_t>(p.dv.token), row < span.length,
                     row + 8 < span.length, lane);
  }
  block_sync();  // K and V have been read
#pragma unroll
  for (int m = 0; m < MT; ++m) store_floats<D>(k_tile, first_key + 16 * m, 0, dk[m], p.scale, lane);
  block_sync();
  store_inverse_rotated<E, D>(p, k_tile, exist, rows_of(p.dk, first, kv_head), p.dk.token, span.sample,
                              span.start + first, kv_head, thread, threads);
}

}  // namespace spe::cuda::keys
