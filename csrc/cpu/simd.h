// SPDX-License-Identifier: Apache-2.0
// Vectors of L floats for the instruction set of this compilation. Everything is in a namespace per instruction set
// (SPE_ISA), so that the linker never merges an AVX-512 inline function into portable code.
//
// GCC/Clang vector extensions do the arithmetic; intrinsics are used only where the compilers have no alternative.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#if !defined(SPE_ISA)
#error "compile with -DSPE_ISA=<name of the instruction set>"
#endif

#define SPE_INLINE inline __attribute__((always_inline))

namespace spe::SPE_ISA {

#if defined(__AVX512F__)
constexpr int L = 16;           // floats in a vector
constexpr int kRegisters = 32;  // vector registers
#elif defined(__AVX2__)
constexpr int L = 8;
constexpr int kRegisters = 16;
#elif defined(__aarch64__)
constexpr int L = 4;
constexpr int kRegisters = 32;
#else
constexpr int L = 4;
constexpr int kRegisters = 16;
#endif

using word = uint32_t;  // 32 bits of an operand: one float, or two bfloat16
typedef float vf __attribute__((vector_size(4 * L)));
typedef int32_t vi __attribute__((vector_size(4 * L)));
typedef uint32_t vw __attribute__((vector_size(4 * L)));
typedef float vf_unaligned __attribute__((vector_size(4 * L), aligned(1), may_alias));

SPE_INLINE vf splat(float x) { return x - vf{}; }
SPE_INLINE vf load(const void* p) { return *static_cast<const vf_unaligned*>(p); }
SPE_INLINE void store(void* p, vf x) { *static_cast<vf_unaligned*>(p) = x; }
SPE_INLINE vf broadcast(const word* p) {
  float x;
  std::memcpy(&x, p, 4);
  return splat(x);
}

// The first n of L floats; the rest of a loaded vector is 0, the rest of memory is left alone.
#if defined(__AVX512F__)
SPE_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
SPE_INLINE vf load_first(const void* p, int n) { return (vf)_mm512_maskz_loadu_ps(first(n), p); }
SPE_INLINE void store_first(void* p, vf x, int n) { _mm512_mask_storeu_ps(p, first(n), (__m512)x); }
#elif defined(__AVX2__)
SPE_INLINE vf load_first(const void* p, int n) {
  const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  return (vf)_mm256_maskload_ps(static_cast<const float*>(p), mask);
}
SPE_INLINE void store_first(void* p, vf x, int n) {  // in parts: a masked store is 40 micro-operations on AMD
  float* to = static_cast<float*>(p);
  __m128 rest = _mm256_castps256_ps128((__m256)x);
  if (n & 4) {
    _mm_storeu_ps(to, rest);
    to += 4;
    rest = _mm256_extractf128_ps((__m256)x, 1);
  }
  if (n & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(to), rest);
    to += 2;
    rest = _mm_movehl_ps(rest, rest);
  }
  if (n & 1) _mm_store_ss(to, rest);
}
#else
SPE_INLINE vf load_first(const void* p, int n) {
  vf x{};
  std::memcpy(&x, p, 4 * static_cast<size_t>(n));
  return x;
}
SPE_INLINE void store_first(void* p, vf x, int n) { std::memcpy(p, &x, 4 * static_cast<size_t>(n)); }
#endif

// The first n floats, or all of them if n >= L, which is faster.
SPE_INLINE vf load_some(const void* p, int n) { return n >= L ? load(p) : load_first(p, n); }
SPE_INLINE void store_some(void* p, vf x, int n) {
  if (n >= L) store(p, x);
  else store_first(p, x, n);
}

SPE_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;  // contracted where the target has an fma
#endif
}

