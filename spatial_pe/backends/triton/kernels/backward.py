# SPDX-License-Identifier: Apache-2.0
"""Backward, deterministic: no atomics, each gradient is summed by one program in a fixed order.

P = softmax(S), dP = dO Vᵀ, dS = P (dP - delta), delta = rowsum(dO O): dq̂ = dS k̂ scale, dk̂ = dSᵀ q̂ scale, dV = Pᵀ dO.

``query_kernel`` has BM queries of a head and loops over the keys, which pre_rotate.py has rotated. It rotates its own
queries, stores them and delta for the next kernel, and applies the inverse rotation to dq̂ in float32 before rounding.
``key_kernel`` has BN keys of a key head and loops over the queries of every head that shares it. Either side may have tokens
and a table of its own (OTHER: the form of the other side).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import (
    aligned,
    count_of,
    dot_over_channels,
    dot_to_channels,
    kept,
    load_blocks,
    load_operands,
    load_rotated,
    operand_cut,
    scaled,
    store_blocks,
    store_inverse_rotated,
    store_operands,
    total_of,
    zeros,
)
from .sequences import locate, other_side, poison


@triton.jit
def query_kernel(
    q, rotated_k, v, out, dout, lse, dq, rotated_q, delta, cos, sin, bounds, key_bounds,
    sequences, tokens, key_tokens, rows_in_all, key_rows, heads, group, scale,
    q_batch, q_token, q_head, v_batch, v_token, v_head, g_batch, g_token, g_head,
    table_batch, table_token, table_head,
    D: tl.constexpr, R: tl.constexpr, PAIRING: tl.constexpr, PAIRS: tl.constexpr, CUT: tl.constexpr,
    ALIGN: tl.constexpr, TABLE_ALIGN: tl.constexpr,
    FORM: tl.constexpr, OTHER: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out and dq (B, N, H, D) contiguous, dout with strides g; rotated_q (H, B N, padded D), rotated_k (Hkv, B M, padded D),
    operands side by side; lse and delta (B, H, N). OTHER = "": M = N, and key_bounds, key_tokens and key_rows are not read."""
    q_batch, q_token, q_head = aligned(q_batch, q_token, q_head, ALIGN)
    v_batch, v_token, v_head = aligned(v_batch, v_token, v_head, ALIGN)
    g_batch, g_token, g_head = aligned(g_batch, g_token, g_head, ALIGN)
    table_batch, table_token, table_head = aligned(table_batch, table_token, table_head, TABLE_ALIGN)
    head = tl.cast(tl.program_id(1), tl.int64)
    index, sample, start, length, rows, nan, end, first = locate(tl.program_id(0), bounds, sequences, tokens, FORM, BM)
    if OTHER == "":
        key_start, key_length, key_tokens, key_rows = start, length, tokens, rows_in_all
    else:
        key_start, key_length, length, rows, nan = other_side(
            index, start, length, rows, nan, first, key_bounds, sequences, key_tokens, OTHER
        )
    sample = tl.cast(sample, tl.int64)
    if FORM != "dense" or OTHER == "padded":
        poison(dq, sample * tokens, nan, end, heads, head, D)
    if FORM == "packed":  # noqa: SIM102, one is the compiler's to decide, the other the GPU's
        if first >= length:  # a program without tokens
            return
    token = start + first
    row = tl.arange(0, BM)
    valid = first + row < length
    width: tl.constexpr = total_of(operand_cut(PAIRS))

    cos += sample * table_batch + token * table_token + head * table_head
    sin += sample * table_batch + token * table_token + head * table_head
    stride = heads * D
    q += sample * q_batch + token * q_token + head * q_head
    queries = load_rotated(q, row, q_token, cos, sin, table_token, valid, D, R, PAIRING, PAIRS)
    rotated_q += (head * rows_in_all + sample * tokens + token) * width
    store_operands(rotated_q, row, valid, queries, PAIRS)
    grads = load_blocks(dout + sample * g_batch + token * g_token + head * g_head, row, g_token, valid, D, CUT)
    at_block = (sample * tokens + token) * stride + head * D
    outs = load_blocks(out + at_block, row, stride, valid, D, CUT)
    row_delta = tl.full((BM,), 0.0, tl.float32)
    for i in tl.static_range(count_of(CUT)):
        row_delta += tl.sum(grads[i].to(tl.float32) * outs[i].to(tl.float32), 1)
    at_row = (sample * heads + head) * tokens + token + row
    tl.store(delta + at_row, row_delta, mask=valid)
    log2_total = tl.load(lse + at_row, mask=valid, other=float("inf")) * 1.4426950408889634

    rotated_k += ((head // group) * key_rows + sample * key_tokens + key_start) * width
    v += sample * v_batch + key_start * v_token + (head // group) * v_head
    c = scale * 1.4426950408889634
    acc = zeros(BM, operand_cut(PAIRS))
    keys = tl.where(first < length, key_length, 0)
    # SPLIT, a separate loop for whole tiles, saves a sixth of its instructions, and takes registers
    whole = keys // BN * BN if SPLIT else 0
    for at in tl.range(0, whole, BN, num_stages=STAGES):
        acc = _add_keys(
            acc, queries, grads, rotated_k, v, at, keys, c, log2_total, row_delta, v_token, False, D, PAIRS, CUT, BM, BN
        )
    for at in tl.range(whole, keys, BN, num_stages=1 if SPLIT else STAGES):
        acc = _add_keys(
            acc, queries, grads, rotated_k, v, at, keys, c, log2_total, row_delta, v_token, True, D, PAIRS, CUT, BM, BN
        )

    written = first + row < rows if FORM == "padded" else valid
    store_inverse_rotated(
        dq + at_block, row, stride, cos, sin, table_token, written, scaled(acc, scale),
        D, R, PAIRING, PAIRS,
    )  # fmt: skip


@triton.jit
def _add_keys(
    acc, queries, grads, rotated_k, v, at, keys, c, log2_total, row_delta, v_token,
    TAIL: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, CUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, BN)
    valid = at + row < keys if TAIL else None
    first = tl.cast(at, tl.int64)
    rotated = load_operands(rotated_k + first * total_of(operand_cut(PAIRS)), row, valid, PAIRS)
    values = load_blocks(v + first * v_token, row, v_token, valid, D, CUT)
    weights = tl.exp2(dot_over_channels(queries, rotated, BM, BN) * c - log2_total[:, None])
    if TAIL:  # a key past the end is 0 and adds 0, unless its weight, exp(0 - lse), is infinite
        weights = tl.where(valid[None, :], weights, 0.0)
    dscores = weights * (dot_over_channels(grads, values, BM, BN) - row_delta[:, None])
    return dot_to_channels(dscores.to(v.dtype.element_ty), rotated, acc)


@triton.jit
def key_kernel(
    rotated_q, rotated_k, v, dout, lse, delta, dk, dv, cos, sin, bounds, query_bounds,
    sequences, tokens, query_tokens, rows_in_all, query_rows, heads, kv_heads, group, scale,
    v_batch, v_token, v_head, g_batch, g_token, g_head, table_batch, table_token, table_head,
    D: tl.constexpr, R: tl.constexpr, PAIRING: tl.constexpr, PAIRS: tl.constexpr, CUT: tl.constexpr,
    ALIGN: tl.constexpr, TABLE_ALIGN: tl.constexpr,
    FORM: tl.constexpr, OTHER: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv (B, M, Hkv, D) contiguous; the rest as query_kernel wrote it. OTHER = "": the tokens, bounds and rows of the
    queries are those of the keys, and not read."""
    v_batch, v_token, v_head = aligned(v_batch, v_token, v_head, ALIGN)
    g_batch, g_token, g_head = aligned(g_batch, g_token, g_head, ALIGN)
    table_batch, table_token, table_head = aligned(table_batch, table_token, table_head, TABLE_ALIGN)
    kv_head = tl.cast(tl.program_id(1), tl.int64)
    index, sample, start, length, rows, nan, end, first = locate(tl.program_id(0), bounds, sequences, tokens, FORM, BN)
    if OTHER == "":
        query_start, query_length, query_tokens, query_rows = start, length, tokens, rows_in_all
    else:
        query_start, query_length, length, rows, nan = other_side(
            index, start, length, rows, nan, first, query_bounds, sequences, query_tokens, OTHER
        )
    sample = tl.cast(sample, tl.int64)
    if FORM != "dense" or OTHER == "padded":
        poison(dk, sample * tokens, nan, end, kv_heads, kv_head, D)
        poison(dv, sample * tokens, nan, end, kv_heads, kv_head, D)
    token = start + first
    row = tl.arange(0, BN)
    valid = first + row < length
    width: tl.constexpr = total_of(operand_cut(PAIRS))

    rotated_k += (kv_head * rows_in_all + sample * tokens + token) * width
    keys = load_operands(rotated_k, row, valid, PAIRS)
    v += sample * v_batch + token * v_token + kv_head * v_head
    values = load_blocks(v, row, v_token, valid, D, CUT)
    c = scale * 1.4426950408889634
    dkeys = zeros(BN, operand_cut(PAIRS))
    dvalues = zeros(BN, CUT)
    queries = tl.where(first < length, query_length, 0)
    # as in query_kernel; saves 11 % here
    whole = queries // BM * BM if SPLIT else 0
    for head in tl.range(kv_head * group, kv_head * group + group, num_stages=1):
        head_q = rotated_q + (head * query_rows + sample * query_tokens + query_start) * width
        head_g = dout + sample * g_batch + query_start * g_token + head * g_head
        head_rows = (sample * heads + head) * query_tokens + query_start
        for at in tl.range(0, whole, BM, num_stages=STAGES):
            dkeys, dvalues = _add_queries(
                dkeys, dvalues, keys, values, head_q, head_g, lse + head_rows, delta + head_rows, at, query_length, c, g_token,
                False, D, PAIRS, CUT, BM, BN,
            )  # fmt: skip
        for at in tl.range(whole, queries, BM, num_stages=1 if SPLIT else STAGES):
            dkeys, dvalues = _add_queries(
                dkeys, dvalues, keys, values, head_q, head_g, lse + head_rows, delta + head_rows, at, query_length, c, g_token,
                True, D, PAIRS, CUT, BM, BN,
            )  # fmt: skip

    written = valid
    if FORM == "padded":
        dkeys = kept(dkeys, valid)
        dvalues = kept(dvalues, valid)
        written = first + row < rows
    stride = kv_heads * D
    at_block = (sample * tokens + token) * stride + kv_head * D
    cos += sample * table_batch + token * table_token + kv_head * table_head
    sin += sample * table_batch + token * table_token + kv_head * table_head
    store_inverse_rotated(
        dk + at_block, row, stride, cos, sin, table_token, written, scaled(dkeys, scale),
        D, R, PAIRING, PAIRS,
    )  # fmt: skip
    store_blocks(dv + at_block, row, stride, written, dvalues, D, CUT)


@triton.jit
def _add_queries(
    dkeys, dvalues, keys, values, q, dout, lse, delta, at, length, c, g_token,
    TAIL: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, CUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, BM)
    valid = at + row < length if TAIL else None
    first = tl.cast(at, tl.int64)
    queries = load_operands(q + first * total_of(operand_cut(PAIRS)), row, valid, PAIRS)
    grads = load_blocks(dout + first * g_token, row, g_token, valid, D, CUT)
    if TAIL:  # past the end: weight exp(-inf) = 0
        log2_total = tl.load(lse + first + row, mask=valid, other=float("inf")) * 1.4426950408889634
        row_delta = tl.load(delta + first + row, mask=valid, other=0.0)
    else:
        log2_total = tl.load(lse + first + row) * 1.4426950408889634
        row_delta = tl.load(delta + first + row)
    weights = tl.exp2(dot_over_channels(keys, queries, BN, BM) * c - log2_total[None, :])
    dvalues = dot_to_channels(weights.to(dout.dtype.element_ty), grads, dvalues)
    dscores = weights * (dot_over_channels(values, grads, BN, BM) - row_delta[None, :])
    dkeys = dot_to_channels(dscores.to(dout.dtype.element_ty), queries, dkeys)
    return dkeys, dvalues
