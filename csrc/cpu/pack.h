// SPDX-License-Identifier: Apache-2.0
// Conversion of tensors to the operands of the register tile, and back: convert, rotate, round, transpose.
//
// Operands hold words: one float (FloatDot) or two bfloat16 (Bf16Dot). Channels keep their order in all of them:
//   rows      operand A: [token][word], a row is the token's channels
//   panels    operand B over tokens: [token / L][word][token % L], L rows transposed
//   lanes     operand B over channels: [token / kPerWord][channel], a word holds the channel of one token (FloatDot: the
//             same as rows) or of two consecutive tokens (Bf16Dot)
#pragma once

#include <type_traits>

#include "../common/problem.h"
#include "elements.h"
#include "tile.h"

namespace spe::SPE_ISA {

// Element of an operand's row.
template <class Dot>
using Operand = std::conditional_t<Dot::kPerWord == 2, bf16, float>;

// Weights of one row of a tile as operand A, and added to the row's sum: as rounded for the product with V, or a large
// weight would be divided by a different value. The sum of bfloat16 weights is their dot product with ones.
template <class Dot, int W>
SPE_INLINE vf store_weights(word* to, const vf (&x)[W], vf sum) {
  if constexpr (Dot::kPerWord == 1) {
    for (int w = 0; w < W; ++w) {
      store(to + w * L, x[w]);
      sum += x[w];
    }
  } else {
#if defined(__AVX512BF16__)
    const vf ones = (vf)(vw{} + 0x3f803f80u);
    for (int w = 0; w < W; w += 2) {
      const vf next = w + 1 < W ? x[w + 1] : vf{};
      const vf packed = (vf)(__m512i)_mm512_cvtne2ps_pbh((__m512)next, (__m512)x[w]);
      if (w + 1 < W) store(to + w * L / 2, packed);
      else store_first(to + w * L / 2, packed, L / 2);
      sum = Dot::multiply_add(packed, ones, sum);
    }
#endif
  }
  return sum;
}

// ------------------------------------------------------------------------------------------------------- one row, pairs

// Pairs (first, second) and (first, second) + 1, ..., n <= L of them, of a segment at pair i.
template <bool interleaved, class T>
SPE_INLINE void load_pairs(const T* x, const Segment& s, int i, int n, vf& low, vf& high) {
  if constexpr (!interleaved) {
    low = widen(x + s.first + i, n);
    high = widen(x + s.second + i, n);
    return;
  }
  const T* p = x + s.first + 2 * i;
  if constexpr (std::is_same_v<T, bf16>) {
    const vw w = (vw)load_some(p, n);
    low = from_words_low(w);
    high = from_words_high(w);
  } else {
    const int a = 2 * n < L ? 2 * n : L;
    deinterleave(widen(p, a), widen(p + a, 2 * n - a), low, high);
  }
}

template <bool interleaved, class T>
SPE_INLINE void store_pairs(T* x, const Segment& s, int i, int n, vf low, vf high) {
  if constexpr (!interleaved) {
    narrow(x + s.first + i, low, n);
    narrow(x + s.second + i, high, n);
    return;
  }
  T* p = x + s.first + 2 * i;
  if constexpr (std::is_same_v<T, bf16>) {
    store_some(p, (vf)pair_bf16(low, high), n);
  } else {
    vf a, b;
    interleave(low, high, a, b);
    const int m = 2 * n < L ? 2 * n : L;
    narrow(p, a, m);
    narrow(p + m, b, 2 * n - m);
  }
}

SPE_INLINE void rotate(vf& low, vf& high, const float* cos_at, const float* sin_at, int n) {
  const vf cos = widen(cos_at, n), sin = widen(sin_at, n);
  const vf x = fma(low, cos, -(high * sin));
  high = fma(low, sin, high * cos);
  low = x;
}

SPE_INLINE void inverse_rotate(vf& low, vf& high, const float* cos_at, const float* sin_at, int n) {
  const vf cos = widen(cos_at, n), sin = widen(sin_at, n);
  const vf x = fma(low, cos, high * sin);
  high = fma(high, cos, -(low * sin));
  low = x;
}

// Calls f(j, n) for the vectors of `count` pairs: n is the constant L except in the last one, so that after inlining
// only that one needs masks.
template <class F>
SPE_INLINE void each_vector(int count, F&& f) {
  int j = 0;
  for (; j + L <= count; j += L) f(j, std::integral_constant<int, L>{});
  if (j < count) f(j, count - j);
}

// The channels of one token, rotated by the angles at cos and sin and rounded to the input's type, as operand.
template <class E, class T>
SPE_INLINE void load_row(const T* x, const float* cos, const float* sin, const ChannelPairs& pairs, int D, E* row) {
  for (int i = 0; i < pairs.count; ++i) {
    const Segment s = pairs.segments[i];
    const auto take = [&](auto interleaved) {
      each_vector(s.count, [&](int j, int n) {
        vf low, high;
        load_pairs<interleaved()>(x, s, j, n, low, high);
        rotate(low, high, cos + s.column + j, sin + s.column + j, n);
        store_pairs<interleaved()>(row, s, j, n, rounded_to<E>(low, x), rounded_to<E>(high, x));
      });
    };
    if (s.interleaved) take(std::true_type{});
    else take(std::false_type{});
  }
  const int R = pairs.rotary_dim;
  if constexpr (sizeof(E) == 2)  // two channels to a word, copied as they are
    each_vector((D - R) / 2, [&](int j, int n) { store_some(row + R + 2 * j, load_some(x + R + 2 * j, n), n); });
  else
    each_vector(D - R, [&](int j, int n) { narrow(row + R + j, widen(x + R + j, n), n); });
}

// Inverse for a row of results: times factor, inverse rotation (by -angle), rounded once.
template <class T>
SPE_INLINE void store_row(T* x, const float* cos, const float* sin, const ChannelPairs& pairs, int D, const float* row,
                          float factor) {
  for (int i = 0; i < pairs.count; ++i) {
    const Segment s = pairs.segments[i];
    const auto put = [&](auto interleaved) {
      each_vector(s.count, [&](int j, int n) {
        vf low, high;
        load_pairs<interleaved()>(row, s, j, n, low, high);
        inverse_rotate(low, high, cos + s.column + j, sin + s.column + j, n);
        store_pairs<interleaved()>(x, s, j, n, low * factor, high * factor);
      });
    };
    if (s.interleaved) put(std::true_type{});
    else put(std::false_type{});
  }
  const int R = pairs.rotary_dim;
  each_vector(D - R, [&](int j, int n) { narrow(x + R + j, widen(row + R + j, n) * factor, n); });
}

// ------------------------------------------------------------------------------------------------------- many tokens

// One head of one sequence of a tensor, with its tables (or none).
template <class T>
struct Source {
  T* data;
  int64_t stride;  // between tokens, in elements
  const float *cos, *sin;
  int64_t table_stride;
  const ChannelPairs* pairs;

