// SPDX-License-Identifier: Apache-2.0
// Which tokens a block works on, for the three forms of sequences, without asking the host for a length.
#pragma once

#include "primitives.h"

namespace spe::cuda {

enum class Form : int { dense, packed, padded };

struct Sequences {
  Form form;
  const int* bounds;  // packed: starts and the end, (count + 1,); padded: lengths, (count,)
  int count;
  int tokens;  // of a sample; packed: of all sequences
};

// Tokens [start, start + length) of a sample.
struct Span {
  int sample, start, length;
};

SPE_DEVICE Span whole_sequence(const Sequences& s, int index) {
  if (s.form == Form::packed) {
    const int start = load_global_int(s.bounds + index), end = load_global_int(s.bounds + index + 1);
    return {0, start, (end < s.tokens ? end : s.tokens) - start};
  }
  int length = s.tokens;
  if (s.form == Form::padded) {
    const int exists = load_global_int(s.bounds + index);
    length = exists < length ? exists : length;
  }
  return {index, 0, length};
}

// Programs for all blocks of `block` tokens. Packed sequence i gets those from bounds[i] / block + i on: enough for any
// lengths, and their count needs none. Those left over find a block behind the end of their sequence.
inline int programs(const Sequences& s, int block) {
  return s.form == Form::packed ? s.tokens / block + s.count : s.count * ((s.tokens + block - 1) / block);
}

// The sequence of a program, and in `first` the first token of its block there.
SPE_DEVICE Span locate(const Sequences& s, int program, int block, int& first) {
  if (s.form != Form::packed) {
    const int blocks = (s.tokens + block - 1) / block;
    first = program % blocks * block;
    return whole_sequence(s, program / blocks);
  }
  int low = 0, high = s.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (load_global_int(s.bounds + middle) / block + middle <= program ? low : high) = middle;
  }
  first = (program - (load_global_int(s.bounds + low) / block + low)) * block;
  return whole_sequence(s, low);
}

}  // namespace spe::cuda
