// SPDX-License-Identifier: Apache-2.0
// Pairs of channels. Plain C++: shared by the CPU and CUDA kernels and by host tests.
#pragma once

#include <cstdint>

namespace spe {

enum class Pairing { half, interleaved, axis_half };

// `count` consecutive pairs, rotated by columns column, column + 1, ... of the table. Pair i is the channels
//   interleaved: (first + 2i, first + 2i + 1)      otherwise: (first + i, second + i)
struct Segment {
  int first, second, count, column;
  bool interleaved;
};

// The pairs of a head as at most two segments. Channels from rotary_dim on pass through.
struct ChannelPairs {
  Segment segments[2];
  int count = 0;
  int rotary_dim = 0;
};

// rotary_dim is even; rotary_dim / 2 is even too for axis_half.
inline ChannelPairs channel_pairs(int rotary_dim, Pairing pairing) {
  ChannelPairs out;
  out.rotary_dim = rotary_dim;
  if (rotary_dim == 0) return out;
  const int half = rotary_dim / 2, quarter = rotary_dim / 4;
  switch (pairing) {
    case Pairing::half: out.segments[out.count++] = {0, half, half, 0, false}; break;
    case Pairing::interleaved: out.segments[out.count++] = {0, 1, half, 0, true}; break;
    case Pairing::axis_half:
      out.segments[out.count++] = {0, quarter, quarter, 0, false};
      out.segments[out.count++] = {half, half + quarter, quarter, quarter, false};
      break;
  }
  return out;
}

}  // namespace spe