  T* row(int64_t token) const { return data + token * stride; }
  const float* cos_row(int64_t token) const { return cos + token * table_stride; }
  const float* sin_row(int64_t token) const { return sin + token * table_stride; }
};

// Head `head` of a view from token `start` on, rotated by the tables of head `table_head`.
template <class T>
Source<T> source(const Tables& tables, const View& v, int64_t sample, int64_t start, int head, int table_head,
                 const ChannelPairs& pairs) {
  const int64_t at = sample * tables.batch + start * tables.token + table_head * tables.head;
  T* data = static_cast<T*>(v.data) + sample * v.batch + start * v.token + head * v.head;
  return {data, v.token, tables.cos + at, tables.sin + at, tables.token, &pairs};
}

// The same of q, out, and their gradients, and of k, v, and theirs.
template <class T>
Source<T> query_source(const Problem& p, const View& v, const Sequence& s, int head, int table_head,
                       const ChannelPairs& pairs) {
  return source<T>(p.tables, v, s.sample, s.start, head, table_head, pairs);
}
template <class T>
Source<T> key_source(const Problem& p, const View& v, const Sequence& s, int head, int table_head,
                     const ChannelPairs& pairs) {
  return source<T>(p.key_tables, v, s.sample, s.key_start, head, table_head, pairs);
}

// Sizes that follow from head_dim, for operands made of Dot's words.
template <class Dot>
struct Widths {
  int D;
  int words;        // of a row
  int row;          // stride of row words: whole vectors, for the transposition. An odd number of them where V has rows
                    // of floats: 4 of 8 KB apart would share few sets of L1 (2 % of head_dim 64)
  int vectors;      // of lanes
  static constexpr int kLongestRow = 256 / Dot::kPerWord + L;  // of the largest head_dim
  explicit Widths(int head_dim)
      : D(head_dim), words(head_dim / Dot::kPerWord), row(((words + L - 1) / L | (kRegisters == 16)) * L),
        vectors((head_dim + L - 1) / L) {}
  int lanes() const { return Dot::kPerWord == 1 ? row : vectors * L; }
  static int64_t whole(int64_t tokens) { return (tokens + L - 1) / L * L; }
  int64_t panel_words(int64_t tokens) const { return whole(tokens) * words; }
  int64_t lane_words(int64_t tokens) const { return whole(tokens) / Dot::kPerWord * lanes() + L; }
};

// Tokens [from, to) of a source in the requested forms; from is a multiple of L. Tokens past the end are zero in the
// last panel and the last lanes. Float lanes are rows: request one of the two.
struct Packed {
  word* rows = nullptr;    // at from * Widths::row
  word* panels = nullptr;  // at from * Widths::words
  word* lanes = nullptr;   // at from / kPerWord * Widths::lanes()
};

// Prefetch into L2: D elements that will soon be read (or written). Heads are adjacent in memory, so the next item's
// rows follow this one's; the hardware does not detect that, because a row of a head ends after 2 or 3 cache lines. On
// 64-token windows the prefetch of q, k and v gains 45 %, that of the output another 5 %.
template <bool write = false, int locality = 2, class T>
SPE_INLINE void prefetch_row(const T* x, int D) {
  const char* p = reinterpret_cast<const char*>(x);
  for (int64_t b = 0; b < D * static_cast<int64_t>(sizeof(T)) + 63; b += 64) __builtin_prefetch(p + b, write, locality);
}

template <class Dot>
SPE_INLINE void pack_panel(const word* rows, const Widths<Dot>& w, word* panel) {
  for (int u = 0; u < w.words; u += L) {
    vf block[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) block[i] = load(rows + i * w.row + u);
    transpose(block);
    const int n = w.words - u < L ? w.words - u : L;
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i)
      if (i < n) store(panel + (u + i) * L, block[i]);
  }
}

