// SPDX-License-Identifier: Apache-2.0
// Sequences of at most KEYS tokens: windows. A warp has 16 queries and their whole rows of scores in registers, so
// softmax is one pass. A block visits (window, head) one after another, the heads of a window consecutively, whose
// angles then are in its L1, and copies the next one while it computes (stages = 2). One barrier a window.
//
// Shared memory: stages x (Q, K, V), each `rows` x D, rows = 16 x warps; then a barrier for each stage.
#pragma once

#include <cmath>

#include "rotate.h"

namespace spe::cuda::windows {

// Blocks per SM for windows of 64, as registers allow: 168 a thread, or 255.
constexpr int blocks_per_multiprocessor(int dim) { return dim <= 80 ? 3 : 2; }

constexpr int shared_bytes(int dim, int rows, int stages) { return stages * 3 * rows * 2 * dim + 8 * stages; }

// Iterates over the windows of a block in order, without empty ones.
struct Cursor {
  int left, window, head;
  Span span;

  SPE_DEVICE explicit Cursor(const Params& p) {
    const int first = p.items.begin(block_index());
    left = p.items.begin(block_index() + 1) - first;
    window = first / p.heads;
    head = first % p.heads - 1;
  }
  // `visit` is called at each window, those without a token included.
  template <class Visit>
  SPE_DEVICE bool next(const Params& p, Visit visit) {
    while (--left >= 0) {
      if (++head == p.heads) head = 0, ++window;
      span = whole_sequence(p.sequences, window);
      visit();
      if (span.length > 0) return true;
    }
    return false;
  }
};

template <class E, int D, int KEYS>
SPE_KERNEL(2 * KEYS, KEYS == 64 ? blocks_per_multiprocessor(D) : 1) forward(SPE_PARAMS Params p) {
  constexpr int BLOCKS = KEYS / 16;
  const int thread = thread_index(), threads = block_size(), lane = thread & 31, warp = thread >> 5;
  const int rows = threads / 2;
  const int tile = rows * Tile<D>::bytes;
  const Shared stages = shared_memory(), barriers = stages + p.stages * 3 * tile;

  if (thread == 0)
    for (int s = 0; s < p.stages; ++s) barrier_init(barriers + 8 * s, threads);
  block_sync();

  Cursor ahead(p), now(p);
  const auto copy_next = [&](int stage) {
    if (!ahead.next(p, [] {})) return;
    const Shared to = stages + stage * 3 * tile;
    const int kv_head = p.group == 1 ? ahead.head : ahead.head / p.group;
    const auto copy = [&](const Tensor& x, int place, int head) {
      copy_rows<D>(to + place * tile, x.at(ahead.span.sample, ahead.span.start, head), x.token, rows, ahead.span.length,
                   thread, threads);
    };
    copy(p.q, 0, ahead.head);
    copy(p.k, 1, kv_head);
    copy(p.v, 2, kv_head);
    barrier_arrive_after_copies(barriers + 8 * stage);
  };
  copy_next(0);

  int stage = 0;
  uint32_t parity = 0;
  while (now.next(p, [&] { poison_results(p, now.span, now.head, thread, threads); })) {
    const int length = now.span.length;
    const Shared q = stages + stage * 3 * tile, k = q + tile, v = k + tile;
    rotate_tile<E, D>(p, q, k, length, now.span.sample, now.span.start, now.head, thread, threads,
                      [&] { barrier_wait(barriers + 8 * stage, parity); });
    block_sync();  // rotated; and the other stage has been read
    if (p.stages == 2) copy_next(stage ^ 1);

    const int row = warp * 16 + (lane >> 2);
    if (warp * 16 < length) {
      Operand<D> a[1];
      a[0].load(q + warp * 16 * Tile<D>::bytes, lane);
      float s[BLOCKS][1][1][2][4];
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) {
#pragma unroll
        for (int i = 0; i < 8; ++i) s[b][0][0][i >> 2][i & 3] = 0.0f;
        if (16 * b < length) multiply_rows<E, D, 1, 1>(s[b], a, k, 16 * b, lane);
      }
      if (length < KEYS) {
        const int left = length - 2 * (lane & 3);  // of this lane's columns
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
          for (int i = 0; i < 8; ++i)
            if (16 * b + 8 * (i >> 2) + (i & 1) >= left) s[b][0][0][i >> 2][i & 3] = -INFINITY;
      }

      // the warp of token 0 of head 0 checks all cu_seqlens
      const float scale = now.span.start + warp + now.head == 0 && decrease(p.sequences, lane) ? NAN : p.scale2;
      float most[2] = {-INFINITY, -INFINITY};
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
        for (int i = 0; i < 8; ++i) most[i >> 1 & 1] = fmaxf(most[i >> 1 & 1], s[b][0][0][i >> 2][i & 3]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        most[h] = fmaxf(most[h], shuffle_xor(most[h], 1));
        most[h] = fmaxf(most[h], shuffle_xor(most[h], 2)) * scale;
      }
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float& x = s[b][0][0][i >> 2][i & 3];
          x = exp2(x * scale - most[i >> 1 & 1]);
        }

      float o[1][D / 8][4];
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[0][n][i] = 0.0f;
      float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // one more column of the product, as in forward.h
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b)
        if (16 * b < length) {
          uint32_t weights[1][4];
          as_operand<E>(weights[0], s[b][0][0][0], s[b][0][0][1]);
          multiply<E>(sum, weights[0], ONES<E>, ONES<E>);
          multiply_columns<E, D, 1>(o, weights, v, 16 * b, lane);
        }

#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if ((lane & 3) == 0 && row + 8 * h < length)
          store_global_float(p.lse + (static_cast<int64_t>(now.span.sample) * p.heads + now.head) * p.sequences.tokens +
                                 now.span.start + row + 8 * h,
                             (most[h] + log2(sum[2 * h])) * LN_2);
      }
      uint16_t* out = p.out.at(now.span.sample, now.span.start + row, now.head);
      store_rows<E, D>(o[0], reciprocal(sum[0]), reciprocal(sum[2]), out, out + 8 * static_cast<int64_t>(p.out.token),
                       row < length, row + 8 < length, lane);
    }
    if (p.stages == 2) {
      stage ^= 1;
      parity ^= stage == 0;
    } else {
      block_sync();
      copy_next(0);
      parity ^= 1;
    }
  }
}

}  // namespace spe::cuda::windows
