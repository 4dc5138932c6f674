// SPDX-License-Identifier: Apache-2.0
#include "emulator.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#ifdef __has_feature
#if __has_feature(address_sanitizer) && !defined(__SANITIZE_ADDRESS__)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#if defined(__x86_64__) && defined(__ELF__) && !defined(__SANITIZE_ADDRESS__)
#define SPE_FAST_SWITCH 1
#else
#include <ucontext.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif
#endif

#ifdef SPE_FAST_SWITCH
// Saves a function's callee-saved registers on the stack, stores the stack's address, and returns on the other stack.
extern "C" void spe_emulator_switch(void** from, void* to);
asm(R"(
  .text
  .globl spe_emulator_switch
  .hidden spe_emulator_switch
  .type spe_emulator_switch, @function
spe_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size spe_emulator_switch, .-spe_emulator_switch
)");
#endif

namespace spe::cuda::emulator {
namespace {

using std::to_string;

// -------------------------------------------------------------------------------------------------------------- fibers

[[noreturn]] void enter();  // entry point of a fiber

#ifdef SPE_FAST_SWITCH

struct Context {
  void* stack_pointer;
};

void change(Context& from, Context& to) { spe_emulator_switch(&from.stack_pointer, to.stack_pointer); }
void entered() {}

void prepare(Context& c, char* stack, size_t bytes) {
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) / 64 * 64);
  *--top = nullptr;  // for enter()'s return address, which it does not need
  *--top = reinterpret_cast<void*>(&enter);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  c.stack_pointer = top;
}

#else

struct Context {
  ucontext_t state;
  void* fake;  // this and the rest are for the address sanitizer
  const void* stack;
  size_t bytes;
};
Context* previous;

void entered() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &previous->stack, &previous->bytes);
#endif
}

void change(Context& from, Context& to) {
  previous = &from;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.fake, to.stack, to.bytes);
#endif
  swapcontext(&from.state, &to.state);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.fake, &previous->stack, &previous->bytes);
#endif
}

void prepare(Context& c, char* stack, size_t bytes) {
  getcontext(&c.state);
  c.state.uc_stack.ss_sp = stack;
  c.state.uc_stack.ss_size = bytes;
  c.state.uc_link = nullptr;
  c.stack = stack;
  c.bytes = bytes;
  makecontext(&c.state, reinterpret_cast<void (*)()>(&enter), 0);
}

#endif

// --------------------------------------------------------------------------------------------------------------- state

constexpr int kMaxThreads = 512;
constexpr size_t kMaxSharedBytes = 227 * 1024;  // of any device so far
constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kStackStride = kStackBytes + 704;  // no power of two: their tops would share the sets of a cache
constexpr uint64_t kCanary = 0x5ca1ab1e0ddba11eu;
constexpr uint32_t kEarlierLaunch = 0xffffffffu;
constexpr int kIdleRounds = 1000;  // of failed barrier_tests, with nothing else going on, are a deadlock

const char* const kWaitNames[] = {
    "nothing", "warp_any", "shuffle_xor", "warp_sync", "load_matrix2", "load_matrix2_transposed", "load_matrix4",
    "load_matrix4_transposed", "multiply<BFloat16>", "multiply<Float16>", "multiply8<BFloat16>", "multiply8<Float16>",
    "block_sync", "barrier_wait", "barrier_test", "exited"};

using Four = float __attribute__((vector_size(16)));  // floats

struct Copy {
  uint32_t to;
  const void* from;  // nullptr for zeros
};
struct Group {  // the copies of a thread up to an arrive_after_copies
  std::vector<Copy> copies;
  int barrier;
  uint32_t sequence;
};

struct Fiber {
  Context context;
  Wait wait = Wait::none;
  uint32_t barrier, parity;     // waited for, or tested
  std::vector<Copy> uncovered;  // by an arrive_after_copies so far
  std::vector<Group> groups;    // not landed
  int engine = -1;              // the index of the clock's entry for its copies, -1 before the first one
  uint32_t sequence = 1;
};

struct Warp {
  uint32_t ready, testing;  // lanes that may run; those that may if no other can
  uint32_t arrived;         // at the collective
  Wait kind;
  float given[32], taken[32];     // of shuffle_xor
  uint32_t row[32], word[32][4];  // of load_matrix
  alignas(16) float a[16][16], b[16][8], d[16][8];
};

