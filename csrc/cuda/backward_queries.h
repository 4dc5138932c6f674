// SPDX-License-Identifier: Apache-2.0
// dq of sequences of any length: a block has 16 x warps queries of one head, keeps q, dout and dq in registers, and
// loops over the keys, which backward_prepare.h has rotated. With P = exp(S - lse), dS = P (dout Vt - delta), dq is dS
// K after the inverse rotation. One barrier for each tile of keys.
//
// Shared memory: STAGES x (K, V) of BN rows; 16 x warps rows of q and of dout, then of dq as floats; STAGES barriers,
// and one.
#pragma once

#include "rotate.h"

namespace spe::cuda::queries {

constexpr int BN = 32, STAGES = 3, MAX_WARPS = 8;

constexpr int shared_bytes(int dim, int warps) {
  return (2 * STAGES * BN + 2 * 16 * warps) * 2 * dim + 8 * (STAGES + 1);
}

template <class E, int D>
SPE_KERNEL(32 * MAX_WARPS, 1) backward(SPE_PARAMS Params p) {
  const int thread = thread_index(), threads = block_size(), lane = thread & 31, warp = thread >> 5;
  const int block_rows = threads / 2;
  const int head = block_index() % p.heads;
  int first;
  const Span span = locate(p.sequences, block_index() / p.heads, block_rows, first);
  poison_gradient(p, p.dq, span, head, thread, threads);
  if (first >= span.length) return;

  const Shared tiles = shared_memory(), q_tile = tiles + 2 * STAGES * BN * Tile<D>::bytes;
  const Shared dout_tile = q_tile + block_rows * Tile<D>::bytes, barriers = dout_tile + block_rows * Tile<D>::bytes;
  if (thread == 0)
    for (int i = 0; i <= STAGES; ++i) barrier_init(barriers + 8 * i, threads);
  block_sync();

  const auto rows_of = [&](const Tensor& x, int row, int of_head) {
    return x.at(span.sample, span.start + row, of_head);
  };
  const int count = (span.length + BN - 1) / BN;
  const auto copy = [&](int tile) {
    if (tile >= count) return;
    const int exist = span.length - tile * BN < BN ? span.length - tile * BN : BN;
    const int stage = tile % STAGES;
    const Shared to = tiles + stage * 2 * BN * Tile<D>::bytes;
    const uint16_t *k = rows_of(p.k, tile * BN, head / p.group), *v = rows_of(p.v, tile * BN, head / p.group);
    copy_rows<D>(to, k, p.k.token, BN, exist, thread, threads);
    copy_rows<D>(to + BN * Tile<D>::bytes, v, p.v.token, BN, exist, thread, threads);
    barrier_arrive_after_copies(barriers + 8 * stage);
  };
  const int exist = span.length - first < block_rows ? span.length - first : block_rows;
  copy_rows<D>(q_tile, rows_of(p.q, first, head), p.q.token, block_rows, exist, thread, threads);
  copy_rows<D>(dout_tile, rows_of(p.dout, first, head), p.dout.token, block_rows, exist, thread, threads);
  barrier_arrive_after_copies(barriers + 8 * STAGES);
  for (int tile = 0; tile < STAGES - 1; ++tile) copy(tile);

  // rows past the end have weights of 0
  float lse[2], delta[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = first + 16 * warp + (lane >> 2) + 8 * h;
    const int64_t at = (static_cast<int64_t>(span.sample) * p.heads + head) * p.sequences.tokens + span.start + row;
    lse[h] = row < span.length ? load_global_float(p.lse + at) * LOG2_E : INFINITY;
    delta[h] = row < span.length ? load_global_float(p.delta + at) : 0.0f;
  }

  Operand<D> q[1], dout[1];
  barrier_wait(barriers + 8 * STAGES, 0);
  q[0].load(q_tile + 16 * warp * Tile<D>::bytes, lane);
  dout[0].load(dout_tile + 16 * warp * Tile<D>::bytes, lane);
  float dq[1][D / 8][4];
#pragma unroll
  for (int n = 0; n < D / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) dq[0][n][i] = 0.0f;

  const float scale = p.scale2;
  const bool works = first + 16 * warp < span.length;
  uint32_t parity = 0;
  for (int tile = 0, stage = 0; tile < count; ++tile) {
    barrier_wait(barriers + 8 * stage, parity);
    block_sync();  // the stage before has been read
    copy(tile + STAGES - 1);
    const Shared k = tiles + stage * 2 * BN * Tile<D>::bytes, v = k + BN * Tile<D>::bytes;
    const int keys = span.length - tile * BN;
#pragma unroll
    for (int b = 0; b < BN / 16; ++b) {
      if (!works || 16 * b >= keys) break;
      float s[1][1][2][4], dp[1][1][2][4];
#pragma unroll
      for (int i = 0; i < 8; ++i) s[0][0][i >> 2][i & 3] = dp[0][0][i >> 2][i & 3] = 0.0f;
      multiply_rows<E, D, 1, 1>(s, q, k, 16 * b, lane);
      multiply_rows<E, D, 1, 1>(dp, dout, v, 16 * b, lane);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int h = i >> 1 & 1;
        const float weight = exp2(s[0][0][i >> 2][i & 3] * scale - lse[h]);
        s[0][0][i >> 2][i & 3] = weight * (dp[0][0][i >> 2][i & 3] - delta[h]);
      }
      if (16 * b + 16 > keys) {  // k = 0 there, but the weight may be infinite
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (16 * b + 8 * (i >> 2) + (i & 1) >= keys - 2 * (lane & 3)) s[0][0][i >> 2][i & 3] = 0.0f;
      }
      uint32_t ds[1][4];
      as_operand<E>(ds[0], s[0][0][0], s[0][0][1]);
      multiply_columns<E, D, 1>(dq, ds, k, 16 * b, lane);
    }
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }

  // q and dout are in registers: their rows of two tiles hold the warp's rows of dq
  block_sync();
  const Shared floats = q_tile + 16 * warp * FloatTile<D>::bytes;
  store_floats<D>(floats, 0, 0, dq[0], p.scale, lane);
  warp_sync();
  const int row = first + 16 * warp;
  const int rows = span.length - row < 16 ? span.length - row : 16;
  store_inverse_rotated<E, D>(p, floats, rows, rows_of(p.dq, row, head), p.dq.token, span.sample,
                              span.start + row, head, lane, 32);
}

}  // namespace spe::cuda::queries