// b if one of them is NaN.
SPE_INLINE vf max(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
SPE_INLINE vf min(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

SPE_INLINE float max_of(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float m = x[0];
  for (int i = 1; i < L; ++i) m = x[i] > m ? x[i] : m;
  return m;
#endif
}

SPE_INLINE float sum_of(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float s = 0;
  for (int i = 0; i < L; ++i) s += x[i];
  return s;
#endif
}

// Lanes 0 .. L-1.
SPE_INLINE vi lane_index() {
  vi x;
  for (int i = 0; i < L; ++i) x[i] = i;
  return x;
}

// x where lane < n, else `other`.
SPE_INLINE vf keep_first(vf x, int n, float other) {
#if defined(__AVX512F__)
  return (vf)_mm512_mask_mov_ps((__m512)splat(other), first(n), (__m512)x);
#else
  return lane_index() < n ? x : splat(other);
#endif
}

// 2^f on [0, 1], least relative error (Remez). Measured in float32 over all f: Degree 3: 7.5e-5, a fiftieth of the
// rounding of a weight to bfloat16; Degree 5: 1.5e-7, a little more than float32's own rounding.
template <int Degree>
SPE_INLINE vf exp2_polynomial(vf f) {
  static_assert(Degree == 3 || Degree == 5);
  if constexpr (Degree == 3) {
    vf p = splat(7.80245215e-2f);
    p = fma(p, f, splat(2.26067156e-1f));
    p = fma(p, f, splat(6.95833564e-1f));
    return fma(p, f, splat(9.99925196e-1f));
  } else {
    vf p = splat(1.87757669e-3f);
    p = fma(p, f, splat(8.98933969e-3f));
    p = fma(p, f, splat(5.58263175e-2f));
    p = fma(p, f, splat(2.40153611e-1f));
    p = fma(p, f, splat(6.93153083e-1f));
    return fma(p, f, splat(9.99999940e-1f));
  }
}

// 2^x. -inf gives 0 and NaN gives NaN; below 2^-126 the result may be flushed to 0.
template <int Degree>
SPE_INLINE vf exp2(vf x) {
#if defined(__AVX512F__)
  // reduce: x - floor(x) (0 for infinities); scalef: times 2^floor(x)
  const vf f = (vf)_mm512_reduce_ps((__m512)x, 0x09);
  return (vf)_mm512_scalef_ps((__m512)exp2_polynomial<Degree>(f), (__m512)x);
#else
  // 2^-127 becomes 0 and 2^128 infinity, as their exponent fields are; NaN stays NaN
  const vf y = min(splat(128.0f), max(splat(-127.0f), x));
#if defined(__AVX2__)
  const vf whole = (vf)_mm256_floor_ps((__m256)y);
#else
  const vf cut = __builtin_convertvector(__builtin_convertvector(y, vi), vf);  // towards 0
  const vf whole = cut > y ? cut - 1.0f : cut;
#endif
  const vi n = __builtin_convertvector(whole, vi);
  return exp2_polynomial<Degree>(y - whole) * (vf)((n + 127) << 23);
#endif
}

// Natural logarithm of positive finite x, to 2 float32 steps: m 2^e with m in [2/3, 4/3), then 2 atanh((m-1)/(m+1)).
// NaN and infinity are unchanged.
SPE_INLINE vf log(vf x) {
  const vi bits = (vi)x;
  const vi e = (bits - 0x3f2aaaab) >> 23;
  const vf m = (vf)(bits - (e << 23));
  const vf t = (m - 1.0f) / (m + 1.0f), t2 = t * t;
  vf p = splat(2.0f / 9);
  p = fma(p, t2, splat(2.0f / 7));
  p = fma(p, t2, splat(2.0f / 5));
  p = fma(p, t2, splat(2.0f / 3));
  p = fma(p * t2, t, t + t);
  const vf y = fma(__builtin_convertvector(e, vf), splat(0.69314718f), p);
  return x < splat(__builtin_inff()) ? y : x;
}

// ---------------------------------------------------------------------------------------------- two vectors, shuffled

// Even and odd elements of the 2 L floats (a, b), and back.
SPE_INLINE void deinterleave(vf a, vf b, vf& even, vf& odd) {
#if defined(__AVX512F__)
  const __m512i e = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  even = (vf)_mm512_permutex2var_ps((__m512)a, e, (__m512)b);
  odd = (vf)_mm512_permutex2var_ps((__m512)a, _mm512_add_epi32(e, _mm512_set1_epi32(1)), (__m512)b);
#elif defined(__AVX2__)
  even = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
  odd = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  even = __builtin_shufflevector(a, b, 0, 2, 4, 6);
  odd = __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
}

SPE_INLINE void interleave(vf even, vf odd, vf& a, vf& b) {
#if defined(__AVX512F__)
  const __m512i i = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  a = (vf)_mm512_permutex2var_ps((__m512)even, i, (__m512)odd);
  b = (vf)_mm512_permutex2var_ps((__m512)even, _mm512_add_epi32(i, _mm512_set1_epi32(8)), (__m512)odd);
#elif defined(__AVX2__)
  a = __builtin_shufflevector(even, odd, 0, 8, 1, 9, 2, 10, 3, 11);
  b = __builtin_shufflevector(even, odd, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  a = __builtin_shufflevector(even, odd, 0, 4, 1, 5);
  b = __builtin_shufflevector(even, odd, 2, 6, 3, 7);
#endif
}

// L x L words in place: row i, lane j <-> row j, lane i. log2(L) rounds of exchanging blocks between row pairs.
template <int Distance>
SPE_INLINE void exchange(vf& a, vf& b) {
  // a takes from b the lanes whose index lacks the bit `Distance`, shifted up; b takes from a, shifted down
#if defined(__AVX512F__)
  alignas(64) static constexpr auto index = [] {
    struct { int32_t lo[16], hi[16]; } t{};
    for (int i = 0; i < 16; ++i) {
      t.lo[i] = (i & Distance) ? 16 + i - Distance : i;
      t.hi[i] = (i & Distance) ? 16 + i : i + Distance;
    }
    return t;
  }();
  const __m512 x = (__m512)a, y = (__m512)b;
  a = (vf)_mm512_permutex2var_ps(x, _mm512_load_si512(index.lo), y);
  b = (vf)_mm512_permutex2var_ps(x, _mm512_load_si512(index.hi), y);
#else
  constexpr auto lo = [](int i) { return (i & Distance) ? L + i - Distance : i; };
  constexpr auto hi = [](int i) { return (i & Distance) ? L + i : i + Distance; };
  const vf x = a;
#if defined(__AVX2__)
  a = __builtin_shufflevector(x, b, lo(0), lo(1), lo(2), lo(3), lo(4), lo(5), lo(6), lo(7));
  b = __builtin_shufflevector(x, b, hi(0), hi(1), hi(2), hi(3), hi(4), hi(5), hi(6), hi(7));
#else
  a = __builtin_shufflevector(x, b, lo(0), lo(1), lo(2), lo(3));
  b = __builtin_shufflevector(x, b, hi(0), hi(1), hi(2), hi(3));
#endif
#endif
}

template <int Distance = L / 2>
SPE_INLINE void transpose(vf (&rows)[L]) {
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i)
    if (!(i & Distance)) exchange<Distance>(rows[i], rows[i + Distance]);
  if constexpr (Distance > 1) transpose<Distance / 2>(rows);
}

}  // namespace spe::SPE_ISA
