// SPDX-License-Identifier: Apache-2.0
// A launch on a device that is not there: prints what is raised. test_dispatch.py compiles and runs it.
#include <cstdio>
#include <exception>

#include "../../../csrc/cuda/launch.h"

namespace spe::cuda {

template <> const Kernels* kernels<64>() { return nullptr; }
template <> const Kernels* kernels<72>() { return nullptr; }
template <> const Kernels* kernels<80>() { return nullptr; }
template <> const Kernels* kernels<88>() { return nullptr; }
template <> const Kernels* kernels<96>() { return nullptr; }
template <> const Kernels* kernels<128>() { return nullptr; }

__global__ void nothing(Params) {}

}  // namespace spe::cuda

int main() {
  using namespace spe::cuda;
  Launch launch{{"windows_64", reinterpret_cast<const void*>(nothing)}, 396, 128, 61456, {}};
  launch.params.head_dim = 80;
  try {
    run({launch}, 0, 0);
  } catch (const std::exception& error) {
    std::puts(error.what());
    return 0;
  }
  std::puts("no error");
  return 1;
}
