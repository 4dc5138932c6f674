// SPDX-License-Identifier: Apache-2.0
// Tiles of rows in shared memory, and fragments of matrix products from and to them.
#pragma once

#include "primitives.h"

namespace spe::cuda {

constexpr float LOG2_E = 1.44269504088896341f, LN_2 = 0.693147180559945309f;

constexpr int divisor(int a, int b) { return b == 0 ? a : divisor(b, a % b); }

// Rows of CHUNKS x 16 bytes, without gaps. Chunks are permuted within a row so that one chunk of 8 consecutive rows
// lies in 8 different banks, as load_matrix reads it: a row starts CHUNKS banks (of 16 bytes) after the one above, so
// the rows repeat after PERIOD of them, and the XOR moves those that repeat.
template <int CHUNKS>
struct Rows {
  static constexpr int bytes = 16 * CHUNKS;
  static constexpr int common = divisor(CHUNKS, 8), period = 8 / common;
  static SPE_DEVICE int exchange(int row) { return row / period & (common - 1); }
  static SPE_DEVICE int at(int row, int chunk) { return row * bytes + ((chunk ^ exchange(row)) << 4); }
};

// Rows of D elements of 16 bits, and of D floats.
template <int D>
using Tile = Rows<D / 8>;
template <int D>
using FloatTile = Rows<D / 4>;

// The row and chunk that a lane names to load_matrix4, for the four 8 x 8 matrices of 16 x 16 elements:
//   by_rows    (0, 0), (8, 0), (0, 8), (8, 8)    A;            B, transposed
//   by_chunks  (0, 0), (0, 8), (8, 0), (8, 8)    B of two n8;  A, transposed
struct Lane {
  int row, chunk;
};
SPE_DEVICE Lane by_rows(int lane) { return {lane & 15, lane >> 4}; }
SPE_DEVICE Lane by_chunks(int lane) { return {(lane >> 4 << 3) + (lane & 7), lane >> 3 & 1}; }

// Address in a tile, of rows that start at a multiple of 8; `chunk` is even. Written so that everything that depends on
// the lane is the same for every chunk, and the compiler keeps one register for it.
template <int D>
SPE_DEVICE Shared matrix_at(Shared tile, int first, Lane lane, int chunk) {
  constexpr int mask = (Tile<D>::common - 1) & ~1;
  const int x = Tile<D>::exchange(lane.row);
  const Shared row = tile + lane.row * Tile<D>::bytes + ((lane.chunk ^ (x & 1)) << 4);
  if constexpr (mask == 0) return row + first * Tile<D>::bytes + (chunk << 4);
  // tiles and rows start at multiples of 128 bytes
  if constexpr (mask == 6) return ((row + ((x & mask) << 4)) ^ (chunk << 4)) + first * Tile<D>::bytes;
  return row + first * Tile<D>::bytes + ((chunk ^ (x & mask)) << 4);
}
// For load_matrix2: lanes 0-15 name the 16 rows of one chunk.
template <int D>
SPE_DEVICE Shared matrix_at(Shared tile, int first, int lane, int chunk) {
  return tile + Tile<D>::at(lane & 15, chunk) + first * Tile<D>::bytes;
}

// 16 rows of D channels as operand A: D / 16 fragments, and half a one where D is an odd multiple of 8.
template <int D>
struct Operand {
  static constexpr int whole = D / 16;
  static constexpr bool half = D % 16 != 0;
  uint32_t a[whole][4];
  uint32_t h[2];

  SPE_DEVICE void load(Shared tile, int lane) {
#pragma unroll
    for (int i = 0; i < whole; ++i) load_matrix4(a[i], matrix_at<D>(tile, 0, by_rows(lane), 2 * i));
    if constexpr (half) load_matrix2(h, matrix_at<D>(tile, 0, lane, 2 * whole));
  }
};

// d += A B^T over D channels, for BLOCKS x 16 rows of B from `first` on: two n8 of each. `operand(m, i, fragment)`
// gives fragment i of the rows of block m.
template <class E, int D, int MT, int BLOCKS, class Operands>
SPE_DEVICE void multiply_rows_by(float (&d)[BLOCKS][MT][2][4], Operands operand, Shared b, int first, int lane) {
#pragma unroll
  for (int i = 0; i < (D + 15) / 16; ++i) {
    uint32_t a[MT][4];
#pragma unroll
    for (int m = 0; m < MT; ++m) operand(m, i, a[m]);
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
      const int row = first + 16 * block;
      if (2 * i + 1 < D / 8) {
        uint32_t w[4];
        load_matrix4(w, matrix_at<D>(b, row, by_chunks(lane), 2 * i));
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          multiply<E>(d[block][m][0], a[m], w[0], w[1]);
          multiply<E>(d[block][m][1], a[m], w[2], w[3]);
        }
      } else {
        uint32_t w[2];
        load_matrix2(w, matrix_at<D>(b, row, lane, 2 * i));
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          multiply8<E>(d[block][m][0], a[m][0], a[m][1], w[0]);
          multiply8<E>(d[block][m][1], a[m][0], a[m][1], w[1]);
        }
      }
    }
  }
}

