// SPDX-License-Identifier: Apache-2.0
// Backward: dq, dk, dv from dout, the saved out and lse.
//
//   P = exp(S scale - lse)   dP = dO V^T   dS = P (dP - delta), delta = rowsum(dO O)
//   dV = P^T dO              dK = scale R^-1 (dS^T R(Q))      dQ = scale R^-1 (dS R(K))
//
// Scores are recomputed, one block of query rows by one block of keys at a time. Both orders of operand A come from
// registers: weights as rows of keys for dQ, and as rows of queries for dK and dV (for bfloat16, where a word pairs two
// queries, by interleaving two rows), so nothing is transposed. Each pair of blocks is visited once, five products.
// Several threads own key blocks, for dK and dV, and add their shares of dQ in order: the thread of the next key block waits
// for the block of queries, which it reaches one step later anyway (one head of 256 on two threads, in float32: from 0.77
// to 1.01 of eager's speed, `spatial-pe bench --suite cross`; a second pass for dQ would repeat the scores: seven
// products). One thread or several sum in the same order, so the results are bitwise equal.
#pragma once

#include <atomic>
#include <new>
#include <thread>

#include "forward.h"

namespace spe::SPE_ISA {

template <class Dot, class T>
class Backward {
 public:
  Backward(const Problem& problem, const BackwardTensors& tensors)
      : p_(problem), t_(tensors), w_(problem.head_dim) {
    for (const Sequence& s : p_.sequences) {
      longest_ = s.length > longest_ ? s.length : longest_;
      longest_keys_ = s.keys > longest_keys_ ? s.keys : longest_keys_;
    }
    at_ = lay_out();
  }

  int phases() const { return 3; }

  int64_t parts(const Item& item, int phase) const {
    const int64_t n = item.sequence.length, keys = item.sequence.keys;
    if (phase == 0) return ((n > keys ? n : keys) + kSlice - 1) / kSlice;
    return phase == 1 ? key_blocks(keys) : (n + kRows - 1) / kRows * group();
  }

  size_t item_bytes() const { return at_.query + static_cast<size_t>(group()) * at_.query_bytes; }
  size_t thread_bytes() const { return sizeof(Thread) + 2 * sizeof(float) * kKeys * w_.lanes(); }

  void part(const Item& item, int phase, int64_t part, bool together, char* item_memory, char* thread_memory) const {
    const Operands ops = operands(item_memory);
    Thread& thread = *reinterpret_cast<Thread*>(thread_memory);
    float* const dk = reinterpret_cast<float*>(thread_memory + sizeof(Thread));
    if (phase == 0) {
      prepare(item, part * kSlice, ops, item_memory);
    } else if (phase == 1) {
      key_block(item, part, together, ops, item_memory, thread, dk, dk + kKeys * w_.lanes());
    } else {
      store_dq(item, static_cast<int>(part % group()), part / group() * kRows, item_memory);
    }
  }

 private:
  static constexpr int kKeys = kPanels * L;

  // Operands of a key head, then of each of its query heads.
  struct Operands {
    word *k_panels, *k_lanes, *v_panels;
  };
  struct QueryOperands {
    word *q_rows, *q_lanes, *dout_rows, *dout_lanes;
    float *dq;          // (tokens, lanes), in float
    float *lse, *delta;  // lse in powers of 2; +infinity past the end, where weights must be 0
    std::atomic<int64_t>* next;  // of each block of rows: the key block whose share of dq comes next
  };

  struct Thread {
    float weights[kScoreRows][kKeys];                         // P of one tile of rows
    word p[kRows / Dot::kPerWord][kKeys];                     // operand A, rows are keys
    word ds_columns[Dot::kPerWord == 2 ? kRows / 2 : 1][kKeys];  // likewise; float rows serve both ways
    word ds[kRows][kKeys / Dot::kPerWord];                    // operand A, rows are queries
  };

  int group() const { return p_.heads / p_.kv_heads; }
  int64_t padded() const { return longest_ + L + kScoreRows; }  // rows of whole tiles

