# SPDX-License-Identifier: Apache-2.0
"""Standalone rotation of q and k in one launch, in place or not: for use with other attention, and as a baseline.

Bound by memory traffic: reads and writes q and k once. A program rotates BLOCK tokens of several heads, with the angles
in registers where heads share them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import aligned, begin_of, count_of, load_angles, load_pairs, rotate, store_pairs
from .sequences import block_of_tokens


@triton.jit
def rotate_kernel(
    q, k, q_out, k_out, cos, sin, tokens, heads, all_heads,
    q_batch, q_token, q_head, k_batch, k_token, k_head, qo_batch, qo_token, qo_head, ko_batch, ko_token, ko_head,
    table_batch, table_token, table_head,
    D: tl.constexpr, R: tl.constexpr, PAIRING: tl.constexpr, PAIRS: tl.constexpr, VISITED: tl.constexpr,
    ALIGN: tl.constexpr, TABLE_ALIGN: tl.constexpr, PER_HEAD: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK: tl.constexpr, PER_PROGRAM: tl.constexpr,
):  # fmt: skip
    """q (B, N, H, D), k (B, N, Hkv, D), and the results, with any strides. VISITED pairs of each head are read and written:
    all D/2, or in place only the R/2 that are rotated. Heads past H are those of k."""
    q_batch, q_token, q_head = aligned(q_batch, q_token, q_head, ALIGN)
    k_batch, k_token, k_head = aligned(k_batch, k_token, k_head, ALIGN)
    qo_batch, qo_token, qo_head = aligned(qo_batch, qo_token, qo_head, ALIGN)
    ko_batch, ko_token, ko_head = aligned(ko_batch, ko_token, ko_head, ALIGN)
    table_batch, table_token, table_head = aligned(table_batch, table_token, table_head, TABLE_ALIGN)
    sample, token, row, valid = block_of_tokens(tl.program_id(0), tokens, BLOCK)
    cos += sample * table_batch + token * table_token
    sin += sample * table_batch + token * table_token
    q += sample * q_batch + token * q_token
    k += sample * k_batch + token * k_token
    q_out += sample * qo_batch + token * qo_token
    k_out += sample * ko_batch + token * ko_token
    begin = tl.program_id(1) * PER_PROGRAM
    for i in tl.static_range(count_of(PAIRS)):
        pair = begin_of(PAIRS, i) + tl.arange(0, PAIRS[i])
        c, s = load_angles(cos, sin, row, table_token, valid, pair, R)
        if INVERSE:
            s = -s
        for index in tl.range(begin, tl.minimum(begin + PER_PROGRAM, all_heads)):
            head = tl.cast(index, tl.int64)
            if PER_HEAD:  # as many heads of k as of q
                at = tl.where(head < heads, head, head - heads) * table_head
                c, s = load_angles(cos + at, sin + at, row, table_token, valid, pair, R)
                if INVERSE:
                    s = -s
            of_q = index < heads
            x = tl.where(of_q, q + head * q_head, k + (head - heads) * k_head)
            out = tl.where(of_q, q_out + head * qo_head, k_out + (head - heads) * ko_head)
            x_token = tl.where(of_q, q_token, k_token)
            out_token = tl.where(of_q, qo_token, ko_token)
            x1, x2 = load_pairs(x, row, x_token, valid, D, R, PAIRING, begin_of(PAIRS, i), PAIRS[i], VISITED)
            x1, x2 = rotate(x1, x2, c, s, pair, D, R)
            store_pairs(out, row, out_token, valid, x1, x2, D, R, PAIRING, begin_of(PAIRS, i), PAIRS[i], VISITED)
