# SPDX-License-Identifier: Apache-2.0
"""Forward of any length: out = softmax(R(q) R(k)ᵀ scale) v and lse, the log of each row's sum of exponentials.

A program has BM queries of one head and loops over the keys in tiles of BN. q is rotated when it is loaded; k is rotated
tile by tile in the loop (ROTATE_K), or was rotated before by pre_rotate.py, always where it has other tokens than q (OTHER,
the form of their lengths), and so a table of its own. JOIN: the two operands of q and k, first and second channels, are
one, so that the loop waits once for the tensor cores and not twice (wgmma).

The softmax is relative to a row's maximum over its first tile only: no maximum and no rescaling in the loop, which
saves a quarter of its instructions. The weights are rounded to the type of v for their product with it. Their sum is that
of the rounded ones, by a product with ONES columns of 1: a row with one dominating weight, which is any power of 2 here
and not 1, is then that row of v exactly. The product also costs less than additions: 167 instructions of a tile for 203
(sm_90, D = 64, Triton 3.6).

If the sum of a row overflows (scores growing by more than 60 nats after the first tile, NaN, Inf), the block is computed
by a second pass with a running maximum: 0.2 % of the blocks of DINOv2-small, all in its first layer (`python -m
tools.score_growth`). float16 takes that pass at once (RUNNING): its weights end at 65,504, 11 nats above the first
maximum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import (
    aligned,
    dot,
    dot_over_channels,
    dot_to_channels,
    joined,
    kept,
    load_blocks,
    load_operands,
    load_rotated,
    scaled,
    store_blocks,
    zeros,
)
from .sequences import locate, other_side, poison


@triton.jit
def forward_kernel(
    q, k, v, out, lse, cos, sin, bounds, key_bounds,
    sequences, tokens, key_tokens, heads, group, scale,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    table_batch, table_token, table_head,
    D: tl.constexpr, R: tl.constexpr, PAIRING: tl.constexpr, PAIRS: tl.constexpr, CUT: tl.constexpr,
    ALIGN: tl.constexpr, TABLE_ALIGN: tl.constexpr, MATERIALIZE: tl.constexpr,
    FORM: tl.constexpr, OTHER: tl.constexpr, ROTATE_K: tl.constexpr, JOIN: tl.constexpr, RUNNING: tl.constexpr, ONES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """q (B, N, H, D), k and v (B, M, Hkv, D) with any strides; out contiguous; lse (B, H, N); ROTATE_K = False: k is
    (Hkv, B M, padded D), operands side by side. OTHER = "": M = N, and key_bounds and key_tokens are not read. ONES = 0:
    weights are summed unrounded."""
    q_batch, q_token, q_head = aligned(q_batch, q_token, q_head, ALIGN)
    k_batch, k_token, k_head = aligned(k_batch, k_token, k_head, ALIGN)
    v_batch, v_token, v_head = aligned(v_batch, v_token, v_head, ALIGN)
    table_batch, table_token, table_head = aligned(table_batch, table_token, table_head, TABLE_ALIGN)
    head = tl.cast(tl.program_id(1), tl.int64)
    index, sample, start, length, rows, nan, end, first = locate(tl.program_id(0), bounds, sequences, tokens, FORM, BM)
    if OTHER == "":
        key_start, key_length, key_tokens = start, length, tokens
    else:
        key_start, key_length, length, rows, nan = other_side(
            index, start, length, rows, nan, first, key_bounds, sequences, key_tokens, OTHER
        )
    sample = tl.cast(sample, tl.int64)  # a tensor may hold more than 2^31 elements
    if FORM != "dense" or OTHER == "padded":
        poison(out, sample * tokens, nan, end, heads, head, D)
        poison(lse, (sample * heads + head) * tokens, nan, end, 1, 0, 1)
    if FORM == "packed":  # noqa: SIM102, one is the compiler's to decide, the other the GPU's
        if first >= length:  # a program without tokens
            return
    token = start + first
    row = tl.arange(0, BM)
    valid = first + row < length

    cos += sample * table_batch + head * table_head
    sin += sample * table_batch + head * table_head
    q += sample * q_batch + token * q_token + head * q_head
    v += sample * v_batch + key_start * v_token + (head // group) * v_head
    if ROTATE_K:
        k += sample * k_batch + key_start * k_token + (head // group) * k_head
    else:
        k += (sample * key_tokens + key_start) * k_token + (head // group) * k_head
    queries = load_rotated(
        q, row, q_token, cos + token * table_token, sin + token * table_token, table_token, valid, D, R, PAIRING, PAIRS
    )  # fmt: skip
    if JOIN:
        queries = joined(queries, PAIRS)
    cos += start * table_token
    sin += start * table_token

    c = scale * 1.4426950408889634
    keys = tl.where(first < length, key_length, 0)  # 0: past the end
    if RUNNING:
        acc, top, total = _running(
            queries, k, v, cos, sin, keys, c, k_token, v_token, table_token, ROTATE_K, JOIN, MATERIALIZE, D, R, PAIRING, PAIRS, CUT, BM, BN, STAGES
        )  # fmt: skip
    else:
        acc, top, total = _fixed(
            queries, k, v, cos, sin, keys, c, k_token, v_token, table_token, ROTATE_K, JOIN, MATERIALIZE, D, R, PAIRING, PAIRS, CUT, ONES, BM, BN, STAGES
        )  # fmt: skip
        # true for NaN too; with a sum below 2^87 no accumulator of |v| <= 2^40 has overflowed
        outside = valid & ~(total < 1.5e26)
        # in small tiles: with large ones this pass, not the loop above, determines the registers (142 for 126, sm_90, D = 64)
        if tl.max(outside.to(tl.int32), 0) > 0:
            acc, top, total = _running(
                queries, k, v, cos, sin, keys, c, k_token, v_token, table_token, ROTATE_K, JOIN, MATERIALIZE, D, R, PAIRING, PAIRS, CUT, BM, (BN // 4 if BN > 64 else 16) if ONES > 0 else BN, 1
            )  # fmt: skip

    acc = scaled(acc, (1.0 / total)[:, None])
    written = valid
    if FORM == "padded":
        written = first + row < rows
    if OTHER != "":  # queries without keys attend to nothing
        valid = valid & (keys > 0)
    if FORM == "padded" or OTHER != "":  # as padding, they are 0
        acc = kept(acc, valid)
    stride = heads * D
    out += (sample * tokens + token) * stride + head * D
    store_blocks(out, row, stride, written, acc, D, CUT)
    log_total = tl.where(valid, top * scale + tl.log(total), 0.0)
    tl.store(lse + (sample * heads + head) * tokens + token + row, log_total, mask=written)


@triton.jit
def _fixed(
    queries, k, v, cos, sin, keys, c, k_token, v_token, table_token, ROTATE_K: tl.constexpr, JOIN: tl.constexpr, MATERIALIZE: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr, PAIRING: tl.constexpr, PAIRS: tl.constexpr, CUT: tl.constexpr,
    ONES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Return (acc, top, total), relative to the maximum over the first tile."""
    scores, values = _scores(
        queries, k, v, cos, sin, 0, keys, k_token, v_token, table_token, True, ROTATE_K, JOIN, MATERIALIZE, D, R, PAIRING, PAIRS, CUT, BM, BN
    )  # fmt: skip
    top = tl.max(scores, 1)
    top_c = top * c
    total = tl.full((BM, ONES) if ONES > 0 else (BM,), 0.0, tl.float32)
    acc, total = _add_weights(zeros(BM, CUT), total, scores, values, c, top_c, ONES)
    whole = keys // BN * BN
    for at in tl.range(BN, whole, BN, num_stages=STAGES):
        scores, values = _scores(
            queries, k, v, cos, sin, at, keys, k_token, v_token, table_token, False, ROTATE_K, JOIN, MATERIALIZE, D, R, PAIRING, PAIRS, CUT, BM, BN
        )  # fmt: skip
        acc, total = _add_weights(acc, total, scores, values, c, top_c, ONES)
    for at in tl.range(tl.maximum(whole, BN), keys, BN, num_stages=1):
        scores, values = _scores(
            queries, k, v, cos, sin, at, keys, k_token, v_token, table_token, True, ROTATE_K, JOIN, MATERIALIZE, D, R, PAIRING, PAIRS, CUT, BM, BN
        )  # fmt: skip
        acc, total = _add_weights(acc, total, scores, values, c, top_c, ONES)
    if ONES > 0:  # all columns are equal
        total = tl.max(total, 1)
    return acc, top, total


