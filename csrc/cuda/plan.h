// SPDX-License-Identifier: Apache-2.0
// Maps a call to its launches. Plain C++: the same for the device and for the emulator.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"
#include "params.h"

namespace spe::cuda {

// Properties of a GPU that a plan depends on.
struct Device {
  std::string name;
  int major, minor, multiprocessors;
  int shared_per_block, shared_per_multiprocessor;  // bytes; the most that a block can ask for
};

struct Call {
  Params params;
  DType dtype;
};

struct Launch {
  Kernel kernel;
  int blocks, threads, shared;
  Params params;
};

std::vector<Launch> plan_forward(const Call& call, const Device& device);
std::vector<Launch> plan_backward(const Call& call, const Device& device);

// "kernel (head_dim N), N blocks of N threads, N bytes of shared memory each"
std::string describe(const Launch& launch);

}  // namespace spe::cuda
