# SPDX-License-Identifier: Apache-2.0
"""Map programs to tokens, for the three forms of sequences, without reading a length on the host.

Packed sequences: sequence i gets the programs from cu_seqlens[i] // BLOCK + i on. This count suffices for any lengths
and needs none of them (T // BLOCK + sequences), and a program finds its sequence by a binary search. Excess programs find
a block past the end of their sequence and do nothing.

A program gets ``(index, sample, start, length, rows, nan, end)``: tokens [start, start + length) of the sample are
sequence ``index``, rows [start, start + rows) of a result are computed, 0 from ``length`` on (padding), and rows [nan,
end) become NaN (``poison``): none in a valid call. Where k has other tokens than q (``OTHER``, the form of the other side,
is not ""), ``other_side`` says which tokens there are of the same sequence.

The host cannot read the lengths without waiting for the GPU, so wrong ones must show in the results. Nothing is read or
written outside the tensors, every row is written, and NaN are
    the rows of a sample                  where seqlens[b] is not in 0..N
    the rows behind cu_seqlens[-1]        where that is less than T
    the rows between two of cu_seqlens    where one is not in 0..T, the first not 0, or a window longer than its tile
    the rows of the program of token 0    where cu_seqlens decrease anywhere; rows that several sequences claim then hold
                                          what one of them wrote
    the rows of a sequence                whose bounds on the other side are wrong

All rows are written because cu_seqlens are read as if the first were 0, the last T, and the others clipped to 0..T: a
path from 0 to T passes each row upwards, whatever else it does, and so do the blocks from one program to the next.
"""

from __future__ import annotations

import triton
import triton.language as tl

DENSE, PACKED, PADDED = "dense", "packed", "padded"


def programs(form: str, sequences: int, tokens: int, block: int) -> int:
    """Return the programs for all blocks: dense and padded have `sequences` samples of `tokens`, packed `tokens` in total."""
    return tokens // block + sequences if form == PACKED else sequences * -(-tokens // block)


