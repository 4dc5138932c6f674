// SPDX-License-Identifier: Apache-2.0
// Attention of sequences of any length. A block has two kinds of warps: producers copy tiles of q, k and v to shared
// memory and rotate q and k there, consumers multiply. Between them are two rings of tiles, of keys (with their values)
// and of queries, whose slots are passed by barriers; no barrier of the whole block after the start.
//
// Work is split into items, (sequence, head, part of its queries). A consumer warp has MT x 16 queries of a tile of 16
// x MT x warps queries; an item is one or more such tiles (passes).   resident   the ring holds all keys of a sequence:
// they are copied and rotated once, in the first pass, read in every              pass, and released one by one in the
// last one, so that the next item's arrive meanwhile.   streaming  the ring is shorter than the sequence: every item is
// one pass, and releases what it has read. The code is the same: the host sets the length of the ring, and the number
// of passes of an item.
//
// Softmax has no running maximum: scores are relative to the largest of a row's first ones, until the sum of a tile's
// weights exceeds SUM_LIMIT; then its scores are recomputed, and the reference is raised. The sum is one more column of
// the weights' product with the values. So a score costs a multiply-add, an exp2 and half a conversion. exp2 on the
// multiply-add units would cost 6 instructions instead of one: the special function unit takes 1/16 clock a score and
// SM, the products at D = 64 at least that (1/8 on sm_80), and instructions are the bottleneck.
//
// Shared memory: slots of keys, each BN rows of K, then V (a shorter tile: as many rows as it has, in multiples of 16,
// so that the last slot of a resident ring may be shorter); query_slots of 16 x warps rows; three barriers a slot.
#pragma once

#include <cmath>

#include "rotate.h"

namespace spe::cuda::attention {

constexpr int BN = 32;              // keys of a tile
constexpr float LOWEST = -3.0e38f;  // of a row without a reference; finite, so that -inf - LOWEST is not NaN

// Warps: equally many for each of the 4 schedulers of an SM. 12 have 168 registers a thread; registers are allocated to
// 4 warps at a time, so one more would leave them 128, and one less no more than 168.
constexpr int CONSUMERS = 8, PRODUCERS = 4;

// Blocks of 16 queries of a warp. A tile of keys is read from shared memory once for all of them, 4 clocks of an SM for
// a product that takes the tensor cores 4 (sm_80) or 3 (sm_90) clocks a block.
constexpr int query_blocks(int dim) { return dim <= 80 ? 2 : 1; }
template <int D>
constexpr int MT = query_blocks(D);

// Whether a warp keeps its queries in registers, MT x D / 4 a thread. Else an operand is read from shared memory for
// every tile of keys: half as much again as the keys and values.
constexpr bool queries_in_registers(int dim) { return dim == 64 || dim == 88 || dim == 96; }

// Limit of the sum of a tile's weights in a row; the largest is 1 when the row's reference is set. float16's are
// infinite from 2^16 on, and so is their sum: a row of float16 may grow by 11 nats before its reference is raised, of
// bfloat16 by 27. Below a weight of 1 float16 keeps all bits of weights 9 nats less, and 4 bits at 14 nats: as torch's
// SDPA does.
constexpr float SUM_LIMIT = 0x1p40f;

// Whether the sum of all tiles so far is tested, not that of one. Either is right: weights of at most 1 never lift a
// sum over the limit, where its last bit is 2^16. That of one tile takes 4 of 241 instructions less on sm_80 and sm_90,
// but 8 (sm_100) or 20 (sm_120) bytes of local memory later on.
template <int D>
constexpr bool TEST_SUM_SO_FAR = BLACKWELL && D == 64;

// Layout of shared memory, and state of the rings. Barriers of a slot: copied, rotated (full), read (empty).
template <int D>
struct Memory {
  const Params& p;

