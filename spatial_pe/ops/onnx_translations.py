# SPDX-License-Identifier: Apache-2.0
"""Translation of the op to ONNX's RotaryEmbedding and Attention (opset 23)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..rotary import join_pairs, split_pairs


def onnx_translations() -> dict[Callable, Callable]:
    """Return the ``custom_translation_table`` with which ``torch.onnx.export(..., dynamo=True, opset_version=23)``
    writes the op as ONNX's ``RotaryEmbedding`` and ``Attention``.

    Without it, and for lower opsets, the rotation is exported as plain operators, and attention as torch exports
    scaled_dot_product_attention (as ``Attention`` from opset 23 on).

    Raises:
        ImportError: onnxscript, which torch.onnx.export itself needs, is not installed.
    """
    return {torch.ops.spatial_pe.rope_attention.default: _rope_attention}


def _rope_attention(
    q: Any,
    k: Any,
    v: Any,
    cos: Any,
    sin: Any,
    pairing: str,
    scale: float,
    cu_seqlens: Any = None,
    max_seqlen: int | None = None,
    seqlens: Any = None,
    backend: str = "auto",
    cross: bool = False,
    cos_k: Any = None,
    sin_k: Any = None,
    cu_seqlens_k: Any = None,
    max_seqlen_k: int | None = None,
    seqlens_k: Any = None,
):
    """Compute out (B, N, H, D) and lse (B, H, N); lse is eliminated as dead code if unused."""
    from onnxscript import opset23 as op

    heads, kv_heads, dim = q.shape[2], k.shape[2], q.shape[3]  # before any operator: results have no shape yet
    if not cross:
        cos_k, sin_k, cu_seqlens_k, seqlens_k = cos, sin, cu_seqlens, seqlens
    elif k.shape[1] == 0:
        raise NotImplementedError("spatial_pe: ONNX's Attention needs at least one key, k has none")
    mask: Any = None
    there: Any = None  # which queries are of a sequence
    attends: Any = None  # which are of one that has keys
    if cu_seqlens is not None:
        mask, there, attends = _packed(op, q, k, cu_seqlens, cu_seqlens_k, cross)
    elif seqlens is not None or seqlens_k is not None:
        mask, there, there_k, attends = _padded(op, q, k, seqlens, seqlens_k, cross)
        # padding tokens may hold anything, NaN included, which must not be multiplied by a zero weight
        q = q if there is None else op.Where(there, q, _like(op, 0.0, q))
        if there_k is not None:
            k, v = (op.Where(there_k, x, _like(op, 0.0, x)) for x in (k, v))
    q, k, v = (op.Transpose(x, perm=[0, 2, 1, 3]) for x in (q, k, v))
    if cos is not None:
        q, k = _rotated(op, q, heads, dim, cos, sin, pairing), _rotated(op, k, kv_heads, dim, cos_k, sin_k, pairing)
    attended, _, _, _ = op.Attention(q, k, v, mask, scale=scale)
    out = op.Transpose(attended, perm=[0, 2, 1, 3])
    if attends is not None:
        out = op.Where(attends, out, _like(op, 0.0, out))
    if cu_seqlens is not None:  # tokens behind the last sequence
        out = op.Where(there, out, _like(op, float("nan"), out))
    return out, _lse(op, q, k, mask, attends, scale, heads // kv_heads)


def _rotated(op: Any, x: Any, heads: int, dim: int, cos: Any, sin: Any, pairing: str) -> Any:
    """Rotate to (B, H, N, D); with axis_half pairs the channels are reordered, for q and k alike."""
    rotary_dim = 2 * cos.shape[3]
    if pairing == "axis_half":
        channels = torch.arange(rotary_dim)
        order = join_pairs(*split_pairs(channels, pairing), "half").tolist() + list(range(rotary_dim, dim))
        x = op.Gather(x, op.Constant(value_ints=order), axis=3)
    wide = op.Cast(x, to=1)  # the rotation is float32, as are its tables
    options = {
        "interleaved": int(pairing == "interleaved"),
        "rotary_embedding_dim": 0 if rotary_dim == dim else rotary_dim,
    }
    shape = op.Shape(wide)
    batch, tokens = op.Gather(shape, _ints(op, 0), axis=0), op.Gather(shape, _ints(op, 2), axis=0)
    if cos.shape[2] == 1:
        rows = op.Concat(batch, tokens, _ints(op, rotary_dim // 2), axis=0)
        tables = (op.Expand(op.Squeeze(t, _ints(op, 2)), rows) for t in (cos, sin))
        return op.CastLike(op.RotaryEmbedding(wide, *tables, **options), x)
    # a table per head: heads become samples
    rows = op.Concat(batch, _ints(op, heads), tokens, _ints(op, rotary_dim // 2), axis=0)
    flat = _ints(op, -1), tokens, _ints(op, rotary_dim // 2)
    tables = (
        op.Reshape(op.Expand(op.Transpose(t, perm=[0, 2, 1, 3]), rows), op.Concat(*flat, axis=0)) for t in (cos, sin)
    )
    samples = op.Reshape(wide, op.Concat(_ints(op, -1), _ints(op, 1), tokens, _ints(op, dim), axis=0))
    return op.CastLike(op.Reshape(op.RotaryEmbedding(samples, *tables, **options), shape), x)


# ------------------------------------------------------------------------------------- masks, see ops/composed.py


def _padded(op: Any, q: Any, k: Any, seqlens: Any, seqlens_k: Any, cross: bool) -> tuple[Any, Any, Any, Any]:
    """Return the mask of the keys of each query, (B, 1, N, M) or None, and which queries and keys are there, and which
    queries have keys, (B, N|M, 1, 1) or None where all."""
    there, there_k = (
        None if lengths is None else op.Unsqueeze(_before(op, x, lengths), _ints(op, 2, 3))
        for x, lengths in ((q, seqlens), (k, seqlens_k))
    )
    if seqlens_k is None:
        return None, there, None, there
    # the first key is seen where there is none, so that the softmax is finite; the result is dropped
    keys = op.Or(_before(op, k, seqlens_k), op.Equal(_tokens(op, k), op.Constant(value_int=0)))
    tokens = op.Gather(op.Shape(q), _ints(op, 1), axis=0)
    rows = op.Concat(_ints(op, 1), _ints(op, 1), tokens, _ints(op, 1), axis=0)
    mask = op.Expand(op.Unsqueeze(keys, _ints(op, 1, 2)), rows)
    attends = there
    if cross:
        attends = op.Greater(op.Unsqueeze(op.Cast(seqlens_k, to=7), _ints(op, 1, 2, 3)), op.Constant(value_int=0))
        attends = attends if there is None else op.And(there, attends)
    return mask, there, there_k, attends


def _before(op: Any, x: Any, lengths: Any) -> Any:
    """Return which tokens of x are there, (B, N)."""
    return op.Less(op.Unsqueeze(_tokens(op, x), _ints(op, 0)), op.Unsqueeze(op.Cast(lengths, to=7), _ints(op, 1)))


def _packed(op: Any, q: Any, k: Any, cu_seqlens: Any, cu_seqlens_k: Any, cross: bool) -> tuple[Any, Any, Any]:
    """Return the mask of the keys of each query, (1, 1, T, S), which queries are of a sequence, and which of one with
    keys, (1, T, 1, 1)."""
    sequence, there = _sequences_of(op, q, cu_seqlens)
    sequence_k, there_k = _sequences_of(op, k, cu_seqlens_k) if cross else (sequence, there)
    mask = op.Equal(op.Unsqueeze(sequence, _ints(op, 1)), op.Unsqueeze(sequence_k, _ints(op, 0)))
    attends = there
    if cross:
        mask = op.And(mask, op.Unsqueeze(there_k, _ints(op, 0)))
        has_keys = op.Greater(op.ReduceSum(op.Cast(mask, to=7), _ints(op, 1), keepdims=0), op.Constant(value_int=0))
        attends = op.And(there, has_keys)
        first = op.Equal(_tokens(op, k), op.Constant(value_int=0))
        mask = op.Or(mask, op.And(op.Not(op.Unsqueeze(attends, _ints(op, 1))), op.Unsqueeze(first, _ints(op, 0))))
    there, attends = (op.Unsqueeze(x, _ints(op, 0, 2, 3)) for x in (there, attends))
    return op.Unsqueeze(mask, _ints(op, 0, 1)), there, attends


def _sequences_of(op: Any, x: Any, cu_seqlens: Any) -> tuple[Any, Any]:
    """Return the number of the sequence of each token, and whether it belongs to one, (T,) each."""
    token, bounds = _tokens(op, x), op.Cast(cu_seqlens, to=7)
    begun = op.Cast(op.GreaterOrEqual(op.Unsqueeze(token, _ints(op, 1)), bounds), to=7)
    sequence = op.ReduceSum(begun, _ints(op, 1), keepdims=0)
    last = op.Gather(bounds, op.Constant(value_int=-1), axis=0)
    return sequence, op.And(op.Greater(sequence, op.Constant(value_int=0)), op.Less(token, last))


def _lse(op: Any, q: Any, k: Any, mask: Any, valid: Any, scale: float, group: int) -> Any:
    if group > 1:  # (B, Hkv, M, D) -> (B, Hkv, group, M, D) -> (B, H, M, D)
        copies = op.Concat(*(_ints(op, 1),) * 2, _ints(op, group), *(_ints(op, 1),) * 2, axis=0)
        batch, heads = (op.Gather(op.Shape(q), _ints(op, i), axis=0) for i in (0, 1))
        tokens, dim = (op.Gather(op.Shape(k), _ints(op, i), axis=0) for i in (2, 3))
        wide = op.Concat(batch, heads, tokens, dim, axis=0)
        k = op.Reshape(op.Expand(op.Unsqueeze(k, _ints(op, 2)), copies), wide)
    scores = op.MatMul(op.Cast(q, to=1), op.Transpose(op.Cast(k, to=1), perm=[0, 1, 3, 2]))
    scores = op.Mul(scores, op.Constant(value_float=scale))
    if mask is not None:
        scores = op.Where(mask, scores, op.Constant(value_float=float("-inf")))
    lse = op.ReduceLogSumExp(scores, _ints(op, 3), keepdims=0)
    if valid is None:
        return lse
    return op.Where(op.Squeeze(op.Transpose(valid, perm=[0, 2, 1, 3]), _ints(op, 3)), lse, op.Constant(value_float=0.0))


def _tokens(op: Any, q: Any) -> Any:
    count = op.Squeeze(op.Gather(op.Shape(q), _ints(op, 1), axis=0))
    return op.Range(op.Constant(value_int=0), count, op.Constant(value_int=1))


def _ints(op: Any, *values: int) -> Any:
    return op.Constant(value_ints=list(values))


def _like(op: Any, value: float, x: Any) -> Any:
    return op.CastLike(op.Constant(value_float=value), x)
