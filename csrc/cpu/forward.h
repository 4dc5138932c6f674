// SPDX-License-Identifier: Apache-2.0
// Forward: out = softmax(R(q) R(k)^T scale) v and lse, the log of each row's sum of exponentials.
//
// Of one key head, K is rotated and packed into panels and V into lanes, once. Then, for each block of query rows
// (rotated on load) and each block of keys: scores by register tiles, online softmax, weights packed as operand A,
// product with V added to the rows' output. Scores and weights never leave the L1/L2 cache.
#pragma once

#include "pack.h"
#include "schedule.h"

namespace spe::SPE_ISA {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;
constexpr float kInfinity = __builtin_inff();

// Query rows of a block: a multiple of every tile height (5, 6, 8 -> 120; 4, 6, 8 -> 24). 120 x 128 weights are 30 KB
// in bfloat16; the packed K and V of 128 keys are read from L2 once per block.
constexpr int kRows = 120;
// Keys of a block, as panels of L: 128 keys.
constexpr int kPanels = 128 / L;
// Widest score tile in vectors; its height is rows_of(kScoreWidth) for every width, so that softmax sees whole tiles.
constexpr int kScoreWidth = kRegisters == 32 ? 4 : 2;
constexpr int kScoreRows = rows_of(kScoreWidth);

template <class Dot, class T>
class Forward {
 public:
  Forward(const Problem& problem, const ForwardTensors& tensors)
      : p_(problem), t_(tensors), w_(problem.head_dim), plain_(channel_pairs(problem.head_dim, 0, Pairing::half)) {
    for (const Sequence& s : p_.sequences) longest_ = s.length > longest_ ? s.length : longest_;
  }

  int phases() const { return 2; }

  int64_t parts(const Item& item, int phase) const {
    const int64_t n = item.sequence.length;
    if (phase == 0) return (n + kSlice - 1) / kSlice;
    return (n + kRows - 1) / kRows * group();
  }

  size_t item_bytes() const { return sizeof(word) * static_cast<size_t>(panel_words() + w_.lane_words(longest_)); }

  size_t thread_bytes() const { return sizeof(Thread) + sizeof(word) * (kRows + kScoreRows) * (w_.row + w_.lanes()); }

  void part(const Item& item, int phase, int64_t part, bool, char* item_memory, char* thread_memory) const {
    word* const panels = reinterpret_cast<word*>(item_memory);
    word* const lanes = panels + panel_words();
    Thread& thread = *reinterpret_cast<Thread*>(thread_memory);
    word* const scratch = reinterpret_cast<word*>(thread_memory + sizeof(Thread));
    if (phase == 0) {
      const int64_t from = part * kSlice, n = item.sequence.length, to = from + kSlice < n ? from + kSlice : n;
      pack(source<const T>(p_, t_.k, item.sequence, item.kv_head, item.kv_head, p_.pairs), w_, from, to,
           Packed{nullptr, panels, nullptr}, scratch);
      pack(source<const T>(p_, t_.v, item.sequence, item.kv_head, 0, plain_), w_, from, to,
           Packed{nullptr, nullptr, lanes}, scratch);
    } else {
      const int head = item.kv_head * group() + static_cast<int>(part % group());
      attend(item.sequence, head, part / group() * kRows, panels, lanes, thread, scratch);
    }
  }

 private:
  static constexpr int kSlice = 8 * L;  // tokens packed as one part

  struct Thread {
    float scores[kScoreRows][kPanels * L];
    word weights[kRows + kScoreRows][kPanels * L / Dot::kPerWord];
    float max[kRows + kScoreRows];  // of the scores, before scaling
    float sum[kRows + kScoreRows];
  };

  int group() const { return p_.heads / p_.kv_heads; }
  int64_t panel_words() const { return (w_.panels(longest_) + L - 1) / L * L; }

  // Query rows [from, from + kRows) of one head against all keys.
  void attend(const Sequence& s, int head, int64_t from, const word* panels, const word* lanes, Thread& thread,
              word* scratch) const {
    const int rows = static_cast<int>(s.length - from < kRows ? s.length - from : kRows);
    word* const q = scratch;                                                          // (rows, w_.row)
    float* const o = reinterpret_cast<float*>(scratch + (kRows + kScoreRows) * w_.row);  // (rows, lanes)
    pack(source<const T>(p_, t_.q, s, head, head, p_.pairs), w_, from, from + rows, Packed{q - from * w_.row}, q);
    std::memset(o, 0, sizeof(float) * rows * w_.lanes());
    for (int r = 0; r < kRows + kScoreRows; ++r) thread.max[r] = -kInfinity, thread.sum[r] = 0;

    const int64_t total = (s.length + L - 1) / L;
    const int64_t blocks = (total + kPanels - 1) / kPanels;
    for (int64_t b = 0, panel = 0; b < blocks; ++b) {
      const int count = static_cast<int>((total - panel) / (blocks - b));  // 13 panels as 6 + 7, not 8 + 5
      const int64_t key = panel * L;
      const int keys = static_cast<int>(s.length - key < count * L ? s.length - key : count * L);
      for (int r = 0; r < rows; r += kScoreRows) {
        scores(q + r * w_.row, panels + key * w_.words, count, thread.scores);
        softmax(thread, r, count, keys, o);
      }
      multiply_add<Dot>({o, w_.lanes()}, {thread.weights[0], kPanels * L / Dot::kPerWord, 1},
                        {lanes + key / Dot::kPerWord * w_.lanes(), L, w_.lanes()}, rows, w_.vectors,
                        (keys + Dot::kPerWord - 1) / Dot::kPerWord);
      panel += count;
    }
    store(s, head, from, rows, thread, o);
  }

