// SPDX-License-Identifier: Apache-2.0
// Peak rate of a core: independent multiply-adds on registers.
#pragma once

#include <chrono>

#include "tile.h"

namespace spe::SPE_ISA {

// FLOP per second of the calling thread, the best of 5 trials of about 10 ms.
template <class Dot>
double peak() {
  constexpr int N = 12;  // at least latency x throughput (2 x 4 to 6), and with two operands no more than 16 registers
  constexpr int64_t kRounds = 3000000;
  vf acc[N];
  for (vf& x : acc) x = splat(0.5f);
  const vf a = splat(0.5f), b = splat(0.25f);
  double best = 0;
  for (int trial = 0; trial < 5; ++trial) {
    asm volatile("" : "+m"(acc));  // the work stays between the clocks
    const auto begin = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < kRounds; ++i)
#pragma GCC unroll 12
      for (vf& x : acc) {
        if constexpr (Dot::kPerWord == 1) x = Dot::multiply_add(x, a, b);  // x a and not a b, which is always the same
        else x = Dot::multiply_add(a, b, x);
      }
    asm volatile("" : "+m"(acc));
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    const double rate = 2.0 * Dot::kPerWord * L * N * kRounds / seconds;
    best = rate > best ? rate : best;
  }
  return best;
}

}  // namespace spe::SPE_ISA
