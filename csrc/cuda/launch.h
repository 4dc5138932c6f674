// SPDX-License-Identifier: Apache-2.0
// Launches on the device or its emulator: launch.cu for CUDA, emulator/launch.cpp for the host.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "plan.h"

namespace spe::cuda {

// The devices of this machine; `error` says why there are none ("" if there are).
std::vector<Device> devices(std::string& error);

// Throws std::runtime_error with the kernel, its grid, its shared memory and CUDA's message.
void run(const std::vector<Launch>& launches, int device, uintptr_t stream);

}  // namespace spe::cuda
