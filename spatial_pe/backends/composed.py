# SPDX-License-Identifier: Apache-2.0
"""Rotate, then torch's scaled_dot_product_attention: serves every device and dtype, differentiable by autograd."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_cu_seqlens, check_seqlens
from ..dispatcher import derivatives_beyond_reverse, has_values, in_torchscript_export, is_traced, unrecorded
from ..rotation import apply_rotary_qk
from .call import Call


def unavailable() -> str | None:
    return None


def cannot_serve(call: Call) -> str | None:
    return None


def attention(call: Call) -> Tensor:
    """Returns out (B, N, H, D). Unlike the fused backends it keeps q̂ and k̂ in memory."""
    q, k, v = call.q, call.k, call.v
    if call.cu_seqlens is not None and not is_traced(call.cu_seqlens):
        if call.rotary is not None:
            q, k = apply_rotary_qk(q, k, call.rotary)
        return _packed(q[0], k[0], v[0], call)[None]
    if call.seqlens is not None and has_values(call.seqlens):
        check_seqlens(call.seqlens.tolist(), q.shape[1])
    mask, valid = masks_of(call)
    if call.seqlens is not None:
        # what lies behind a sample's end may be anything, NaN included: it must not meet a zero weight
        q, k, v = (torch.where(valid[:, :, None, None], x, 0) for x in (q, k, v))  # type: ignore[index]
    if call.rotary is not None:
        q, k = apply_rotary_qk(q, k, call.rotary)
    out = _sdpa(q, k, v, call.scale, mask)
    return out if valid is None else torch.where(valid[:, :, None, None], out, outside(call))


def masks_of(call: Call) -> tuple[Tensor | None, Tensor | None]:
    """Which keys a query attends to, (B|1, 1, N, N) bool, and which tokens are part of a sequence, (B|1, N) bool; None
    where it is all of them. Made of the lengths without reading them.

    A sample without tokens attends to its first one, so that its softmax stays finite; the result is dropped.
    """
    tokens = call.q.shape[1]
    if call.seqlens is not None:
        token = torch.arange(tokens, device=call.q.device)
        valid = token < call.seqlens[:, None]
        # as many rows as queries: a view to torch, and ONNX Runtime's Attention broadcasts none
        return (valid | (token == 0))[:, None, None, :].expand(-1, -1, tokens, -1), valid
    if call.cu_seqlens is not None:
        token = torch.arange(tokens, device=call.q.device)
        sequence = (token[:, None] >= call.cu_seqlens).sum(-1)  # 1 .. sequences, 0 and sequences + 1 outside
        valid = (sequence > 0) & (token < call.cu_seqlens[-1])
        return (sequence[:, None] == sequence)[None, None], valid[None]
    return None, None


def outside(call: Call) -> Tensor:
    """What stands for tokens of no sequence: 0 for padding, NaN where the lengths do not fit the tokens. The second can
    be met here only if nobody could look at the lengths before."""
    zero, nan = torch.zeros((), device=call.q.device), torch.full((), torch.nan, device=call.q.device)
    if call.seqlens is None:
        return nan.to(call.q.dtype)
    fits = (call.seqlens >= 0) & (call.seqlens <= call.q.shape[1])
    return torch.where(fits, zero, nan).to(call.q.dtype)[:, None, None, None]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """(B, N, H, D) -> (B, N, H, D)"""
    group = unrecorded(_heads, q) // unrecorded(_heads, k)
    if group > 1 and in_torchscript_export():  # which has no enable_gqa
        k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
        group = 1
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if derivatives_beyond_reverse() is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=group > 1)
    else:
        bias = None  # this operator would add True as 1
        if mask is not None:
            bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
        attention = torch.ops.aten._scaled_dot_product_attention_math
        out, _ = attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=group > 1)
    return out.transpose(1, 2).contiguous()


def _heads(x: Tensor) -> int:
    return x.shape[2]


def _packed(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """(T, H, D) -> (T, H, D): one SDPA call for each distinct length, not for each sequence."""
    assert call.cu_seqlens is not None
    bounds = call.cu_seqlens.tolist()
    check_cu_seqlens(bounds, q.shape[0], call.max_seqlen)
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
        index = (torch.tensor(begin, device="cpu")[:, None] + torch.arange(length, device="cpu")).to(
            q.device
        )  # (sequences, length)
        outs.append(_sdpa(q[index], k[index], v[index], call.scale).flatten(0, 1))
        order.append(index.flatten())
    return torch.cat(outs)[torch.cat(order).argsort()]
