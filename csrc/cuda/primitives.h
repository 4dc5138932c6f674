// SPDX-License-Identifier: Apache-2.0
// The kernels' interface to the machine, and the only file that depends on it: PTX for nvcc, and for any other compiler
// the functions of the same names in emulator/primitives.h, so that the same kernels run on the host.
//
// Shared memory is addressed by byte (Shared), and only touched through these functions. Fragments of matrix products
// are those of the PTX manual (mma.m16n8k16, .m16n8k8, ldmatrix): with g = lane / 4 and t = lane % 4,
//   A (16 x 16)  a[0]: (g, 2t..), a[1]: (g + 8, 2t..), a[2]: (g, 2t + 8..), a[3]: (g + 8, 2t + 8..)   two elements each
//   B (16 x 8)   b[0]: (2t.., g), b[1]: (2t + 8.., g)
//   D (16 x 8)   d[0], d[1]: (g, 2t..), d[2], d[3]: (g + 8, 2t..)                                      float
// Two elements in a word: the first in its low half.
#pragma once

#include <cstdint>

namespace spe::cuda {

using Shared = uint32_t;

struct alignas(8) Word2 {
  uint32_t w[2];
};
struct alignas(16) Word4 {
  uint32_t w[4];
};
struct alignas(8) Float2 {
  float f[2];
};
struct alignas(16) Float4 {
  float f[4];
};

// Element types, as tags: their values only exist in words.
struct BFloat16 {};
struct Float16 {};

}  // namespace spe::cuda

#ifndef __CUDACC__
#include "emulator/primitives.h"
#else

#define SPE_DEVICE __device__ __forceinline__
#define SPE_KERNEL(max_threads, blocks_per_sm) __global__ void __launch_bounds__(max_threads, blocks_per_sm)
#define SPE_PARAMS const __grid_constant__

namespace spe::cuda {

// Whether this compiles for sm_100 or later.
#if __CUDA_ARCH__ >= 1000
constexpr bool BLACKWELL = true;
#else
constexpr bool BLACKWELL = false;
#endif

// ------------------------------------------------------------------------------------------------------ who and where

SPE_DEVICE int thread_index() { return threadIdx.x; }
// Known by the compiler to be the same in all lanes.
SPE_DEVICE int warp_index() { return __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0); }
SPE_DEVICE int block_size() { return blockDim.x; }
SPE_DEVICE int block_index() { return blockIdx.x; }

// The first byte of the block's dynamic shared memory, a multiple of 16.
SPE_DEVICE Shared shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return static_cast<Shared>(__cvta_generic_to_shared(memory));
}

// -------------------------------------------------------------------------------------------------- together and apart

// Hides the origin of a value from the optimiser: it recomputes values instead of keeping them in registers.
SPE_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// All threads of the block.
SPE_DEVICE void block_sync() { __syncthreads(); }
// All threads of the warp: orders what they do in shared memory.
SPE_DEVICE void warp_sync() { __syncwarp(); }
// Collectives of all 32 lanes; they order nothing.
SPE_DEVICE bool warp_any(bool p) { return __any_sync(0xffffffffu, p); }
SPE_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
SPE_DEVICE uint32_t shuffle_xor(uint32_t x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// A barrier of 8 bytes in shared memory, in phases: a phase is complete after `count` arrivals. Writes of a thread
// before its arrival are visible to those that waited for the phase.
SPE_DEVICE void barrier_init(Shared barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
SPE_DEVICE void barrier_arrive(Shared barrier) {
  asm volatile("{\n .reg .b64 state;\n mbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(barrier) : "memory");
}
// The arrival comes when all earlier copies (copy_async) of this thread are complete.
SPE_DEVICE void barrier_arrive_after_copies(Shared barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
// Whether the phase of this parity (0 for the first) is complete.
SPE_DEVICE bool barrier_test(Shared barrier, uint32_t parity) {
  uint32_t done;
#if __CUDA_ARCH__ >= 900  // may sleep before it returns
#define SPE_TEST "mbarrier.try_wait.parity.shared.b64"
#else
#define SPE_TEST "mbarrier.test_wait.parity.shared.b64"
#endif
  asm volatile("{\n .reg .pred p;\n " SPE_TEST " p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
               : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
#undef SPE_TEST
  return done != 0;
}
SPE_DEVICE void barrier_wait(Shared barrier, uint32_t parity) {
  while (!barrier_test(barrier, parity)) {
  }
}

// ------------------------------------------------------------------------------------------------------------- memory

// 16 bytes from global to shared memory, both multiples of 16; zeros where `exists` is false, and nothing is read.
SPE_DEVICE void copy_async(Shared to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(exists ? 16 : 0) : "memory");
}

// Global memory that no thread writes during the launch.
SPE_DEVICE int load_global_int(const int* p) { return __ldg(p); }
SPE_DEVICE float load_global_float(const float* p) { return __ldg(p); }
SPE_DEVICE Float2 load_global_float2(const float* p) {
  const float2 x = __ldg(reinterpret_cast<const float2*>(p));
  return {{x.x, x.y}};
}
SPE_DEVICE Float4 load_global_float4(const float* p) {
  const float4 x = __ldg(reinterpret_cast<const float4*>(p));
  return {{x.x, x.y, x.z, x.w}};
}
SPE_DEVICE Word4 load_global4(const void* p) {
  const uint4 x = __ldg(reinterpret_cast<const uint4*>(p));
  return {{x.x, x.y, x.z, x.w}};
}
SPE_DEVICE Word2 load_global2(const void* p) {
  const uint2 x = __ldg(reinterpret_cast<const uint2*>(p));
  return {{x.x, x.y}};
}
SPE_DEVICE uint32_t load_global1(const void* p) { return __ldg(reinterpret_cast<const uint32_t*>(p)); }
SPE_DEVICE void store_global2(void* p, const Word2& x) { *reinterpret_cast<uint2*>(p) = make_uint2(x.w[0], x.w[1]); }
SPE_DEVICE void store_global1(void* p, uint32_t x) { *reinterpret_cast<uint32_t*>(p) = x; }
SPE_DEVICE void store_global_float(float* p, float x) { *p = x; }

SPE_DEVICE float load_shared_float(Shared a) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(a) : "memory");
  return x;
}
SPE_DEVICE Float2 load_shared_float2(Shared a) {
  Float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.f[0]), "=f"(x.f[1]) : "r"(a) : "memory");
  return x;
}
SPE_DEVICE Float4 load_shared_float4(Shared a) {
  Float4 x;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.f[0]), "=f"(x.f[1]), "=f"(x.f[2]), "=f"(x.f[3]) : "r"(a) : "memory");
  return x;
}
SPE_DEVICE uint32_t load_shared(Shared a) {
  uint32_t x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(a) : "memory");
  return x;
}
SPE_DEVICE Word2 load_shared2(Shared a) {
  Word2 x;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(x.w[0]), "=r"(x.w[1]) : "r"(a) : "memory");
  return x;
}
SPE_DEVICE Word4 load_shared4(Shared a) {
  Word4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.w[0]), "=r"(x.w[1]), "=r"(x.w[2]), "=r"(x.w[3]) : "r"(a) : "memory");
  return x;
}
SPE_DEVICE void store_shared_float(Shared a, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(a), "f"(x) : "memory");
}
SPE_DEVICE void store_shared_float2(Shared a, Float2 x) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(a), "f"(x.f[0]), "f"(x.f[1]) : "memory");
}
SPE_DEVICE void store_shared(Shared a, uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(a), "r"(x) : "memory");
}
SPE_DEVICE void store_shared2(Shared a, const Word2& x) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(a), "r"(x.w[0]), "r"(x.w[1]) : "memory");
}

