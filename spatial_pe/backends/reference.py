# SPDX-License-Identifier: Apache-2.0
"""Reference: the function that the kernels compute, in plain PyTorch, forward and backward. The oracle of all tests.

Float64 inputs are computed in float64. For lower precision everything is float32 inside, and only the result is
rounded: the reference does not imitate the rounding of a kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import rotary
from ..rotary import rotated
from .base import AttentionCall


def unavailable() -> str | None:
    return None


def cannot_serve(call: AttentionCall) -> str | None:
    return None


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Return out (B, N, H, D) in q's dtype and lse (B, H, N), the log of each row's sum of exponentials."""
    out = torch.zeros_like(call.q, memory_format=torch.contiguous_format)
    batch, tokens, heads, _ = call.q.shape
    lse = call.q.new_zeros((batch, heads, tokens), dtype=torch.float32)
    for b, start, stop, first, last in call.pairs():
        if last == first:
            continue  # no keys: 0
        q, k, v = _rotated(call, b, start, stop, first, last)
        scores = _scores(q, k) * call.scale  # (H, n, m)
        row = torch.logsumexp(scores, dim=-1)
        out[b, start:stop] = _einsum("hnm,mhd->nhd", torch.softmax(scores, dim=-1), v).to(out.dtype)
        lse[b, :, start:stop] = row.float()
    return out, lse


def backward(call: AttentionCall, out: Tensor, lse: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv in the shapes and dtype of q, k, v.

    P = softmax(S), dP = dO Vᵀ, dS = P (dP - rowsum(dO O)): from these follow the gradients of q̂ and k̂, and by the
    inverse rotation, which is its transpose, those of q and k.
    """
    wide = _wide(call.q)
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (call.q, call.k, call.v))
    group = call.q.shape[2] // call.k.shape[2]
    for b, start, stop, first, last in call.pairs():
        if last == first:
            continue
        q, k, v = _rotated(call, b, start, stop, first, last)
        g = dout[b, start:stop].to(wide)
        p = torch.softmax(_scores(q, k) * call.scale, dim=-1)
        dp = _einsum("nhd,mhd->hnm", g, v)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * call.scale
        dq[b, start:stop] = _einsum("hnm,mhd->nhd", ds, k)
        # (n, H, D) -> (n, Hkv, group, D): query heads that share a key head are summed
        dk[b, first:last] = _einsum("hnm,nhd->mhd", ds, q).unflatten(1, (-1, group)).sum(2)
        dv[b, first:last] = _einsum("hnm,nhd->mhd", p, g).unflatten(1, (-1, group)).sum(2)
    if call.rotary is not None and call.key_rotary is not None:
        dq, dk = rotated(dq, call.rotary.inverse()), rotated(dk, call.key_rotary.inverse())
    return dq.to(call.q.dtype), dk.to(call.k.dtype), dv.to(call.v.dtype)


def angle_gradient(
    q: Tensor, k: Tensor | None, dq: Tensor, dk: Tensor | None, cos: Tensor, pairing: str, seqlens: Tensor | None
) -> Tensor:
    """Return dφ in the shape of the tables, (B|1, N, H|1, R/2), from the final gradients of q and k, or of q alone."""
    dphi = _of_one(q, dq, cos, pairing, seqlens)
    return dphi if k is None or dk is None else dphi + _of_one(k, dk, cos, pairing, seqlens)


def _of_one(x: Tensor, dx: Tensor, cos: Tensor, pairing: str, seqlens: Tensor | None) -> Tensor:
    if seqlens is not None:  # padding tokens may be NaN, and 0 * NaN is not 0
        exists = (torch.arange(x.shape[1], device=x.device) < seqlens[:, None])[:, :, None, None]
        x = torch.where(exists, x, 0)
    return rotary.angle_gradient(x, dx, cos, pairing)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _einsum(equation: str, a: Tensor, b: Tensor) -> Tensor:
    with torch.autocast(a.device.type, enabled=False):  # autocast would multiply in bfloat16
        return torch.einsum(equation, a, b)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return _einsum("nhd,mhd->hnm", q, k)


def _rotated(
    call: AttentionCall, b: int, start: int, stop: int, first: int, last: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q̂ (n, H, D), k̂ and v (m, H, D) of one sequence in the wide dtype; key heads are repeated to H."""
    wide = _wide(call.q)
    q, k, v = call.q[b, start:stop].to(wide), call.k[b, first:last].to(wide), call.v[b, first:last].to(wide)
    if call.rotary is not None and call.key_rotary is not None:
        q = rotated(q, call.rotary.slice(b, start, stop))
        k = rotated(k, call.key_rotary.slice(b, first, last))
    group = q.shape[1] // k.shape[1]
    return q, k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