struct Barrier {
  uint32_t at;
  int count, arrived, promised;  // promised: after copies which have not landed
  uint32_t phase;
  std::vector<uint32_t> pending, done;  // clocks: of the arrivals so far, and of those of the completed phases
  std::vector<int> waiting;
  bool awaited;
};

// State of four bytes of shared memory. A clock's entry names the author of an access: a thread, or its copies.
struct Granule {
  uint32_t write_clock;
  uint16_t writer;
  uint16_t barrier;  // its index + 1
  uint16_t flying;   // the thread whose copy has not landed + 1
  bool written;
  // The reads since the write: a list, and where it would be longer than that an entry for every thread.
  uint8_t readers;
  uint16_t reader[6];
  uint32_t read_clock[6];
  std::unique_ptr<uint32_t[]> all_readers;
};
constexpr int kList = 6;

struct Range {
  uintptr_t begin, end;
  std::vector<uint32_t> writer;  // of every four bytes: 0, kEarlierLaunch or the thread's number in the grid + 1
};

uint32_t seed_of_environment() {
  const char* text = std::getenv("SPATIAL_PE_EMULATOR_SEED");
  return text ? static_cast<uint32_t>(std::strtoul(text, nullptr, 10)) : 0;
}

struct Machine {
  const Launch* launch = nullptr;  // nullptr when idle
  const std::function<void()>* body;
  int block, threads, live;
  int current;  // the running thread, -1 for the scheduler
  int idle;     // rounds of failed tests since anything else happened
  Context main;
  std::exception_ptr failure;
  std::unique_ptr<char[]> stacks;
  Fiber fibers[kMaxThreads];
  Warp warps[kMaxThreads / 32];
  int at_block_sync;

  uint32_t seed = seed_of_environment(), random;
  bool rewrites = false;  // allowed

  // Clocks: `stride` entries for each thread; `width` of them are in use, those of the threads first.
  std::vector<uint32_t> clocks;
  int stride, width, engines;
  int engine_thread[kMaxThreads];

  std::vector<unsigned char> shared;
  std::vector<Granule> granules;
  std::deque<Barrier> barriers;

  std::vector<Range> readable, writable;
};
Machine m;

[[noreturn]] void fail(int thread, const std::string& what) {
  std::string where = m.launch ? "kernel " + std::string(m.launch->kernel) + ", block " + to_string(m.block) : "launch";
  if (thread >= 0) where += ", thread " + to_string(thread);
  throw Error(where + ": " + what);
}
[[noreturn]] void fail(const std::string& what) { fail(m.current, what); }

Fiber& me() { return m.fibers[m.current]; }
Warp& my_warp() { return m.warps[m.current / 32]; }
int lane() { return m.current % 32; }
std::string shared_byte(uint32_t at) { return "shared byte " + to_string(static_cast<int64_t>(at) - kSharedBase); }

// ---------------------------------------------------------------------------------------------------------- scheduling

uint32_t draw() {
  m.random ^= m.random << 13;
  m.random ^= m.random >> 17;
  return m.random ^= m.random << 5;
}

void make_ready(int thread) { m.warps[thread / 32].ready |= 1u << thread % 32; }

// Returns a thread that may run, which then counts as running; -1 if there is none.
int pick() {
  const int warps = m.threads / 32;
  int w = m.current >= 0 ? m.current / 32 : 0;
  if (m.seed && (draw() & 0x300) == 0) w = draw() % warps;
  for (int i = 0; i < warps; ++i, w = w + 1 == warps ? 0 : w + 1) {
    uint32_t ready = m.warps[w].ready;
    if (!ready) continue;
    if (m.seed) {
      const uint32_t from = ~0u << (draw() >> 8) % 32;
      if (ready & from) ready &= from;
    }
    const int l = __builtin_ctz(ready);
    m.warps[w].ready &= ~(1u << l);
    return w * 32 + l;
  }
  return -1;
}

// Lets others run until this fiber is made ready and scheduled.
void pause() {
  Fiber& self = me();
  const int next = pick();
  if (next == m.current) return;
  m.current = next;
  change(self.context, next < 0 ? m.main : m.fibers[next].context);
}

