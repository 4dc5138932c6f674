// SPDX-License-Identifier: Apache-2.0
#include "plan.h"

#include <algorithm>
#include <stdexcept>

#include "backward_keys.h"
#include "backward_prepare.h"
#include "backward_queries.h"
#include "forward.h"
#include "windows_forward.h"

namespace spe::cuda {

namespace {

// Slots of a streaming ring: one is read, one is rotated, the others are being filled.
constexpr int LEAST_SLOTS = 3, MOST_STREAMING_SLOTS = 6;
constexpr int RESERVED_PER_BLOCK = 1024;  // bytes of shared memory that the system reserves

int divide_up(int a, int b) { return (a + b - 1) / b; }
int round_up(int a, int b) { return divide_up(a, b) * b; }

const Kernels& table(const Call& call) {
  return kernels(call.params.head_dim)[call.dtype == DType::float16 ? 1 : 0];
}

// Blocks with that much shared memory that fit an SM.
int blocks_per_multiprocessor(const Device& device, int shared, int most) {
  return std::clamp(device.shared_per_multiprocessor / (shared + RESERVED_PER_BLOCK), 1, most);
}

// ------------------------------------------------------------------------------------------------------------ forward

Launch windows_forward(const Call& call, const Device& device) {
  Params p = call.params;
  const int longest = p.sequences.longest;
  const bool small = longest <= 64;
  const int warps = divide_up(longest, 16), rows = 16 * warps;
  p.stages = windows::shared_bytes(p.head_dim, rows, 2) <= device.shared_per_block ? 2 : 1;
  const int items = p.sequences.count * p.heads;
  const int shared = windows::shared_bytes(p.head_dim, rows, p.stages);
  const int registers = small ? windows::blocks_per_multiprocessor(p.head_dim) * 4 / warps : 1;
  const int per_sm = blocks_per_multiprocessor(device, shared, registers);
  const int grid = std::min(items, device.multiprocessors * per_sm);
  p.items = Work(items, grid);
  return {table(call).windows[small ? 0 : 1], grid, 32 * warps, shared, p};
}

// Configuration of one block for a long sequence.
struct Shape {
  int consumers, passes;  // passes: of a whole sequence
};

// Time of a pass on the busiest of an SM's 4 schedulers, in warps' work: a single warp overlaps nothing with its
// products, and takes 1.6 times (model: exp2 and the rest beside them).
double time_of(int warps) {
  const int busiest = divide_up(warps, 4);
  return busiest == 1 ? 1.6 : busiest;
}

// The number of warps with the least time for all passes; among equals the fewest passes, then the fewest warps. 576
// tokens at D = 64: 8 warps in 3 passes, the last with 4 of them; 6 warps would load the schedulers 2, 2, 1, 1 in each.
Shape shape_for(int longest, int mt, int most_consumers) {
  const int blocks = divide_up(longest, 16);
  Shape best{};
  double least = 0;
  for (int consumers = most_consumers; consumers > 0; --consumers) {
    const int passes = divide_up(blocks, mt * consumers), left = blocks - (passes - 1) * mt * consumers;
    const double time = (passes - 1) * time_of(consumers) + time_of(std::min(consumers, left));
    if (best.passes == 0 || time < least || (time == least && passes == best.passes)) {
      best = {consumers, passes};
      least = time;
    }
  }
  return best;
}

Launch general_forward(const Call& call, const Device& device) {
  using namespace attention;
  Params p = call.params;
  const int dim = p.head_dim, most = CONSUMERS, mt = query_blocks(dim);
  const int sequences = p.sequences.count, longest = p.sequences.longest;
  // the ring's last slot may be short if all sequences end in the same one
  const int tiles = divide_up(longest, BN);
  const int resident_rows =
      p.sequences.form == Form::dense ? (tiles - 1) * BN + round_up(longest - (tiles - 1) * BN, 16) : tiles * BN;

  Shape shape = shape_for(longest, mt, most);
  // few sequences: smaller blocks, so that every SM has one
  while (sequences * p.heads * shape.passes < device.multiprocessors && shape.consumers > 2)
    shape = shape_for(longest, mt, shape.consumers - 1);

  int shared = 0, items = 0;
  const auto fits = [&](int rows, int slots, int query_slots, int consumers) {
    p.slots = slots, p.query_slots = query_slots, p.consumers = consumers;
    shared = lay_out(p, rows);
    return shared <= device.shared_per_block;
  };
  const bool resident =
      fits(resident_rows, tiles, 2, shape.consumers) ||
      (queries_in_registers(dim) && fits(resident_rows, tiles, 1, shape.consumers));
  if (resident) {
    const int wanted = divide_up(device.multiprocessors, std::max(1, sequences * p.heads));
    p.passes = divide_up(shape.passes, std::min(shape.passes, wanted));
    p.parts = divide_up(shape.passes, p.passes);
    items = sequences * p.parts * p.heads;
  } else {
    shape.consumers = std::min(most, divide_up(divide_up(longest, 16), mt));
    for (int slots = MOST_STREAMING_SLOTS; !fits(slots * BN, slots, 2, shape.consumers);)
      if (slots > LEAST_SLOTS)
        --slots;
      else if (--shape.consumers == 0)
        throw std::runtime_error("forward: the device has too little shared memory for a block");
    p.parts = 0;
    p.passes = 1;
    items = programs(p.sequences, 16 * mt * shape.consumers) * p.heads;
  }
  const int grid = std::min(items, device.multiprocessors);
  p.items = Work(items, grid);
  return {table(call).forward, grid, 32 * (shape.consumers + PRODUCERS), shared, p};
}

}  // namespace

const Kernels* kernels(int head_dim) {
  switch (head_dim) {
    case 64: return kernels<64>();
    case 72: return kernels<72>();
    case 80: return kernels<80>();
    case 88: return kernels<88>();
    case 96: return kernels<96>();
    case 128: return kernels<128>();
  }
  throw std::invalid_argument("no kernel for head_dim " + std::to_string(head_dim));
}

std::string describe(const Launch& launch) {
  return std::string(launch.kernel.name) + " (head_dim " + std::to_string(launch.params.head_dim) + "), " +
         std::to_string(launch.blocks) + " blocks of " + std::to_string(launch.threads) + " threads, " +
         std::to_string(launch.shared) + " bytes of shared memory each";
}

std::vector<Launch> plan_forward(const Call& call, const Device& device) {
  const Sequences& s = call.params.sequences;
  if (s.count == 0 || s.longest == 0) return {};
  return {s.longest <= 128 ? windows_forward(call, device) : general_forward(call, device)};
}

// ----------------------------------------------------------------------------------------------------------- backward

std::vector<Launch> plan_backward(const Call& call, const Device& device) {
  Params p = call.params;
  const int dim = p.head_dim, kv_heads = p.heads / p.group, longest = p.sequences.longest;
  if (p.sequences.count == 0 || longest == 0) return {};
  const Kernels& t = table(call);

  // a block with all keys
  for (int blocks = 1; blocks <= max_key_blocks(dim); ++blocks) {
    const int warps = divide_up(longest, 16 * blocks);
    if (warps > keys::MAX_WARPS) continue;
    const int shared = keys::shared_bytes(dim, blocks, warps, true);
    if (shared > device.shared_per_block) continue;
    p.whole = true;
    return {{t.keys[blocks - 1], p.sequences.count * kv_heads, 32 * warps, shared, p}};
  }

  const auto fitting = [&](int warps, auto shared) {
    while (shared(warps) > device.shared_per_block)
      if (--warps == 0) throw std::runtime_error("backward: the device has too little shared memory for a block");
    return warps;
  };
  const int samples = p.sequences.form == Form::packed ? 1 : p.sequences.count;
  std::vector<Launch> launches{{t.prepare, samples * divide_up(p.sequences.tokens, prepare::ROWS) * p.heads,
                                prepare::THREADS, 0, p}};
  if (p.rotate_inputs) p.q = p.q_rotated, p.k = p.k_rotated;
  p.rotate_inputs = false;
  p.whole = false;
  int warps = fitting(queries::MAX_WARPS, [&](int w) { return queries::shared_bytes(dim, w); });
  launches.push_back({t.queries, programs(p.sequences, 16 * warps) * p.heads, 32 * warps,
                      queries::shared_bytes(dim, warps), p});
  const int blocks = max_key_blocks(dim);
  warps = fitting(keys::MAX_WARPS, [&](int w) { return keys::shared_bytes(dim, blocks, w, false); });
  launches.push_back({t.keys[blocks - 1], programs(p.sequences, 16 * blocks * warps) * kv_heads, 32 * warps,
                      keys::shared_bytes(dim, blocks, warps, false), p});
  return launches;
}

}  // namespace spe::cuda
