// SPDX-License-Identifier: Apache-2.0
// float, bfloat16 and float16 in memory <-> vectors of floats.
#pragma once

#include "simd.h"

namespace spe::SPE_ISA {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

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

SPE_INLINE vf widen(const float* p, int n) { return load_some(p, n); }
SPE_INLINE void narrow(float* p, vf x, int n) { store_some(p, x, n); }

#if defined(__AVX512F__)
SPE_INLINE vf widen(const bf16* p, int n) {
  const __m256i x = n == L ? _mm256_loadu_si256((const __m256i*)p) : _mm256_maskz_loadu_epi16(first(n), p);
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16);
}
SPE_INLINE vf widen(const f16* p, int n) {
  const __m256i x = n == L ? _mm256_loadu_si256((const __m256i*)p) : _mm256_maskz_loadu_epi16(first(n), p);
  return (vf)_mm512_cvtph_ps(x);
}
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

#elif defined(__AVX2__)
// n of 8 halves, in registers: loading a vector from parts just stored would wait for the stores.
SPE_INLINE __m128i load_halves(const void* p, int n) {
  if (n == L) return _mm_loadu_si128(static_cast<const __m128i*>(p));
  const char* from = static_cast<const char*>(p);
  const auto some = [](const char* at, int count) {  // of 4
    uint64_t whole = 0;
    uint32_t two = 0;
    uint16_t one = 0;
    if (count == 4) return std::memcpy(&whole, at, 8), whole;
    if (count & 2) std::memcpy(&two, at, 4), whole = two;
    if (count & 1) std::memcpy(&one, at + 2 * (count & 2), 2), whole |= static_cast<uint64_t>(one) << (16 * (count & 2));
    return whole;
  };
  const uint64_t low = some(from, n < 4 ? n : 4), high = n > 4 ? some(from + 8, n - 4) : 0;
  return _mm_set_epi64x(static_cast<int64_t>(high), static_cast<int64_t>(low));
}
SPE_INLINE void store_halves(void* p, __m128i x, int n) {
  if (n == L) return _mm_storeu_si128(static_cast<__m128i*>(p), x);
  char* to = static_cast<char*>(p);
  int64_t rest = _mm_cvtsi128_si64(x);
  if (n & 4) std::memcpy(to, &rest, 8), to += 8, rest = _mm_extract_epi64(x, 1);
  if (n & 2) std::memcpy(to, &rest, 4), to += 4, rest >>= 32;
  if (n & 1) std::memcpy(to, &rest, 2);
}
SPE_INLINE vf widen(const bf16* p, int n) {
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_halves(p, n)), 16);
}
SPE_INLINE void narrow(bf16* p, vf x, int n) {
  const __m256i r = (__m256i)(round_bf16(x) >> 16);
  store_halves(p, _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1)), n);
}
SPE_INLINE vf widen(const f16* p, int n) { return (vf)_mm256_cvtph_ps(load_halves(p, n)); }
SPE_INLINE void narrow(f16* p, vf x, int n) {
  store_halves(p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), n);
}
SPE_INLINE vf rounded(vf x, const f16*) {
  return (vf)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
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
SPE_INLINE vf widen(const bf16* p, int n) {
  typedef uint16_t half_words __attribute__((vector_size(2 * L)));
  half_words x{};
  std::memcpy(&x, p, 2 * static_cast<size_t>(n));
  return (vf)(__builtin_convertvector(x, vw) << 16);
}
SPE_INLINE void narrow(bf16* p, vf x, int n) {
  const vw r = round_bf16(x) >> 16;
  for (int i = 0; i < n; ++i) p[i].bits = static_cast<uint16_t>(r[i]);
}
SPE_INLINE vf widen(const f16* p, int n) {
  vf x{};
  for (int i = 0; i < n; ++i) x[i] = half_to_float(p[i].bits);
  return x;
}
SPE_INLINE void narrow(f16* p, vf x, int n) {
  for (int i = 0; i < n; ++i) p[i].bits = float_to_half(x[i]);
}
SPE_INLINE vf rounded(vf x, const f16*) {
  f16 t[L];
  narrow(t, x, L);
  return widen(t, L);
}
#endif

SPE_INLINE vf rounded(vf x, const float*) { return x; }
SPE_INLINE vf rounded(vf x, const bf16*) { return (vf)(round_bf16(x) & 0xffff0000u); }

// x as rounded when it becomes an operand of type E: an E narrower than T rounds when it is stored.
template <class E, class T>
SPE_INLINE vf rounded_to(vf x, const T* type) {
  return sizeof(E) == 2 ? x : rounded(x, type);
}

}  // namespace spe::SPE_ISA