void pause_in(Wait place) {
  me().wait = place;
  pause();
  me().wait = Wait::none;
}

// With a random schedule a thread may be delayed where it need not wait.
void stumble() {
  if (!m.seed || (draw() & 0x30) != 0) return;
  make_ready(m.current);
  pause();
}

[[noreturn]] void enter() {
  entered();
  Fiber& self = me();
  try {
    (*m.body)();
    if (!self.uncovered.empty())
      fail("ends after " + to_string(self.uncovered.size()) + " copies that no barrier_arrive_after_copies covers");
  } catch (...) {
    m.failure = std::current_exception();
  }
  self.wait = Wait::exited;
  --m.live;
  m.idle = 0;
  m.current = -1;
  change(self.context, m.main);
  std::abort();  // never resumed
}

// -------------------------------------------------------------------------------------------------------------- clocks

uint32_t* clock_of(int thread) { return m.clocks.data() + static_cast<size_t>(thread) * m.stride; }

void join(uint32_t* __restrict a, const uint32_t* __restrict b) {
  for (int i = 0; i < m.width; i += 16)
    for (int j = i; j < i + 16; ++j) a[j] = std::max(a[j], b[j]);
}

// Marks that all of these threads have seen all accesses of the others.
void meet(int first, int count) {
  uint32_t* all = clock_of(first);
  for (int i = 1; i < count; ++i) join(all, clock_of(first + i));
  for (int i = 1; i < count; ++i) std::memcpy(clock_of(first + i), all, m.width * sizeof(uint32_t));
  for (int i = 0; i < count; ++i) ++clock_of(first + i)[first + i];
}

// ------------------------------------------------------------------------------------------------------- shared memory

Granule& granule(uint32_t at) { return m.granules[(at - kSharedBase) / 4]; }

void check_place(int thread, uint32_t at, uint32_t bytes, const char* verb) {
  if (at < kSharedBase || at - kSharedBase + uint64_t{bytes} > m.shared.size())
    fail(thread, std::string(verb) + " " + to_string(bytes) + " bytes at " + shared_byte(at) +
                     ", out of bounds: there are " + to_string(m.shared.size()));
  if (at % bytes)
    fail(thread, std::string(verb) + " " + to_string(bytes) + " bytes at " + shared_byte(at) + ", misaligned");
}

// Checks that the last write came before the thread's current access.
void check_write_seen(int thread, uint32_t at, const Granule& g, const char* verb) {
  if (!g.written || clock_of(thread)[g.writer] >= g.write_clock) return;
  const std::string start = "race: thread " + to_string(thread) + " " + verb + " " + shared_byte(at);
  if (g.writer < m.threads)
    fail(thread, start + " that thread " + to_string(g.writer) + " wrote without a barrier between");
  fail(thread, start + " that a copy of thread " + to_string(m.engine_thread[g.writer - m.threads]) +
                   " wrote, without waiting for the copy's barrier");
}

void check_ordinary(int thread, uint32_t at, const Granule& g, const char* verb) {
  if (g.barrier) fail(thread, std::string(verb) + " " + shared_byte(at) + ", which is part of a barrier");
  if (g.flying)
    fail(thread, std::string(verb) + " " + shared_byte(at) + " while a copy of thread " + to_string(g.flying - 1) +
                     " to it is in flight");
}

void note_read(Granule& g, int thread) {
  const uint32_t* clock = clock_of(thread);
  if (!g.all_readers) {
    int i = 0;
    while (i < g.readers && g.reader[i] != thread) ++i;
    if (i == kList) {  // drops the reads that this thread has seen: later accesses also come after them
      i = 0;
      for (int j = 0; j < kList; ++j) {
        if (clock[g.reader[j]] >= g.read_clock[j]) continue;
        g.reader[i] = g.reader[j];
        g.read_clock[i++] = g.read_clock[j];
      }
      g.readers = i;
    }
    if (i < kList) {
      g.reader[i] = thread;
      g.read_clock[i] = clock[thread];
      if (i == g.readers) ++g.readers;
      return;
    }
    g.all_readers.reset(new uint32_t[m.threads]());
    for (int j = 0; j < kList; ++j) g.all_readers[g.reader[j]] = g.read_clock[j];
  }
  g.all_readers[thread] = clock[thread];
}