  // Where the operands lie in an item's memory, in bytes: those of the key head, then those of each query head, relative
  // to its part.
  struct Offsets {
    size_t k_panels, k_lanes, v_panels, query;
    size_t q_rows, q_lanes, dout_rows, dout_lanes, dq, lse, delta, next, query_bytes;
  };

  Offsets lay_out() const {
    size_t used = 0;
    const auto take = [&used](int64_t words) {
      const size_t at = used;
      used += whole_lines(static_cast<size_t>(words) * sizeof(word));
      return at;
    };
    Offsets o;
    o.k_panels = take(w_.panel_words(longest_keys_));
    o.k_lanes = take(w_.lane_words(longest_keys_));
    o.v_panels = take(w_.panel_words(longest_keys_));
    o.query = used;
    used = 0;
    o.q_rows = take(padded() * w_.row);
    o.dout_rows = take(padded() * w_.row);
    // float lanes are rows
    o.q_lanes = Dot::kPerWord == 1 ? o.q_rows : take(w_.lane_words(longest_));
    o.dout_lanes = Dot::kPerWord == 1 ? o.dout_rows : take(w_.lane_words(longest_));
    o.dq = take(padded() * w_.lanes());
    o.lse = take(padded());
    o.delta = take(padded());
    o.next = take((longest_ + kRows - 1) / kRows * static_cast<int64_t>(sizeof(int64_t) / sizeof(word)));
    o.query_bytes = used;
    return o;
  }

  Operands operands(char* memory) const {
    const auto at = [memory](size_t offset) { return reinterpret_cast<word*>(memory + offset); };
    return {at(at_.k_panels), at(at_.k_lanes), at(at_.v_panels)};
  }

  QueryOperands query_operands(char* memory, int in_group) const {
    char* const mine = memory + at_.query + static_cast<size_t>(in_group) * at_.query_bytes;
    const auto at = [mine](size_t offset) { return reinterpret_cast<word*>(mine + offset); };
    const auto floats = [mine](size_t offset) { return reinterpret_cast<float*>(mine + offset); };
    return {at(at_.q_rows),  at(at_.q_lanes),  at(at_.dout_rows), at(at_.dout_lanes),
            floats(at_.dq), floats(at_.lse), floats(at_.delta),
            reinterpret_cast<std::atomic<int64_t>*>(mine + at_.next)};
  }

  // ------------------------------------------------------------------------------------------------------- phase 0

  void prepare(const Item& item, int64_t from, const Operands& ops, char* memory) const {
    const Sequence& s = item.sequence;
    alignas(64) word scratch[L * Widths<Dot>::kLongestRow];
    const int64_t last = from + kSlice < s.keys ? from + kSlice : s.keys;
    pack(key_source<const T>(p_, t_.k, s, item.kv_head, item.kv_head, p_.pairs), w_, from, last,
         Packed{nullptr, ops.k_panels, ops.k_lanes}, scratch);
    pack(key_source<const T>(p_, t_.v, s, item.kv_head, 0, plain_), w_, from, last,
         Packed{nullptr, ops.v_panels, nullptr}, scratch);
    const int64_t n = s.length, to = from + kSlice < n ? from + kSlice : n;
    if (from >= n) return;  // more keys than queries
    for (int g = 0; g < group(); ++g) {
      const int head = item.kv_head * group() + g;
      const QueryOperands q = query_operands(memory, g);
      const auto dout = query_source<const T>(p_, t_.dout, s, head, 0, plain_);
      const auto out = query_source<const T>(p_, t_.out, s, head, 0, plain_);
      pack(query_source<const T>(p_, t_.q, s, head, head, p_.pairs), w_, from, to, Packed{q.q_rows, nullptr, q.q_lanes}, scratch);
      pack(dout, w_, from, to, Packed{q.dout_rows, nullptr, q.dout_lanes}, scratch);
      const float* lse = t_.lse + (s.sample * p_.heads + head) * p_.tokens + s.start;
      for (int64_t i = from; i < to; ++i) {
        q.lse[i] = lse[i] * kLog2e;
        q.delta[i] = dot(dout.row(i), out.row(i));
        if (i % kRows == 0) new (&q.next[i / kRows]) std::atomic<int64_t>(0);
      }
      std::memset(q.dq + from * w_.lanes(), 0, sizeof(float) * static_cast<size_t>((to - from) * w_.lanes()));
      if (to < n) continue;
      // rows past the end, up to a whole tile: weight 0, and no NaN from a previous head
      const size_t rest = static_cast<size_t>(padded() - n);
      std::memset(q.q_rows + n * w_.row, 0, sizeof(word) * rest * w_.row);
      std::memset(q.dout_rows + n * w_.row, 0, sizeof(word) * rest * w_.row);
      for (int64_t i = n; i < padded(); ++i) q.lse[i] = kInfinity, q.delta[i] = 0;
    }
  }

