# SPDX-License-Identifier: Apache-2.0
"""The torch ops as plain torch operators, for ONNX, ExecuTorch and processes without spatial_pe.

They compute what the composed path computes. Lengths are not read but become masks, so that a traced graph is valid
for other lengths too; the masks, and the scores of the backward, are N x N, which is what the fused kernels avoid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import reference
from ..backends.base import AttentionCall, Keys
from ..rotary import Rotary, rotated
from . import composed


def decompositions() -> dict[torch._ops.OpOverload, Callable]:
    """Return the decompositions of spatial_pe's torch ops into plain torch operators, by op.

    For ``exported_program.run_decompositions(table)``, ``make_fx(f, table)``, and other functions that take such a
    table; ``torch.onnx.export`` finds them by itself.
    """
    ops = torch.ops.spatial_pe
    return {
        ops.rope_attention.default: rope_attention,
        ops.rope_attention_backward.default: rope_attention_backward,
        ops.angle_gradient.default: angle_gradient,
        ops.rotate.default: rotate,
        ops.rotate_.default: rotate_,
    }


def register() -> None:
    """Add the decompositions to the table in which torch.onnx.export looks for ops that it cannot translate."""
    for op, plain in decompositions().items():
        torch._decomp.decomposition_table[op] = plain
        # Fake tensors of symbolic sizes would run the decomposition to compute a shape, unless the op is listed here as
        # one with its own fake kernel: that of torch.library.register_fake.
        torch._decomp.meta_table[op] = op


# ------------------------------------------------------------------------------------------------------------ the ops


def rope_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Return out (B, N, H, D) and lse (B, H, N) float32. The scores are computed a second time for lse; this is
    eliminated as dead code if lse is unused."""
    call, _ = unflatten(*args, **kwargs)
    scores, valid = _scores(*_rotated(call), call)
    lse = torch.logsumexp(scores, dim=-1)
    return composed.attention(call), (lse if valid is None else torch.where(valid[:, None], lse, 0)).float()


def rope_attention_backward(
    dout: Tensor, out: Tensor, lse: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv: P = exp(S - lse), dP = dO Vᵀ, dS = P (dP - rowsum(dO O)), as the kernels do."""
    call, _ = unflatten(*args, **kwargs)
    q, k, v, scale = call.q, call.k, call.v, call.scale
    q_hat, k_hat = _rotated(call)
    scores, valid = _scores(q_hat, k_hat, call)
    weights = torch.exp(scores - lse[..., None])
    value, dout, out = (_wide(x) for x in (v, dout, out))
    if valid is not None:
        weights = torch.where(valid[:, None, :, None], weights, 0)
        dout, out = (torch.where(valid[:, :, None, None], x, 0) for x in (dout, out))
    if (there := composed.valid_keys(call)) is not None:
        value = torch.where(there[:, :, None, None], value, 0)
    group = q.shape[2] // k.shape[2]
    dweights = torch.einsum("bnhd,bmhd->bhnm", dout, value.repeat_interleave(group, dim=2))
    delta = (dout * out).sum(-1).transpose(1, 2)
    dscores = weights * (dweights - delta[..., None]) * scale
    dq = torch.einsum("bhnm,bmhd->bnhd", dscores, k_hat)
    dk = torch.einsum("bhnm,bnhd->bmhd", dscores, q_hat).unflatten(2, (-1, group)).sum(3)
    dv = torch.einsum("bhnm,bnhd->bmhd", weights, dout).unflatten(2, (-1, group)).sum(3)
    if call.rotary is not None and call.key_rotary is not None:
        dq, dk = rotated(dq, call.rotary.inverse()), rotated(dk, call.key_rotary.inverse())
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def angle_gradient(
    q: Tensor,
    k: Tensor | None,
    dq: Tensor,
    dk: Tensor | None,
    cos: Tensor,
    pairing: str,
    seqlens: Tensor | None,
    backend: str,
) -> Tensor:
    return reference.angle_gradient(q, k, dq, dk, cos, pairing, seqlens)


def rotate(xs: list[Tensor], cos: Tensor, sin: Tensor, pairing: str, inverse: bool) -> list[Tensor]:
    rotary = Rotary._unchecked(cos, sin, pairing)  # type: ignore[arg-type]
    return [rotated(x, rotary.inverse() if inverse else rotary) for x in xs]


def rotate_(xs: list[Tensor], cos: Tensor, sin: Tensor, pairing: str) -> None:
    for x, new in zip(xs, rotate(xs, cos, sin, pairing, False), strict=True):
        x.copy_(new)


# --------------------------------------------------------------------------------------------------------------- parts


def unflatten(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    pairing: Any,
    scale: float,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    seqlens: Tensor | None,
    backend: str,
    cross: bool = False,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    seqlens_k: Tensor | None = None,
) -> tuple[AttentionCall, str]:
    """Return the call and the backend that the arguments of the op stand for."""
    keys = None
    if cross:
        assert (cos_k is None) == (sin_k is None)
        table = None if cos_k is None else Rotary._unchecked(cos_k, sin_k, pairing)  # type: ignore[arg-type]
        keys = Keys(table, cu_seqlens_k, max_seqlen_k, seqlens_k)
    rotary = None if cos is None else Rotary._unchecked(cos, sin, pairing)  # type: ignore[arg-type]
    return AttentionCall(q, k, v, rotary, scale, cu_seqlens, max_seqlen, seqlens, keys), backend


def _rotated(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Return q̂ (B, N, H, D) and k̂, its heads repeated to H, rounded as the kernels round them; 0 in padding."""
    q, k = call.q, call.k
    if call.seqlens is not None:
        q = torch.where(composed.valid_queries(call)[:, :, None, None], q, 0)  # type: ignore[index]
    if call.cu_seqlens is None and (there := composed.valid_keys(call)) is not None:
        k = torch.where(there[:, :, None, None], k, 0)
    if call.rotary is not None and call.key_rotary is not None:
        q, k = rotated(q, call.rotary), rotated(k, call.key_rotary)
    return _wide(q), _wide(k).repeat_interleave(q.shape[2] // k.shape[2], dim=2)


def _scores(q_hat: Tensor, k_hat: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Return the scores (B, H, N, N), -inf where a query does not attend to a key; and the mask of valid tokens."""
    scores = torch.einsum("bnhd,bmhd->bhnm", q_hat, k_hat) * call.scale
    mask, valid = composed.masks_of(call)
    return scores if mask is None else scores.masked_fill(~mask, -torch.inf), valid


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
