// SPDX-License-Identifier: Apache-2.0
// Parameters of one launch, passed to its kernel.
#pragma once

#include <cmath>

#include "../common/problem.h"
#include "sequences.h"
#include "tile.h"

namespace spe::cuda {

// The vectors of a row, for a division by multiplication: exact up to 2^15.
struct Vectors {
  int per_row;
  uint32_t reciprocal;

  Vectors() = default;
  explicit Vectors(int per_row)
      : per_row(per_row), reciprocal(per_row ? ((1u << 20) + per_row - 1) / per_row : 0) {}
  SPE_DEVICE int row(int i) const { return static_cast<int>(i * reciprocal >> 20); }
  SPE_DEVICE Share share(int thread, int threads) const {
    const int at = row(thread), step = row(threads);
    return {thread - at * per_row, at < step ? at : 1 << 30, step};
  }
};

// Items in a row for each block, distributed evenly.
struct Work {
  int each, left;  // blocks [0, left) have one more

  Work() = default;
  Work(int count, int blocks) : each(count / blocks), left(count % blocks) {}
  SPE_DEVICE int begin(int block) const { return block * each + (block < left ? block : left); }
};

// (batch, tokens, heads, head_dim). Strides in elements: 32 bits, so that an address takes two multiply-adds, not
// eight.
struct Tensor {
  uint16_t* data;
  int64_t batch;
  int token, head;

  SPE_DEVICE uint16_t* at(int sample, int of_token, int of_head) const {
    return data + sample * batch + static_cast<int64_t>(of_token) * token + static_cast<int64_t>(of_head) * head;
  }
};

// cos and sin of (sample, token, head, pair); a stride of 0 broadcasts.
struct AngleTables {
  const float *cos, *sin;
  int64_t batch;
  int token, head;

  SPE_DEVICE int64_t at(int sample, int of_token, int of_head) const {
    return sample * batch + static_cast<int64_t>(of_token) * token + static_cast<int64_t>(of_head) * head;
  }
};

struct Params {
  Tensor q, k, v, out, dout, dq, dk, dv;  // strides are multiples of 8, addresses of 16
  Tensor q_rotated, k_rotated;            // of backward_prepare.h
  float *lse, *delta;                     // (batch, heads, tokens): log of the sum of exponentials; rowsum(dout out)
  AngleTables tables;
  ChannelPairs pairs;
  int rotate_vector;   // pairs that a thread rotates at a time: 4 or 2
  Vectors rotated;     // of a row's pairs
  Vectors all;         // of its channels
  bool rotate_inputs;  // false: q and k are rotated already, or never
  Sequences sequences;
  int heads, group, head_dim;  // group: heads that share a key head
  float scale, scale2;         // scale2: times log2(e)
  // windows_forward.h
  Work items;  // of all blocks; of forward.h too
  int stages;  // windows in shared memory at a time
  // forward.h
  int parts, passes;            // of a sequence (0: an item is a block of queries); the most tiles of queries in a part
  int slots, query_slots;       // of the rings
  int consumers;                // warps
  int queries_at, barriers_at;  // bytes of shared memory
  // backward_keys.h
  bool whole;  // a block has all keys of its sequence, and writes dq too
};

// Writes NaN to the rows of a head of x given by a span, by `threads` threads, whole warps.
SPE_DEVICE void poison(const Params& p, const Tensor& x, const Span& span, int head, int thread, int threads) {
#pragma unroll 1
  for (int row = span.nan + (thread >> 5); row < span.end; row += threads >> 5)
#pragma unroll 1
    for (int i = thread & 31; i < p.head_dim / 4; i += 32)
      store_global2(x.at(span.sample, row, head) + 4 * i, {{0x7fff7fffu, 0x7fff7fffu}});  // of both types
}

// NaN in out and lse.
SPE_DEVICE void poison_results(const Params& p, const Span& span, int head, int thread, int threads) {
  poison(p, p.out, span, head, thread, threads);
#pragma unroll 1
  for (int row = span.nan + thread; row < span.end; row += threads)
    store_global_float(p.lse + (static_cast<int64_t>(span.sample) * p.heads + head) * p.sequences.tokens + row, NAN);
}

// NaN in a gradient. Arguments are opaque: otherwise values computed here are kept for later code, where registers are
// short: keys_2 at D = 64 would spill 24 bytes, and the loop of queries be 3 % longer at D = 72 and 88.
SPE_DEVICE void poison_gradient(const Params& p, const Tensor& x, const Span& span, int head, int thread, int threads) {
  if (span.nan < span.end) poison(p, x, span, opaque(head), opaque(thread), opaque(threads));
}

}  // namespace spe::cuda
