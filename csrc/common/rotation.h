// SPDX-License-Identifier: Apache-2.0
// Which channels make a pair. Plain C++: shared by the CPU and CUDA kernels and by host tests.
#pragma once

#include <cstdint>

namespace spe {

enum class Pairing { half, interleaved, axis_half };

// `count` pairs in a row. Pair i of a segment is the channels
//   interleaved: (first + 2i, first + 2i + 1)      otherwise: (first + i, second + i)
// and is turned by column + i of the table, or passes through if column < 0.
struct Segment {
  int first, second, count, column;
  bool interleaved;
};

// All head_dim / 2 channel pairs of a head as at most three segments, in the order in which kernels store them.
struct ChannelPairs {
  Segment segments[3];
  int count = 0;
};

// rotary_dim is even and <= head_dim, which is even too; rotary_dim / 2 is even for axis_half. Channels that pass
// through can be paired in any way: with their neighbours if `neighbours`, else first half with second half.
inline ChannelPairs channel_pairs(int head_dim, int rotary_dim, Pairing pairing, bool neighbours) {
  ChannelPairs out;
  const int half = rotary_dim / 2, quarter = rotary_dim / 4;
  if (rotary_dim > 0) {
    switch (pairing) {
      case Pairing::half: out.segments[out.count++] = {0, half, half, 0, false}; break;
      case Pairing::interleaved: out.segments[out.count++] = {0, 1, half, 0, true}; break;
      case Pairing::axis_half:
        out.segments[out.count++] = {0, quarter, quarter, 0, false};
        out.segments[out.count++] = {half, half + quarter, quarter, quarter, false};
        break;
    }
  }
  const int rest = (head_dim - rotary_dim) / 2;
  if (rest > 0) out.segments[out.count++] = {rotary_dim, rotary_dim + (neighbours ? 1 : rest), rest, -1, neighbours};
  return out;
}

}  // namespace spe
