// SPDX-License-Identifier: Apache-2.0
// What one core can do at most: independent multiply-adds on registers, in GF/s.
//
//   g++ -O3 -march=native -std=c++17 benchmarks/throughput/peak_cpu.cpp -o build/peak_cpu && build/peak_cpu
#include <immintrin.h>

#include <chrono>
#include <cstdio>

namespace {

constexpr int kAccumulators = 16;  // more than latency x throughput
constexpr long kRounds = 4000000;

template <class Vector, class Step>
double best_rate(Vector start, double flops_per_step, Step step) {
  double best = 1e9;
  for (int trial = 0; trial < 10; ++trial) {
    Vector acc[kAccumulators];
    for (auto& a : acc) a = start;
    const auto begin = std::chrono::steady_clock::now();
    for (long i = 0; i < kRounds; ++i)
#pragma GCC unroll 16
      for (auto& a : acc) {
        a = step(a);
        asm volatile("" : "+v"(a));
      }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    best = seconds < best ? seconds : best;
  }
  return kRounds * kAccumulators * flops_per_step / best / 1e9;
}

}  // namespace

int main() {
#if defined(__AVX512F__)
  const __m512 x = _mm512_set1_ps(0.999f), y = _mm512_set1_ps(0.001f);
  std::printf("float32, 512-bit fused multiply-add: %.0f GF/s\n",
              best_rate(x, 32, [&](__m512 a) { return _mm512_fmadd_ps(a, x, y); }));
#endif
#if defined(__AVX512BF16__)
  const __m512bh b = (__m512bh)_mm512_set1_epi16(0x3f00);
  std::printf("bfloat16, 512-bit dot product: %.0f GF/s\n",
              best_rate(_mm512_set1_ps(0.1f), 64, [&](__m512 a) { return _mm512_dpbf16_ps(a, b, b); }));
#endif
#if defined(__AVX2__) && defined(__FMA__)
  const __m256 u = _mm256_set1_ps(0.999f), v = _mm256_set1_ps(0.001f);
  std::printf("float32, 256-bit fused multiply-add: %.0f GF/s\n",
              best_rate(u, 16, [&](__m256 a) { return _mm256_fmadd_ps(a, u, v); }));
#endif
}