const unsigned char* read(int thread, uint32_t at, uint32_t bytes) {
  check_place(thread, at, bytes, "reads");
  for (uint32_t i = 0; i < bytes; i += 4) {
    Granule& g = granule(at + i);
    check_ordinary(thread, at + i, g, "reads");
    if (!g.written) fail(thread, "reads " + shared_byte(at + i) + ", which was never written");
    check_write_seen(thread, at + i, g, "reads");
    note_read(g, thread);
  }
  return &m.shared[at - kSharedBase];
}

unsigned char* write(uint32_t at, uint32_t bytes, const char* verb) {
  const int thread = m.current;
  const uint32_t* clock = clock_of(thread);
  check_place(thread, at, bytes, verb);
  for (uint32_t i = 0; i < bytes; i += 4) {
    Granule& g = granule(at + i);
    check_ordinary(thread, at + i, g, verb);
    check_write_seen(thread, at + i, g, verb);
    for (int j = 0, n = g.all_readers ? m.threads : g.readers; j < n; ++j) {
      const int reader = g.all_readers ? j : g.reader[j];
      if (clock[reader] < (g.all_readers ? g.all_readers[j] : g.read_clock[j]))
        fail("race: thread " + to_string(thread) + " " + verb + " " + shared_byte(at + i) + " that thread " +
             to_string(reader) + " read without a barrier between");
    }
    g.readers = 0;
    g.all_readers.reset();
    g.written = true;
    g.writer = thread;
    g.write_clock = clock[thread];
  }
  return &m.shared[at - kSharedBase];
}

// ------------------------------------------------------------------------------------------------------------ barriers

Barrier& barrier_at(uint32_t at, const char* verb) {
  check_place(m.current, at, 8, verb);
  const Granule& g = granule(at);
  if (!g.barrier) fail(std::string(verb) + " " + shared_byte(at) + ", which was not initialised as a barrier");
  check_write_seen(m.current, at, g, verb);
  return m.barriers[g.barrier - 1];
}

// One of the arrivals of a phase. Promised ones count: the barrier could not distinguish early arrivals for the next
// phase.
void check_count(const Barrier& b) {
  if (b.arrived + b.promised >= b.count)
    fail("arrives at the barrier at " + shared_byte(b.at) + " more often than its count, " + to_string(b.count) +
         ", within a phase");
}

bool passed(const Barrier& b, uint32_t parity) {
  if (parity > 1) fail("waits for parity " + to_string(parity) + " of a barrier");
  return (b.phase & 1) != parity;
}

// Lets others run, while the phase is not complete.
void pause_at(const Barrier& b, uint32_t parity, Wait place) {
  me().barrier = b.at;
  me().parity = parity;
  pause_in(place);
}

// Records that the thread has seen everything before the phase.
void pass(const Barrier& b) {
  join(clock_of(m.current), b.done.data());
  stumble();
}

void arrive(Barrier& b) {
  m.idle = 0;
  if (++b.arrived < b.count) return;
  b.arrived = 0;
  ++b.phase;
  b.done = b.pending;
  for (int thread : b.waiting) make_ready(thread);
  b.waiting.clear();
}

void land(Fiber& fiber) {
  const Group group = std::move(fiber.groups.front());
  fiber.groups.erase(fiber.groups.begin());
  for (const Copy& copy : group.copies) {
    unsigned char* to = &m.shared[copy.to - kSharedBase];
    if (copy.from) std::memcpy(to, copy.from, 16);
    else std::memset(to, 0, 16);
    for (int i = 0; i < 16; i += 4) {
      Granule& g = granule(copy.to + i);
      g.flying = 0;
      g.writer = m.threads + fiber.engine;
      g.write_clock = group.sequence;
    }
  }
  Barrier& b = m.barriers[group.barrier];
  // With these copies all earlier ones of the thread have landed.
  if (fiber.engine >= 0) b.pending[m.threads + fiber.engine] = group.sequence;
  --b.promised;
  arrive(b);
}

// -------------------------------------------------------------------------------------------------- when none can run