// A in registers.
template <class E, int D, int MT, int BLOCKS>
SPE_DEVICE void multiply_rows(float (&d)[BLOCKS][MT][2][4], const Operand<D> (&a)[MT], Shared b, int first, int lane) {
  multiply_rows_by<E, D, MT, BLOCKS>(
      d,
      [&](int m, int i, uint32_t (&fragment)[4]) {
#pragma unroll
        for (int j = 0; j < 4; ++j) fragment[j] = i < D / 16 ? a[m].a[i][j] : a[m].h[j & 1];
      },
      b, first, lane);
}

// A in shared memory, `stride` bytes from 16 rows to the next 16: four registers instead of D / 4.
template <class E, int D, int MT, int BLOCKS>
SPE_DEVICE void multiply_rows(float (&d)[BLOCKS][MT][2][4], Shared a, int stride, Shared b, int first, int lane) {
  multiply_rows_by<E, D, MT, BLOCKS>(
      d,
      [&](int m, int i, uint32_t (&fragment)[4]) {
        if (2 * i + 1 < D / 8) {
          load_matrix4(fragment, matrix_at<D>(a + m * stride, 0, by_rows(lane), 2 * i));
        } else {
          uint32_t half[2];
          load_matrix2(half, matrix_at<D>(a + m * stride, 0, lane, 2 * i));
          fragment[0] = half[0], fragment[1] = half[1];
        }
      },
      b, first, lane);
}

// d[MT][D / 8] += A B for 16 rows of B from `first` on.
template <class E, int D, int MT>
SPE_DEVICE void multiply_columns(float (&d)[MT][D / 8][4], const uint32_t (&a)[MT][4], Shared b, int first, int lane) {
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
    uint32_t w[4];
    load_matrix4_transposed(w, matrix_at<D>(b, first, by_rows(lane), 2 * i));
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      multiply<E>(d[m][2 * i], a[m], w[0], w[1]);
      multiply<E>(d[m][2 * i + 1], a[m], w[2], w[3]);
    }
  }
  if constexpr (D % 16 != 0) {
    uint32_t w[2];
    load_matrix2_transposed(w, matrix_at<D>(b, first, lane, D / 8 - 1));
#pragma unroll
    for (int m = 0; m < MT; ++m) multiply<E>(d[m][D / 8 - 1], a[m], w[0], w[1]);
  }
}

// Two n8 of a result as operand A of the next product.
template <class E>
SPE_DEVICE void as_operand(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack<E>(left[0], left[1]);
  a[1] = pack<E>(left[2], left[3]);
  a[2] = pack<E>(right[0], right[1]);
  a[3] = pack<E>(right[2], right[3]);
}

// Stores rows g and g + 8 of a result, times a factor each, to global memory, where valid. Two lanes exchange words, so
// that the four of a row write 32 bytes at once: a whole sector.
template <class E, int D>
SPE_DEVICE void store_rows(const float (&d)[D / 8][4], float factor0, float factor1, uint16_t* row0, uint16_t* row1,
                           bool exists0, bool exists1, int lane) {
  const bool odd = lane & 1;
  const int t = lane & 3;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float factor = half ? factor1 : factor0;
    uint32_t words[D / 8];  // of n8 i; after the exchange two words of n8 i or i + 1
#pragma unroll
    for (int i = 0; i < D / 8; ++i) words[i] = pack<E>(d[i][2 * half] * factor, d[i][2 * half + 1] * factor);
#pragma unroll
    for (int i = 0; i + 1 < D / 8; i += 2) {
      const uint32_t other = shuffle_xor(odd ? words[i] : words[i + 1], 1);
      if (odd)
        words[i] = other;
      else
        words[i + 1] = other;
    }
    if (half ? exists1 : exists0) {
      uint16_t* to = (half ? row1 : row0) + 8 * (t & 1) + 4 * (t >> 1);
#pragma unroll
      for (int i = 0; i + 1 < D / 8; i += 2) store_global2(to + 8 * i, {{words[i], words[i + 1]}});
      if constexpr (D % 16 != 0) store_global1((half ? row1 : row0) + D - 8 + 2 * t, words[D / 8 - 1]);
    }
  }
}

// Distribution of columns x rows over threads: each has one column, and rows `row`, `row + step` and so on. Excess
// threads get a row past the end.
struct Share {
  int column, row, step;
};
template <int COLUMNS>
SPE_DEVICE Share share(int thread, int threads) {
  const int row = thread / COLUMNS, step = threads / COLUMNS;
  return {thread % COLUMNS, row < step ? row : 1 << 30, step};
}

// Starts copying `rows` rows of D elements, the first `exist` of which are valid and the others become 0. `rows` is a
// multiple of 16; thread `thread` of `threads`.
template <int D>
SPE_DEVICE void copy_rows(Shared tile, const uint16_t* first, int stride, int rows, int exist, int thread,
                          int threads) {
  const Share s = share<D / 8>(thread, threads);
  const uint16_t* from = first + static_cast<int64_t>(s.row) * stride + 8 * s.column;
  const int64_t step = static_cast<int64_t>(s.step) * stride;
#pragma unroll 1
  for (int row = s.row; row < rows; row += s.step, from += step)
    copy_async(tile + Tile<D>::at(row, s.column), row < exist ? from : first, row < exist);
}

}  // namespace spe::cuda
