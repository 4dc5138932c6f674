// SPDX-License-Identifier: Apache-2.0
// Distribution of work over threads. An item is one key head of one sequence, done in phases of independent parts. As
// many items as divide evenly are done by one thread each; the remaining ones are done one after another by all threads
// together, each part begun after those before it. The result of a part does not depend on the thread, so results do not
// depend on the number of threads.
#pragma once

#include <atomic>
#include <vector>

#include "../common/problem.h"
#include "scratch.h"

namespace spe {

struct Item {
  Sequence sequence;
  int kv_head;
};

// The number of threads to use now: 1 in a process that was forked from one whose OpenMP workers already ran, because
// libgomp's workers do not survive a fork and a parallel region would wait for them forever.
int usable_threads(int wanted);
int thread_number();  // inside a parallel region

// The next share of [0, count): half of each thread's part of the rest. Large shares first, because neighbouring heads
// share cache lines, small ones at the end, so that no thread waits long for the last (shares of a fixed eighth cost 5
// % of 48 heads on two threads).
struct Share {
  int64_t from, to;
};
inline Share next_share(std::atomic<int64_t>& taken, int64_t count, int threads) {
  int64_t from = taken.load(std::memory_order_relaxed), to;
  do {
    const int64_t half = (count - from) / (2 * threads);
    to = from >= count ? from : from + (half < 1 ? 1 : half);
  } while (!taken.compare_exchange_weak(from, to, std::memory_order_relaxed));
  return {from, to};
}

// Kernel:
//   size_t item_bytes()                    working memory for one item, shared by its threads
//   size_t thread_bytes()                  working memory of a thread
//   int phases(); int64_t parts(item, phase)
//   void part(item, phase, part, together, char* item_memory, char* thread_memory)
template <class Kernel>
void run(const Kernel& kernel, const Problem& p) {
  const int64_t items = static_cast<int64_t>(p.sequences.size()) * p.kv_heads;
  if (items == 0) return;
  const int threads = usable_threads(p.threads);
  const int64_t alone = items / threads * threads;
  const auto item_at = [&p](int64_t i) {
    return Item{p.sequences[static_cast<size_t>(i / p.kv_heads)], static_cast<int>(i % p.kv_heads)};
  };
  // allocate before the region: nothing inside it can throw
  const size_t item_bytes = whole_lines(kernel.item_bytes());
  const size_t thread_bytes = whole_lines(kernel.thread_bytes());
  const Workspace memory(item_bytes, thread_bytes, threads);
  char* const data = memory.data();
  std::atomic<int64_t> taken{0};

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int me = thread_number();
    char* const mine = data + static_cast<size_t>(me) * (item_bytes + thread_bytes);
    char* const ours = data;
    for (Share share; (share = next_share(taken, alone, threads)).from < alone;)
      for (int64_t i = share.from; i < share.to; ++i) {
        const Item item = item_at(i);
        for (int phase = 0; phase < kernel.phases(); ++phase)
          for (int64_t part = 0; part < kernel.parts(item, phase); ++part)
            kernel.part(item, phase, part, false, mine, mine + item_bytes);
      }
#pragma omp barrier  // the first thread's memory for an item is shared by all
    for (int64_t i = alone; i < items; ++i) {
      const Item item = item_at(i);
      for (int phase = 0; phase < kernel.phases(); ++phase) {
        const int64_t parts = kernel.parts(item, phase);
        // in ascending order: a part may wait for those before it
#pragma omp for schedule(monotonic : dynamic, 1)
        for (int64_t part = 0; part < parts; ++part)
          kernel.part(item, phase, part, true, ours, mine + item_bytes);
      }
    }
  }
}

}  // namespace spe