bool anybody_ready() {
  return std::any_of(m.warps, m.warps + m.threads / 32, [](const Warp& w) { return w.ready != 0; });
}

// Lands copies that are waited for, until one thread can continue. Returns whether any has landed.
bool land_awaited() {
  for (Barrier& b : m.barriers) b.awaited = false;
  for (int t = 0; t < m.threads; ++t) {
    const Fiber& f = m.fibers[t];
    if (f.wait != Wait::barrier_wait && f.wait != Wait::barrier_test) continue;
    Barrier& b = m.barriers[granule(f.barrier).barrier - 1];
    if (!passed(b, f.parity)) b.awaited = true;
  }
  bool landed = false;
  const int start = m.seed ? draw() % m.threads : 0;
  for (int i = 0; i < m.threads; ++i) {
    Fiber& f = m.fibers[(start + i) % m.threads];
    const auto group = std::find_if(f.groups.begin(), f.groups.end(),
                                    [](const Group& g) { return m.barriers[g.barrier].awaited; });
    if (group == f.groups.end()) continue;
    Barrier& b = m.barriers[group->barrier];
    const uint32_t phase = b.phase;
    for (auto n = group - f.groups.begin(); n >= 0; --n) land(f);
    landed = true;
    if (b.phase != phase || anybody_ready()) break;
  }
  return landed;
}

std::string who_waits_where() {
  std::map<std::string, int> counts;
  for (int t = 0; t < m.threads; ++t) {
    const Fiber& f = m.fibers[t];
    std::string place = kWaitNames[static_cast<int>(f.wait)];
    if (f.wait < Wait::block_sync) place += " of warp " + to_string(t / 32);
    if (f.wait == Wait::barrier_wait || f.wait == Wait::barrier_test)
      place += " (barrier at " + shared_byte(f.barrier) + ", parity " + to_string(f.parity) + ")";
    ++counts[f.wait == Wait::exited ? "have ended" : "wait in " + place];
  }
  std::string text;
  for (const auto& [place, count] : counts) text += (text.empty() ? "" : ", ") + to_string(count) + " threads " + place;
  return text;
}

void unblock() {
  const bool landed = land_awaited();
  bool testing = false;
  for (int w = 0; w < m.threads / 32; ++w) {
    testing |= m.warps[w].testing != 0;
    m.warps[w].ready |= m.warps[w].testing;
    m.warps[w].testing = 0;
  }
  if (landed || (testing && ++m.idle < kIdleRounds)) return;
  const bool diverged = std::any_of(m.warps, m.warps + m.threads / 32, [](const Warp& w) { return w.arrived != 0; });
  fail((diverged ? "warp diverged: " : "deadlock: ") + who_waits_where());
}

void run_block() {
  for (int t = 0; t < m.threads; ++t) {
    char* stack = m.stacks.get() + t * kStackStride;
    m.fibers[t] = Fiber{};
    prepare(m.fibers[t].context, stack, kStackBytes);
    std::memcpy(stack, &kCanary, sizeof kCanary);
  }
  for (int w = 0; w < m.threads / 32; ++w) {
    m.warps[w].ready = 0xffffffffu;
    m.warps[w].testing = m.warps[w].arrived = 0;
  }
  m.live = m.threads;
  m.idle = m.at_block_sync = m.engines = 0;
  m.width = m.threads;
  m.stride = 2 * m.threads;
  m.clocks.assign(static_cast<size_t>(m.threads) * m.stride, 0);
  for (int t = 0; t < m.threads; ++t) clock_of(t)[t] = 1;
  m.shared.assign(m.launch->shared_bytes, 0xff);
  m.granules.clear();
  m.granules.resize((m.launch->shared_bytes + 3) / 4);
  m.barriers.clear();
  m.current = -1;

  while (m.live > 0) {
    const int next = pick();
    if (next < 0) {
      unblock();
      continue;
    }
    m.current = next;
    change(m.main, m.fibers[next].context);
    if (m.failure) std::rethrow_exception(std::exchange(m.failure, nullptr));
  }
  for (int t = 0; t < m.threads; ++t)
    if (std::memcmp(m.stacks.get() + t * kStackStride, &kCanary, sizeof kCanary) != 0)
      fail(t, "stack overflow of its fiber");
}

// ---------------------------------------------------------------------------------------------------- warp collectives