// Lane i names row i of the 8 x 8 matrices, 16 bytes each: lanes 0-7 the first, 8-15 the second and so on. Element
// (r, 2c..) of a matrix goes to lane 4 r + c; with _transposed element (2c.., r).
SPE_DEVICE void load_matrix4(uint32_t (&r)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
SPE_DEVICE void load_matrix4_transposed(uint32_t (&r)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
// Two matrices: lanes 0-7 name the rows of the first, 8-15 of the second.
SPE_DEVICE void load_matrix2(uint32_t (&r)[2], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1]) : "r"(row) : "memory");
}
SPE_DEVICE void load_matrix2_transposed(uint32_t (&r)[2], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1]) : "r"(row) : "memory");
}

// --------------------------------------------------------------------------------------------------------- arithmetic

// d += a b, m16n8k16 and m16n8k8 (whose A is a[0], a[1], and whose B is b[0] of the above).
template <class E>
SPE_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <class E>
SPE_DEVICE void multiply8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0);

#define SPE_MULTIPLY(E, ptx)                                                                                        \
  template <>                                                                                                       \
  SPE_DEVICE void multiply<E>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {                    \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." ptx "." ptx ".f32 "                                                \
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                           \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                            \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                            \
  }                                                                                                                 \
  template <>                                                                                                       \
  SPE_DEVICE void multiply8<E>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {                              \
    asm("mma.sync.aligned.m16n8k8.row.col.f32." ptx "." ptx ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};" \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                            \
        : "r"(a0), "r"(a1), "r"(b0));                                                                               \
  }
SPE_MULTIPLY(BFloat16, "bf16")
SPE_MULTIPLY(Float16, "f16")
#undef SPE_MULTIPLY

// 2^x, to two units in the last place; results below 2^-126 are 0.
SPE_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1 / x, to one unit in the last place.
SPE_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SPE_DEVICE float log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats, rounded to nearest, as a word of two elements; and back.
template <class E>
SPE_DEVICE uint32_t pack(float first, float second);
template <>
SPE_DEVICE uint32_t pack<BFloat16>(float first, float second) {
  uint32_t w;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(second), "f"(first));
  return w;
}
template <>
SPE_DEVICE uint32_t pack<Float16>(float first, float second) {
  uint32_t w;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(second), "f"(first));
  return w;
}
// A word of two ones.
template <class E>
constexpr uint32_t ONES = 0x3f803f80u;
template <>
constexpr uint32_t ONES<Float16> = 0x3c003c00u;

template <class E>
SPE_DEVICE Float2 unpack(uint32_t w);
template <>
SPE_DEVICE Float2 unpack<BFloat16>(uint32_t w) {
  return {{__uint_as_float(w << 16), __uint_as_float(w & 0xffff0000u)}};
}
template <>
SPE_DEVICE Float2 unpack<Float16>(uint32_t w) {
  Float2 x;
  asm("{\n .reg .b16 a, b;\n mov.b32 {a, b}, %2;\n cvt.f32.f16 %0, a;\n cvt.f32.f16 %1, b;\n}"
      : "=f"(x.f[0]), "=f"(x.f[1]) : "r"(w));
  return x;
}

}  // namespace spe::cuda
#endif
