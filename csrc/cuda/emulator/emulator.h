// SPDX-License-Identifier: Apache-2.0
// Runs the CUDA kernels on the host, for tests, with strict checks: undefined behaviour of a GPU is an error here.
//
// Each thread of a block is a fiber, which runs until it has to wait for others. Checked are: every access is within
// bounds and aligned; shared memory is written before it is read; accesses to the same shared bytes are ordered by
// block_sync, warp_sync or a barrier (vector clocks: races are found whatever order the fibers ran in); copies land as
// late as possible; warps are converged at their collectives; no byte of the output is written twice.
//
// One launch at a time in a process: not thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>

namespace spe::cuda::emulator {

// -------------------------------------------------------------------------------------------------------- for the host

struct Launch {
  const char* kernel;  // its name, for messages
  int blocks, threads;
  size_t shared_bytes;
};

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Runs every block, one after another; `body` is one thread's code, a call of the kernel. Throws Error with kernel,
// block, thread and the fault; the destructors on the stacks of the other threads do not run then.
void run(const Launch& launch, const std::function<void()>& body);

// The global memory that kernels may read or write. Write access does not imply read access.
void allow_read(const void* p, size_t bytes);
void allow_write(void* p, size_t bytes);
void forget_ranges();
// Returns how many of these bytes, allowed to be written, no launch has written since.
size_t unwritten(const void* p, size_t bytes);

// The order in which fibers run: 0 for the default (a warp continues while it can), other values for random ones. The
// default is the environment variable SPATIAL_PE_EMULATOR_SEED, as it was when the program started, or 0.
void set_schedule(uint32_t seed);

// Sets whether results may be written twice, as overlapping sequences do; not allowed by default.
void allow_rewrites(bool allowed);

// ------------------------------------------------- for primitives.h: what the calling thread does, see ../primitives.h

constexpr uint32_t kSharedBase = 1024;  // not 0, so that an uninitialised address is out of range

enum class Wait : uint8_t {
  none, any, shuffle, warp_sync, matrix2, matrix2_transposed, matrix4, matrix4_transposed, multiply_bf16, multiply_f16,
  multiply8_bf16, multiply8_f16,  // up to here at a collective of the warp
  block_sync, barrier_wait, barrier_test, exited
};

int thread_index();
int block_size();
int block_index();

void block_sync();
void warp_sync();
bool warp_any(bool p);
float shuffle_xor(float x, int mask);

void barrier_init(uint32_t at, int count);
void barrier_arrive(uint32_t at);
void barrier_arrive_after_copies(uint32_t at);
bool barrier_test(uint32_t at, uint32_t parity);
void barrier_wait(uint32_t at, uint32_t parity);
void copy_async(uint32_t to, const void* from, bool exists);

// Returns the checked place of an access of 4, 8 or 16 bytes.
const void* global_read(const void* p, size_t bytes);
void* global_write(void* p, size_t bytes);
const void* shared_read(uint32_t at, uint32_t bytes);
void* shared_write(uint32_t at, uint32_t bytes);

void load_matrix(uint32_t* r, Wait kind, uint32_t row);
// The lane's elements as floats, in the order of its words: 8 and 4 of them, or 4 and 2 for multiply8.
void multiply(float (&d)[4], const float* a, const float* b, Wait kind);

}  // namespace spe::cuda::emulator
