// SPDX-License-Identifier: Apache-2.0
// Selection of the kernels' build for a dtype on this CPU. kernels.cpp is compiled once for each instruction set.
#pragma once

#include <string>
#include <vector>

#include "../common/problem.h"

namespace spe {

using ForwardKernel = void (*)(const Problem&, const ForwardTensors&);
using BackwardKernel = void (*)(const Problem&, const BackwardTensors&);
using RotateKernel = void (*)(const Rotation&);
using PeakKernel = double (*)();

// A build may lack a dtype (null): the next lower instruction set is used.
struct KernelTable {
  const char* isa;
  ForwardKernel forward[3];    // by DType
  BackwardKernel backward[3];
  RotateKernel rotate[3];
  PeakKernel peak[3];
};

// Builds that this CPU can run, best first; the last one is "portable".
std::vector<std::string> usable_isas();
std::string current_isa();
void use_isa(const std::string& isa);  // throws std::invalid_argument
const std::vector<std::string>& cpu_flags();

void forward(const Problem& problem, const ForwardTensors& tensors);
void backward(const Problem& problem, const BackwardTensors& tensors);
void rotate(const Rotation& rotation);
// FLOP per second of the kernels' multiply-add for a dtype, on the calling thread's core.
double peak_flops(DType dtype);

}  // namespace spe
