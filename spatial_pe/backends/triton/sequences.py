# SPDX-License-Identifier: Apache-2.0
"""Which tokens a program works on, for the three forms of sequences, without asking the host for a length.

Packed sequences: sequence i gets the programs from cu_seqlens[i] // BLOCK + i on. That many are enough for any lengths,
the count needs no length (T // BLOCK + sequences), and a program finds its sequence by a binary search. Programs that
are left over find a block past the end of their sequence and do nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

DENSE, PACKED, PADDED = "dense", "packed", "padded"


def programs(form: str, sequences: int, tokens: int, block: int) -> int:
    """Programs for all blocks: dense and padded have `sequences` samples of `tokens`, packed `tokens` in total."""
    return tokens // block + sequences if form == PACKED else sequences * -(-tokens // block)


@triton.jit
def locate(program, bounds, sequences, tokens, FORM: tl.constexpr, BLOCK: tl.constexpr):
    """(sample, first token of the sequence in the sample, its length, first token of the block in the sequence)."""
    if FORM == "packed":
        low = 0
        high = sequences
        while high - low > 1:
            middle = (low + high) // 2
            at_or_before = tl.load(bounds + middle) // BLOCK + middle <= program
            low = tl.where(at_or_before, middle, low)
            high = tl.where(at_or_before, high, middle)
        start = tl.load(bounds + low)
        length = tl.load(bounds + low + 1) - start
        return start * 0, start, length, (program - (start // BLOCK + low)) * BLOCK
    else:
        blocks = tl.cdiv(tokens, BLOCK)
        sample = program // blocks
        length = tokens
        if FORM == "padded":
            length = tl.load(bounds + sample)
        return sample, sample * 0, length, (program % blocks) * BLOCK


@triton.jit
def block_of_tokens(program, tokens, BLOCK: tl.constexpr):
    """(sample, first token of the block, rows, which of them exist), for kernels to which sequences are nothing."""
    blocks = tl.cdiv(tokens, BLOCK)
    sample = tl.cast(program // blocks, tl.int64)
    first = (program % blocks) * BLOCK
    row = tl.arange(0, BLOCK)
    return sample, tl.cast(first, tl.int64), row, first + row < tokens


@triton.jit
def whole_sequence(index, bounds, tokens, FORM: tl.constexpr):
    """(sample, first token, length) of sequence `index`."""
    if FORM == "packed":
        start = tl.load(bounds + index)
        return start * 0, start, tl.load(bounds + index + 1) - start
    elif FORM == "padded":
        return index, index * 0, tl.load(bounds + index)
    else:
        return index, index * 0, tokens
