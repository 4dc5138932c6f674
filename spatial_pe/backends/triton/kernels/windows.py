# SPDX-License-Identifier: Apache-2.0
"""Sequences of at most 128 tokens, such as Qwen2.5-VL's windows of 64: a whole sequence is one tile.

No running maximum, no loop over keys, each q and k is rotated once, and the backward is one kernel that needs only its
sequence. These sizes are bound by memory traffic: a program takes several heads of a sequence, one after another, so that
the next head's loads are in flight while this one is computed, and the angles, two thirds as many bytes as q, k and v
together, come from the L1 cache after the first head. The backward has no registers for that.
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
    load_rotated,
    operand_cut,
    scaled,
    store_blocks,
    store_inverse_rotated,
    zeros,
)
from .sequences import poison, whole_sequence


@triton.jit
def window_forward_kernel(
    q, k, v, out, lse, cos, sin, bounds,
    sequences, tokens, heads, group, scale,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    table_batch, table_token, table_head,
    D: tl.constexpr, R: tl.constexpr, PAIRING: tl.constexpr, PAIRS: tl.constexpr, CUT: tl.constexpr,
    ALIGN: tl.constexpr, TABLE_ALIGN: tl.constexpr, MATERIALIZE: tl.constexpr,
    FORM: tl.constexpr, BLOCK: tl.constexpr, PER_PROGRAM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Forward like forward_kernel; a sequence longer than BLOCK becomes NaN."""
    q_batch, q_token, q_head = aligned(q_batch, q_token, q_head, ALIGN)
    k_batch, k_token, k_head = aligned(k_batch, k_token, k_head, ALIGN)
    v_batch, v_token, v_head = aligned(v_batch, v_token, v_head, ALIGN)
    table_batch, table_token, table_head = aligned(table_batch, table_token, table_head, TABLE_ALIGN)
    sample, start, length, rows, nan, end = whole_sequence(tl.program_id(0), bounds, sequences, tokens, FORM, BLOCK)
    sample = tl.cast(sample, tl.int64)
    begin = tl.program_id(1) * PER_PROGRAM
    stop = tl.minimum(begin + PER_PROGRAM, heads)
    if FORM != "dense":  # noqa: SIM102, one is the compiler's to decide, the other the GPU's
        if nan < end:
            for index in tl.range(begin, stop):
                poison(out, sample * tokens, nan, end, heads, index, D)
                poison(lse, (sample * heads + index) * tokens, nan, end, 1, 0, 1)
    row = tl.arange(0, BLOCK)
    valid = row < length
    written = row < rows if FORM == "padded" else valid
    c = scale * 1.4426950408889634
    stride = heads * D
    q += sample * q_batch + start * q_token
    k += sample * k_batch + start * k_token
    v += sample * v_batch + start * v_token
    cos += sample * table_batch + start * table_token
    sin += sample * table_batch + start * table_token
    out += (sample * tokens + start) * stride
    for index in tl.range(begin, stop, num_stages=STAGES):
        head = tl.cast(index, tl.int64)
        at_cos = cos + head * table_head
        at_sin = sin + head * table_head
        queries = load_rotated(
            q + head * q_head, row, q_token, at_cos, at_sin, table_token, valid, D, R, PAIRING, PAIRS
        )  # fmt: skip
        keys = load_rotated(
            k + (head // group) * k_head, row, k_token, at_cos, at_sin, table_token, valid, D, R, PAIRING, PAIRS, MATERIALIZE
        )  # fmt: skip
        values = load_blocks(v + (head // group) * v_head, row, v_token, valid, D, CUT)

        scores = dot_over_channels(queries, keys, BLOCK, BLOCK)
        scores = tl.where(valid[None, :], scores, float("-inf"))
        top = tl.max(scores, 1)
        weights = tl.exp2(scores * c - (top * c)[:, None])
        total = tl.sum(weights, 1)
        acc = dot_to_channels(weights.to(v.dtype.element_ty), values, zeros(BLOCK, CUT))

        acc = scaled(acc, (1.0 / total)[:, None])
        if FORM == "padded":  # padding is 0
            acc = kept(acc, valid)
        store_blocks(out + head * D, row, stride, written, acc, D, CUT)
        log_total = tl.where(valid, top * scale + tl.log(total), 0.0)
        tl.store(lse + (sample * heads + head) * tokens + start + row, log_total, mask=written)


@triton.jit
def window_backward_kernel(
    q, k, v, out, dout, lse, dq, dk, dv, cos, sin, bounds,
    sequences, tokens, heads, kv_heads, group, scale,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, g_batch, g_token, g_head,
    table_batch, table_token, table_head,
    D: tl.constexpr, R: tl.constexpr, PAIRING: tl.constexpr, PAIRS: tl.constexpr, CUT: tl.constexpr,
    ALIGN: tl.constexpr, TABLE_ALIGN: tl.constexpr, MATERIALIZE: tl.constexpr,
    FORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute all gradients of a key head of a sequence, from the query heads that share it one after another."""
    q_batch, q_token, q_head = aligned(q_batch, q_token, q_head, ALIGN)
    k_batch, k_token, k_head = aligned(k_batch, k_token, k_head, ALIGN)
    v_batch, v_token, v_head = aligned(v_batch, v_token, v_head, ALIGN)
    g_batch, g_token, g_head = aligned(g_batch, g_token, g_head, ALIGN)
    table_batch, table_token, table_head = aligned(table_batch, table_token, table_head, TABLE_ALIGN)
    sample, start, length, rows, nan, end = whole_sequence(tl.program_id(0), bounds, sequences, tokens, FORM, BLOCK)
    sample = tl.cast(sample, tl.int64)
    kv_head = tl.cast(tl.program_id(1), tl.int64)
    if FORM != "dense":
        for head in tl.range(kv_head * group, kv_head * group + group):
            poison(dq, sample * tokens, nan, end, heads, head, D)
        poison(dk, sample * tokens, nan, end, kv_heads, kv_head, D)
        poison(dv, sample * tokens, nan, end, kv_heads, kv_head, D)
    row = tl.arange(0, BLOCK)
    valid = row < length
    written = row < rows if FORM == "padded" else valid
    c = scale * 1.4426950408889634
    stride = heads * D
    kv_stride = kv_heads * D
    q += sample * q_batch + start * q_token
    k += sample * k_batch + start * k_token
    v += sample * v_batch + start * v_token
    dout += sample * g_batch + start * g_token
    cos += sample * table_batch + start * table_token
    sin += sample * table_batch + start * table_token
    out += (sample * tokens + start) * stride
    dq += (sample * tokens + start) * stride
    dk += (sample * tokens + start) * kv_stride
    dv += (sample * tokens + start) * kv_stride
    k_cos = cos + kv_head * table_head
    k_sin = sin + kv_head * table_head
    keys = load_rotated(
        k + kv_head * k_head, row, k_token, k_cos, k_sin, table_token, valid, D, R, PAIRING, PAIRS, MATERIALIZE
    )  # fmt: skip
    values = load_blocks(v + kv_head * v_head, row, v_token, valid, D, CUT)
    dkeys = zeros(BLOCK, operand_cut(PAIRS))
    dvalues = zeros(BLOCK, CUT)
    for head in tl.range(kv_head * group, kv_head * group + group, num_stages=1):
        at_cos = cos + head * table_head
        at_sin = sin + head * table_head
        grads = load_blocks(dout + head * g_head, row, g_token, valid, D, CUT)
        outs = load_blocks(out + head * D, row, stride, valid, D, CUT)
        delta = tl.full((BLOCK,), 0.0, tl.float32)
        for i in tl.static_range(count_of(CUT)):
            delta += tl.sum(grads[i].to(tl.float32) * outs[i].to(tl.float32), 1)
        queries = load_rotated(
            q + head * q_head, row, q_token, at_cos, at_sin, table_token, valid, D, R, PAIRING, PAIRS
        )  # fmt: skip
        at_row = (sample * heads + head) * tokens + start + row
        log2_total = tl.load(lse + at_row, mask=valid, other=float("inf")) * 1.4426950408889634

        weights = tl.exp2(dot_over_channels(queries, keys, BLOCK, BLOCK) * c - log2_total[:, None])
        weights = tl.where(valid[None, :], weights, 0.0)
        low_weights = weights.to(v.dtype.element_ty)
        dvalues = dot_to_channels(tl.trans(low_weights), grads, dvalues)
        dscores = weights * (dot_over_channels(grads, values, BLOCK, BLOCK) - delta[:, None])
        low_dscores = dscores.to(v.dtype.element_ty)
        dkeys = dot_to_channels(tl.trans(low_dscores), queries, dkeys)
        dqueries = dot_to_channels(low_dscores, keys, zeros(BLOCK, operand_cut(PAIRS)))
        store_inverse_rotated(
            dq + head * D, row, stride, at_cos, at_sin, table_token, written, scaled(dqueries, scale), D, R, PAIRING, PAIRS
        )  # fmt: skip
    store_inverse_rotated(
        dk + kv_head * D, row, kv_stride, k_cos, k_sin, table_token, written, scaled(dkeys, scale), D, R, PAIRING, PAIRS
    )  # fmt: skip
    store_blocks(dv + kv_head * D, row, kv_stride, written, dvalues, D, CUT)