  SPE_DEVICE int layer_rows() const { return 16 * p.consumers; }
  SPE_DEVICE int layer_bytes() const { return layer_rows() * Tile<D>::bytes; }
  SPE_DEVICE int block_rows() const { return MT<D> * layer_rows(); }
  SPE_DEVICE Shared keys(int slot) const { return shared_memory() + slot * 2 * BN * Tile<D>::bytes; }
  SPE_DEVICE Shared layer(int slot) const { return shared_memory() + p.queries_at + slot * layer_bytes(); }
  // slots of keys, then of queries
  SPE_DEVICE Shared copied(int slot) const { return shared_memory() + p.barriers_at + 24 * slot; }
  SPE_DEVICE Shared full(int slot) const { return copied(slot) + 8; }
  SPE_DEVICE Shared empty(int slot) const { return copied(slot) + 16; }

  SPE_DEVICE void start() const {
    const int count = p.slots + p.query_slots;
    for (int i = thread_index(); i < count; i += block_size()) {
      barrier_init(copied(i), 32 * PRODUCERS);
      barrier_init(full(i), 32 * PRODUCERS);
      barrier_init(empty(i), p.consumers);
    }
    block_sync();
  }
};

// Computes the layout behind a ring of `tile_rows` rows of keys; returns the total bytes.
inline int lay_out(Params& p, int tile_rows) {
  p.queries_at = 2 * tile_rows * 2 * p.head_dim;
  p.barriers_at = p.queries_at + p.query_slots * 16 * p.consumers * 2 * p.head_dim;
  return p.barriers_at + 24 * (p.slots + p.query_slots);
}

// Rows of a tile of keys in its slot.
SPE_DEVICE int rows_of(int exist) { return exist < BN ? (exist + 15) / 16 * 16 : BN; }

// Position in a ring: the slot, and the parity of the round.
struct Place {
  int at = 0;

  SPE_DEVICE int slot(int slots) const { return at < slots ? at : at - slots; }
  SPE_DEVICE uint32_t round(int slots) const { return at >= slots; }
  SPE_DEVICE void advance(int slots) {
    if (++at == 2 * slots) at = 0;
  }
  SPE_DEVICE void back(int by, int slots) {
    at -= by;
    if (at < 0) at += 2 * slots;
  }
};

// (sequence, head, part of its queries).
struct Item {
  Span span;
  int head, first, passes, tiles;  // first query; tiles of keys

