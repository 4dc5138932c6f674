// SPDX-License-Identifier: Apache-2.0
#include "kernels.h"

#include "backward_keys.h"
#include "backward_prepare.h"
#include "backward_queries.h"
#include "forward.h"
#include "windows_forward.h"

namespace spe::cuda {

namespace {

template <class F>
const void* address(F* kernel) {
  return reinterpret_cast<const void*>(kernel);
}

template <class E, int D>
Kernels table() {
  Kernels t{{{"windows_64", address(windows::forward<E, D, 64>)},
             {"windows_128", address(windows::forward<E, D, 128>)}},
            {"forward", address(attention::forward<E, D>)},
            {"prepare", address(prepare::prepare<E>)},
            {"queries", address(queries::backward<E, D>)},
            {{"keys_1", address(keys::backward<E, D, 1>)}, {"keys_2", nullptr}}};
  if constexpr (max_key_blocks(D) == 2) t.keys[1].function = address(keys::backward<E, D, 2>);
  return t;
}

}  // namespace

template <>
const Kernels* kernels<SPE_HEAD_DIM>() {
  static const Kernels tables[] = {table<BFloat16, SPE_HEAD_DIM>(), table<Float16, SPE_HEAD_DIM>()};
  return tables;
}

}  // namespace spe::cuda