  float dot(const T* a, const T* b) const {
    vf sum{};
    for (int i = 0; i < w_.D; i += L) {
      const int n = w_.D - i < L ? w_.D - i : L;
      sum = fma(widen(a + i, n), widen(b + i, n), sum);
    }
    return sum_of(sum);
  }

  // ------------------------------------------------------------------------------------------------- phases 1 and 2

  // dK and dV of one block of keys, and its share of every dQ, after those of the blocks before.
  void key_block(const Item& item, int64_t block, bool together, const Operands& ops, char* memory, Thread& thread,
                 float* dk, float* dv) const {
    const Sequence& s = item.sequence;
    const Keys keys = keys_of(s.keys, block);
    std::memset(dk, 0, sizeof(float) * static_cast<size_t>(keys.count * w_.lanes()));
    std::memset(dv, 0, sizeof(float) * static_cast<size_t>(keys.count * w_.lanes()));
    for (int g = 0; g < group(); ++g) {
      const QueryOperands q = query_operands(memory, g);
      for (int64_t from = 0; from < s.length; from += kRows) {
        const int rows = static_cast<int>(s.length - from < kRows ? s.length - from : kRows);
        weights_and_gradients(q, from, rows, keys, ops, thread);
        const int64_t depth = (rows + Dot::kPerWord - 1) / Dot::kPerWord, lane = from / Dot::kPerWord * w_.lanes();
        const word* ds = Dot::kPerWord == 2 ? thread.ds_columns[0] : thread.ds[0];
        multiply_add<Dot>({dv, w_.lanes()}, {thread.p[0], 1, kKeys}, {q.dout_lanes + lane, L, w_.lanes()}, keys.count,
                          w_.vectors, depth);
        multiply_add<Dot>({dk, w_.lanes()}, {ds, 1, kKeys}, {q.q_lanes + lane, L, w_.lanes()}, keys.count, w_.vectors,
                          depth);
        if (!together) {
          add_dq(q, from, rows, keys, ops, thread);
          continue;
        }
        std::atomic<int64_t>& next = q.next[from / kRows];
        while (next.load(std::memory_order_acquire) != block) std::this_thread::yield();
        add_dq(q, from, rows, keys, ops, thread);
        next.store(block + 1, std::memory_order_release);
      }
    }
    const auto to_k = key_source<T>(p_, t_.dk, s, item.kv_head, item.kv_head, p_.pairs);
    const auto to_v = key_source<T>(p_, t_.dv, s, item.kv_head, 0, plain_);
    for (int i = 0; i < keys.count; ++i) {
      const int64_t token = keys.from + i;
      store_row(to_k.row(token), to_k.cos_row(token), to_k.sin_row(token), p_.pairs, w_.D, dk + i * w_.lanes(), p_.scale);
      store_row(to_v.row(token), nullptr, nullptr, plain_, w_.D, dv + i * w_.lanes(), 1.0f);
    }
  }

  void store_dq(const Item& item, int in_group, int64_t from, char* memory) const {
    const Sequence& s = item.sequence;
    const QueryOperands q = query_operands(memory, in_group);
    const int rows = static_cast<int>(s.length - from < kRows ? s.length - from : kRows);
    const int head = item.kv_head * group() + in_group;
    const auto to = query_source<T>(p_, t_.dq, s, head, head, p_.pairs);
    for (int64_t i = from; i < from + rows; ++i)
      store_row(to.row(i), to.cos_row(i), to.sin_row(i), p_.pairs, w_.D, q.dq + i * w_.lanes(), p_.scale);
  }

