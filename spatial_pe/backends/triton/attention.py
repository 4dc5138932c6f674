# SPDX-License-Identifier: Apache-2.0
"""Forward: out = softmax(R(q) R(k)ᵀ scale) v and lse, the log of each row's sum of exponentials.

A program has BM queries of one head. q is turned as it is loaded; k is turned tile by tile in the loop (ROTATE_K), or
was turned before by rotate.py and is read in operand order. The softmax keeps a running maximum; scores stay unscaled,
and scale · log2(e) costs nothing in the multiply-add before the exponential.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pieces import (
    aligned,
    dot_over_channels,
    dot_to_channels,
    kept,
    load_operand,
    load_pieces,
    load_turned,
    scaled,
    store_pieces,
    zeros,
)
from .sequences import locate


@triton.jit
def forward_kernel(
    q, k, v, out, lse, cos, sin, bounds,
    sequences, tokens, heads, group, scale,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    table_batch, table_token, table_head,
    D: tl.constexpr, R: tl.constexpr, PAIRING: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr,
    ALIGN: tl.constexpr, TABLE_ALIGN: tl.constexpr,
    FORM: tl.constexpr, ROTATE_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """q (B, N, H, D), k and v (B, N, Hkv, D) with any strides; out contiguous; lse (B, H, N); ROTATE_K = False: k is
    (Hkv, B N, padded D) in operand order."""
    q_batch = aligned(q_batch, ALIGN)
    q_token = aligned(q_token, ALIGN)
    q_head = aligned(q_head, ALIGN)
    k_batch = aligned(k_batch, ALIGN)
    k_token = aligned(k_token, ALIGN)
    k_head = aligned(k_head, ALIGN)
    v_batch = aligned(v_batch, ALIGN)
    v_token = aligned(v_token, ALIGN)
    v_head = aligned(v_head, ALIGN)
    table_batch = aligned(table_batch, TABLE_ALIGN)
    table_token = aligned(table_token, TABLE_ALIGN)
    table_head = aligned(table_head, TABLE_ALIGN)
    head = tl.cast(tl.program_id(1), tl.int64)
    sample, start, length, first = locate(tl.program_id(0), bounds, sequences, tokens, FORM, BM)
    sample = tl.cast(sample, tl.int64)  # a tensor may hold more than 2^31 elements
    token = tl.cast(start + first, tl.int64)
    row = tl.arange(0, BM)
    exists = first + row < length

    cos += sample * table_batch + head * table_head
    sin += sample * table_batch + head * table_head
    q += sample * q_batch + token * q_token + head * q_head
    v += sample * v_batch + start * v_token + (head // group) * v_head
    if ROTATE_K:
        k += sample * k_batch + start * k_token + (head // group) * k_head
    else:
        k += (sample * tokens + start) * k_token + (head // group) * k_head
    turned_q = load_turned(
        q, row, q_token, cos + token * table_token, sin + token * table_token, table_token, exists,
        D, R, PAIRING, START, WIDTH,
    )  # fmt: skip
    cos += start * table_token
    sin += start * table_token

    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.full((BM,), 0.0, tl.float32)
    acc = zeros(BM, WIDTH)
    c = scale * 1.4426950408889634
    keys = tl.where(first < length, length, 0)  # nothing to do past the end
    whole = keys // BN * BN
    for at in tl.range(0, whole, BN, num_stages=STAGES):
        acc, top, total = _add_keys(
            acc, top, total, turned_q, k, v, cos, sin, at, keys, c, k_token, v_token,
            table_token, False, ROTATE_K, D, R, PAIRING, START, WIDTH, BM, BN,
        )  # fmt: skip
    for at in tl.range(whole, keys, BN, num_stages=1):
        acc, top, total = _add_keys(
            acc, top, total, turned_q, k, v, cos, sin, at, keys, c, k_token, v_token,
            table_token, True, ROTATE_K, D, R, PAIRING, START, WIDTH, BM, BN,
        )  # fmt: skip

    acc = scaled(acc, (1.0 / total)[:, None], WIDTH)
    written = exists
    if FORM == "padded":  # tokens that do not exist are 0
        acc = kept(acc, exists, WIDTH)
        written = first + row < tokens
    stride = heads * D
    out += (sample * tokens + token) * stride + head * D
    store_pieces(out, row, stride, written, acc, D, START, WIDTH)
    log_total = tl.where(exists, top * scale + tl.log(total), 0.0)
    tl.store(lse + (sample * heads + head) * tokens + token + row, log_total, mask=written)


@triton.jit
def _add_keys(
    acc, top, total, turned_q, k, v, cos, sin, at, keys, c, k_token, v_token, table_token,
    TAIL: tl.constexpr, ROTATE_K: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr, PAIRING: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One tile of keys."""
    row = tl.arange(0, BN)
    exists = at + row < keys if TAIL else row >= 0
    first = tl.cast(at, tl.int64)
    if ROTATE_K:
        turned_k = load_turned(
            k + first * k_token, row, k_token, cos + first * table_token, sin + first * table_token, table_token, exists,
            D, R, PAIRING, START, WIDTH,
        )  # fmt: skip
    else:
        turned_k = load_operand(k + first * k_token, row, exists, START, WIDTH)
    scores = dot_over_channels(turned_q, turned_k, BM, BN, WIDTH)
    if TAIL:
        scores = tl.where(exists[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    shrink = tl.exp2((top - new_top) * c)
    weights = tl.exp2(scores * c - (new_top * c)[:, None])
    total = total * shrink + tl.sum(weights, 1)
    values = load_pieces(v + first * v_token, row, v_token, exists, D, START, WIDTH)
    acc = dot_to_channels(weights.to(v.dtype.element_ty), values, scaled(acc, shrink[:, None], WIDTH), WIDTH)
    return acc, new_top, total
