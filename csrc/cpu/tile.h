// SPDX-License-Identifier: Apache-2.0
// The register tile: the building block of every matrix product of the kernels.
//
//   C[row][lane] += sum over k of A[row][k] * B[k][lane]
//
// One word of A is broadcast, a vector of B is loaded, and R x W accumulators stay in registers. A word is one float
// (FloatDot) or two bfloat16 that are multiplied and added at once (Bf16Dot): the depth k counts words.
#pragma once

#include "simd.h"

namespace spe::SPE_ISA {

struct FloatDot {
  static constexpr int kPerWord = 1;
  static constexpr int kExpDegree = 5;
  static SPE_INLINE vf multiply_add(vf a, vf b, vf c) { return fma(a, b, c); }
};

#if defined(__AVX512BF16__)
struct Bf16Dot {
  static constexpr int kPerWord = 2;
  static constexpr int kExpDegree = 3;
  static SPE_INLINE vf multiply_add(vf a, vf b, vf c) {
    return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// Rows of a tile of W vectors: as many accumulators as fit beside W vectors of B and one of A. 6 x 4 and 5 x 5 load
// 10 vectors for 24 and 25 products, so that one load per product, which every x86 core can do, is never the limit.
constexpr int rows_of(int width) {
  if (kRegisters == 32) return width >= 5 ? 5 : width == 4 ? 6 : 8;
  return width >= 3 ? 4 : width == 2 ? 6 : 8;
}
constexpr int kMaxWidth = kRegisters == 32 ? 5 : 3;

// A and B of a product: words, with strides in words.
struct Rows {
  const word* data;
  int64_t row, step;  // A[row][k] at row * row + step * k
};
struct Lanes {
  const word* data;
  int64_t vector, step;  // vector w of B[k] at vector * w + step * k
};

// depth > 0, which the compiler must know: GCC keeps C in memory if the loop may not run at all, which cost 80 cycles a
// tile of 6 x 2, a sixth of its time at 64 words.
template <class Dot, int R, int W>
SPE_INLINE void multiply(vf (&c)[R][W], Rows a, Lanes b, int64_t depth) {
  const word* pa = a.data;
  const word* pb = b.data;
  if (depth <= 0) __builtin_unreachable();
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k, pa += a.step, pb += b.step) {
    vf vb[W];
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) vb[w] = load(pb + w * b.vector);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vf va = broadcast(pa + r * a.row);
#pragma GCC unroll 8
      for (int w = 0; w < W; ++w) c[r][w] = Dot::multiply_add(va, vb[w], c[r][w]);
    }
  }
}

// ------------------------------------------------------------------------------ C in memory: rows x (vectors * L) floats

struct Block {
  float* data;
  int64_t row;      // stride in floats
  bool add = true;  // to the old value; else overwrite it
};

template <class Dot, int R, int W>
void multiply_add_rows(Block c, Rows a, Lanes b, int rows, int64_t depth) {
  int r = 0;
  for (; r + R <= rows; r += R) {
    vf acc[R][W];
    float* pc = c.data + r * c.row;
    for (int i = 0; i < R; ++i)
      for (int w = 0; w < W; ++w) acc[i][w] = c.add ? load(pc + i * c.row + w * L) : vf{};
    multiply<Dot, R, W>(acc, {a.data + r * a.row, a.row, a.step}, b, depth);
    for (int i = 0; i < R; ++i)
      for (int w = 0; w < W; ++w) store(pc + i * c.row + w * L, acc[i][w]);
  }
  if constexpr (R > 1) {
    // the last rows by tiles of half the height: 5 = 2 + 2 + 1
    if (r < rows)
      multiply_add_rows<Dot, R / 2, W>({c.data + r * c.row, c.row, c.add}, {a.data + r * a.row, a.row, a.step}, b, rows - r,
                                       depth);
  }
}

// C += A B, over all lanes: `vectors` of them, in chunks of nearly equal width (9 = 5 + 4, not 5 + 3 + 1).
template <class Dot>
void multiply_add(Block c, Rows a, Lanes b, int rows, int vectors, int64_t depth) {
  const int chunks = (vectors + kMaxWidth - 1) / kMaxWidth;
  for (int i = 0, from = 0; i < chunks; ++i) {
    const int width = (vectors - from) / (chunks - i);
    const Block ci = {c.data + from * L, c.row, c.add};
    const Lanes bi = {b.data + from * b.vector, b.vector, b.step};
    switch (width) {
      case 1: multiply_add_rows<Dot, rows_of(1), 1>(ci, a, bi, rows, depth); break;
      case 2: multiply_add_rows<Dot, rows_of(2), 2>(ci, a, bi, rows, depth); break;
      case 3: multiply_add_rows<Dot, rows_of(3), 3>(ci, a, bi, rows, depth); break;
#if defined(__AVX512F__) || defined(__aarch64__)
      case 4: multiply_add_rows<Dot, rows_of(4), 4>(ci, a, bi, rows, depth); break;
      case 5: multiply_add_rows<Dot, rows_of(5), 5>(ci, a, bi, rows, depth); break;
#endif
    }
    from += width;
  }
}

}  // namespace spe::SPE_ISA