  Item() = default;
  SPE_DEVICE Item(const Params& p, int index, int block_rows) {
    head = index % p.heads;
    const int program = index / p.heads;
    if (p.parts == 0) {
      span = locate(p.sequences, program, block_rows, first);
      passes = 1;
    } else {
      span = whole_sequence(p.sequences, program / p.parts);
      first = program % p.parts * p.passes * block_rows;
      if (first > 0) span.nan = span.end;  // left to the first part
      passes = (span.length - first + block_rows - 1) / block_rows;
      if (passes > p.passes) passes = p.passes;
    }
    tiles = (span.length + BN - 1) / BN;
  }
  SPE_DEVICE bool exists() const { return first < span.length; }
};

// ---------------------------------------------------------------------------------------------------------- producers

// A tile that is being copied, and is to be rotated on arrival.
struct Arriving {
  Shared tile, copied, full;
  int rows, sample, head, first;
  uint32_t round;
  bool any = false;
};

template <class E, int D>
SPE_DEVICE void finish(const Params& p, Arriving& a, int thread) {
  if (!a.any) return;
  rotate_tile<E, D>(p, a.tile, 0, a.rows, a.sample, a.first, a.head, thread, 32 * PRODUCERS,
                    [&] { barrier_wait(a.copied, a.round); });
  barrier_arrive(a.full);
}

template <class E, int D>
SPE_DEVICE void produce(const Params& p, const Memory<D>& memory, int thread) {
  Place keys, queries;
  Arriving arriving;
  Item item;
  int step = 0;
  const int end = p.items.begin(block_index() + 1);
  for (int index = p.items.begin(block_index()); index < end || arriving.any;) {
    Arriving next;
    if (index < end) {
      if (step == 0) {
        item = Item(p, index, memory.block_rows());
        if (!item.exists()) {
          poison_results(p, item.span, item.head, thread, 32 * PRODUCERS);
          ++index;
          continue;
        }
      }
      // in the order in which consumers need them: the first pass's queries, keys, the other passes' queries
      const bool is_keys = step >= MT<D> && step < MT<D> + item.tiles;
      const int i = is_keys ? step - MT<D> : step < MT<D> ? step : step - item.tiles;
      const Place place = is_keys ? keys : queries;
      const int slots = is_keys ? p.slots : p.query_slots, in_ring = place.slot(slots);
      const int slot = is_keys ? in_ring : p.slots + in_ring;
      const uint32_t round = place.round(slots);
      // if a slot is not free yet, first finish the tile being copied
      if (!arriving.any) barrier_wait(memory.empty(slot), round ^ 1);
      if (barrier_test(memory.empty(slot), round ^ 1)) {
        // here, since a step is retried until its slot is free
        if (step == 0) poison_results(p, item.span, item.head, thread, 32 * PRODUCERS);
        const int first = is_keys ? i * BN : item.first + i * memory.layer_rows();
        const int head = is_keys ? item.head / p.group : item.head;
        const int token = item.span.start + first;
        int exist = item.span.length - first;
        exist = exist < 0 ? 0 : exist;
        const int rows = is_keys ? rows_of(exist) : memory.layer_rows();
        exist = exist < rows ? exist : rows;
        next = {is_keys ? memory.keys(in_ring) : memory.layer(in_ring), memory.copied(slot), memory.full(slot), exist,
                item.span.sample, head, token, round, true};
        const Tensor& x = is_keys ? p.k : p.q;
        copy_rows<D>(next.tile, x.at(next.sample, token, head), x.token, rows, exist, thread, 32 * PRODUCERS);
        if (is_keys)
          copy_rows<D>(next.tile + rows * Tile<D>::bytes, p.v.at(next.sample, token, head), p.v.token, rows, exist,
                       thread, 32 * PRODUCERS);
        barrier_arrive_after_copies(next.copied);
        if (is_keys)
          keys.advance(p.slots);
        else
          queries.advance(p.query_slots);
        if (++step == item.passes * MT<D> + item.tiles) ++index, step = 0;
      }
    }
    finish<E, D>(p, arriving, thread);
    arriving = next;
  }
}

// ---------------------------------------------------------------------------------------------------------- consumers

// A warp's state of its rows: h = 0 for row g of a block of 16, h = 1 for row g + 8.
template <int D>
struct State {
  float out[MT<D>][D / 8][4];
  float reference[MT<D>][2];  // of the weights, in log2
  float sum[MT<D>][2];        // of all weights

  SPE_DEVICE void start() {
#pragma unroll
    for (int m = 0; m < MT<D>; ++m) {
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[m][n][i] = 0.0f;
#pragma unroll
      for (int h = 0; h < 2; ++h) reference[m][h] = LOWEST, sum[m][h] = 0.0f;
    }
  }
};

// The largest score of a row, over all lanes that hold some.
SPE_DEVICE float row_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}

// Sets a row's reference to its largest score; it never decreases.
template <int D>
SPE_DEVICE void raise(State<D>& rows, const float (&most)[MT<D>][2], float scale) {
#pragma unroll
  for (int m = 0; m < MT<D>; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float before = rows.reference[m][h];
      rows.reference[m][h] = fmaxf(before, row_max(most[m][h]) * scale);
      const float factor = exp2(before - rows.reference[m][h]);
      rows.sum[m][h] *= factor;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) rows.out[m][n][2 * h] *= factor, rows.out[m][n][2 * h + 1] *= factor;
    }
}

