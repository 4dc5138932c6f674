// SPDX-License-Identifier: Apache-2.0
// Maps blocks to tokens, for the three forms of sequences, without reading a length on the host.
//
// The host cannot read the lengths without waiting for the device, so wrong ones must show in the results. Nothing is
// read or written outside the tensors, every row is written, and NaN are   the rows of a sample                  where
// its length is not in 0..tokens   the rows behind the last bound        where that is less than tokens   the rows
// between two bounds           where one is not in 0..tokens, the first not 0, or they are too far apart   the first
// rows of head 0              where bounds decrease anywhere; rows that several sequences claim then hold
// what one of them wrote All rows are written because bounds (cu_seqlens) are read as if the first were 0, the last
// `tokens`, and the others clipped: a path from 0 to `tokens` passes each row upwards, whatever else it does, and so do
// the blocks from one program to the next.
#pragma once

#include "primitives.h"

namespace spe::cuda {

enum class Form : int { dense, packed, padded };

struct Sequences {
  Form form;
  const int* bounds;  // packed: starts and the end, (count + 1,); padded: lengths, (count,)
  int count;
  int tokens;   // of a sample; packed: of all sequences
  int longest;  // a sequence of more is wrong
};

// Tokens [start, start + length) of a sample, and rows [nan, end) that become NaN: none in a valid call.
struct Span {
  int sample, start, length, nan, end;
};

SPE_DEVICE int clipped(const Sequences& s, int bound) { return bound < 0 ? 0 : bound < s.tokens ? bound : s.tokens; }

SPE_DEVICE Span whole_sequence(const Sequences& s, int index) {
  if (s.form == Form::packed) {
    const int first = load_global_int(s.bounds + index), last = load_global_int(s.bounds + index + 1);
    const int start = index == 0 ? 0 : clipped(s, first), end = index + 1 == s.count ? s.tokens : clipped(s, last);
    const bool right = first == start && first <= last && last <= end && last - first <= s.longest;
    const int length = right ? last - first : 0;
    return {0, start, length, start + length, end};
  }
  const int length = s.form == Form::padded ? load_global_int(s.bounds + index) : s.tokens;
  if (length < 0 || length > s.tokens) return {index, 0, 0, 0, s.tokens};
  return {index, 0, length, s.tokens, s.tokens};
}

// Programs for all blocks of `block` tokens. Packed sequence i gets those from bounds[i] / block + i on: this suffices
// for any lengths, and the count needs none of them. Excess ones find a block past the end of their sequence.
inline int programs(const Sequences& s, int block) {
  return s.form == Form::packed ? s.tokens / block + s.count : s.count * ((s.tokens + block - 1) / block);
}

// The sequence of a program, and in `first` the first token of its block there. Of the rows that become NaN, its part.
SPE_DEVICE Span locate(const Sequences& s, int program, int block, int& first) {
  Span span;
  if (s.form != Form::packed) {
    const int blocks = (s.tokens + block - 1) / block;
    first = program % blocks * block;
    span = whole_sequence(s, program / blocks);
  } else {
    int low = 0, high = s.count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (clipped(s, load_global_int(s.bounds + middle)) / block + middle <= program ? low : high) = middle;
    }
    span = whole_sequence(s, low);
    first = (program - (span.start / block + low)) * block;
  }
  const int begin = span.start + first;
  if (span.nan < begin) span.nan = begin;
  if (span.end > begin + block) span.end = begin + block;
  return span;
}

// Whether packed bounds decrease anywhere: computed by a whole warp, only that of token 0 of head 0.
SPE_DEVICE bool decrease(const Sequences& s, int lane) {
  if (s.form != Form::packed) return false;
#pragma unroll 1
  for (int base = 0; base < s.count; base += 32) {
    const int i = base + lane;
    if (warp_any(i < s.count && load_global_int(s.bounds + i + 1) < load_global_int(s.bounds + i))) return true;
  }
  return false;
}

}  // namespace spe::cuda
