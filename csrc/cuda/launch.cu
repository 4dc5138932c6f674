// SPDX-License-Identifier: Apache-2.0
#include "launch.h"

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>

namespace spe::cuda {

namespace {

void check(cudaError_t status, const Launch& launch, int device) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // so that the next call of torch does not report it again
  throw std::runtime_error("CUDA could not launch " + describe(launch) + ", on device " + std::to_string(device) +
                           ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")");
}

// A kernel must request more than 48 KB of shared memory, once on each device.
void allow_shared_memory(const Launch& launch, int device) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  int& bytes = allowed[{launch.kernel.function, device}];
  if (launch.shared <= bytes) return;
  check(cudaFuncSetAttribute(launch.kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared),
        launch, device);
  bytes = launch.shared;
}

// Makes a device current, and restores the one before.
class Current {
 public:
  explicit Current(int device) {
    cudaGetDevice(&before_);
    changed_ = before_ != device && cudaSetDevice(device) == cudaSuccess;
  }
  ~Current() {
    if (changed_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace

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
    found.push_back({p.name, p.major, p.minor, p.multiProcessorCount, static_cast<int>(p.sharedMemPerBlockOptin),
                     static_cast<int>(p.sharedMemPerMultiprocessor)});
  }
  return found;
}

void run(const std::vector<Launch>& launches, int device, uintptr_t stream) {
  const Current current(device);
  for (const Launch& launch : launches) {
    if (launch.shared > 48 * 1024) allow_shared_memory(launch, device);
    Params params = launch.params;
    void* arguments[] = {&params};
    check(cudaLaunchKernel(launch.kernel.function, dim3(launch.blocks), dim3(launch.threads), arguments, launch.shared,
                           reinterpret_cast<cudaStream_t>(stream)),
          launch, device);
  }
}

}  // namespace spe::cuda
