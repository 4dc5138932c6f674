# SPDX-License-Identifier: Apache-2.0
"""R(x) in the order of the products: turns k once, where turning it in the attention's loop would cost more, and for the
backward."""

from __future__ import annotations

import triton
import triton.language as tl

from .pieces import aligned, load_turned, operand_cut, store_operands, total_of


@triton.jit
def operands_kernel(
    x, out, cos, sin, tokens, rows_in_all,
    x_batch, x_token, x_head, table_batch, table_token, table_head,
    D: tl.constexpr, R: tl.constexpr, PAIRING: tl.constexpr, PAIRS: tl.constexpr,
    ALIGN: tl.constexpr, TABLE_ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x (B, N, H, D) with any strides to out (H, B N, padded D)."""
    x_batch = aligned(x_batch, ALIGN)
    x_token = aligned(x_token, ALIGN)
    x_head = aligned(x_head, ALIGN)
    table_batch = aligned(table_batch, TABLE_ALIGN)
    table_token = aligned(table_token, TABLE_ALIGN)
    table_head = aligned(table_head, TABLE_ALIGN)
    head = tl.cast(tl.program_id(1), tl.int64)
    blocks = tl.cdiv(tokens, BLOCK)
    sample = tl.cast(tl.program_id(0) // blocks, tl.int64)
    first = (tl.program_id(0) % blocks) * BLOCK
    token = tl.cast(first, tl.int64)
    row = tl.arange(0, BLOCK)
    exists = first + row < tokens
    cos += sample * table_batch + token * table_token + head * table_head
    sin += sample * table_batch + token * table_token + head * table_head
    x += sample * x_batch + token * x_token + head * x_head
    operands = load_turned(x, row, x_token, cos, sin, table_token, exists, D, R, PAIRING, PAIRS)
    out += (head * rows_in_all + sample * tokens + token) * total_of(operand_cut(PAIRS))
    store_operands(out, row, exists, operands, PAIRS)
