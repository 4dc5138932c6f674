# SPDX-License-Identifier: Apache-2.0
"""Argument validation of a call, before any kernel runs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .._utils.dispatcher import in_transform
from ..rotary import Rotary, check_rotary_fits

INTEGERS = (int, torch.SymInt)  # as a tuple: dynamo of torch 2.9 supports no union of types
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: Rotary | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    seqlens: Tensor | None,
    rotary_k: Rotary | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    seqlens_k: Tensor | None = None,
) -> bool:
    """Check shapes, dtypes, devices and strides of ``rope_attention``. Reads no values, so it can be traced.

    Returns:
        Whether the keys are other tokens than the queries, or have a table or lengths of their own.
    """
    _check_tensors(q, k, v)
    packed = cu_seqlens is not None
    _check_shapes(q, k, v, packed)
    _check_lengths(q, cu_seqlens, max_seqlen, seqlens, "q", "")
    given = (rotary_k, cu_seqlens_k, max_seqlen_k, seqlens_k)
    cross = q.shape[-3] != k.shape[-3] or any(x is not None for x in given)
    if cross:
        _check_keys(q, k, rotary, cu_seqlens, seqlens, *given)
    if rotary is not None:
        check_rotary_fits(q[None] if packed else q, rotary, "q")
        _check_table_heads(rotary, q, k)
    return cross


def _check_keys(
    q: Tensor,
    k: Tensor,
    rotary: Rotary | None,
    cu_seqlens: Tensor | None,
    seqlens: Tensor | None,
    rotary_k: Rotary | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_k: int | None,
    seqlens_k: Tensor | None,
) -> None:
    """Check what belongs to keys of their own."""
    packed, other = cu_seqlens is not None, q.shape[-3] != k.shape[-3]
    if packed and seqlens_k is not None:
        raise ValueError("seqlens_k is for a padded batch: pass cu_seqlens_k beside cu_seqlens")
    if not packed and cu_seqlens_k is not None:
        raise ValueError("cu_seqlens_k needs cu_seqlens, the starts of the queries' sequences, which is None")
    if packed and cu_seqlens_k is None and other:
        raise ValueError(
            f"q has {q.shape[0]} tokens, k {k.shape[0]}: pass cu_seqlens_k, the starts of the keys' sequences"
        )
    if max_seqlen_k is not None and not packed:
        raise ValueError("max_seqlen_k is the length of the longest packed sequence: it needs cu_seqlens_k")
    _check_lengths(k, cu_seqlens_k, max_seqlen_k, seqlens_k, "k", "_k")
    if cu_seqlens_k is not None and cu_seqlens is not None and cu_seqlens_k.shape != cu_seqlens.shape:
        raise ValueError(
            f"cu_seqlens_k must have as many sequences as cu_seqlens, {cu_seqlens.shape[0] - 1}, got "
            f"{cu_seqlens_k.shape[0] - 1}"
        )
    if rotary is None:
        if rotary_k is not None:
            raise ValueError(
                "rotary_k is given, but rotary is None: queries that are not rotated have a table of cos = 1, sin = 0"
            )
        return
    if rotary_k is None:
        if other:
            raise ValueError(
                f"rotary is for the {q.shape[-3]} tokens of q, and k has {k.shape[-3]}: pass rotary_k, the table of "
                "the keys (keys that are not rotated have rows of cos = 1, sin = 0)"
            )
        return
    check_rotary_fits(k[None] if packed else k, rotary_k, "k", "rotary_k")
    _check_table_heads(rotary_k, q, k)
    if (rotary_k.rotary_dim, rotary_k.pairing) != (rotary.rotary_dim, rotary.pairing):
        raise ValueError(
            f"rotary_k must rotate the pairs of rotary, {rotary.rotary_dim} channels ({rotary.pairing}), got "
            f"{rotary_k.rotary_dim} ({rotary_k.pairing})"
        )


def check_fits(call: Any) -> None:
    """Run the same checks on a call that came through the torch op, e.g. from a traced graph."""
    packed = call.cu_seqlens is not None
    q, k, v = (x[0] if packed and x.ndim == 4 else x for x in (call.q, call.k, call.v))
    for rotary in (call.rotary, call.key_rotary):
        if rotary is not None:
            rotary.check()
    own: tuple = ()
    if (keys := call.keys) is not None:
        own = (keys.rotary, keys.cu_seqlens, keys.max_seqlen, keys.seqlens)
        for name, x, of_keys in (
            ("rotary", call.rotary, keys.rotary),
            ("cu_seqlens", call.cu_seqlens, keys.cu_seqlens),
        ):
            if (x is None) != (of_keys is None):
                raise ValueError(f"with keys of their own, {name} and {name}_k must be given together")
    elif q.ndim == k.ndim and k.shape == v.shape and q.shape[:-2] != k.shape[:-2]:
        raise ValueError(f"q and k must have the same batch and tokens, got {tuple(q.shape)} and {tuple(k.shape)}")
    check_call(q, k, v, call.rotary, call.cu_seqlens, call.max_seqlen, call.seqlens, *own)


def check_gradients(call: Any, out: Tensor, lse: Tensor, dout: Tensor) -> None:
    """Check the additional arguments of the backward."""
    q = call.q
    for name, x in (("dout", dout), ("out", out)):
        if x.shape != q.shape or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} must be like q, {tuple(q.shape)} {q.dtype} on {q.device}, got {tuple(x.shape)} {x.dtype} on "
                f"{x.device}"
            )
    rows = (q.shape[0], q.shape[2], q.shape[1])
    if lse.shape != rows or lse.dtype != torch.float32 or lse.device != q.device:
        raise ValueError(f"lse must be (B, H, N) float32 on {q.device}, got {tuple(lse.shape)} {lse.dtype}")


def check_angle_gradient(q: Tensor, k: Tensor | None, dq: Tensor, dk: Tensor | None, cos: Tensor) -> None:
    """Check the arguments of the op angle_gradient."""
    if (k is None) != (dk is None):
        raise ValueError("k and dk must be given together")
    rotary = Rotary._unchecked(cos, cos, "half")
    for name, x, dx in (("q", q, dq), ("k", k, dk)):
        if x is None or dx is None:
            continue
        if dx.shape != x.shape:
            raise ValueError(f"d{name} must have the shape of {name}, {tuple(x.shape)}, got {tuple(dx.shape)}")
        check_rotary_fits(x, rotary, name)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    dtype = device = None
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.layout is not torch.strided:
            raise TypeError(
                f"{name} must be a dense (strided) tensor, got {x.layout}: pass sequences of several lengths as one "
                "packed tensor with cu_seqlens"
            )
        if dtype is None:
            dtype, device = x.dtype, x.device
            if dtype not in DTYPES:
                raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {dtype}")
        if x.dtype is not dtype:
            raise TypeError(f"q, k and v must share a dtype, got q {dtype}, {name} {x.dtype}")
        if x.device != device:
            raise ValueError(f"q, k and v must be on one device, got q on {device}, {name} on {x.device}")
        if x.ndim and x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel() and not in_transform():
            # inside torch.vmap strides are those of all lanes: its rule copies tensors that the kernels cannot read
            raise ValueError(
                f"{name} must be contiguous in its last dimension (stride 1), got strides {x.stride()}: "
                f"pass (batch, tokens, heads, head_dim), or call {name}.contiguous()"
            )


def _check_lengths(
    x: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None, seqlens: Tensor | None, name: str, side: str
) -> None:
    """Check the lengths of q, or those of k, whose arguments end in ``side``."""
    if cu_seqlens is not None and seqlens is not None:
        raise ValueError(f"pass cu_seqlens{side} (packed sequences) or seqlens{side} (padded batch), not both")
    if cu_seqlens is not None:
        _check_index(cu_seqlens, f"cu_seqlens{side}", x, name)
        if cu_seqlens.shape[0] < 2:
            raise ValueError(f"cu_seqlens{side} must have sequences + 1 entries, got {cu_seqlens.shape[0]}")
        if max_seqlen is not None and not isinstance(max_seqlen, INTEGERS):
            raise TypeError(
                f"max_seqlen{side} must be an int or None, got {type(max_seqlen).__name__}: use int(max_seqlen{side})"
            )
    if seqlens is not None:
        _check_index(seqlens, f"seqlens{side}", x, name)
        if seqlens.shape[0] != x.shape[0]:
            raise ValueError(
                f"seqlens{side} must have an entry for each of the {x.shape[0]} samples, got {seqlens.shape[0]}"
            )


def _check_table_heads(rotary: Rotary, q: Tensor, k: Tensor) -> None:
    if rotary.cos.shape[2] != 1 and k.shape[-2] != q.shape[-2]:
        raise ValueError(
            f"rotary has a table per head, which needs as many key heads as query heads, "
            f"got {k.shape[-2]} and {q.shape[-2]}"
        )


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, packed: bool) -> None:
    layout = "(total_tokens, heads, head_dim)" if packed else "(batch, tokens, heads, head_dim)"
    ndim = 3 if packed else 4
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != ndim:
            hint = "" if packed or x.ndim != 3 else ": packed tensors need cu_seqlens"
            raise ValueError(f"{name} must be {layout}, got shape {tuple(x.shape)}{hint}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have the same shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    if not packed and q.shape[0] != k.shape[0]:
        raise ValueError(f"q and k must have the same batch, got {tuple(q.shape)} and {tuple(k.shape)}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must have the same head_dim, got {q.shape[-1]} and {k.shape[-1]}")
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"the number of key heads must divide the number of query heads, got {kv_heads} and {heads}")
    if q.shape[-1] == 0:
        raise ValueError("head_dim must be at least 1, got 0")


def _check_index(index: Tensor, name: str, x: Tensor, of: str) -> None:
    if not isinstance(index, Tensor):
        raise TypeError(f"{name} must be an int32 torch.Tensor, got {type(index).__name__}")
    if index.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {index.dtype}: use {name}.int()")
    if index.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got shape {tuple(index.shape)}")
    if index.device != x.device:
        raise ValueError(f"{name} is on {index.device}, {of} on {x.device}: they must be on one device")


def check_cu_seqlens(cu_seqlens: list[int], total: int, max_seqlen: int | None = None, side: str = "") -> None:
    """Check the values of cu_seqlens (cu_seqlens_k: side "_k"), where reading them costs no device synchronisation."""
    if cu_seqlens[0] != 0:
        raise ValueError(f"cu_seqlens{side} must start at 0, got {cu_seqlens[0]}")
    if cu_seqlens[-1] != total:
        raise ValueError(f"cu_seqlens{side} must end at the number of tokens, {total}, got {cu_seqlens[-1]}")
    for i, (a, b) in enumerate(pairwise(cu_seqlens)):
        if b < a:
            raise ValueError(f"cu_seqlens{side} must not decrease, got {a} then {b} at entry {i + 1}")
        if max_seqlen is not None and b - a > max_seqlen:
            raise ValueError(
                f"max_seqlen{side} must be at least the longest sequence, got {max_seqlen}: sequence {i} has {b - a} "
                "tokens"
            )


def check_seqlens(seqlens: list[int], tokens: int, side: str = "") -> None:
    """Check the values of seqlens (seqlens_k: side "_k")."""
    of = "k" if side else "q"
    for i, length in enumerate(seqlens):
        if not 0 <= length <= tokens:
            raise ValueError(
                f"seqlens{side} must lie between 0 and the {tokens} tokens of {of}, got {length} for sample {i}"
            )
