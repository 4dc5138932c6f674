// SPDX-License-Identifier: Apache-2.0
// Forward: out = softmax(R(q) R(k)^T scale) v and lse, the log of each row's sum of exponentials.
//
// For each key head, K is rotated and packed into panels and V into lanes, once. Then, for each block of query rows
// (rotated on load) and each block of keys: scores by register tiles, exponentials while they are still in registers,
// weights packed as operand A, product with V added to the rows' output. Scores never touch memory.
//
// The softmax of a row is relative to its maximum over the first tile of keys, not to a running maximum: weights above
// 1 are as exact as those below in floating point, so nothing has to be rescaled. Only if a row's sum becomes too large
// (scores that grow by more than 22 nats, NaN, Inf) is its block of rows recomputed, relative to the true maximum.
#pragma once

#include "pack.h"
#include "schedule.h"

namespace spe::SPE_ISA {

constexpr float kLog2e = 1.44269504088896341f;
// Rows whose weights sum to more are recomputed: 2^32 leaves values up to 2^90 room in float.
constexpr float kLargestSum = 0x1p32f;
constexpr float kInfinity = __builtin_inff();

// Query rows of a block: a multiple of every tile height (5, 6, 8 -> 120; 4, 6, 8 -> 24). 120 x 128 weights are 30 KB
// in bfloat16; the packed K and V of 128 keys are read from L2 once per block.
constexpr int kRows = 120;
// Keys of a block, as panels of L: 128 keys.
constexpr int kPanels = 128 / L;
// Tokens packed as one part of an item.
constexpr int kSlice = 8 * L;
// Widest score tile in vectors. Every score tile has kScoreRows rows, whatever its width.
constexpr int kScoreWidth = kRegisters == 32 ? 4 : 2;
constexpr int kScoreRows = rows_of(kScoreWidth);

// Calls f(width, first panel) for tiles of nearly equal width, at most kScoreWidth; width is a compile-time constant.
template <class F>
SPE_INLINE void each_score_tile(int panels, F&& f) {
  const int tiles = (panels + kScoreWidth - 1) / kScoreWidth;
  for (int i = 0, from = 0; i < tiles; ++i) {
    const int width = (panels - from) / (tiles - i);
    switch (width) {
      case 1: f(std::integral_constant<int, 1>{}, from); break;
      case 2: f(std::integral_constant<int, 2>{}, from); break;
      case 3: if constexpr (kScoreWidth >= 3) f(std::integral_constant<int, 3>{}, from); break;
      case 4: if constexpr (kScoreWidth >= 4) f(std::integral_constant<int, 4>{}, from); break;
    }
    from += width;
  }
}

// Block `index` of the keys of a sequence of n: whole panels, as evenly as possible (13 panels as 6 + 7, not 8 + 5).
struct Keys {
  int64_t from;
  int panels, count;
};
inline int64_t key_blocks(int64_t n) { return ((n + L - 1) / L + kPanels - 1) / kPanels; }
inline Keys keys_of(int64_t n, int64_t index) {
  const int64_t total = (n + L - 1) / L, blocks = key_blocks(n);
  const int64_t panel = total * index / blocks, end = total * (index + 1) / blocks;
  return {panel * L, static_cast<int>(end - panel), static_cast<int>((end * L < n ? end * L : n) - panel * L)};
}

template <class Dot, class T>
class Forward {
 public:
  Forward(const Problem& problem, const ForwardTensors& tensors)
      : p_(problem), t_(tensors), w_(problem.head_dim) {
    for (const Sequence& s : p_.sequences) longest_ = s.keys > longest_ ? s.keys : longest_;
  }

  int phases() const { return 2; }

  int64_t parts(const Item& item, int phase) const {
    if (phase == 0) return (item.sequence.keys + kSlice - 1) / kSlice;
    return (item.sequence.length + kRows - 1) / kRows * group();
  }

  size_t item_bytes() const { return sizeof(word) * static_cast<size_t>(panel_words() + w_.lane_words(longest_)); }