// Lanes of bfloat16 rows: two tokens to a word. (Rows of floats are lanes already.)
template <class Dot>
SPE_INLINE void pack_lanes(const word* rows, const Widths<Dot>& w, int tokens, word* lanes) {
#if defined(__AVX512BF16__)
  alignas(64) static constexpr auto order = [] {
    struct { int16_t i[32]; } t{};
    for (int j = 0; j < 16; ++j) t.i[2 * j] = static_cast<int16_t>(j), t.i[2 * j + 1] = static_cast<int16_t>(32 + j);
    return t;
  }();
  const __m512i low = _mm512_load_si512(order.i), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int i = 0; i < tokens; i += 2) {
    const word *even = rows + i * w.row, *odd = even + w.row;
    word* to = lanes + i / 2 * w.lanes();
    for (int u = 0; u < w.lanes(); u += 2 * L) {  // 2 L channels are L words of a row
      const __m512i a = (__m512i)load(even + u / 2), b = (__m512i)load(odd + u / 2);
      store(to + u, (vf)_mm512_permutex2var_epi16(a, low, b));
      if (u + L < w.lanes()) store(to + u + L, (vf)_mm512_permutex2var_epi16(a, high, b));
    }
  }
#else
  (void)rows, (void)w, (void)tokens, (void)lanes;
#endif
}

template <class Dot, class T>
void pack(const Source<const T>& source, const Widths<Dot>& w, int64_t from, int64_t to, Packed out, word* scratch) {
  for (int64_t t = from; t < to; t += L) {
    word* rows = scratch;
    if (out.rows) rows = out.rows + t * w.row;
    else if (Dot::kPerWord == 1 && out.lanes) rows = out.lanes + t * w.row;
    const int n = static_cast<int>(to - t < L ? to - t : L);
    for (int i = 0; i < n; ++i) prefetch_row(source.row(t + i) + w.D, w.D);
    for (int64_t next = t + L; next < t + 2 * L && next < to; ++next) prefetch_row<false, 3>(source.row(next), w.D);
    for (int i = 0; i < n; ++i)
      load_row(source.row(t + i), source.cos_row(t + i), source.sin_row(t + i), *source.pairs, w.D,
               reinterpret_cast<Operand<Dot>*>(rows + i * w.row));
    if (n < L && (out.panels || out.lanes)) std::memset(rows + n * w.row, 0, sizeof(word) * (L - n) * w.row);
    if (out.panels) pack_panel<Dot>(rows, w, out.panels + t * w.words);
    if constexpr (Dot::kPerWord == 2)
      if (out.lanes) pack_lanes<Dot>(rows, w, n, out.lanes + t / 2 * w.lanes());
  }
}

}  // namespace spe::SPE_ISA
