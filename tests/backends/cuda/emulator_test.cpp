// SPDX-License-Identifier: Apache-2.0
// Tests of csrc/cuda/emulator: right kernels compute what plain loops compute, every fault is found.
//   emulator_test --list      names of the cases
//   emulator_test [NAME...]   runs these, or all
#include <regex.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <iterator>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "primitives.h"

namespace spe::cuda {
namespace {

using emulator::allow_read;
using emulator::allow_write;
using emulator::forget_ranges;
using emulator::run;
using emulator::unwritten;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

#define CHECK(condition) \
  if (!(condition)) throw std::runtime_error("line " + std::to_string(__LINE__) + ": " #condition)

// ------------------------------------------------------------------------------------------- what most kernels work on

constexpr int kThreads = 64;
constexpr size_t kSharedBytes = 4096;

int lane() { return thread_index() % 32; }
Shared word(int i) { return shared_memory() + 4 * i; }
Shared four(int i) { return shared_memory() + 16 * i; }
Shared barrier(int i) { return shared_memory() + 1024 + 8 * i; }

alignas(16) float in[1024], out[1024], both[1024];  // to read, to write; in[i] is i

void allow() {
  forget_ranges();
  for (int i = 0; i < 1024; ++i) in[i] = static_cast<float>(i);
  allow_read(in, sizeof in), allow_write(out, sizeof out);
  allow_read(both, sizeof both), allow_write(both, sizeof both);
}

// Barriers 0 and 1, with these counts; and word 0.
void init_barriers(int count = kThreads, int other = kThreads) {
  if (thread_index() == 0) barrier_init(barrier(0), count), barrier_init(barrier(1), other), store_shared(word(0), 0);
  block_sync();
}

std::string error_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const std::runtime_error& e) {  // an Error, or of a CHECK
    return e.what();
  }
  return "";
}

// ---------------------------------------------------------------------------------------------- kernels that are right

// Every finite number, and the floats around the middle of it and the next one.
template <class E, int mantissa, int bias>
void conversions() {
  const auto value = [](uint32_t h) {
    const int exponent = h >> mantissa, fraction = h & ((1 << mantissa) - 1);
    return exponent ? std::ldexp((1 << mantissa) + fraction, exponent - bias - mantissa)
                    : std::ldexp(fraction, 1 - bias - mantissa);
  };
  const auto rounded = [](float x) {  // and -x
    const uint32_t w = pack<E>(x, -x);
    CHECK(w >> 16 == (w & 0xffffu) + 0x8000);
    return w & 0xffffu;
  };
  const uint32_t infinity = 0x8000 - (1 << mantissa);
  for (uint32_t h = 0; h < infinity; ++h) {
    const float x = value(h), middle = (value(h) + value(h + 1)) / 2;
    CHECK(unpack<E>(h).f[0] == x && unpack<E>((h + 0x8000) << 16).f[1] == -x);
    CHECK(rounded(x) == h);
    CHECK(rounded(std::nextafter(middle, 0.0f)) == h);
    CHECK(rounded(middle) == h + (h & 1));
    CHECK(rounded(std::nextafter(middle, kInfinity)) == h + 1);
  }
  CHECK(unpack<E>(infinity).f[0] == kInfinity && rounded(kInfinity) == infinity);
  CHECK(std::isnan(unpack<E>(infinity + 1).f[0]) && pack<E>(0, NAN) == 0x7fff0000u);
}

void exponentials() {
  CHECK(exp2(3.0f) == 8 && exp2(-126.0f) == 0x1p-126f && exp2(-126.5f) == 0);
  CHECK(exp2(-kInfinity) == 0 && exp2(200.0f) == kInfinity && std::isnan(exp2(NAN)));
  CHECK(log2(8.0f) == 3 && log2(1e-40f) == -kInfinity && log2(0.0f) == -kInfinity);
}

void collectives() {
  std::vector<int> seen(3 * kThreads);
  run({"collectives", 3, kThreads, 0}, [&] {
    const int t = thread_index();
    ++seen[block_index() * block_size() + t];
    CHECK(block_size() == kThreads && warp_index() == t / 32 && opaque(t) == t);
    CHECK(warp_any(t == 5) == (t < 32));
    CHECK(shuffle_xor(static_cast<float>(t), 3) == static_cast<float>(t ^ 3));
    CHECK(shuffle_xor(0x7f800000u + t, 17) == 0x7f800000u + (t ^ 17));  // NaN, if it were taken for a float
    float sum = static_cast<float>(lane());
    for (int mask = 1; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
    CHECK(sum == 31 * 32 / 2);
  });
  CHECK(seen == std::vector<int>(3 * kThreads, 1));
}

// Every form of a load and a store.
void memory() {
  allow();
  run({"memory", 1, 32, kSharedBytes}, [] {
    const int t = thread_index();
    store_shared_float(word(t), load_global_float(in + t));
    store_shared(word(32 + t), load_global1(in + 32 + t));
    store_shared_float2(word(64 + 2 * t), load_global_float2(in + 64 + 2 * t));
    store_shared2(word(128 + 2 * t), load_global2(in + 128 + 2 * t));
    warp_sync();
    store_global_float(out + t, load_shared_float(word(t)));
    store_global1(out + 32 + t, load_shared(word(32 + t)));
    store_global2(out + 64 + 2 * t, load_shared2(word(64 + 2 * t)));
    const Float2 two = load_shared_float2(word(128 + 2 * t));
    for (int i = 0; i < 2; ++i) store_global_float(out + 128 + 2 * t + i, two.f[i]);
    const Float4 f = load_shared_float4(word(4 * t)), same_f = load_global_float4(in + 4 * t);
    const Word4 w = load_shared4(word(4 * t)), same_w = load_global4(in + 4 * t);
    for (int i = 0; i < 4; ++i) CHECK(f.f[i] == in[4 * t + i] && f.f[i] == same_f.f[i] && w.w[i] == same_w.w[i]);
    CHECK(load_global_int(reinterpret_cast<int*>(in) + 1) == 0x3f800000);
  });
  CHECK(std::equal(in, in + 192, out));
  CHECK(unwritten(out, sizeof out) == sizeof out - 192 * 4 && unwritten(out + 191, 6) == 2);
}

// What one launch wrote another one may read, or write again.
void launches() {
  allow();
  const auto write = [] { store_global_float(both + thread_index(), 1); };
  run({"writes", 1, 32, 0}, write);
  run({"reads", 1, 32, 0}, [] { CHECK(load_global_float(both + thread_index()) == 1); });
  run({"writes", 1, 32, 0}, write);
  const auto nothing = [] {};
  const auto fails = [](const char* words, const std::function<void()>& f) {
    return error_of(f).find(words) != std::string::npos;
  };
  CHECK(fails("cannot launch", [&] { run({"odd", 1, 33, 0}, nothing); }));
  CHECK(fails("cannot launch", [&] { run({"large", 1, 32, 1 << 20}, nothing); }));
  CHECK(fails("within a launch", [&] { run({"outer", 1, 32, 0}, [&] { run({"inner", 1, 32, 0}, nothing); }); }));
  CHECK(fails("not allowed to be written", [] { unwritten(in, 4); }));
  CHECK(error_of([] { run({"throws", 1, 32, 0}, [] { throw std::runtime_error("its own"); }); }) == "its own");
}

// Other seeds, other orders of lanes and of warps; the same seed, the same order.
void schedules() {
  const auto order = [](uint32_t seed) {
    std::vector<int> threads;
    emulator::set_schedule(seed);
    run({"order", 1, kThreads, 0}, [&] { threads.push_back(thread_index()); });
    return threads;
  };
  const std::vector<int> plain = order(0), first = order(1), second = order(2);
  CHECK(std::is_sorted(plain.begin(), plain.end()) && first == order(1) && first != second);
  const auto of_warp = [](int t) { return t < 32; };
  CHECK(!std::is_partitioned(first.begin(), first.end(), of_warp));
  std::vector<int> lanes;
  std::copy_if(first.begin(), first.end(), std::back_inserter(lanes), of_warp);
  CHECK(!std::is_sorted(lanes.begin(), lanes.end()));
  const char* seed = std::getenv("SPATIAL_PE_EMULATOR_SEED");
  emulator::set_schedule(seed ? std::atoi(seed) : 0);
}

void load_matrix() {
  run({"load_matrix", 1, kThreads, kSharedBytes}, [] {
    const int l = lane(), base = thread_index() / 32 * 256;  // 32 rows of 16 elements for each warp; element e is e
    for (int i = 0; i < 8; ++i) store_shared(word(base + l * 8 + i), (l * 16 + 2 * i) | (l * 16 + 2 * i + 1) << 16);
    warp_sync();
    const auto row = [&](int r) { return word(base + r * 8); };
    const auto straight = [&](int matrix) {
      const uint32_t e = (matrix * 8 + l / 4) * 16 + l % 4 * 2;
      return e | (e + 1) << 16;
    };
    const auto transposed = [&](int matrix) {
      const uint32_t e = (matrix * 8 + l % 4 * 2) * 16 + l / 4;
      return e | (e + 16) << 16;
    };
    uint32_t r[4], s[4], r2[2], s2[2];
    load_matrix4(r, row(l));
    load_matrix4_transposed(s, row(l));
    load_matrix2(r2, l < 16 ? row(l) : 0);  // the other lanes name no rows
    load_matrix2_transposed(s2, l < 16 ? row(l) : 0);
    for (int i = 0; i < 4; ++i) CHECK(r[i] == straight(i) && s[i] == transposed(i));
    for (int i = 0; i < 2; ++i) CHECK(r2[i] == straight(i) && s2[i] == transposed(i));
  });
}

// Small multiples of 1/4: exact in both element types, and so are their products and sums.
float small(std::mt19937& rng) { return static_cast<float>(rng() % 17) / 4 - 2; }

template <class E, int depth>
void multiplies() {
  std::mt19937 rng(1);
  float a[16][depth], b[depth][8], d[16][8];
  for (auto& row : a) for (float& x : row) x = small(rng);
  for (auto& row : b) for (float& x : row) x = small(rng);
  for (auto& row : d) for (float& x : row) x = small(rng);
  run({"multiplies", 1, kThreads, 0}, [&] {
    const int g = lane() / 4, c = lane() % 4 * 2, warp = warp_index();
    const auto of_a = [&](int row, int k) { return pack<E>(a[row][k], a[row][k + 1]); };
    const auto of_b = [&](int k) { return pack<E>(b[k][g], b[k + 1][g]); };
    const int at[4][2] = {{g, c}, {g, c + 1}, {g + 8, c}, {g + 8, c + 1}};
    float sum[4];
    for (int i = 0; i < 4; ++i) sum[i] = d[at[i][0]][at[i][1]] + warp;
    if constexpr (depth == 8) {
      multiply8<E>(sum, of_a(g, c), of_a(g + 8, c), of_b(c));
    } else {
      multiply<E>(sum, {of_a(g, c), of_a(g + 8, c), of_a(g, c + 8), of_a(g + 8, c + 8)}, of_b(c), of_b(c + 8));
    }
    for (int i = 0; i < 4; ++i) {
      float want = d[at[i][0]][at[i][1]] + warp;
      for (int k = 0; k < depth; ++k) want += a[at[i][0]][k] * b[k][at[i][1]];
      CHECK(sum[i] == want);
    }
  });
}

// D = A B, of 64 x depth and depth x 8 elements. Warp 4 copies 16 columns of A and as many rows of B at a time to a
// ring of slots, warps 0 to 3 multiply 16 rows of A each.
struct Product {
  const uint16_t *a, *b;
  float* d;
  int depth;
};
constexpr int kSlots = 3, kSlotA = 64 * 32, kSlotBytes = kSlotA + 16 * 16;

template <class E>
SPE_KERNEL(160, 1) product(SPE_PARAMS Product p) {
  const Shared ring = shared_memory(), full = ring + kSlots * kSlotBytes, empty = full + 8 * kSlots;
  const int t = thread_index(), warp = warp_index(), l = lane();
  for (int s = 0; t == 0 && s < kSlots; ++s) barrier_init(full + 8 * s, 32), barrier_init(empty + 8 * s, 4);
  block_sync();
  float d[4] = {};
  for (int i = 0; i < p.depth / 16; ++i) {
    const int s = i % kSlots, parity = i / kSlots & 1;
    const Shared slot = ring + s * kSlotBytes;
    if (warp == 4) {
      if (i >= kSlots) barrier_wait(empty + 8 * s, parity ^ 1);
      for (int c = l; c < 128; c += 32) copy_async(slot + c * 16, p.a + c / 2 * p.depth + i * 16 + c % 2 * 8, true);
      if (l < 16) copy_async(slot + kSlotA + l * 16, p.b + (i * 16 + l) * 8, true);
      barrier_arrive_after_copies(full + 8 * s);
      continue;
    }
    if (!barrier_test(full + 8 * s, parity)) barrier_wait(full + 8 * s, parity);
    uint32_t a[4], b[2];
    load_matrix4(a, slot + (warp * 16 + l % 16) * 32 + l / 16 * 16);
    load_matrix2_transposed(b, slot + kSlotA + l % 16 * 16);
    multiply<E>(d, a, b[0], b[1]);
    warp_sync();
    if (l == 0) barrier_arrive(empty + 8 * s);
  }
  for (int j = 0; j < 4 && warp < 4; ++j)
    store_global_float(p.d + (warp * 16 + l / 4 + j / 2 * 8) * 8 + l % 4 * 2 + j % 2, d[j]);
}

template <class E>
void ring() {
  constexpr int depth = 16 * 11;
  alignas(16) static uint16_t a[64 * depth], b[depth * 8];
  static float d[64 * 8];
  std::mt19937 rng(2);
  for (uint16_t& x : a) x = pack<E>(small(rng), 0);
  for (uint16_t& x : b) x = pack<E>(small(rng), 0);
  forget_ranges(), allow_read(a, sizeof a), allow_read(b, sizeof b), allow_write(d, sizeof d);
  CHECK(unwritten(d, sizeof d) == sizeof d);
  run({"product", 1, 160, kSlots * (kSlotBytes + 16)}, [&] { product<E>({a, b, d, depth}); });
  CHECK(unwritten(d, sizeof d) == 0);
  for (int i = 0; i < 64 * 8; ++i) {
    float want = 0;
    for (int k = 0; k < depth; ++k) want += unpack<E>(a[i / 8 * depth + k]).f[0] * unpack<E>(b[k * 8 + i % 8]).f[0];
    CHECK(d[i] == want);
  }
}

// ---------------------------------------------------------------------------------------------- kernels with one fault

// Each runs twice: without its fault nothing may be found, with it an error of these words (a regular expression).
struct Fault {
  const char *name, *words;
  void (*kernel)(bool right, int thread);
  int blocks = 1;
};

// Words 0 to 63. They are written before: else a thread that is too early would read what was never written.
void store_words() {
  store_shared(word(thread_index()), 0);
  block_sync();
  store_shared(word(thread_index()), 1);
}

// 16 bytes for every thread, and an arrival at barrier 0; others, and one at barrier 1.
void copy(const float* from = in, bool exists = true) {
  const int t = thread_index();
  init_barriers();
  copy_async(four(t), from + (exists ? 4 * t : 0), exists);
  barrier_arrive_after_copies(barrier(0));
}
void copy_again() {
  copy_async(four(thread_index() + 128), in, true);
  barrier_arrive_after_copies(barrier(1));
}
void wait_for_copies() { barrier_wait(barrier(0), 0); }

// Word 0, and perhaps an arrival at barrier 0.
void load_first(bool arrives) {
  load_shared(word(0));
  if (arrives) barrier_arrive(barrier(0));
}

// Thread 31 reads before or after the other lanes; thread 0, which writes then, has waited for those alone.
void many_reads(bool right, bool before) {
  const int t = thread_index();
  init_barriers(31 + right);
  for (int i = 0; i < 2 && t < 32; ++i) {
    if ((t == 31) == (before == (i == 0))) load_first(right || t != 31);
    warp_any(true);
  }
  if (t == 0) barrier_wait(barrier(0), 0), store_shared(word(0), 1);
}

// Warp 0 copies twice to the same slot, from which warp 1 reads.
void hand_over(bool waits_for_empty, bool reads_before_it_arrives) {
  init_barriers(32, 1);
  const Shared full = barrier(0), empty = barrier(1);
  for (int i = 0; i < 2; ++i) {
    if (warp_index() == 0) {
      if (i > 0) barrier_wait(waits_for_empty ? empty : full, 0);
      copy_async(four(lane()), in + 128 * i + 4 * lane(), true);
      barrier_arrive_after_copies(full);
    } else {
      barrier_wait(full, i);
      CHECK(load_shared_float(four(lane() ^ 1)) == 128 * i + 4 * (lane() ^ 1));
      if (reads_before_it_arrives) warp_sync();
      if (lane() == 0) barrier_arrive(empty);
    }
  }
}

constexpr char kRace[] = "race: thread .* shared byte .* that thread .* (wrote|read) without a barrier between";
constexpr char kLoneRead[] = "race: thread 0 writes shared byte 0 that thread 31 read without a barrier between";
constexpr char kInFlight[] = "reads shared byte .* while a copy of thread .* to it is in flight";
constexpr char kReused[] = "in flight|race: thread .* copies to shared byte .* that thread .* read without";

const Fault kFaults[] = {
    // Order in shared memory
    {"no_block_sync", kRace, [](bool right, int t) {
       store_words(), right ? block_sync() : warp_sync();
       if (t < 32) load_shared(word(t + 32));
     }},
    {"no_warp_sync", kRace, [](bool right, int t) {
       store_words();
       warp_any(true);  // orders nothing
       if (right) warp_sync();
       load_shared(word(t ^ 1));
     }},
    {"store_after_the_arrival", kRace, [](bool right, int t) {
       init_barriers(), store_words();
       if (!right) barrier_arrive(barrier(0));
       store_shared(word(t), 2);
       if (right) barrier_arrive(barrier(0));
       barrier_wait(barrier(0), 0), load_shared(word(t ^ 32));
     }},
    {"two_writers", "race: thread .* writes shared byte 0 that thread .* wrote without",
     [](bool right, int t) { if (t == 3 || (t == 40 && !right)) store_shared(word(0), 1); }},
    {"write_after_an_early_read", kLoneRead, [](bool right, int) { many_reads(right, true); }},
    {"write_after_a_late_read", kLoneRead, [](bool right, int) { many_reads(right, false); }},
    {"write_after_a_read_between", kLoneRead, [](bool right, int t) {
       init_barriers(5 + right);  // six readers are a full list, and of five thread 0 knows
       if (t >= 1 && t < 6) load_first(true);
       warp_any(true);
       if (t == 31) load_first(right);
       warp_any(true);
       if (t == 0) barrier_wait(barrier(0), 0), load_shared(word(0)), store_shared(word(0), 1);
     }},

    // Copies
    {"copy_not_waited_for", kInFlight,
     [](bool right, int t) { copy(), right ? wait_for_copies() : block_sync(), load_shared(four(t ^ 33)); }},
    {"copy_waited_for_by_another_thread", "that a copy of thread .* wrote, without waiting", [](bool right, int t) {
       copy();
       if (t == 0) wait_for_copies();
       if (t >= 32) return;
       warp_any(true);
       if (right) warp_sync();
       load_shared(four(t ^ 1));
     }},
    {"copy_after_the_arrival", kInFlight, [](bool right, int t) {
       copy(), copy_again();
       barrier_wait(barrier(right), 0);  // the second comes after all copies
       load_shared(four(t)), load_shared(four(t + 128));
     }},
    {"stores_before_an_arrival_of_copies", kRace, [](bool right, int t) {
       init_barriers(32);
       store_words();
       if (t < 32) right ? barrier_arrive(barrier(0)) : barrier_arrive_after_copies(barrier(0));
       if (t >= 32) barrier_wait(barrier(0), 0), load_shared(word(t - 32));
     }},
    {"copy_over_copy", "copies to .* while a copy of thread .* to it is in flight", [](bool right, int t) {
       copy();
       if (right) wait_for_copies();
       copy_async(four(t), in, true), barrier_arrive_after_copies(barrier(0));
     }},
    {"copy_never_covered", "ends after 1 copies that no barrier_arrive_after_copies covers", [](bool right, int t) {
       copy(), copy_async(four(t + 128), in, true);
       if (right) barrier_arrive_after_copies(barrier(1));
     }},
    {"slot_not_waited_for", kReused, [](bool right, int) { hand_over(right, true); }},
    {"slot_freed_too_early", kReused, [](bool right, int) { hand_over(true, right); }},

    // Places in shared memory
    {"never_written", "reads shared byte .*, which was never written",
     [](bool right, int t) { store_words(), load_shared(word(right ? t : t + 64)); }},
    {"row_never_written", "thread 37: reads shared byte 592, which was never written", [](bool right, int t) {
       for (int i = 0; i < 4 && (right || t != 37); ++i) store_shared(four(t) + 4 * i, 1);
       warp_sync();
       uint32_t r[4];
       load_matrix4(r, four(t));
     }},
    {"shared_above", "writes 8 bytes at shared byte 4096, out of bounds: there are 4096",
     [](bool right, int t) { if (t == 0) store_shared2(word(right ? 1022 : 1024), {}); }},
    {"shared_below", "reads 4 bytes at shared byte -.*, out of bounds",
     [](bool right, int t) { store_words(), load_shared(right ? word(t) : 0); }},
    {"shared_misaligned", "writes 8 bytes at shared byte .*, misaligned",
     [](bool right, int t) { store_shared2(word(2 * t + !right), {}); }},

    // Barriers
    {"barrier_not_initialised", "which was not initialised as a barrier",
     [](bool right, int) { init_barriers(), barrier_arrive(barrier(right ? 0 : 2)); }},
    {"barrier_initialised_unseen", "barrier at .*(not initialised|thread 0 wrote without)", [](bool right, int t) {
       if (t == 0) barrier_init(barrier(0), kThreads);
       if (right) block_sync();
       barrier_arrive(barrier(0));
     }},
    {"barrier_initialised_twice", "initialises a barrier at .* part of a barrier",
     [](bool right, int t) { init_barriers(); if (t == 5) barrier_init(barrier(right ? 2 : 0), 1); }},
    {"barrier_of_none", "initialises a barrier with count 0", [](bool right, int) { init_barriers(right); }},
    {"barrier_read", "reads shared byte 1024, which is part of a barrier",
     [](bool right, int t) { init_barriers(), store_words(), load_shared(right ? word(t) : barrier(0)); }},
    {"too_many_arrivals", "more often than its count, 63, within a phase",
     [](bool right, int t) { init_barriers(63); if (!right || t > 0) barrier_arrive_after_copies(barrier(0)); }},
    {"no_parity", "waits for parity 2", [](bool right, int) { copy(), barrier_wait(barrier(0), right ? 0 : 2); }},

    // Threads that wait for each other
    {"deadlock_at_block_sync", "deadlock: 1 threads have ended, 63 threads wait in block_sync",
     [](bool right, int t) { if (right || t != 7) block_sync(); }},
    {"deadlock_at_barrier_wait", "deadlock: 64 threads wait in barrier_wait .barrier at shared byte 1024, parity 0",
     [](bool right, int) { init_barriers(64 + !right), barrier_arrive(barrier(0)), barrier_wait(barrier(0), 0); }},
    {"deadlock_at_barrier_test", "deadlock: 64 threads wait in barrier_test", [](bool right, int) {
       init_barriers(64 + !right), barrier_arrive(barrier(0));
       while (!barrier_test(barrier(0), 0)) {
       }
     }},
    {"phase_missed", "deadlock: .* wait in barrier_wait .* parity 0", [](bool right, int t) {
       init_barriers(1);
       if (t >= 32) barrier_wait(barrier(0), 0);
       for (int i = 0; i < (right ? 1 : 2) && t == 0; ++i) barrier_arrive(barrier(0));
     }},
    {"diverged_kinds", "warp diverged: lane .* is at (warp_any, .* at shuffle_xor|shuffle_xor, .* at warp_any)",
     [](bool right, int t) { if (right || t > 7) warp_any(true); else shuffle_xor(1.0f, 1); }},
    {"diverged_exit", "warp diverged: 33 threads have ended, 31 threads wait in warp_sync of warp 0",
     [](bool right, int t) { if (right || t != 7) warp_sync(); }},
    {"diverged_block_sync", "warp diverged: 33 threads wait in block_sync, 31 threads wait in warp_any",
     [](bool right, int t) { if (right || t != 7) warp_any(true); block_sync(); }},
    {"shuffle_too_far", "shuffle_xor with mask 32", [](bool right, int) { shuffle_xor(1.0f, right ? 31 : 32); }},

    // Global memory
    {"read_out_of_bounds", "reads 16 bytes of global memory, out of bounds: at byte 4096 of a range of 4096",
     [](bool right, int) { load_global_float4(in + (right ? 1020 : 1024)); }},
    {"read_partly_out_of_bounds", "reads 16 bytes of global memory, out of bounds: at byte 4088",
     [](bool right, int) { load_global_float4(in + (right ? 1020 : 1022)); }},
    {"read_of_output", "reads 4 bytes of global memory, out of bounds",
     [](bool right, int) { load_global_float(right ? in : out); }},
    {"write_to_input", "writes 4 bytes of global memory, out of bounds",
     [](bool right, int t) { store_global_float((right ? out : in) + t, 1); }},
    {"global_misaligned", "reads 16 bytes of global memory, misaligned",
     [](bool right, int) { load_global4(in + (right ? 4 : 2)); }},
    {"copy_out_of_bounds", "reads 16 bytes of global memory, out of bounds",  // unless it does not exist
     [](bool right, int t) { copy(in + 1024, !right), wait_for_copies(); CHECK(load_shared(four(t)) == 0); }},
    {"copy_misaligned", "copies from global memory, misaligned",
     [](bool right, int) { copy(in + !right); }},
    {"written_twice", "global memory written twice, first by thread .* of block 0: byte .*",
     [](bool right, int t) { store_global_float(out + (right ? t : t / 2), 1); }},
    {"written_by_two_blocks", "block 1, thread .*: global memory written twice, first by thread .* of block 0",
     [](bool right, int t) { store_global_float(out + (right ? 64 * block_index() : 0) + t, 1); }, 2},
    {"read_after_write", "reads global memory written during the launch",
     [](bool right, int t) { store_global_float(both + t, 1), load_global_float(both + (right ? 64 : 0) + t); }},
};

bool matches(const std::string& text, const std::string& expression) {
  regex_t compiled;
  CHECK(regcomp(&compiled, expression.c_str(), REG_EXTENDED | REG_NOSUB) == 0);
  const bool found = regexec(&compiled, text.c_str(), 0, nullptr, 0) == 0;
  regfree(&compiled);
  return found;
}

void check(const Fault& fault) {
  for (bool right : {true, false, true}) {  // and once more after the error
    allow();
    const std::string error = error_of([&] {
      run({fault.name, fault.blocks, kThreads, kSharedBytes}, [&] { fault.kernel(right, thread_index()); });
    });
    if (right && !error.empty()) throw std::runtime_error("without its fault: " + error);
    if (!right && !matches(error, "^kernel " + std::string(fault.name) + ", .*(" + fault.words + ")"))
      throw std::runtime_error("expected '" + std::string(fault.words) + "', found '" + error + "'");
  }
}

// --------------------------------------------------------------------------------------------------------------- cases

int main(const std::vector<std::string>& names) {
  std::vector<std::pair<std::string, std::function<void()>>> cases = {
      {"conversions_bf16", conversions<BFloat16, 7, 127>}, {"conversions_f16", conversions<Float16, 10, 15>},
      {"exponentials", exponentials}, {"collectives", collectives}, {"memory", memory}, {"launches", launches},
      {"schedules", schedules}, {"load_matrix", load_matrix}, {"multiply_bf16", multiplies<BFloat16, 16>},
      {"multiply_f16", multiplies<Float16, 16>}, {"multiply8_bf16", multiplies<BFloat16, 8>},
      {"multiply8_f16", multiplies<Float16, 8>}, {"ring_bf16", ring<BFloat16>}, {"ring_f16", ring<Float16>}};
  for (const Fault& fault : kFaults) cases.emplace_back(fault.name, [&] { check(fault); });

  const bool list = names == std::vector<std::string>{"--list"};
  size_t found = 0, failed = 0;
  for (const auto& [name, run_case] : cases) {
    if (list) std::puts(name.c_str());
    if (list || (!names.empty() && std::find(names.begin(), names.end(), name) == names.end())) continue;
    ++found;
    try {
      run_case();
      std::printf("ok %s\n", name.c_str());
    } catch (const std::exception& e) {
      ++failed;
      std::printf("FAILED %s: %s\n", name.c_str(), e.what());
    }
  }
  if (!list && found < names.size()) std::printf("FAILED: only %zu of these names are known\n", found);
  return failed || (!list && found < names.size());
}

}  // namespace
}  // namespace spe::cuda

int main(int count, char** words) { return spe::cuda::main({words + 1, words + count}); }
