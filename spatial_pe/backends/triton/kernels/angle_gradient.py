# SPDX-License-Identifier: Apache-2.0
"""Gradient of the angles: dφ = x₁·dx₂ - x₂·dx₁ of q plus that of k, from un-rotated x and its final gradient, since a
rotation commutes with a rotation by 90°. Only for tables that require a gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import aligned, begin_of, count_of, load_pairs
from .sequences import block_of_tokens


@triton.jit
def angles_kernel(
    q, k, dq, dk, out, lengths, tokens, heads, kv_heads, table_heads,
    q_batch, q_token, q_head, k_batch, k_token, k_head, dq_batch, dq_token, dq_head, dk_batch, dk_token, dk_head,
    D: tl.constexpr, R: tl.constexpr, PAIRING: tl.constexpr, PAIRS: tl.constexpr,
    ALIGN: tl.constexpr, PADDED: tl.constexpr, PER_HEAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """q, dq (B, N, H, D), k, dk (B, N, Hkv, D), Hkv = 0: of q alone; out (B, N, H|1, R/2) contiguous: of one head, or the sum
    over all heads in order, so that results are deterministic."""
    q_batch, q_token, q_head = aligned(q_batch, q_token, q_head, ALIGN)
    k_batch, k_token, k_head = aligned(k_batch, k_token, k_head, ALIGN)
    dq_batch, dq_token, dq_head = aligned(dq_batch, dq_token, dq_head, ALIGN)
    dk_batch, dk_token, dk_head = aligned(dk_batch, dk_token, dk_head, ALIGN)
    sample, token, row, written = block_of_tokens(tl.program_id(0), tokens, BLOCK)
    valid = written
    if PADDED:  # padding may be NaN; where the length is none, all gradients are
        length = tl.load(lengths + sample)
        valid = written & (token + row < tl.where(length < 0, tokens, length))
    q += sample * q_batch + token * q_token
    k += sample * k_batch + token * k_token
    dq += sample * dq_batch + token * dq_token
    dk += sample * dk_batch + token * dk_token
    table_head = tl.program_id(1)
    out += ((sample * tokens + token) * table_heads + table_head) * (R // 2)
    begin = table_head if PER_HEAD else 0
    for i in tl.static_range(count_of(PAIRS)):
        total = tl.full((BLOCK, PAIRS[i]), 0.0, tl.float32)
        for index in tl.range(begin, begin + 1 if PER_HEAD else heads):
            head = tl.cast(index, tl.int64)
            total += _of_a_head(
                q + head * q_head, dq + head * dq_head, row, q_token, dq_token, valid, D, R, PAIRING, begin_of(PAIRS, i), PAIRS[i]
            )  # fmt: skip
        for index in tl.range(begin, tl.minimum(begin + 1, kv_heads) if PER_HEAD else kv_heads):
            head = tl.cast(index, tl.int64)
            total += _of_a_head(
                k + head * k_head, dk + head * dk_head, row, k_token, dk_token, valid, D, R, PAIRING, begin_of(PAIRS, i), PAIRS[i]
            )  # fmt: skip
        pair = begin_of(PAIRS, i) + tl.arange(0, PAIRS[i])
        at = row[:, None] * (table_heads * (R // 2)) + pair[None, :]
        tl.store(out + at, total, mask=written[:, None] & (pair < R // 2)[None, :])


@triton.jit
def _of_a_head(
    x, dx, row, x_token, dx_token, valid, D: tl.constexpr, R: tl.constexpr, PAIRING: tl.constexpr,
    BEGIN: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    x1, x2 = load_pairs(x, row, x_token, valid, D, R, PAIRING, BEGIN, COUNT, R // 2)
    g1, g2 = load_pairs(dx, row, dx_token, valid, D, R, PAIRING, BEGIN, COUNT, R // 2)
    return x1.to(tl.float32) * g2.to(tl.float32) - x2.to(tl.float32) * g1.to(tl.float32)