  // scores (kScoreRows, count * L) of one tile of rows.
  void scores(const word* q, const word* panels, int count, float (*out)[kPanels * L]) const {
    const int tiles = (count + kScoreWidth - 1) / kScoreWidth;
    for (int i = 0, from = 0; i < tiles; ++i) {
      const int width = (count - from) / (tiles - i);
      const word* at = panels + static_cast<int64_t>(from) * L * w_.words;
      switch (width) {
        case 1: score_tile<1>(q, at, out, from); break;
        case 2: score_tile<2>(q, at, out, from); break;
        case 3: if constexpr (kScoreWidth >= 3) score_tile<3>(q, at, out, from); break;
        case 4: if constexpr (kScoreWidth >= 4) score_tile<4>(q, at, out, from); break;
      }
      from += width;
    }
  }

  template <int W>
  void score_tile(const word* q, const word* panels, float (*out)[kPanels * L], int from) const {
    vf acc[kScoreRows][W] = {};
    multiply<Dot, kScoreRows, W>(acc, {q, w_.row, 1}, {panels, static_cast<int64_t>(L) * w_.words, L}, w_.words);
    for (int r = 0; r < kScoreRows; ++r)
      for (int v = 0; v < W; ++v) spe::SPE_ISA::store(&out[r][(from + v) * L], acc[r][v]);
  }

  // Online softmax of one tile of rows: weights of this block, and the rows' maximum, sum and output brought up to it.
  void softmax(Thread& thread, int row, int count, int keys, float* o) const {
    const float c = p_.scale * kLog2e;
    for (int r = 0; r < kScoreRows; ++r) {
      float* s = thread.scores[r];
      const int tail = keys - (count - 1) * L;
      if (tail < L) spe::SPE_ISA::store(s + (count - 1) * L, keep_first(load(s + (count - 1) * L), tail, -kInfinity));
      vf top = load(s);
      for (int v = 1; v < count; ++v) top = max(top, load(s + v * L));
      const float old = thread.max[row + r], m = std::fmax(old, max_of(top));
      if (m > old) {
        thread.max[row + r] = m;
        const vf factor = exp2<Dot::kExpDegree>(splat((old - m) * c));
        thread.sum[row + r] *= factor[0];
        float* out = o + (row + r) * w_.lanes();
        if (old != -kInfinity)
          for (int v = 0; v < w_.vectors; ++v) spe::SPE_ISA::store(out + v * L, load(out + v * L) * factor);
      }
      const vf scale = splat(c), shift = splat(-m * c);
      vf sum{};
      word* weights = thread.weights[row + r];
      if constexpr (Dot::kPerWord == 1) {
        for (int v = 0; v < count; ++v) {
          const vf w = exp2<Dot::kExpDegree>(fma(load(s + v * L), scale, shift));
          sum += w;
          spe::SPE_ISA::store(weights + v * L, w);
        }
      } else {
        for (int v = 0; v < count; ++v) {
          const vf w = exp2<Dot::kExpDegree>(fma(load(s + v * L), scale, shift));
          sum += w;
          narrow(reinterpret_cast<bf16*>(weights) + v * L, w, L);
        }
      }
      thread.sum[row + r] += sum_of(sum);
    }
  }

  void store(const Sequence& s, int head, int64_t from, int rows, const Thread& thread, const float* o) const {
    const auto out = source<T>(p_, t_.out, s, head, 0, plain_);
    float* lse = t_.lse + (s.sample * p_.heads + head) * p_.tokens + s.start + from;
    for (int r = 0; r < rows; ++r) {
      store_row(out.row(from + r), nullptr, nullptr, plain_, w_.P, o + r * w_.lanes(), 1.0f / thread.sum[r]);
      lse[r] = thread.max[r] * p_.scale + std::log(thread.sum[r]);
    }
  }

  const Problem& p_;
  const ForwardTensors& t_;
  const Widths<Dot> w_;
  const ChannelPairs plain_;  // v and out are not turned
  int64_t longest_ = 0;
};

}  // namespace spe::SPE_ISA