@triton.jit
def _add_weights(acc, total, scores, values, c, top_c, ONES: tl.constexpr):
    """Add the weights relative to a maximum to their sum, and their product with the values to acc. The sum of ONES = 0
    in this order: with the product first the compiler keeps 168 registers instead of 128, and one program an SM instead of
    two (sm_90, D = 64)."""
    weights = tl.exp2(scores * c - top_c[:, None])
    if ONES > 0:
        rounded = weights.to(values[0].dtype)
        acc = dot_to_channels(rounded, values, acc)
        total = dot(rounded, tl.full((rounded.shape[1], ONES), 1.0, rounded.dtype), total)
    else:
        total += tl.sum(weights, 1)
        acc = dot_to_channels(weights.to(values[0].dtype), values, acc)
    return acc, total


@triton.jit
def _running(
    queries, k, v, cos, sin, keys, c, k_token, v_token, table_token, ROTATE_K: tl.constexpr, JOIN: tl.constexpr, MATERIALIZE: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr, PAIRING: tl.constexpr, PAIRS: tl.constexpr, CUT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Return (acc, top, total), relative to the maximum so far."""
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.full((BM,), 0.0, tl.float32)
    acc = zeros(BM, CUT)
    for at in tl.range(0, keys, BN, num_stages=STAGES):
        scores, values = _scores(
            queries, k, v, cos, sin, at, keys, k_token, v_token, table_token, True, ROTATE_K, JOIN, MATERIALIZE, D, R, PAIRING, PAIRS, CUT, BM, BN
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2((top - new_top) * c)
        acc, total = _add_weights(scaled(acc, shrink[:, None]), total * shrink, scores, values, c, new_top * c, 0)
        top = new_top
    return acc, top, total


@triton.jit
def _scores(
    queries, k, v, cos, sin, at, keys, k_token, v_token, table_token,
    TAIL: tl.constexpr, ROTATE_K: tl.constexpr, JOIN: tl.constexpr, MATERIALIZE: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr, PAIRING: tl.constexpr, PAIRS: tl.constexpr, CUT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Return the scores of a tile of keys (BM, BN), unscaled, and its values."""
    row = tl.arange(0, BN)
    first = tl.cast(at, tl.int64)
    valid = at + row < keys if TAIL else None
    if ROTATE_K:
        rotated = load_rotated(
            k + first * k_token, row, k_token, cos + first * table_token, sin + first * table_token, table_token, valid,
            D, R, PAIRING, PAIRS, MATERIALIZE,
        )  # fmt: skip
        if JOIN:
            rotated = joined(rotated, PAIRS)
    else:
        rotated = load_operands(k + first * k_token, row, valid, PAIRS, JOIN)
    scores = dot_over_channels(queries, rotated, BM, BN)
    if TAIL:
        scores = tl.where(valid[None, :], scores, float("-inf"))
    return scores, load_blocks(v + first * v_token, row, v_token, valid, D, CUT)
