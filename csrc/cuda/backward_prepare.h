// SPDX-License-Identifier: Apache-2.0
// Inputs that the backward of long sequences needs more than once: q and k rotated, and delta = rowsum(dout out). A
// block has ROWS tokens of one head. Sequences of at most 256 tokens do not need it: backward_keys.h rotates them
// itself.
#pragma once

#include "rotate.h"

namespace spe::cuda::prepare {

constexpr int THREADS = 128, ROWS = 64;

// Writes rows [first, first + rows) of one head of x, rotated, to `to`.
template <class E, int V>
SPE_DEVICE void rotate_rows(const Params& p, const Tensor& x, const Tensor& to, int sample, int first, int rows,
                            int head, int thread) {
  const Share s = p.all.share(thread, THREADS);
  const Channels c = channels_of<V>(p.pairs, s.column);
  const bool rotated = s.column < p.rotated.per_row;
  const uint16_t* from = x.at(sample, first + s.row, head);
  uint16_t* out = to.at(sample, first + s.row, head);
  for (int row = s.row; row < rows; row += s.step, from += static_cast<int64_t>(s.step) * x.token,
           out += static_cast<int64_t>(s.step) * to.token) {
    float a[V], b[V];
    load_elements<E, V>(a, from + c.first);
    load_elements<E, V>(b, from + c.second);
    if (rotated) rotate<V>(a, b, load_angles<V>(p.tables, sample, first + row, head, s.column), c.interleaved, 1.0f);
    store_elements<E, V>(out + c.first, a);
    store_elements<E, V>(out + c.second, b);
  }
}

template <class E>
SPE_KERNEL(THREADS, 8) prepare(SPE_PARAMS Params p) {
  const int thread = thread_index(), lane = thread & 31;
  const int tokens = p.sequences.tokens, blocks = (tokens + ROWS - 1) / ROWS;
  const int head = block_index() % p.heads, block = block_index() / p.heads;
  const int sample = block / blocks, first = block % blocks * ROWS;
  const int rows = tokens - first < ROWS ? tokens - first : ROWS;

  // 4 lanes a row; padding rows hold anything, and their results are not used
  const auto row_of = [&](const Tensor& x, int row) { return x.at(sample, first + row, head); };
  for (int base = 0; base < rows; base += THREADS / 4) {
    const int row = base + (thread >> 2);
    float sum = 0.0f;
    if (row < rows)
      for (int chunk = lane & 3; chunk < p.head_dim / 8; chunk += 4)
        sum += dot<E>(load_global4(row_of(p.dout, row) + 8 * chunk), load_global4(row_of(p.out, row) + 8 * chunk));
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    if (row < rows && (lane & 3) == 0)
      store_global_float(p.delta + (static_cast<int64_t>(sample) * p.heads + head) * tokens + first + row, sum);
  }

  if (!p.rotate_inputs) return;
  const bool has_keys = head % p.group == 0;
  if (p.rotate_vector == 4) {
    rotate_rows<E, 4>(p, p.q, p.q_rotated, sample, first, rows, head, thread);
    if (has_keys) rotate_rows<E, 4>(p, p.k, p.k_rotated, sample, first, rows, head / p.group, thread);
  } else {
    rotate_rows<E, 2>(p, p.q, p.q_rotated, sample, first, rows, head, thread);
    if (has_keys) rotate_rows<E, 2>(p, p.k, p.k_rotated, sample, first, rows, head / p.group, thread);
  }
}

}  // namespace spe::cuda::prepare
