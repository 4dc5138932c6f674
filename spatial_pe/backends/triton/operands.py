# SPDX-License-Identifier: Apache-2.0
"""R(x) in the order of the products: turns k once, where turning it in the attention's loop would cost more, and for the
backward."""

from __future__ import annotations

import triton
import triton.language as tl

from .pieces import aligned, load_turned, operand_cut, store_operands, total_of
from .sequences import block_of_tokens


@triton.jit
def operands_kernel(
    x, out, cos, sin, tokens, rows_in_all,
    x_batch, x_token, x_head, table_batch, table_token, table_head,
    D: tl.constexpr, R: tl.constexpr, PAIRING: tl.constexpr, PAIRS: tl.constexpr,
    ALIGN: tl.constexpr, TABLE_ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x (B, N, H, D) with any strides to out (H, B N, padded D)."""
    x_batch, x_token, x_head = aligned(x_batch, x_token, x_head, ALIGN)
    table_batch, table_token, table_head = aligned(table_batch, table_token, table_head, TABLE_ALIGN)
    head = tl.cast(tl.program_id(1), tl.int64)
    sample, token, row, exists = block_of_tokens(tl.program_id(0), tokens, BLOCK)
    cos += sample * table_batch + token * table_token + head * table_head
    sin += sample * table_batch + token * table_token + head * table_head
    x += sample * x_batch + token * x_token + head * x_head
    operands = load_turned(x, row, x_token, cos, sin, table_token, exists, D, R, PAIRING, PAIRS)
    out += (head * rows_in_all + sample * tokens + token) * total_of(operand_cut(PAIRS))
    store_operands(out, row, exists, operands, PAIRS)
