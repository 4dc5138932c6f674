// SPDX-License-Identifier: Apache-2.0
// The functions of ../primitives.h for the host: included by it, after its types, and documented there.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "emulator.h"

#define SPE_DEVICE inline
#define SPE_KERNEL(max_threads, blocks_per_sm) inline void
#define SPE_PARAMS const

namespace spe::cuda {

using emulator::barrier_arrive;
using emulator::barrier_arrive_after_copies;
using emulator::barrier_init;
using emulator::barrier_test;
using emulator::barrier_wait;
using emulator::block_index;
using emulator::block_size;
using emulator::block_sync;
using emulator::copy_async;
using emulator::shuffle_xor;
using emulator::thread_index;
using emulator::warp_any;
using emulator::warp_sync;

inline Shared shared_memory() { return emulator::kSharedBase; }

// -------------------------------------------------------------------------------------------------------------- memory

namespace host {

template <class T>
T load(const void* p) {
  T x;
  std::memcpy(&x, p, sizeof(T));
  return x;
}
template <class T>
void store(void* p, const T& x) {
  std::memcpy(p, &x, sizeof(T));
}
template <class T>
T load_global(const void* p) {
  return load<T>(emulator::global_read(p, sizeof(T)));
}
template <class T>
T load_shared(Shared a) {
  return load<T>(emulator::shared_read(a, sizeof(T)));
}
template <class T>
void store_shared(Shared a, const T& x) {
  store(emulator::shared_write(a, sizeof(T)), x);
}

}  // namespace host

constexpr bool BLACKWELL = false;
inline int warp_index() { return thread_index() >> 5; }
template <class E>
constexpr uint32_t ONES = std::is_same_v<E, BFloat16> ? 0x3f803f80u : 0x3c003c00u;

inline float reciprocal(float x) { return 1.0f / x; }
inline int opaque(int x) { return x; }

inline int load_global_int(const int* p) { return host::load_global<int>(p); }
inline float load_global_float(const float* p) { return host::load_global<float>(p); }
inline Float2 load_global_float2(const float* p) { return host::load_global<Float2>(p); }
inline Float4 load_global_float4(const float* p) { return host::load_global<Float4>(p); }
inline Word4 load_global4(const void* p) { return host::load_global<Word4>(p); }
inline Word2 load_global2(const void* p) { return host::load_global<Word2>(p); }
inline uint32_t load_global1(const void* p) { return host::load_global<uint32_t>(p); }
inline void store_global2(void* p, const Word2& x) { host::store(emulator::global_write(p, sizeof x), x); }
inline void store_global1(void* p, uint32_t x) { host::store(emulator::global_write(p, sizeof x), x); }
inline void store_global_float(float* p, float x) { host::store(emulator::global_write(p, sizeof x), x); }

inline float load_shared_float(Shared a) { return host::load_shared<float>(a); }
inline Float2 load_shared_float2(Shared a) { return host::load_shared<Float2>(a); }
inline Float4 load_shared_float4(Shared a) { return host::load_shared<Float4>(a); }
inline uint32_t load_shared(Shared a) { return host::load_shared<uint32_t>(a); }
inline Word2 load_shared2(Shared a) { return host::load_shared<Word2>(a); }
inline Word4 load_shared4(Shared a) { return host::load_shared<Word4>(a); }
inline void store_shared_float(Shared a, float x) { host::store_shared(a, x); }
inline void store_shared_float2(Shared a, Float2 x) { host::store_shared(a, x); }
inline void store_shared(Shared a, uint32_t x) { host::store_shared(a, x); }
inline void store_shared2(Shared a, const Word2& x) { host::store_shared(a, x); }

inline void load_matrix4(uint32_t (&r)[4], Shared row) { emulator::load_matrix(r, emulator::Wait::matrix4, row); }
inline void load_matrix4_transposed(uint32_t (&r)[4], Shared row) {
  emulator::load_matrix(r, emulator::Wait::matrix4_transposed, row);
}
inline void load_matrix2(uint32_t (&r)[2], Shared row) { emulator::load_matrix(r, emulator::Wait::matrix2, row); }
inline void load_matrix2_transposed(uint32_t (&r)[2], Shared row) {
  emulator::load_matrix(r, emulator::Wait::matrix2_transposed, row);
}

inline uint32_t shuffle_xor(uint32_t x, int mask) {
  const float other = shuffle_xor(host::load<float>(&x), mask);  // its bits pass unchanged
  return host::load<uint32_t>(&other);
}

// ---------------------------------------------------------------------------------------------------------- arithmetic

namespace host {

inline uint32_t bits(float x) { return load<uint32_t>(&x); }
inline float from_bits(uint32_t u) { return load<float>(&u); }

// Rounding to nearest, ties to even; NaN becomes the one that the GPU gives.
inline uint32_t narrow(float x, BFloat16) {
  const uint32_t u = bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return (u + 0x7fffu + (u >> 16 & 1)) >> 16;
}
inline uint32_t narrow(float x, Float16) {
  const uint32_t u = bits(x) & 0x7fffffffu, sign = bits(x) >> 16 & 0x8000u;
  if (u > 0x7f800000u) return 0x7fff;
  if (u >= 0x477ff000u) return sign | 0x7c00u;  // from 65520 on the nearest is infinity
  // Below 2^-14 the results are multiples of 2^-24, as floats from 1/2 on are: the addition rounds to them.
  if (u < 0x38800000u) return sign | (bits(from_bits(u) + 0.5f) - bits(0.5f));
  return sign | (u - (112u << 23) + 0xfffu + (u >> 13 & 1)) >> 13;
}
inline float widen(uint32_t h, BFloat16) { return from_bits(h << 16); }
inline float widen(uint32_t h, Float16) {
  // The exponent's offset, 112 more in a float, is a factor: so that subnormal numbers come out right as well.
  const uint32_t sign = (h & 0x8000u) << 16, magnitude = (h & 0x7fffu) << 13;
  if ((h & 0x7c00u) == 0x7c00u) return from_bits(sign | 0x7f800000u | magnitude);
  return from_bits(sign | bits(from_bits(magnitude) * 0x1p112f));
}

template <class E>
constexpr emulator::Wait kind(emulator::Wait bf16, emulator::Wait f16) {
  return std::is_same_v<E, BFloat16> ? bf16 : f16;
}

}  // namespace host

template <class E>
inline uint32_t pack(float first, float second) {
  return host::narrow(first, E{}) | host::narrow(second, E{}) << 16;
}
template <class E>
inline Float2 unpack(uint32_t w) {
  return {{host::widen(w & 0xffffu, E{}), host::widen(w >> 16, E{})}};
}

template <class E>
inline void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  float x[8], y[4];
  for (int i = 0; i < 4; ++i) host::store(x + 2 * i, unpack<E>(a[i]));
  host::store(y, unpack<E>(b0));
  host::store(y + 2, unpack<E>(b1));
  emulator::multiply(d, x, y, host::kind<E>(emulator::Wait::multiply_bf16, emulator::Wait::multiply_f16));
}
template <class E>
inline void multiply8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  float x[4], y[2];
  host::store(x, unpack<E>(a0));
  host::store(x + 2, unpack<E>(a1));
  host::store(y, unpack<E>(b0));
  emulator::multiply(d, x, y, host::kind<E>(emulator::Wait::multiply8_bf16, emulator::Wait::multiply8_f16));
}

// As with .ftz, subnormal arguments and results are 0.
inline float exp2(float x) {
  const float y = std::exp2(x);
  return y < std::numeric_limits<float>::min() ? 0.0f : y;
}
inline float log2(float x) { return std::log2(std::fabs(x) < std::numeric_limits<float>::min() ? 0.0f : x); }

}  // namespace spe::cuda
