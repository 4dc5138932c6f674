# SPDX-License-Identifier: Apache-2.0
"""Rotate, then torch's scaled_dot_product_attention: serves every device and dtype, differentiable by autograd."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_cu_seqlens, check_seqlens
from ..rotary import _has_values
from ..rotation import apply_rotary_qk
from .call import Call


def unavailable() -> str | None:
    return None


def cannot_serve(call: Call) -> str | None:
    return None


def attention(call: Call) -> Tensor:
    """Returns out (B, N, H, D). Unlike the fused backends it keeps q̂ and k̂ in memory."""
    q, k, v = call.q, call.k, call.v
    valid = None
    if call.seqlens is not None:
        if _has_values(call.seqlens):
            check_seqlens(call.seqlens.tolist(), q.shape[1])
        # what lies behind a sample's end may be anything, NaN included: it must not meet a zero weight
        valid = torch.arange(q.shape[1], device=q.device) < call.seqlens[:, None]  # (B, N)
        q, k, v = (torch.where(valid[:, :, None, None], x, 0) for x in (q, k, v))
    if call.rotary is not None:
        q, k = apply_rotary_qk(q, k, call.rotary)
    if call.cu_seqlens is not None:
        return _packed(q[0], k[0], v[0], call)[None]
    if valid is None:
        return _sdpa(q, k, v, call.scale)
    # an empty sample attends to its (zeroed) first token, so that its softmax stays finite; the result is dropped
    keys = valid | (torch.arange(q.shape[1], device=q.device) == 0)
    out = _sdpa(q, k, v, call.scale, mask=keys[:, None, None, :])
    return torch.where(valid[:, :, None, None], out, 0)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """(B, N, H, D) -> (B, N, H, D)"""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).contiguous()


def _packed(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """(T, H, D) -> (T, H, D): one SDPA call for each distinct length, not for each sequence."""
    assert call.cu_seqlens is not None
    bounds = call.cu_seqlens.tolist()
    check_cu_seqlens(bounds, q.shape[0])
    starts: dict[int, list[int]] = {}
    for start, stop in pairwise(bounds):
        if stop > start:
            starts.setdefault(stop - start, []).append(start)
    if not starts:
        return q + k.sum() + v.sum()  # no tokens, so no elements; but differentiable
    if len(starts) == 1:  # all windows alike: (T, H, D) -> (windows, length, H, D) is a view
        (length,) = starts
        q, k, v = (x.unflatten(0, (-1, length)) for x in (q, k, v))
        return _sdpa(q, k, v, call.scale).flatten(0, 1)
    order, outs = [], []
    for length, begin in starts.items():
        index = (torch.tensor(begin)[:, None] + torch.arange(length)).to(q.device)  # (sequences, length)
        outs.append(_sdpa(q[index], k[index], v[index], call.scale).flatten(0, 1))
        order.append(index.flatten())
    return torch.cat(outs)[torch.cat(order).argsort()]