// Returns whether the lane is the last of its warp to arrive, which does the work and calls leave(). The others return
// after that.
bool last_to_meet(Wait kind) {
  Warp& w = my_warp();
  if (w.arrived && w.kind != kind)
    fail("warp diverged: lane " + to_string(lane()) + " is at " + kWaitNames[static_cast<int>(kind)] + ", lane " +
         to_string(__builtin_ctz(w.arrived)) + " at " + kWaitNames[static_cast<int>(w.kind)]);
  w.kind = kind;
  w.arrived |= 1u << lane();
  if (w.arrived == 0xffffffffu) return true;
  pause_in(kind);
  return false;
}

void leave() {
  Warp& w = my_warp();
  w.arrived = 0;
  w.ready |= ~(1u << lane());
}

// d += a b of the warp, with `depth` columns of a: each sum in their order, and sixteen sums at a time as an addition
// takes several cycles. The products are exact (but for underflow).
void multiply_all(Warp& w, int depth) {
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 8; j += 4) {
      Four sum[4], b;
      for (int n = 0; n < 4; ++n) std::memcpy(&sum[n], &w.d[i + n][j], sizeof b);
      for (int k = 0; k < depth; ++k) {
        std::memcpy(&b, &w.b[k][j], sizeof b);
        for (int n = 0; n < 4; ++n) sum[n] += w.a[i + n][k] * b;
      }
      for (int n = 0; n < 4; ++n) std::memcpy(&w.d[i + n][j], &sum[n], sizeof b);
    }
  }
}

void copy_pair(float* to, const float* from) { std::memcpy(to, from, 2 * sizeof(float)); }

void load_rows(Warp& w, int matrices, bool transposed) {
  const int first = m.current / 32 * 32;
  for (int i = 0; i < matrices; ++i) {
    uint16_t matrix[8][8];
    for (int r = 0; r < 8; ++r) std::memcpy(matrix[r], read(first + i * 8 + r, w.row[i * 8 + r], 16), 16);
    for (int l = 0; l < 32; ++l) {
      const int r = l / 4, c = l % 4 * 2;
      const uint32_t low = transposed ? matrix[c][r] : matrix[r][c];
      const uint32_t high = transposed ? matrix[c + 1][r] : matrix[r][c + 1];
      w.word[l][i] = low | high << 16;
    }
  }
}

// ------------------------------------------------------------------------------------------------------- global memory

Range* find(std::vector<Range>& ranges, uintptr_t at, size_t bytes) {
  for (Range& r : ranges)
    if (r.begin <= at && at < r.end && bytes <= r.end - at) return &r;
  return nullptr;
}

Range range_of(const void* p, size_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p);
  return {begin, begin + bytes, {}};
}

Range& check_global(std::vector<Range>& ranges, uintptr_t at, size_t bytes, const char* verb) {
  Range* const range = find(ranges, at, bytes);
  if (range && at % bytes == 0) return *range;
  const std::string what = std::string(verb) + " " + to_string(bytes) + " bytes of global memory, ";
  if (range) fail(what + "misaligned");
  const Range* below = nullptr;  // the last range that starts before, for the message
  for (const Range& r : ranges)
    if (r.begin <= at && (!below || r.begin > below->begin)) below = &r;
  fail(what + "out of bounds" + (!below ? "" : ": at byte " + to_string(at - below->begin) + " of a range of " +
                                                   to_string(below->end - below->begin)));
}

// Checks that nothing was written there during the launch.
void check_unwritten(const Range& r, uintptr_t at, size_t bytes, const char* what) {
  for (uintptr_t i = at / 4; i < (at + bytes) / 4; ++i)
    if (const uint32_t writer = r.writer[i - r.begin / 4]; writer && writer != kEarlierLaunch)
      fail(what + std::string(", first by thread ") + to_string((writer - 1) % m.threads) + " of block " +
           to_string((writer - 1) / m.threads) + ": byte " + to_string(i * 4 - r.begin) + " of its range");
}

}  // namespace

const void* global_read(const void* p, size_t bytes) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  check_global(m.readable, at, bytes, "reads");
  if (const Range* r = find(m.writable, at, bytes))
    check_unwritten(*r, at, bytes, "reads global memory written during the launch");
  return p;
}

