// SPDX-License-Identifier: Apache-2.0
// Compiled once for each instruction set, with -DSPE_ISA=<its name>: instantiates the kernels for the dtypes.
#include "dispatch.h"
#include "backward.h"
#include "forward.h"
#include "peak.h"
#include "rotate.h"

namespace spe::SPE_ISA {

namespace {

template <class Dot, class T>
void forward(const Problem& problem, const ForwardTensors& tensors) {
  run(Forward<Dot, T>(problem, tensors), problem);
}

template <class Dot, class T>
void backward(const Problem& problem, const BackwardTensors& tensors) {
  run(Backward<Dot, T>(problem, tensors), problem);
}

}  // namespace

#define SPE_STRING_(x) #x
#define SPE_STRING(x) SPE_STRING_(x)

extern const KernelTable kTable;
#if defined(__AVX512BF16__)
// only bfloat16 gains from the bfloat16 dot product: the plain AVX-512 build has the rest, and the rotation, whose results
// are not flushed to zero there
const KernelTable kTable = {SPE_STRING(SPE_ISA),
                            {nullptr, &forward<Bf16Dot, bf16>, nullptr},
                            {nullptr, &backward<Bf16Dot, bf16>, nullptr},
                            {},
                            {nullptr, &peak<Bf16Dot>, nullptr}};
#else
const KernelTable kTable = {SPE_STRING(SPE_ISA),
                            {&forward<FloatDot, float>, &forward<FloatDot, bf16>, &forward<FloatDot, f16>},
                            {&backward<FloatDot, float>, &backward<FloatDot, bf16>, &backward<FloatDot, f16>},
                            {&rotate<float>, &rotate<bf16>, &rotate<f16>},
                            {&peak<FloatDot>, &peak<FloatDot>, &peak<FloatDot>}};
#endif

}  // namespace spe::SPE_ISA
