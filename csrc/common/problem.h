// SPDX-License-Identifier: Apache-2.0
// One attention problem, as the kernels receive it: addresses, sizes, strides. No torch here.
#pragma once

#include <cstdint>
#include <vector>

#include "rotation.h"

namespace spe {

enum class DType { float32, bfloat16, float16 };

// (batch, tokens, heads, head_dim) with any strides but the last, which is 1. Strides count elements.
struct View {
  void* data = nullptr;
  int64_t batch = 0, token = 0, head = 0;
};

// Tokens [start, start + length) of one sample attend to tokens [key_start, key_start + keys) of k and v: to themselves,
// or to other ones.
struct Sequence {
  int64_t sample, start, length, key_start, keys;
};

// cos and sin of (sample, token, head, pair); a stride of 0 broadcasts.
struct Tables {
  const float* cos = nullptr;
  const float* sin = nullptr;
  int64_t batch = 0, token = 0, head = 0;
};

struct Problem {
  DType dtype = DType::float32;
  int64_t batch = 0, tokens = 0;  // of q
  int heads = 0, kv_heads = 0, head_dim = 0;
  float scale = 1.0f;
  Tables tables, key_tables;
  ChannelPairs pairs;  // of q and k; none if they are not rotated
  std::vector<Sequence> sequences;
  int threads = 1;
};

struct ForwardTensors {
  View q, k, v, out;
  float* lse;  // (batch, heads, tokens)
};

struct BackwardTensors {
  View q, k, v, out, dout, dq, dk, dv;
  const float* lse;
};

// x and its rotation out, which may be x, of (batch, tokens, heads, head_dim).
struct Rotation {
  DType dtype = DType::float32;
  int64_t batch = 0, tokens = 0;
  int heads = 0, head_dim = 0;
  Tables tables;
  ChannelPairs pairs;
  View x, out;
  int threads = 1;
};

}  // namespace spe
