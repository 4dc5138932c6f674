// SPDX-License-Identifier: Apache-2.0
// The rotation alone: out = R(x), or x itself, one pass over memory. For attention that is not ours.
#pragma once

#include "dispatch.h"
#include "pack.h"
#include "schedule.h"

namespace spe::SPE_ISA {

template <class T>
void rotate(const Rotation& r) {
  constexpr int64_t kBlock = 32;  // tokens of a part
  const int64_t blocks = (r.tokens + kBlock - 1) / kBlock, parts = r.batch * blocks;
  // a part of few heads takes less time than waking a thread
  const bool small = r.batch * r.tokens * r.heads * r.head_dim < 1 << 15;
  const int threads = small ? 1 : usable_threads(r.threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
#pragma omp for schedule(monotonic : dynamic, 1)
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t sample = part / blocks, from = part % blocks * kBlock;
    const int64_t to = from + kBlock < r.tokens ? from + kBlock : r.tokens;
    for (int64_t token = from; token < to; ++token)
      for (int head = 0; head < r.heads; ++head) {
        const auto x = source<const T>(r.tables, r.x, sample, token, head, head, r.pairs);
        const auto out = source<T>(r.tables, r.out, sample, token, head, head, r.pairs);
        load_row(x.data, x.cos, x.sin, r.pairs, r.head_dim, out.data);
      }
  }
}

}  // namespace spe::SPE_ISA