  void add_dq(const QueryOperands& q, int64_t from, int rows, const Keys& keys, const Operands& ops, Thread& thread) const {
    multiply_add<Dot>({q.dq + from * w_.lanes(), w_.lanes()}, {thread.ds[0], kKeys / Dot::kPerWord, 1},
                      {ops.k_lanes + keys.from / Dot::kPerWord * w_.lanes(), L, w_.lanes()}, rows, w_.vectors,
                      (keys.count + Dot::kPerWord - 1) / Dot::kPerWord);
  }

  // P and dS of a block of queries by a block of keys, as operands.
  void weights_and_gradients(const QueryOperands& q, int64_t from, int rows, const Keys& keys, const Operands& ops,
                             Thread& thread) const {
    for (int r = 0; r < rows; r += kScoreRows)
      each_score_tile(keys.panels, [&](auto width, int panel) { tile<width()>(q, from, r, keys, panel, ops, thread); });
  }

  template <int W>
  __attribute__((noinline)) void tile(const QueryOperands& q, int64_t from, int r, const Keys& keys, int panel,
                                      const Operands& ops, Thread& thread) const {
    const int64_t at = (keys.from + panel * L) * w_.words;
    const Lanes k{ops.k_panels + at, static_cast<int64_t>(L) * w_.words, L};
    const Lanes v{ops.v_panels + at, static_cast<int64_t>(L) * w_.words, L};
    const float *lse = q.lse + from + r, *delta = q.delta + from + r;
    const int tail = keys.count - (panel + W - 1) * L;  // keys in the last vector; zero keys must have zero weights
    {
      vf s[kScoreRows][W] = {};
      multiply<Dot, kScoreRows, W>(s, {q.q_rows + (from + r) * w_.row, w_.row, 1}, k, w_.words);
      const vf scale = splat(p_.scale * kLog2e);
      for (int i = 0; i < kScoreRows; ++i)
        for (int j = 0; j < W; ++j) {
          s[i][j] = exp2<Dot::kExpDegree>(fma(s[i][j], scale, splat(-lse[i])));
          if (j == W - 1 && tail < L) s[i][j] = keep_first(s[i][j], tail, 0.0f);
          store(&thread.weights[i][j * L], s[i][j]);
        }
      store_columns<W>(thread.p, r, panel, s);
    }
    vf dp[kScoreRows][W] = {};
    multiply<Dot, kScoreRows, W>(dp, {q.dout_rows + (from + r) * w_.row, w_.row, 1}, v, w_.words);
    for (int i = 0; i < kScoreRows; ++i)
      for (int j = 0; j < W; ++j) {
        dp[i][j] = load(&thread.weights[i][j * L]) * (dp[i][j] - splat(delta[i]));
        if constexpr (Dot::kPerWord == 1)
          store(thread.ds[r + i] + (panel + j) * L, dp[i][j]);
        else
          narrow(reinterpret_cast<bf16*>(thread.ds[r + i]) + (panel + j) * L, dp[i][j], L);
      }
    if constexpr (Dot::kPerWord == 2) store_columns<W>(thread.ds_columns, r, panel, dp);
  }

  // Operand A whose rows are keys: floats unchanged, bfloat16 in pairs of queries.
  template <int W>
  SPE_INLINE static void store_columns(word (*to)[kKeys], int r, int panel, const vf (&x)[kScoreRows][W]) {
    for (int i = 0; i < kScoreRows; i += Dot::kPerWord)
      for (int j = 0; j < W; ++j) {
        if constexpr (Dot::kPerWord == 1)
          store(to[r + i] + (panel + j) * L, x[i][j]);
        else
          store(to[(r + i) / 2] + (panel + j) * L, (vf)pair_bf16(x[i][j], x[i + 1][j]));
      }
  }

  const Problem& p_;
  const BackwardTensors& t_;
  const Widths<Dot> w_;
  const ChannelPairs plain_{};  // v, out and dout are not rotated
  int64_t longest_ = 0, longest_keys_ = 0;  // queries and keys of a sequence
  Offsets at_;
};

}  // namespace spe::SPE_ISA