  size_t thread_bytes() const { return sizeof(Thread) + sizeof(word) * (kRows + kScoreRows) * (w_.row + w_.lanes()); }

  void part(const Item& item, int phase, int64_t part, bool, char* item_memory, char* thread_memory) const {
    word* const panels = reinterpret_cast<word*>(item_memory);
    word* const lanes = panels + panel_words();
    Thread& thread = *reinterpret_cast<Thread*>(thread_memory);
    word* const scratch = reinterpret_cast<word*>(thread_memory + sizeof(Thread));
    if (phase == 0) {
      const int64_t from = part * kSlice, n = item.sequence.keys, to = from + kSlice < n ? from + kSlice : n;
      pack(key_source<const T>(p_, t_.k, item.sequence, item.kv_head, item.kv_head, p_.pairs), w_, from, to,
           Packed{nullptr, panels, nullptr}, scratch);
      pack(key_source<const T>(p_, t_.v, item.sequence, item.kv_head, 0, plain_), w_, from, to,
           Packed{nullptr, nullptr, lanes}, scratch);
    } else {
      const int head = item.kv_head * group() + static_cast<int>(part % group());
      attend(item.sequence, head, part / group() * kRows, panels, lanes, thread, scratch);
    }
  }

 private:
  struct Thread {
    word weights[kRows + kScoreRows][kPanels * L / Dot::kPerWord];
    float sum[kRows + kScoreRows][L];  // of the weights, by lane
    float total[kRows + L];            // over the lanes
    float shift[kRows + L];            // the score, before scaling, whose weight is 1
  };

  // Purpose of a score tile.
  enum class Purpose {
    first,    // weights, relative to the maximum of this tile
    next,     // weights, relative to the shift
    maximum,  // no weights: raise the shift to the tile's maximum
  };

  int group() const { return p_.heads / p_.kv_heads; }
  int64_t panel_words() const { return Widths<Dot>::whole(w_.panel_words(longest_)); }

  // Query rows [from, from + kRows) of one head against all keys.
  void attend(const Sequence& s, int head, int64_t from, const word* panels, const word* lanes, Thread& thread,
              word* scratch) const {
    const int rows = static_cast<int>(s.length - from < kRows ? s.length - from : kRows);
    word* const q = scratch;                                                             // (rows, w_.row)
    float* const o = reinterpret_cast<float*>(scratch + (kRows + kScoreRows) * w_.row);  // (rows, lanes)
    pack(query_source<const T>(p_, t_.q, s, head, head, p_.pairs), w_, from, from + rows, Packed{q - from * w_.row}, q);
    sweep<Purpose::first>(s.keys, q, rows, panels, lanes, thread, o);
    if (!totals_in_range(thread, rows)) {
      for (int r = 0; r < rows; ++r) thread.shift[r] = -kInfinity;
      sweep<Purpose::maximum>(s.keys, q, rows, panels, lanes, thread, o);
      sweep<Purpose::next>(s.keys, q, rows, panels, lanes, thread, o);
      totals_in_range(thread, rows);
    }
    store_rows(s, head, from, rows, thread, o);
  }

  // All keys, block by block. `start` is the purpose of the first tile, which determines that of the others.
  template <Purpose start>
  void sweep(int64_t n, const word* q, int rows, const word* panels, const word* lanes, Thread& thread, float* o) const {
    constexpr Purpose later = start == Purpose::maximum ? Purpose::maximum : Purpose::next;
    if (start == Purpose::next) std::memset(thread.sum, 0, sizeof(thread.sum));
    for (int64_t b = 0; b < key_blocks(n); ++b) {
      const Keys keys = keys_of(n, b);
      // a tile's panels stay in L1 (4 KB) while the rows go by (1.5 KB each)
      each_score_tile(keys.panels, [&](auto width, int panel) {
        const word* at = panels + (keys.from + panel * L) * w_.words;
        const bool very_first = start == Purpose::first && keys.from + panel == 0;
        for (int r = 0; r < rows; r += kScoreRows) {
          if (very_first)
            tile<width(), start>(q + r * w_.row, at, r, panel, keys.count - panel * L, thread);
          else
            tile<width(), later>(q + r * w_.row, at, r, panel, keys.count - panel * L, thread);
        }
      });
      if (start == Purpose::maximum) continue;
      multiply_add<Dot>({o, w_.lanes(), b > 0}, {thread.weights[0], kPanels * L / Dot::kPerWord, 1},
                        {lanes + keys.from / Dot::kPerWord * w_.lanes(), L, w_.lanes()}, rows, w_.vectors,
                        (keys.count + Dot::kPerWord - 1) / Dot::kPerWord);
    }
  }

