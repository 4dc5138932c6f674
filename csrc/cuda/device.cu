// SPDX-License-Identifier: Apache-2.0
#include "device.h"

#include <cuda_runtime.h>

namespace spe::cuda {

std::vector<Device> devices(std::string& error) {
  int count = 0;
  std::vector<Device> found;
  if (const cudaError_t status = cudaGetDeviceCount(&count); status != cudaSuccess) {
    error = cudaGetErrorString(status);
    return found;
  }
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp p;
    if (const cudaError_t status = cudaGetDeviceProperties(&p, i); status != cudaSuccess) {
      error = cudaGetErrorString(status);
      return found;
    }
    found.push_back({p.name, p.major, p.minor, p.multiProcessorCount, p.sharedMemPerBlockOptin});
  }
  return found;
}

}  // namespace spe::cuda
