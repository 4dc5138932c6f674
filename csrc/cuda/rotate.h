// SPDX-License-Identifier: Apache-2.0
// Rotation of rows in shared memory, V channel pairs at a time. Channels keep their order, so that a table of cos = 1
// and sin = 0 changes no bit. A row's vectors are those of its pairs, then those of the channels that pass through, in
// which two neighbours count as a pair.
#pragma once

#include "params.h"
#include "tile.h"

namespace spe::cuda {

// V first and V second channels of pairs.
struct Channels {
  int first, second;
  bool interleaved;  // pairs are (first, first + 1), ...: 2 V channels from `first` on, of which `second` is the middle
};

template <int V>
SPE_DEVICE Channels channels_of(const ChannelPairs& pairs, int vector) {
  const int pair = vector * V;
  if (2 * pair >= pairs.rotary_dim) return {2 * pair, 2 * pair + V, true};
  const Segment& s = pairs.segments[pair >= pairs.segments[0].count ? 1 : 0];
  const int i = pair - s.column;
  if (s.interleaved) return {s.first + 2 * i, s.first + 2 * i + V, true};
  return {s.first + i, s.second + i, false};
}

template <int V>
struct Angles {
  float cos[V], sin[V];
};

template <int V>
SPE_DEVICE void load_floats(float (&to)[V], const float* from) {
  if constexpr (V == 4) {
    const Float4 x = load_global_float4(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = x.f[i];
  } else {
    const Float2 x = load_global_float2(from);
    to[0] = x.f[0], to[1] = x.f[1];
  }
}

template <int V>
SPE_DEVICE void load_floats(float (&to)[V], Shared from) {
  if constexpr (V == 4) {
    const Float4 x = load_shared_float4(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = x.f[i];
  } else {
    const Float2 x = load_shared_float2(from);
    to[0] = x.f[0], to[1] = x.f[1];
  }
}

// token: in the sample.
template <int V>
SPE_DEVICE Angles<V> load_angles(const AngleTables& t, int sample, int token, int head, int vector) {
  const int64_t at = t.at(sample, token, head) + vector * V;
  Angles<V> a;
  load_floats<V>(a.cos, t.cos + at);
  load_floats<V>(a.sin, t.sin + at);
  return a;
}

// V elements of 16 bits, or V floats, at a byte of shared memory.
template <class E, int V>
SPE_DEVICE void load_elements(float (&x)[V], Shared at) {
  uint32_t w[V / 2];
  if constexpr (V == 4) {
    const Word2 both = load_shared2(at);
    w[0] = both.w[0], w[1] = both.w[1];
  } else {
    w[0] = load_shared(at);
  }
#pragma unroll
  for (int i = 0; i < V / 2; ++i) {
    const Float2 f = unpack<E>(w[i]);
    x[2 * i] = f.f[0], x[2 * i + 1] = f.f[1];
  }
}

template <class E, int V>
SPE_DEVICE void load_elements(float (&x)[V], const uint16_t* at) {
  uint32_t w[V / 2];
  if constexpr (V == 4) {
    const Word2 both = load_global2(at);
    w[0] = both.w[0], w[1] = both.w[1];
  } else {
    w[0] = load_global1(at);
  }
#pragma unroll
  for (int i = 0; i < V / 2; ++i) {
    const Float2 f = unpack<E>(w[i]);
    x[2 * i] = f.f[0], x[2 * i + 1] = f.f[1];
  }
}

template <class E, int V>
SPE_DEVICE void store_elements(Shared at, const float (&x)[V]) {
  if constexpr (V == 4)
    store_shared2(at, {{pack<E>(x[0], x[1]), pack<E>(x[2], x[3])}});
  else
    store_shared(at, pack<E>(x[0], x[1]));
}

template <class E, int V>
SPE_DEVICE void store_elements(uint16_t* at, const float (&x)[V]) {
  if constexpr (V == 4)
    store_global2(at, {{pack<E>(x[0], x[1]), pack<E>(x[2], x[3])}});
  else
    store_global1(at, pack<E>(x[0], x[1]));
}

// x, y: values of the first and second channels. `back`: by the negative angle.
template <int V>
SPE_DEVICE void rotate(float (&x)[V], float (&y)[V], const Angles<V>& a, bool interleaved, float back) {
  if (interleaved) {
    float z[2 * V];
#pragma unroll
    for (int i = 0; i < V; ++i) z[i] = x[i], z[V + i] = y[i];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float one = z[2 * i], two = z[2 * i + 1], sin = back * a.sin[i];
      z[2 * i] = one * a.cos[i] - two * sin;
      z[2 * i + 1] = one * sin + two * a.cos[i];
    }
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] = z[i], y[i] = z[V + i];
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float one = x[i], two = y[i], sin = back * a.sin[i];
      x[i] = one * a.cos[i] - two * sin;
      y[i] = one * sin + two * a.cos[i];
    }
  }
}

// Start of a row's vector in a tile: the chunk depends on the row, the byte in it does not.
template <class TILE>
struct Slot {
  int chunk, byte;

  // channel: of `size` bytes
  SPE_DEVICE Slot(int channel, int size) : chunk(channel * size >> 4 << 4), byte(channel * size & 15) {}
  SPE_DEVICE int at(int row) const { return row * TILE::bytes + (chunk ^ TILE::exchange(row) << 4) + byte; }
};

