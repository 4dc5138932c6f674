# SPDX-License-Identifier: Apache-2.0
"""Rotary alone: x̂ = R(x), for q and k in one launch; also what turns k once, before the forward, for long sequences."""

from __future__ import annotations

import triton
import triton.language as tl

from .pieces import load_turned, store_operand, store_turned


@triton.jit
def rotate_kernel(
    x, out, cos, sin, tokens, rows_in_all,
    x_batch, x_token, x_head, out_batch, out_token, out_head, table_batch, table_token, table_head, sign,
    D: tl.constexpr, R: tl.constexpr, PAIRING: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr,
    TO_OPERAND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x (B, N, H, D) with any strides, to out with its own, which may be x: a program reads its rows before it writes.

    TO_OPERAND: out is (H, B N, padded D) in operand order instead. sign = -1 turns back.
    """
    head = tl.cast(tl.program_id(1), tl.int64)
    blocks = tl.cdiv(tokens, BLOCK)
    sample = tl.cast(tl.program_id(0) // blocks, tl.int64)
    row = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    exists = row < tokens
    rows = tl.cast(row, tl.int64)
    cos += sample * table_batch + head * table_head
    sin += sample * table_batch + head * table_head
    x += sample * x_batch + head * x_head
    if TO_OPERAND:
        pieces = load_turned(x, rows, x_token, cos, sin, rows, table_token, exists, D, R, PAIRING, START, WIDTH)
        width: tl.constexpr = START[len(WIDTH) - 1] + WIDTH[len(WIDTH) - 1]
        store_operand(out + head * rows_in_all * width, sample * tokens + rows, exists, pieces, START, WIDTH)
    else:
        # as it is, in operand order; turned on the way out
        pieces = load_turned(x, rows, x_token, cos, sin, rows, table_token, exists, D, R, PAIRING, START, WIDTH, False)
        out += sample * out_batch + head * out_head
        store_turned(
            out, rows, out_token, cos, sin, rows, table_token, exists, pieces, sign, D, R, PAIRING, START, WIDTH
        )
