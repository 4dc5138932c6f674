# SPDX-License-Identifier: Apache-2.0
"""Sequences of at most 128 tokens, such as Qwen2.5-VL's windows of 64: a whole sequence is one tile.

No running maximum, no loop over keys, nothing is turned twice, and the backward is one kernel that needs nothing but its own
sequence. These sizes are bound by memory traffic: a program takes several sequences, one after another, so that the
next one's loads are under way while this one is computed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pieces import (
    aligned,
    dot_over_channels,
    dot_to_channels,
    kept,
    load_pieces,
    load_turned,
    scaled,
    store_pieces,
    store_turned_back,
    zeros,
)
from .sequences import whole_sequence


@triton.jit
def window_forward_kernel(
    q, k, v, out, lse, cos, sin, bounds,
    sequences, tokens, heads, group, scale,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    table_batch, table_token, table_head,
    D: tl.constexpr, R: tl.constexpr, PAIRING: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr,
    ALIGN: tl.constexpr, TABLE_ALIGN: tl.constexpr,
    FORM: tl.constexpr, BLOCK: tl.constexpr, PER_PROGRAM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As forward_kernel; no sequence is longer than BLOCK."""
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
    begin = tl.program_id(0) * PER_PROGRAM
    row = tl.arange(0, BLOCK)
    c = scale * 1.4426950408889634
    stride = heads * D
    for index in tl.range(begin, tl.minimum(begin + PER_PROGRAM, sequences), num_stages=STAGES):
        sample, start, length = whole_sequence(index, bounds, tokens, FORM)
        sample = tl.cast(sample, tl.int64)
        start = tl.cast(start, tl.int64)
        exists = row < length
        table = sample * table_batch + start * table_token + head * table_head
        queries = load_turned(
            q + sample * q_batch + start * q_token + head * q_head, row, q_token, cos + table, sin + table, table_token, exists,
            D, R, PAIRING, START, WIDTH,
        )  # fmt: skip
        keys = load_turned(
            k + sample * k_batch + start * k_token + (head // group) * k_head, row, k_token, cos + table, sin + table, table_token,
            exists, D, R, PAIRING, START, WIDTH,
        )  # fmt: skip
        values = load_pieces(
            v + sample * v_batch + start * v_token + (head // group) * v_head, row, v_token, exists, D, START, WIDTH
        )

        scores = dot_over_channels(queries, keys, BLOCK, BLOCK, WIDTH)
        scores = tl.where(exists[None, :], scores, float("-inf"))
        top = tl.max(scores, 1)
        weights = tl.exp2(scores * c - (top * c)[:, None])
        total = tl.sum(weights, 1)
        acc = dot_to_channels(weights.to(v.dtype.element_ty), values, zeros(BLOCK, WIDTH), WIDTH)

        acc = scaled(acc, (1.0 / total)[:, None], WIDTH)
        written = exists
        if FORM == "padded":  # tokens that do not exist are 0
            acc = kept(acc, exists, WIDTH)
            written = row < tokens
        store_pieces(out + (sample * tokens + start) * stride + head * D, row, stride, written, acc, D, START, WIDTH)
        log_total = tl.where(exists, top * scale + tl.log(total), 0.0)
        tl.store(lse + (sample * heads + head) * tokens + start + row, log_total, mask=written)


@triton.jit
def window_backward_kernel(
    q, k, v, out, dout, lse, dq, dk, dv, cos, sin, bounds,
    sequences, tokens, heads, kv_heads, group, scale,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, g_batch, g_token, g_head,
    table_batch, table_token, table_head,
    D: tl.constexpr, R: tl.constexpr, PAIRING: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr,
    ALIGN: tl.constexpr, TABLE_ALIGN: tl.constexpr,
    FORM: tl.constexpr, BLOCK: tl.constexpr, PER_PROGRAM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All gradients of a key head of a sequence, the query heads that share it one after another."""
    q_batch = aligned(q_batch, ALIGN)
    q_token = aligned(q_token, ALIGN)
    q_head = aligned(q_head, ALIGN)
    k_batch = aligned(k_batch, ALIGN)
    k_token = aligned(k_token, ALIGN)
    k_head = aligned(k_head, ALIGN)
    v_batch = aligned(v_batch, ALIGN)
    v_token = aligned(v_token, ALIGN)
    v_head = aligned(v_head, ALIGN)
    g_batch = aligned(g_batch, ALIGN)
    g_token = aligned(g_token, ALIGN)
    g_head = aligned(g_head, ALIGN)
    table_batch = aligned(table_batch, TABLE_ALIGN)
    table_token = aligned(table_token, TABLE_ALIGN)
    table_head = aligned(table_head, TABLE_ALIGN)
    kv_head = tl.cast(tl.program_id(1), tl.int64)
    begin = tl.program_id(0) * PER_PROGRAM
    row = tl.arange(0, BLOCK)
    c = scale * 1.4426950408889634
    stride = heads * D
    kv_stride = kv_heads * D
    for index in tl.range(begin, tl.minimum(begin + PER_PROGRAM, sequences), num_stages=STAGES):
        sample, start, length = whole_sequence(index, bounds, tokens, FORM)
        sample = tl.cast(sample, tl.int64)
        start = tl.cast(start, tl.int64)
        exists = row < length
        written = row < tokens if FORM == "padded" else exists
        k_table = sample * table_batch + start * table_token + kv_head * table_head
        keys = load_turned(
            k + sample * k_batch + start * k_token + kv_head * k_head, row, k_token, cos + k_table, sin + k_table, table_token,
            exists, D, R, PAIRING, START, WIDTH,
        )  # fmt: skip
        values = load_pieces(
            v + sample * v_batch + start * v_token + kv_head * v_head, row, v_token, exists, D, START, WIDTH
        )
        dkeys = zeros(BLOCK, WIDTH)
        dvalues = zeros(BLOCK, WIDTH)
        for head in tl.range(kv_head * group, kv_head * group + group, num_stages=1):
            grads = load_pieces(
                dout + sample * g_batch + start * g_token + head * g_head, row, g_token, exists, D, START, WIDTH
            )
            outs = load_pieces(
                out + (sample * tokens + start) * stride + head * D, row, stride, exists, D, START, WIDTH
            )
            delta = tl.full((BLOCK,), 0.0, tl.float32)
            for i in tl.static_range(len(WIDTH)):
                delta += tl.sum(grads[i].to(tl.float32) * outs[i].to(tl.float32), 1)
            table = sample * table_batch + start * table_token + head * table_head
            queries = load_turned(
                q + sample * q_batch + start * q_token + head * q_head, row, q_token, cos + table, sin + table, table_token, exists,
                D, R, PAIRING, START, WIDTH,
            )  # fmt: skip
            at_row = (sample * heads + head) * tokens + start + row
            log2_total = tl.load(lse + at_row, mask=exists, other=float("inf")) * 1.4426950408889634

            weights = tl.exp2(dot_over_channels(queries, keys, BLOCK, BLOCK, WIDTH) * c - log2_total[:, None])
            weights = tl.where(exists[None, :], weights, 0.0)
            low_weights = weights.to(v.dtype.element_ty)
            dvalues = dot_to_channels(tl.trans(low_weights), grads, dvalues, WIDTH)
            dscores = weights * (dot_over_channels(grads, values, BLOCK, BLOCK, WIDTH) - delta[:, None])
            low_dscores = dscores.to(v.dtype.element_ty)
            dkeys = dot_to_channels(tl.trans(low_dscores), queries, dkeys, WIDTH)
            dqueries = dot_to_channels(low_dscores, keys, zeros(BLOCK, WIDTH), WIDTH)
            store_turned_back(
                dq + (sample * tokens + start) * stride + head * D, row, stride, cos + table, sin + table, table_token,
                written, scaled(dqueries, scale, WIDTH), D, R, PAIRING, START, WIDTH,
            )  # fmt: skip
        at = (sample * tokens + start) * kv_stride + kv_head * D
        store_turned_back(
            dk + at, row, kv_stride, cos + k_table, sin + k_table, table_token,
            written, scaled(dkeys, scale, WIDTH), D, R, PAIRING, START, WIDTH,
        )  # fmt: skip
        store_pieces(dv + at, row, kv_stride, written, dvalues, D, START, WIDTH)