  // Scores of kScoreRows queries with W panels, of which `keys` keys are valid, and their purpose.
  // Not inlined: GCC keeps 24 accumulators in registers only if nothing else is to be kept there (15 % of all time).
  template <int W, Purpose purpose>
  __attribute__((noinline)) void tile(const word* q, const word* panels, int row, int panel, int keys,
                                      Thread& thread) const {
    vf s[kScoreRows][W] = {};
    multiply<Dot, kScoreRows, W>(s, {q, w_.row, 1}, {panels, static_cast<int64_t>(L) * w_.words, L}, w_.words);
    const int tail = keys - (W - 1) * L;
    if (tail < L)
      for (int r = 0; r < kScoreRows; ++r) s[r][W - 1] = keep_first(s[r][W - 1], tail, -kInfinity);

    float* const shift = thread.shift + row;
    if (purpose != Purpose::next) {
#pragma GCC unroll 8
      for (int r = 0; r < kScoreRows; ++r) {
        vf top = s[r][0];
        for (int w = 1; w < W; ++w) top = max(top, s[r][w]);
        const float m = max_of(top);
        shift[r] = purpose == Purpose::maximum && shift[r] > m ? shift[r] : m;
      }
      if (purpose == Purpose::maximum) return;
    }
    const float c = p_.scale * kLog2e;
#pragma GCC unroll 8
    for (int r = 0; r < kScoreRows; ++r) {
      const vf scale = splat(c), offset = splat(-shift[r] * c);
      vf sum = purpose == Purpose::first ? vf{} : load(thread.sum[row + r]);
#pragma GCC unroll 8
      for (int w = 0; w < W; ++w) s[r][w] = exp2<Dot::kExpDegree>(fma(s[r][w], scale, offset));
      sum = store_weights<Dot>(thread.weights[row + r] + panel * L / Dot::kPerWord, s[r], sum);
      store(thread.sum[row + r], sum);
    }
  }

  // Totals of the rows. False if one is NaN, or so large that weights times values could overflow. None can be too
  // small: the maximum of the first tile adds 1, unless it is -inf, which makes the total NaN.
  bool totals_in_range(Thread& thread, int rows) const {
    bool good = true;
    for (int r = 0; r < rows; ++r) {
      thread.total[r] = sum_of(load(thread.sum[r]));
      good = good && thread.total[r] < kLargestSum;
    }
    return good;
  }

  void store_rows(const Sequence& s, int head, int64_t from, int rows, const Thread& thread, const float* o) const {
    const auto out = query_source<T>(p_, t_.out, s, head, 0, plain_);
    for (int r = 0; r < rows; ++r) {
      prefetch_row<true>(out.row(from + r) + w_.D, w_.D);
      store_row(out.row(from + r), nullptr, nullptr, plain_, w_.D, o + r * w_.lanes(), 1.0f / thread.total[r]);
    }
    float* lse = t_.lse + (s.sample * p_.heads + head) * p_.tokens + s.start + from;
    for (int r = 0; r < rows; r += L)
      store_some(lse + r, fma(load(thread.shift + r), splat(p_.scale), log(load(thread.total + r))), rows - r);
  }

  const Problem& p_;
  const ForwardTensors& t_;
  const Widths<Dot> w_;
  const ChannelPairs plain_{};  // v and out are not rotated
  int64_t longest_ = 0;  // keys of a sequence
};

}  // namespace spe::SPE_ISA
