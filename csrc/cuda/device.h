// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

namespace spe::cuda {

struct Device {
  std::string name;
  int major, minor, multiprocessors;
  size_t shared_memory_per_block;  // the most that a kernel can ask for, in bytes
};

// The devices of this machine; `error` says why there are none ("" if there are).
std::vector<Device> devices(std::string& error);

}  // namespace spe::cuda
