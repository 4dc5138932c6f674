// SPDX-License-Identifier: Apache-2.0
// From tensors to the operands of the register tile, and back: convert, rotate, round, pair, transpose.
//
// A head's D channels are P = D / 2 pairs (common/rotation.h), pair p being (low p, high p). Three forms of a row:
//   row words    operand A:  FloatDot: D floats, low 0..P-1 then high 0..P-1;  Bf16Dot: P words (low p, high p)
//   panels       operand B over tokens: [token / L][word of the row][token % L], the transpose of L row words
//   lanes        operand B over channels: [token / kPerWord][channel lane], lanes low 0..P-1 then high 0..P-1, a word
//                holding one token (FloatDot: the same as its row words) or two consecutive ones (Bf16Dot); also the
//                order of float results
// Any order of channels would do for the scores, as long as q and k share it; this one makes loads and stores straight.
#pragma once

#include <type_traits>

#include "../common/problem.h"
#include "tile.h"

namespace spe::SPE_ISA {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

// ------------------------------------------------------------------------------------------- elements <-> float vectors

SPE_INLINE vf from_words_low(vw w) { return (vf)(w << 16); }                   // bfloat16 in the low half
SPE_INLINE vf from_words_high(vw w) { return (vf)(w & 0xffff0000u); }          // and in the high half

// bfloat16, round to nearest even, in the high half of each word (the low half is not cleared); NaN stays NaN.
SPE_INLINE vw round_bf16(vf x) {
  const vw bits = (vw)x;
  const vw rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return x == x ? rounded : (bits | 0x400000u);
}

// (low, high) pairs of bfloat16, one pair a word.
SPE_INLINE vw pair_bf16(vf low, vf high) {
#if defined(__AVX512BF16__)
  const __m512i packed = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);  // 16 low, then 16 high
  alignas(64) static constexpr auto order = [] {
    struct { int16_t i[32]; } t{};
    for (int j = 0; j < 16; ++j) t.i[2 * j] = static_cast<int16_t>(j), t.i[2 * j + 1] = static_cast<int16_t>(16 + j);
    return t;
  }();
  return (vw)_mm512_permutexvar_epi16(_mm512_load_si512(order.i), packed);
#else
  return (round_bf16(low) >> 16) | (round_bf16(high) & 0xffff0000u);
#endif
}