void* global_write(void* p, size_t bytes) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  Range& r = check_global(m.writable, at, bytes, "writes");
  if (!m.rewrites) check_unwritten(r, at, bytes, "global memory written twice");
  for (uintptr_t i = at / 4; i < (at + bytes) / 4; ++i)
    r.writer[i - r.begin / 4] = static_cast<uint32_t>(m.block) * m.threads + m.current + 1;
  return p;
}

void allow_read(const void* p, size_t bytes) { m.readable.push_back(range_of(p, bytes)); }

void allow_write(void* p, size_t bytes) {
  Range r = range_of(p, bytes);
  r.writer.assign((r.end + 3) / 4 - r.begin / 4, 0);
  m.writable.push_back(std::move(r));
}

void forget_ranges() {
  m.readable.clear();
  m.writable.clear();
}

size_t unwritten(const void* p, size_t bytes) {
  if (bytes == 0) return 0;
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  const Range* r = find(m.writable, at, bytes);
  if (!r) throw Error("unwritten: these bytes were not allowed to be written");
  size_t count = 0;
  for (uintptr_t i = at; i < at + bytes; ++i) count += r->writer[i / 4 - r->begin / 4] == 0;
  return count;
}

// -------------------------------------------------------------------------------------------------------------- launch

void set_schedule(uint32_t seed) { m.seed = seed; }
void allow_rewrites(bool allowed) { m.rewrites = allowed; }

void run(const Launch& launch, const std::function<void()>& body) {
  if (m.launch) throw Error("a launch within a launch");
  if (launch.blocks < 1 || launch.threads < 32 || launch.threads > kMaxThreads || launch.threads % 32 ||
      launch.shared_bytes > kMaxSharedBytes)
    throw Error(std::string("kernel ") + launch.kernel + ": cannot launch " + to_string(launch.blocks) + " blocks of " +
                to_string(launch.threads) + " threads with " + to_string(launch.shared_bytes) +
                " bytes of shared memory");
  if (!m.stacks) m.stacks.reset(new char[kMaxThreads * kStackStride]);
  for (Range& r : m.writable)
    for (uint32_t& writer : r.writer)
      if (writer) writer = kEarlierLaunch;
  m.body = &body;
  m.threads = launch.threads;
  m.random = m.seed * 2654435761u | 1;
  struct Running {
    explicit Running(const Launch* l) { m.launch = l; }
    ~Running() { m.launch = nullptr; }
  } running(&launch);
  for (m.block = 0; m.block < launch.blocks; ++m.block) run_block();
}

// --------------------------------------------------------------------------------------------------- what kernels call

int thread_index() { return m.current; }
int block_size() { return m.threads; }
int block_index() { return m.block; }

const void* shared_read(uint32_t at, uint32_t bytes) { return read(m.current, at, bytes); }
void* shared_write(uint32_t at, uint32_t bytes) { return write(at, bytes, "writes"); }

void block_sync() {
  if (++m.at_block_sync < m.threads) {
    pause_in(Wait::block_sync);
    return;
  }
  m.at_block_sync = m.idle = 0;
  meet(0, m.threads);
  for (int t = 0; t < m.threads; ++t)
    if (t != m.current) make_ready(t);
  stumble();
}

void warp_sync() {
  if (!last_to_meet(Wait::warp_sync)) return;
  meet(m.current / 32 * 32, 32);
  leave();
}

bool warp_any(bool p) {
  Warp& w = my_warp();
  w.given[lane()] = p;
  if (last_to_meet(Wait::any)) {
    const bool any = std::any_of(w.given, w.given + 32, [](float x) { return x != 0; });
    std::fill(w.taken, w.taken + 32, any);
    leave();
  }
  return w.taken[lane()] != 0;
}

float shuffle_xor(float x, int mask) {
  if (mask < 0 || mask > 31) fail("shuffle_xor with mask " + to_string(mask));
  Warp& w = my_warp();
  w.given[lane()] = x;
  w.row[lane()] = lane() ^ mask;
  if (last_to_meet(Wait::shuffle)) {
    for (int l = 0; l < 32; ++l) w.taken[l] = w.given[w.row[l]];
    leave();
  }
  return w.taken[lane()];
}

