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
    mask = valid = None
    if cross:  # masks of two sides: as plain operators
        raise NotImplementedError(
            "spatial_pe: attention to other tokens has no translation: leave custom_translation_table out, and it is "
            "exported as plain operators"
        )
    if cu_seqlens is not None:
        mask, valid = _packed(op, q, cu_seqlens)
    elif seqlens is not None:
        mask, valid = _padded(op, q, seqlens)
        # padding tokens may hold anything, NaN included, which must not be multiplied by a zero weight
        q, k, v = (op.Where(valid, x, _like(op, 0.0, x)) for x in (q, k, v))
    q, k, v = (op.Transpose(x, perm=[0, 2, 1, 3]) for x in (q, k, v))
    if cos is not None:
        q, k = (_rotated(op, x, n, dim, cos, sin, pairing) for x, n in ((q, heads), (k, kv_heads)))
    attended, _, _, _ = op.Attention(q, k, v, mask, scale=scale)
    out = op.Transpose(attended, perm=[0, 2, 1, 3])
    if valid is not None:
        out = op.Where(valid, out, _like(op, 0.0 if cu_seqlens is None else float("nan"), out))
    return out, _lse(op, q, k, mask, valid, scale, heads // kv_heads)


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


# ------------------------------------------------------------------------------------- masks, see backends/composed.py


def _padded(op: Any, q: Any, seqlens: Any) -> tuple[Any, Any]:
    """Return the masks of the keys of each query, (B, 1, N, N), and of the valid tokens, (B, N, 1, 1)."""
    token = _tokens(op, q)
    valid = op.Less(op.Unsqueeze(token, _ints(op, 0)), op.Unsqueeze(op.Cast(seqlens, to=7), _ints(op, 1)))
    keys = op.Or(valid, op.Equal(token, op.Constant(value_int=0)))
    tokens = op.Gather(op.Shape(q), _ints(op, 1), axis=0)
    rows = op.Concat(_ints(op, 1), _ints(op, 1), tokens, _ints(op, 1), axis=0)
    return op.Expand(op.Unsqueeze(keys, _ints(op, 1, 2)), rows), op.Unsqueeze(valid, _ints(op, 2, 3))


def _packed(op: Any, q: Any, cu_seqlens: Any) -> tuple[Any, Any]:
    """Return the masks of the keys of each query, (1, 1, T, T), and of the tokens in a sequence, (1, T, 1, 1)."""
    token, bounds = _tokens(op, q), op.Cast(cu_seqlens, to=7)
    begun = op.Cast(op.GreaterOrEqual(op.Unsqueeze(token, _ints(op, 1)), bounds), to=7)
    sequence = op.ReduceSum(begun, _ints(op, 1), keepdims=0)
    same = op.Equal(op.Unsqueeze(sequence, _ints(op, 1)), op.Unsqueeze(sequence, _ints(op, 0)))
    last = op.Gather(bounds, op.Constant(value_int=-1), axis=0)
    valid = op.And(op.Greater(sequence, op.Constant(value_int=0)), op.Less(token, last))
    return op.Unsqueeze(same, _ints(op, 0, 1)), op.Unsqueeze(valid, _ints(op, 0, 2, 3))


def _lse(op: Any, q: Any, k: Any, mask: Any, valid: Any, scale: float, group: int) -> Any:
    shape = op.Shape(q)
    if group > 1:  # (B, Hkv, N, D) -> (B, Hkv, group, N, D) -> (B, H, N, D)
        copies = op.Concat(*(_ints(op, 1),) * 2, _ints(op, group), *(_ints(op, 1),) * 2, axis=0)
        k = op.Reshape(op.Expand(op.Unsqueeze(k, _ints(op, 2)), copies), shape)
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
