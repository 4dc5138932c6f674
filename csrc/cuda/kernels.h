// SPDX-License-Identifier: Apache-2.0
// The compiled kernels of each head_dim and element type. kernels.cu is compiled once for each head_dim.
#pragma once

namespace spe::cuda {

// As in CMakeLists.txt.
constexpr int HEAD_DIMS[] = {64, 72, 80, 88, 96, 128};

// Blocks of 16 keys that a warp of backward_keys.h may have: dk and dv of two take 2 D registers.
constexpr int max_key_blocks(int dim) { return dim <= 64 ? 2 : 1; }

struct Kernel {
  const char* name;
  const void* function;  // void (Params); null: not compiled
};

// By the longest sequence: windows of 64 or 128; by blocks of 16 keys of a warp: keys of 1 or 2.
struct Kernels {
  Kernel windows[2], forward, prepare, queries, keys[2];
};

// Of 0: bfloat16, 1: float16.
template <int D>
const Kernels* kernels();
const Kernels* kernels(int head_dim);  // throws std::invalid_argument

}  // namespace spe::cuda