// Rotates a tile in place: rows [0, rows) are tokens [first, first + rows) of the sample. `ready` is called after the
// first angles are being loaded, and before the tile is touched. A second tile of the same tokens is rotated with it,
// unless it is 0.
template <class E, int D, int V, class Ready>
SPE_DEVICE void rotate_tile(const Params& p, Shared tile, Shared also, int rows, int sample, int first, int head,
                            int thread, int threads, Ready ready) {
  constexpr int AHEAD = 4;  // loads of angles, which come from L2, before the first is used
  const Share s = p.rotated.share(thread, threads);
  const Channels c = channels_of<V>(p.pairs, s.column);
  const Slot<Tile<D>> one(c.first, 2), two(c.second, 2);
  const AngleTables& t = p.tables;
  const int64_t at = t.at(sample, first + s.row, head) + s.column * V;
  const float *cos = t.cos + at, *sin = t.sin + at;
  const int64_t stride = static_cast<int64_t>(s.step) * t.token;
  bool waiting = true;
  for (int base = s.row; base < rows || waiting; base += AHEAD * s.step) {
    Angles<V> angles[AHEAD];
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) {
      if (base + j * s.step < rows) load_floats<V>(angles[j].cos, cos), load_floats<V>(angles[j].sin, sin);
      cos += stride, sin += stride;
    }
    if (waiting) ready(), waiting = false;
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) {
      const int row = base + j * s.step;
      if (row >= rows) break;
      for (Shared to = tile; to != 0; to = to == tile ? also : 0) {
        float x[V], y[V];
        load_elements<E, V>(x, to + one.at(row));
        load_elements<E, V>(y, to + two.at(row));
        rotate<V>(x, y, angles[j], c.interleaved, 1.0f);
        store_elements<E, V>(to + one.at(row), x);
        store_elements<E, V>(to + two.at(row), y);
      }
    }
  }
}

template <class E, int D, class Ready>
SPE_DEVICE void rotate_tile(const Params& p, Shared tile, Shared also, int rows, int sample, int first, int head,
                            int thread, int threads, Ready ready) {
  if (!p.rotate_inputs)
    ready();
  else if (p.rotate_vector == 4)
    rotate_tile<E, D, 4>(p, tile, also, rows, sample, first, head, thread, threads, ready);
  else
    rotate_tile<E, D, 2>(p, tile, also, rows, sample, first, head, thread, threads, ready);
}

// Stores rows of D floats in shared memory, after the inverse rotation and rounding, to global memory.
template <class E, int D, int V>
SPE_DEVICE void store_inverse_rotated(const Params& p, Shared tile, int rows, uint16_t* to, int stride, int sample,
                                      int first, int head, int thread, int threads) {
  const Share s = share<D / (2 * V)>(thread, threads);
  const Channels c = channels_of<V>(p.pairs, s.column);
  const Slot<FloatTile<D>> one(c.first, 4), two(c.second, 4);
  const bool rotated = s.column < p.rotated.per_row;
  for (int row = s.row; row < rows; row += s.step) {
    float x[V], y[V];
    load_floats<V>(x, tile + one.at(row));
    load_floats<V>(y, tile + two.at(row));
    if (rotated) rotate<V>(x, y, load_angles<V>(p.tables, sample, first + row, head, s.column), c.interleaved, -1.0f);
    store_elements<E, V>(to + static_cast<int64_t>(row) * stride + c.first, x);
    store_elements<E, V>(to + static_cast<int64_t>(row) * stride + c.second, y);
  }
}

template <class E, int D>
SPE_DEVICE void store_inverse_rotated(const Params& p, Shared tile, int rows, uint16_t* to, int stride, int sample,
                                      int first, int head, int thread, int threads) {
  if (p.rotate_vector == 4)
    store_inverse_rotated<E, D, 4>(p, tile, rows, to, stride, sample, first, head, thread, threads);
  else
    store_inverse_rotated<E, D, 2>(p, tile, rows, to, stride, sample, first, head, thread, threads);
}

// Stores an n8 of a result of 16 rows, times a factor, as floats in shared memory: columns 8 n to 8 n + 7.
template <int D>
SPE_DEVICE void store_floats(Shared tile, int row, int n, const float (&d)[4], float factor, int lane) {
  const int g = lane >> 2, t = lane & 3;
  const int chunk = 2 * n + (t >> 1), byte = (t & 1) * 8;
  store_shared_float2(tile + FloatTile<D>::at(row + g, chunk) + byte, {{d[0] * factor, d[1] * factor}});
  store_shared_float2(tile + FloatTile<D>::at(row + g + 8, chunk) + byte, {{d[2] * factor, d[3] * factor}});
}

template <int D>
SPE_DEVICE void store_floats(Shared tile, int row, int n, const float (&d)[D / 8][4], float factor, int lane) {
#pragma unroll
  for (int i = 0; i < D / 8; ++i) store_floats<D>(tile, row, n + i, d[i], factor, lane);
}

// The sum of the products of 8 elements.
template <class E>
SPE_DEVICE float dot(const Word4& a, const Word4& b) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Float2 x = unpack<E>(a.w[i]), y = unpack<E>(b.w[i]);
    sum += x.f[0] * y.f[0] + x.f[1] * y.f[1];
  }
  return sum;
}

}  // namespace spe::cuda