// Keys [0, 16 BLOCKS) of a tile, of which `exist` are valid where MASK is set.
template <class E, int D, int BLOCKS, bool MASK>
SPE_DEVICE void attend(State<D>& rows, const Operand<D> (&a)[MT<D>], Shared queries, int stride, Shared k, Shared v,
                       int exist, float scale, bool first, int lane) {
  constexpr int M = MT<D>;
  // Blocks of 16 keys whose scores are in registers at a time: one where the queries are as well.
  constexpr int STEP = queries_in_registers(D) || BLOCKS == 1 ? 1 : 2;
  using Scores = float[STEP][M][2][4];
  const auto multiply_keys = [&](Scores& s, int block) {
#pragma unroll
    for (int b = 0; b < STEP; ++b)
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int i = 0; i < 8; ++i) s[b][m][i >> 2][i & 3] = 0.0f;
    if constexpr (queries_in_registers(D))
      multiply_rows<E, D, M, STEP>(s, a, k, 16 * block, lane);
    else
      multiply_rows<E, D, M, STEP>(s, queries, stride, k, 16 * block, lane);
    if constexpr (MASK) {
      const int left = exist - 16 * block - 2 * (lane & 3);  // of this lane's columns
#pragma unroll
      for (int b = 0; b < STEP; ++b)
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
          for (int i = 0; i < 8; ++i)
            if (16 * b + 8 * (i >> 2) + (i & 1) >= left) s[b][m][i >> 2][i & 3] = -INFINITY;
    }
  };
  const auto find_most = [&](float (&most)[M][2], const Scores& s) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int b = 0; b < STEP; ++b)
#pragma unroll
        for (int i = 0; i < 8; ++i) most[m][i >> 1 & 1] = fmaxf(most[m][i >> 1 & 1], s[b][m][i >> 2][i & 3]);
  };

  uint32_t weights[BLOCKS][M][4];
  float sum[M][4];  // of a row's weights, in every column
  for (bool again = false;; again = true) {
    float most[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m) most[m][0] = most[m][1] = -INFINITY;
    if (again) {  // the weights are too large: all scores once for the reference alone
#pragma unroll 1
      for (int block = 0; block < BLOCKS; block += STEP) {
        Scores s;
        multiply_keys(s, block);
        find_most(most, s);
      }
      raise<D>(rows, most, scale);
    }
#pragma unroll
    for (int block = 0; block < BLOCKS; block += STEP) {
      Scores s;
      multiply_keys(s, block);
      if (block == 0 && first && !again) {
        find_most(most, s);
        raise<D>(rows, most, scale);
      }
#pragma unroll
      for (int b = 0; b < STEP; ++b)
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            float& x = s[b][m][i >> 2][i & 3];
            x = exp2(x * scale - rows.reference[m][i >> 1 & 1]);
          }
          as_operand<E>(weights[block + b][m], s[b][m][0], s[b][m][1]);
        }
    }
    // the sum is one more column of the product: that of the rounded weights, so that one far above the others is exact
    bool outgrown = false;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[m][i] = 0.0f;
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) multiply<E>(sum[m], weights[b][m], ONES<E>, ONES<E>);
      if constexpr (TEST_SUM_SO_FAR<D>) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          sum[m][2 * h] += rows.sum[m][h];
          outgrown |= !(sum[m][2 * h] < SUM_LIMIT);
        }
      } else {
        outgrown |= !(sum[m][0] + sum[m][2] < SUM_LIMIT);
      }
    }
    if (again || !warp_any(outgrown)) break;
  }
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if constexpr (!TEST_SUM_SO_FAR<D>) sum[m][2 * h] += rows.sum[m][h];
      rows.sum[m][h] = sum[m][2 * h];
    }
#pragma unroll
  for (int b = 0; b < BLOCKS; ++b) multiply_columns<E, D, M>(rows.out, weights[b], v, 16 * b, lane);
}

template <class E, int D>
SPE_DEVICE void store(const Params& p, const Item& item, State<D>& rows, int first, int layer_rows, int lane) {
  // the warp of token 0 of head 0 checks all cu_seqlens
  const bool poisoned = item.span.start + first + item.head == 0 && decrease(p.sequences, lane);
#pragma unroll
  for (int m = 0; m < MT<D>; ++m) {
    const int row = first + m * layer_rows + (lane >> 2);
    const bool exists[2] = {row < item.span.length, row + 8 < item.span.length};
    float factor[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sum = poisoned ? NAN : rows.sum[m][h];
      factor[h] = reciprocal(sum);
      if ((lane & 3) == 0 && exists[h])
        store_global_float(p.lse + (static_cast<int64_t>(item.span.sample) * p.heads + item.head) * p.sequences.tokens +
                               item.span.start + row + 8 * h,
                           (rows.reference[m][h] + log2(sum)) * LN_2);
    }
    uint16_t* out = p.out.at(item.span.sample, item.span.start + row, item.head);
    store_rows<E, D>(rows.out[m], factor[0], factor[1], out, out + 8 * static_cast<int64_t>(p.out.token), exists[0],
                     exists[1], lane);
  }
}