@triton.jit
def locate(program, bounds, sequences, tokens, FORM: tl.constexpr, BLOCK: tl.constexpr):
    """Return the sequence of a program, by its index and its tokens, and last the first token of its block there."""
    if FORM == "packed":
        low = 0
        high = sequences
        while high - low > 1:
            middle = (low + high) // 2
            at_or_before = _clipped(tl.load(bounds + middle), tokens) // BLOCK + middle <= program
            low = tl.where(at_or_before, middle, low)
            high = tl.where(at_or_before, high, middle)
        start, length, begin, end, _ = _packed(low, bounds, sequences, tokens)
        first = (program - (begin // BLOCK + low)) * BLOCK
        if begin + first == 0:
            length = tl.where(_decrease(bounds, sequences), 0, length)
        nan = begin + tl.maximum(first, length)
        end = tl.minimum(begin + first + BLOCK, end)
        return low, start * 0, tl.cast(start, tl.int64), length, length, nan, end, first
    else:
        blocks = tl.cdiv(tokens, BLOCK)
        sample = program // blocks
        first = (program % blocks) * BLOCK
        length, rows = _of_sample(sample, bounds, tokens, FORM)
        nan = tl.maximum(first, rows)
        end = tl.minimum(first + BLOCK, tokens)
        return sample, sample, tl.cast(sample * 0, tl.int64), length, rows, nan, end, first


@triton.jit
def other_side(index, start, length, rows, nan, first, bounds, sequences, tokens, OTHER: tl.constexpr):
    """Return (start, length) of sequence `index` on the other side, and (length, rows, nan) of a block of this one: without
    tokens, and NaN from its first row on, if the bounds of the other side are wrong."""
    if OTHER == "packed":
        other_start, other_length, _, end, right = _packed(index, bounds, sequences, tokens)
        right = right & (tl.load(bounds + index + 1) == end)  # the last sequence ends with the tokens
        kept = right | (length == 0)  # `start` may be any number for a sequence without tokens, all NaN already
    else:
        other_length, other_rows = _of_sample(index, bounds, tokens, OTHER)
        other_start = start * 0
        right = other_rows == tokens
        kept = right
    nan = tl.where(kept, nan, tl.cast(start, tl.int32) + first)
    length = tl.where(right, length, 0)
    return tl.cast(other_start, tl.int64), other_length, length, tl.where(right, rows, 0), nan


@triton.jit
def whole_sequence(index, bounds, sequences, tokens, FORM: tl.constexpr, LONGEST: tl.constexpr):
    """Return sequence `index`, for kernels that hold LONGEST tokens of it."""
    if FORM == "packed":
        start, length, begin, end, _ = _packed(index, bounds, sequences, tokens)
        length = tl.where(length <= LONGEST, length, 0)
        if begin == 0:
            length = tl.where(_decrease(bounds, sequences), 0, length)
        return start * 0, tl.cast(start, tl.int64), length, length, begin + length, end
    else:
        length, rows = _of_sample(index, bounds, tokens, FORM)
        return index, tl.cast(index * 0, tl.int64), length, rows, rows, tokens


@triton.jit
def _packed(index, bounds, sequences, tokens):
    """Return (start, length, begin, end, right) of packed sequence `index`, which has rows [begin, end), and no length if its
    bounds are not right. The start is the unclipped one for sequences with a length: it is at hand, where `begin` would cost
    instructions in the loops."""
    start = tl.load(bounds + index)
    stop = tl.load(bounds + index + 1)
    begin = tl.where(index == 0, 0, _clipped(start, tokens))
    end = tl.where(index + 1 == sequences, tokens, _clipped(stop, tokens))
    right = (start == begin) & (start <= stop) & (stop <= end)
    return start, tl.where(right, stop - start, 0), begin, end, right


@triton.jit
def _clipped(bound, tokens):
    return tl.minimum(tl.maximum(bound, 0), tokens)


@triton.jit
def _decrease(bounds, sequences):
    """Return whether cu_seqlens decrease anywhere. Only the program of token 0 checks it."""
    found = tl.full((32,), 0, tl.int32)
    for at in tl.range(0, sequences, 32, num_stages=1):
        index = at + tl.arange(0, 32)
        bound = tl.load(bounds + index, mask=index < sequences, other=0)
        found |= (tl.load(bounds + index + 1, mask=index < sequences, other=0) < bound).to(tl.int32)
    return tl.max(found, 0) > 0


@triton.jit
def _of_sample(sample, bounds, tokens, FORM: tl.constexpr):
    """Return (length, rows) of a sample of `tokens`."""
    length = tokens
    rows = tokens
    if FORM == "padded":
        length = tl.load(bounds + sample)
        right = (length >= 0) & (length <= tokens)
        length = tl.where(right, length, 0)
        rows = tl.where(right, tokens, 0)
    return length, rows


@triton.jit
def poison(result, sample_row, nan, end, heads, head, D: tl.constexpr):
    """Write NaN to rows [nan, end) of a sample, of one head of a contiguous (rows, heads, D). All that takes registers is
    within the branch."""
    if nan < end:
        channel = tl.arange(0, 128)
        for row in tl.range(nan, end, num_stages=1):
            tl.store(result + ((sample_row + row) * heads + head) * D + channel, float("nan"), mask=channel < D)


@triton.jit
def block_of_tokens(program, tokens, BLOCK: tl.constexpr):
    """Return (sample, first token of the block, rows, valid rows), for kernels that ignore sequence boundaries."""
    blocks = tl.cdiv(tokens, BLOCK)
    sample = tl.cast(program // blocks, tl.int64)
    first = (program % blocks) * BLOCK
    row = tl.arange(0, BLOCK)
    return sample, tl.cast(first, tl.int64), row, first + row < tokens