void load_matrix(uint32_t* r, Wait kind, uint32_t row) {
  Warp& w = my_warp();
  const int matrices = kind == Wait::matrix4 || kind == Wait::matrix4_transposed ? 4 : 2;
  w.row[lane()] = row;
  if (last_to_meet(kind)) {
    load_rows(w, matrices, kind == Wait::matrix2_transposed || kind == Wait::matrix4_transposed);
    leave();
  }
  std::copy(w.word[lane()], w.word[lane()] + matrices, r);
}

void multiply(float (&d)[4], const float* a, const float* b, Wait kind) {
  Warp& w = my_warp();
  const int depth = kind == Wait::multiply_bf16 || kind == Wait::multiply_f16 ? 16 : 8;
  const int g = lane() / 4, t = lane() % 4 * 2;
  copy_pair(&w.a[g][t], a);
  copy_pair(&w.a[g + 8][t], a + 2);
  w.b[t][g] = b[0];
  w.b[t + 1][g] = b[1];
  if (depth == 16) {
    copy_pair(&w.a[g][t + 8], a + 4);
    copy_pair(&w.a[g + 8][t + 8], a + 6);
    w.b[t + 8][g] = b[2];
    w.b[t + 9][g] = b[3];
  }
  copy_pair(&w.d[g][t], d);
  copy_pair(&w.d[g + 8][t], d + 2);
  if (last_to_meet(kind)) {
    multiply_all(w, depth);
    leave();
  }
  copy_pair(d, &w.d[g][t]);
  copy_pair(d + 2, &w.d[g + 8][t]);
}

void barrier_init(uint32_t at, int count) {
  if (count < 1) fail("initialises a barrier with count " + to_string(count));
  write(at, 8, "initialises a barrier at");
  const std::vector<uint32_t> none(m.stride, 0);
  m.barriers.push_back({at, count, 0, 0, 0, none, none, {}, false});
  granule(at).barrier = granule(at + 4).barrier = static_cast<uint16_t>(m.barriers.size());
}

void barrier_arrive(uint32_t at) {
  Barrier& b = barrier_at(at, "arrives at the barrier at");
  check_count(b);
  join(b.pending.data(), clock_of(m.current));
  ++clock_of(m.current)[m.current];
  arrive(b);
  stumble();
}

// Orders only the copies: the thread's own accesses are not part of this arrival.
void barrier_arrive_after_copies(uint32_t at) {
  Barrier& b = barrier_at(at, "arrives at the barrier at");
  check_count(b);
  ++b.promised;
  Fiber& self = me();
  self.groups.push_back({std::move(self.uncovered), granule(at).barrier - 1, self.sequence++});
  self.uncovered.clear();
  stumble();
}

bool barrier_test(uint32_t at, uint32_t parity) {
  Barrier& b = barrier_at(at, "tests the barrier at");
  if (passed(b, parity)) {
    pass(b);
    return true;
  }
  // The others first; with a random schedule only perhaps.
  if (m.seed && (draw() & 0x10)) make_ready(m.current);
  else my_warp().testing |= 1u << lane();
  pause_at(b, parity, Wait::barrier_test);
  return false;
}

void barrier_wait(uint32_t at, uint32_t parity) {
  Barrier& b = barrier_at(at, "waits for the barrier at");
  while (!passed(b, parity)) {  // again after each phase: the thread may have missed it, as on a GPU
    b.waiting.push_back(m.current);
    pause_at(b, parity, Wait::barrier_wait);
  }
  pass(b);
}

void copy_async(uint32_t to, const void* from, bool exists) {
  if (reinterpret_cast<uintptr_t>(from) % 16) fail("copies from global memory, misaligned");
  if (exists) global_read(from, 16);
  write(to, 16, "copies to");
  for (int i = 0; i < 16; i += 4) granule(to + i).flying = static_cast<uint16_t>(m.current + 1);
  Fiber& self = me();
  self.uncovered.push_back({to, exists ? from : nullptr});
  if (self.engine >= 0) return;
  self.engine = m.engines;
  m.engine_thread[m.engines++] = m.current;
  m.width = (m.threads + m.engines + 15) / 16 * 16;
}

}  // namespace spe::cuda::emulator