template <class E, int D>
SPE_DEVICE void consume(const Params& p, const Memory<D>& memory, int warp, int lane) {
  Place keys, queries;
  const auto give_back = [&](int slot) {
    warp_sync();
    if (lane == 0) barrier_arrive(memory.empty(slot));
  };
  // Properties of an item are computed again after its loop, not kept in registers during it.
  int pass = 0;
  for (int index = p.items.begin(block_index()); index < p.items.begin(opaque(block_index()) + 1);) {
    const Item item(p, index, memory.block_rows());
    if (!item.exists()) {
      ++index;
      continue;
    }
    const bool last = pass == item.passes - 1;
    const bool works = item.first + pass * memory.block_rows() + 16 * warp < item.span.length;

    Operand<D> a[MT<D>];
    const int own = queries.slot(p.query_slots);  // and the next, with MT = 2
    const Shared layer = memory.layer(own) + warp * 16 * Tile<D>::bytes;
#pragma unroll
    for (int m = 0; m < MT<D>; ++m) {
      const int slot = queries.slot(p.query_slots);
      barrier_wait(memory.full(p.slots + slot), queries.round(p.query_slots));
      if constexpr (queries_in_registers(D)) {
        a[m].load(memory.layer(slot) + warp * 16 * Tile<D>::bytes, lane);
        give_back(p.slots + slot);
      }
      queries.advance(p.query_slots);
    }

    State<D> rows;
    rows.start();
    if (pass > 0) keys.back(item.tiles, p.slots);
    // After the first pass this waits for what has happened.
    bool raise = true;
    int exist = item.span.length;
    for (; exist >= BN; exist -= BN) {
      const int slot = keys.slot(p.slots);
      barrier_wait(memory.full(slot), keys.round(p.slots));
      const Shared k = memory.keys(slot), v = k + BN * Tile<D>::bytes;
      if (works) attend<E, D, BN / 16, false>(rows, a, layer, memory.layer_bytes(), k, v, BN, p.scale2, raise, lane);
      raise = false;
      if (last) give_back(slot);
      keys.advance(p.slots);
    }
    if (exist > 0) {
      const int slot = keys.slot(p.slots);
      barrier_wait(memory.full(slot), keys.round(p.slots));
      const Shared k = memory.keys(slot), v = k + rows_of(exist) * Tile<D>::bytes;
      for (int i = 0; i < exist && works; i += 16, raise = false)
        attend<E, D, 1, true>(rows, a, layer, memory.layer_bytes(), k + i * Tile<D>::bytes, v + i * Tile<D>::bytes,
                              exist - i, p.scale2, raise, lane);
      if (last) give_back(slot);
      keys.advance(p.slots);
    }
    if constexpr (!queries_in_registers(D)) {
#pragma unroll
      for (int m = 0; m < MT<D>; ++m) give_back(p.slots + own + m);
    }
    if (works) {
      const Item again(p, opaque(index), memory.block_rows());
      store<E, D>(p, again, rows, again.first + pass * memory.block_rows() + 16 * warp, memory.layer_rows(), lane);
    }
    ++pass;
    if (last) pass = 0, ++index;
  }
}

template <class E, int D>
SPE_KERNEL(32 * (CONSUMERS + PRODUCERS), 1) forward(SPE_PARAMS Params p) {
  const Memory<D> memory{p};
  memory.start();
  const int thread = thread_index(), warp = warp_index();
  if (warp < p.consumers)
    consume<E, D>(p, memory, warp, thread & 31);
  else
    produce<E, D>(p, memory, thread - 32 * p.consumers);
}

}  // namespace spe::cuda::attention
