// SPDX-License-Identifier: Apache-2.0
// What GCC calls for the parallel regions of csrc/cpu/schedule.h, on pthreads: for `make races` in place of libgomp, whose
// barriers ThreadSanitizer does not see (it would report every part that follows another's).
//
// Parts are taken by relaxed atomics: a lock would put them in an order that they do not have, and hide races.
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace {

struct Team {
  explicit Team(unsigned threads) : size(threads) {}

  void barrier() {
    std::unique_lock<std::mutex> lock(mutex);
    const unsigned here = round;
    if (++waiting == size) {
      waiting = 0;
      ++round;
      changed.notify_all();
    } else {
      changed.wait(lock, [&] { return round != here; });
    }
  }

  const unsigned size;
  std::mutex mutex;
  std::condition_variable changed;
  unsigned waiting = 0, round = 0;
  std::atomic<long> taken[64] = {};  // iterations of each loop of the region: none has to be set up
};

struct Loop {
  int number;
  long start, end, step, chunk;
};

thread_local Team* team = nullptr;
thread_local int number = 0;
thread_local Loop loop;

bool take(long* from, long* to) {
  std::this_thread::yield();  // or the first would take all parts of a small problem
  const long at = team->taken[loop.number].fetch_add(loop.chunk, std::memory_order_relaxed);
  *from = loop.start + at * loop.step;
  *to = *from + loop.chunk * loop.step;
  if (*to > loop.end) *to = loop.end;
  return *from < loop.end;
}

}  // namespace

extern "C" {

void GOMP_parallel(void (*region)(void*), void* data, unsigned threads, unsigned) {
  Team mine(threads);
  const auto work = [&mine, region, data](int me) {
    team = &mine;
    number = me;
    loop.number = -1;
    mine.barrier();  // or the first would be done before the last begins
    region(data);
    team = nullptr;
    number = 0;
  };
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; ++i) others.emplace_back(work, static_cast<int>(i));
  work(0);
  for (std::thread& other : others) other.join();
}

void GOMP_barrier() { team->barrier(); }

bool GOMP_loop_dynamic_next(long* from, long* to) { return take(from, to); }

bool GOMP_loop_dynamic_start(long start, long end, long step, long chunk, long* from, long* to) {
  if (loop.number + 1 == 64) std::abort();
  loop = {loop.number + 1, start, end, step, chunk};
  return take(from, to);
}

void GOMP_loop_end() { team->barrier(); }
void GOMP_loop_end_nowait() {}

int omp_get_thread_num() { return number; }
}
