# SPDX-License-Identifier: Apache-2.0
"""Rotate k once and store it in the layout of the products: for the backward, and for forwards whose loop does not rotate.

Bound by memory traffic. A program rotates BLOCK tokens of several heads, with the angles in registers where heads share
them: at D = 64 a token has 256 bytes of cos and sin, and 128 of a head's k.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import aligned, begin_of, count_of, load_angles, load_pairs, operand_cut, rotate, store_cut, total_of
from .sequences import block_of_tokens


@triton.jit
def operands_kernel(
    x, out, cos, sin, tokens, rows_in_all, heads,
    x_batch, x_token, x_head, table_batch, table_token, table_head,
    D: tl.constexpr, R: tl.constexpr, PAIRING: tl.constexpr, PAIRS: tl.constexpr,
    ALIGN: tl.constexpr, TABLE_ALIGN: tl.constexpr, PER_HEAD: tl.constexpr, BLOCK: tl.constexpr, PER_PROGRAM: tl.constexpr,
):  # fmt: skip
    """x (B, N, H, D) with any strides to out (H, B N, padded D). PER_HEAD: each head has its own angles."""
    x_batch, x_token, x_head = aligned(x_batch, x_token, x_head, ALIGN)
    table_batch, table_token, table_head = aligned(table_batch, table_token, table_head, TABLE_ALIGN)
    sample, token, row, valid = block_of_tokens(tl.program_id(0), tokens, BLOCK)
    width: tl.constexpr = total_of(operand_cut(PAIRS))
    cos += sample * table_batch + token * table_token
    sin += sample * table_batch + token * table_token
    x += sample * x_batch + token * x_token
    out += (sample * tokens + token) * width
    begin = tl.program_id(1) * PER_PROGRAM
    stop = tl.minimum(begin + PER_PROGRAM, heads)
    for i in tl.static_range(count_of(PAIRS)):
        pair = begin_of(PAIRS, i) + tl.arange(0, PAIRS[i])
        if R > 0:
            c, s = load_angles(cos, sin, row, table_token, valid, pair, R)
        for index in tl.range(begin, stop):
            head = tl.cast(index, tl.int64)
            x1, x2 = load_pairs(
                x + head * x_head, row, x_token, valid, D, R, PAIRING, begin_of(PAIRS, i), PAIRS[i], D // 2
            )
            if R > 0:
                if PER_HEAD:
                    at = head * table_head
                    c, s = load_angles(cos + at, sin + at, row, table_token, valid, pair, R)
                x1, x2 = rotate(x1, x2, c, s, pair, D, R)
            store_cut(out + head * rows_in_all * width, row, valid, x1, x2, i, PAIRS)