#if defined(__AVX512F__)
SPE_INLINE vf widen(const float* p, int n) { return load_some(p, n); }
SPE_INLINE vf widen(const bf16* p, int n) {
  const __m256i x = n == L ? _mm256_loadu_si256((const __m256i*)p) : _mm256_maskz_loadu_epi16(first(n), p);
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16);
}
SPE_INLINE vf widen(const f16* p, int n) {
  const __m256i x = n == L ? _mm256_loadu_si256((const __m256i*)p) : _mm256_maskz_loadu_epi16(first(n), p);
  return (vf)_mm512_cvtph_ps(x);
}
SPE_INLINE void narrow(float* p, vf x, int n) { store_some(p, x, n); }
SPE_INLINE void narrow(bf16* p, vf x, int n) {
#if defined(__AVX512BF16__)
  const __m256i y = (__m256i)_mm512_cvtneps_pbh((__m512)x);
#else
  const __m256i y = _mm512_cvtepi32_epi16((__m512i)(round_bf16(x) >> 16));
#endif
  if (n >= L) _mm256_storeu_si256((__m256i*)p, y);
  else _mm256_mask_storeu_epi16(p, first(n), y);
}
SPE_INLINE void narrow(f16* p, vf x, int n) {
  _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
SPE_INLINE vf rounded(vf x, const f16*) {
  return (vf)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else

// float16 by hand where the target has no conversion: exact, round to nearest even.
SPE_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  float x;
  uint32_t bits;
  if (magnitude >= 0x7c00u) {  // infinity, NaN
    bits = sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13);
    std::memcpy(&x, &bits, 4);
    return x;
  }
  bits = magnitude << 13;  // as if the exponent bias were that of float: 2^112 too small
  std::memcpy(&x, &bits, 4);
  x *= 5.192296858534828e33f;  // 2^112
  std::memcpy(&bits, &x, 4);
  bits |= sign;
  std::memcpy(&x, &bits, 4);
  return x;
}
SPE_INLINE uint16_t float_to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to 65520 or more
  if (bits < 0x38800000u) {  // below 2^-14: adding 0.5 puts the last bit of a half denormal at the last bit of a float
    float y;
    std::memcpy(&y, &bits, 4);
    y += 0.5f;
    std::memcpy(&bits, &y, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  bits += 0xfffu + ((bits >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((bits - 0x38000000u) >> 13));
}
SPE_INLINE vf widen(const float* p, int n) { return load_some(p, n); }
SPE_INLINE vf widen(const bf16* p, int n) {
  typedef uint16_t half_words __attribute__((vector_size(2 * L)));
  half_words x{};
  std::memcpy(&x, p, 2 * static_cast<size_t>(n));
  return (vf)(__builtin_convertvector(x, vw) << 16);
}
SPE_INLINE void narrow(float* p, vf x, int n) { store_some(p, x, n); }
SPE_INLINE void narrow(bf16* p, vf x, int n) {
  const vw r = round_bf16(x) >> 16;
  for (int i = 0; i < n; ++i) p[i].bits = static_cast<uint16_t>(r[i]);
}
#if defined(__F16C__)
SPE_INLINE vf widen(const f16* p, int n) {
  __m128i x = _mm_setzero_si128();
  std::memcpy(&x, p, 2 * static_cast<size_t>(n));
  return (vf)_mm256_cvtph_ps(x);
}
SPE_INLINE void narrow(f16* p, vf x, int n) {
  const __m128i y = _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &y, 2 * static_cast<size_t>(n));
}
#else
SPE_INLINE vf widen(const f16* p, int n) {
  vf x{};
  for (int i = 0; i < n; ++i) x[i] = half_to_float(p[i].bits);
  return x;
}
SPE_INLINE void narrow(f16* p, vf x, int n) {
  for (int i = 0; i < n; ++i) p[i].bits = float_to_half(x[i]);
}
#endif
SPE_INLINE vf rounded(vf x, const f16*) {
  f16 t[L];
  narrow(t, x, L);
  return widen(t, L);
}
#endif

SPE_INLINE vf rounded(vf x, const float*) { return x; }
SPE_INLINE vf rounded(vf x, const bf16*) { return (vf)(round_bf16(x) & 0xffff0000u); }

// Weights of one row of a tile as operand A: floats, or bfloat16 in pairs of neighbours.
template <class Dot, int W>
SPE_INLINE void store_weights(word* to, const vf (&x)[W]) {
  if constexpr (Dot::kPerWord == 1) {
    for (int w = 0; w < W; ++w) store(to + w * L, x[w]);
  } else {
    int w = 0;
#if defined(__AVX512BF16__)
    for (; w + 2 <= W; w += 2)
      store(to + w * L / 2, (vf)(__m512i)_mm512_cvtne2ps_pbh((__m512)x[w + 1], (__m512)x[w]));
#endif
    for (; w < W; ++w) narrow(reinterpret_cast<bf16*>(to) + w * L, x[w], L);
  }
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

SPE_INLINE void turn(vf& low, vf& high, const float* cos_at, const float* sin_at, int n) {
  const vf cos = widen(cos_at, n), sin = widen(sin_at, n);
  const vf x = fma(low, cos, -(high * sin));
  high = fma(low, sin, high * cos);
  low = x;
}

SPE_INLINE void turn_back(vf& low, vf& high, const float* cos_at, const float* sin_at, int n) {
  const vf cos = widen(cos_at, n), sin = widen(sin_at, n);
  const vf x = fma(low, cos, high * sin);
  high = fma(high, cos, -(low * sin));
  low = x;
}

// Calls f(j, n) for the vectors of `count` pairs: n is the constant L but for the last one, so that after inlining only
// that one pays for masks (a row costs 20 cycles instead of 33 at D = 64).
template <class F>
SPE_INLINE void each_vector(int count, F&& f) {
  int j = 0;
  for (; j + L <= count; j += L) f(j, std::integral_constant<int, L>{});
  if (j < count) f(j, count - j);
}

// Row words of one token: turned by the angles at cos and sin, rounded to the input's type.
template <class Dot, class T>
SPE_INLINE void load_row(const T* x, const float* cos, const float* sin, const ChannelPairs& pairs, int P, word* row) {
  int p = 0;
  for (int i = 0; i < pairs.count; p += pairs.segments[i++].count) {
    const Segment s = pairs.segments[i];
    const auto take = [&](auto interleaved, auto turned) {
      each_vector(s.count, [&](int j, int n) {
        vf low, high;
        load_pairs<interleaved()>(x, s, j, n, low, high);
        if constexpr (turned()) turn(low, high, cos + s.column + j, sin + s.column + j, n);
        if constexpr (Dot::kPerWord == 2) {
          store_some(row + p + j, (vf)pair_bf16(low, high), n);
        } else {
          store_some(row + p + j, rounded(low, x), n);
          store_some(row + P + p + j, rounded(high, x), n);
        }
      });
    };
    if (s.column >= 0 && s.interleaved) take(std::true_type{}, std::true_type{});
    else if (s.column >= 0) take(std::false_type{}, std::true_type{});
    else if constexpr (Dot::kPerWord == 1) take(std::false_type{}, std::false_type{});
    else  // neighbours that pass through are words already
      each_vector(s.count, [&](int j, int n) { store_some(row + p + j, load_some(x + s.first + 2 * j, n), n); });
  }
}

// The way back for a row of float lanes: times factor, turned back (by -angle), rounded once.
template <class T>
SPE_INLINE void store_row(T* x, const float* cos, const float* sin, const ChannelPairs& pairs, int P, const float* lanes,
                          float factor) {
  int p = 0;
  for (int i = 0; i < pairs.count; p += pairs.segments[i++].count) {
    const Segment s = pairs.segments[i];
    const auto put = [&](auto interleaved, auto turned) {
      each_vector(s.count, [&](int j, int n) {
        vf low = load(lanes + p + j) * splat(factor), high = load(lanes + P + p + j) * splat(factor);
        if constexpr (turned()) turn_back(low, high, cos + s.column + j, sin + s.column + j, n);
        store_pairs<interleaved()>(x, s, j, n, low, high);
      });
    };
    if (s.column < 0 && s.interleaved) put(std::true_type{}, std::false_type{});
    else if (s.column < 0) put(std::false_type{}, std::false_type{});
    else if (s.interleaved) put(std::true_type{}, std::true_type{});
    else put(std::false_type{}, std::true_type{});
  }
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

// Head `head` of a view, turned by the tables of head `table_head`.
template <class T>
Source<T> source(const Problem& p, const View& v, const Sequence& s, int head, int table_head, const ChannelPairs& pairs) {
  const int64_t at = s.sample * p.tables.batch + s.start * p.tables.token + table_head * p.tables.head;
  T* data = static_cast<T*>(v.data) + s.sample * v.batch + s.start * v.token + head * v.head;
  return {data, v.token, p.tables.cos + at, p.tables.sin + at, p.tables.token, &pairs};
}

// Sizes that follow from head_dim, for operands made of Dot's words.
template <class Dot>
struct Widths {
  int D, P;         // channels, pairs
  int words;        // of a row
  int row;          // stride of row words: whole vectors, for the transposition
  int vectors;      // of lanes
  explicit Widths(int head_dim)
      : D(head_dim), P(head_dim / 2), words(head_dim / Dot::kPerWord), row((words + L - 1) / L * L),
        vectors((head_dim + L - 1) / L) {}
  int lanes() const { return vectors * L; }
  static int64_t whole(int64_t tokens) { return (tokens + L - 1) / L * L; }
  int64_t panel_words(int64_t tokens) const { return whole(tokens) * words; }
  int64_t lane_words(int64_t tokens) const { return whole(tokens) / Dot::kPerWord * lanes() + L; }
};

// Tokens [from, to) of a source in the forms asked for; from is a multiple of L. Tokens past the end are zero in the
// last panel and the last lanes. Float lanes are rows: ask for one of the two.
struct Packed {
  word* rows = nullptr;    // at from * Widths::row
  word* panels = nullptr;  // at from * Widths::words
  word* lanes = nullptr;   // at from / kPerWord * Widths::lanes()
};

// Into L2: D elements that will be read soon. Heads lie side by side, so the next item's rows follow this one's; the
// hardware does not see that, because a row of a head ends after 2 or 3 cache lines. 45 % on 64-token windows.
template <class T>
SPE_INLINE void prefetch_row(const T* x, int D) {
  const char* p = reinterpret_cast<const char*>(x);
  for (int64_t b = 0; b < D * static_cast<int64_t>(sizeof(T)) + 63; b += 64) __builtin_prefetch(p + b, 0, 2);
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

// Of bfloat16 rows: two tokens to a word. (Rows of floats are lanes already.)
template <class Dot>
SPE_INLINE void pack_lanes(const word* rows, const Widths<Dot>& w, int tokens, word* lanes) {
  for (int i = 0; i < tokens; i += 2) {
    const word *even = rows + i * w.row, *odd = even + w.row;
    word* to = lanes + i / 2 * w.lanes();
    // lows first: their last vector may run over into the highs
    for (int u = 0; u < w.P; u += L) store(to + u, (vf)(((vw)load(even + u) & 0xffffu) | ((vw)load(odd + u) << 16)));
    for (int u = 0; u < w.P; u += L)
      store_some(to + w.P + u, (vf)(((vw)load(even + u) >> 16) | ((vw)load(odd + u) & 0xffff0000u)), w.P - u);
  }
}

template <class Dot, class T>
void pack(const Source<const T>& source, const Widths<Dot>& w, int64_t from, int64_t to, Packed out, word* scratch) {
  for (int64_t t = from; t < to; t += L) {
    word* rows = scratch;
    if (out.rows) rows = out.rows + t * w.row;
    else if (Dot::kPerWord == 1 && out.lanes) rows = out.lanes + t * w.row;
    const int n = static_cast<int>(to - t < L ? to - t : L);
    for (int i = 0; i < n; ++i) prefetch_row(source.row(t + i) + w.D, w.D);
    for (int i = 0; i < n; ++i)
      load_row<Dot>(source.row(t + i), source.cos_row(t + i), source.sin_row(t + i), *source.pairs, w.P, rows + i * w.row);
    if (n < L && (out.panels || out.lanes)) std::memset(rows + n * w.row, 0, sizeof(word) * (L - n) * w.row);
    if (out.panels) pack_panel<Dot>(rows, w, out.panels + t * w.words);
    if constexpr (Dot::kPerWord == 2)
      if (out.lanes) pack_lanes<Dot>(rows, w, n, out.lanes + t / 2 * w.lanes());
  }
}

}  // namespace spe::SPE_ISA
