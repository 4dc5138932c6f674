# SPDX-License-Identifier: Apache-2.0
"""Rotate, then call the fastest available attention: flash-attn (flash.py), or torch's scaled_dot_product_attention,
which supports every device and dtype. Differentiable by autograd."""

from __future__ import annotations

import functools
import os
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from .._utils.dispatcher import (
    derivatives_beyond_reverse,
    has_values,
    in_torchscript_export,
    is_traced,
    needs_dispatcher,
    unrecorded,
)
from ..backends.base import AttentionCall
from ..backends.checks import check_cu_seqlens, check_seqlens
from . import flash
from .rotate import apply_rotary_qk


def unavailable() -> str | None:
    return None


def cannot_serve(call: AttentionCall) -> str | None:
    return None


def attention(call: AttentionCall) -> Tensor:
    """Return out (B, N, H, D). Unlike the fused backends it materialises q̂ and k̂."""
    row, _ = flash.choose(call)
    if row is not None and (served := flash.attention(call, row)) is not None:
        return served
    q, k, v = call.q, call.k, call.v
    if call.cu_seqlens is not None and not is_traced(call.cu_seqlens):
        q, k = _rotated(q, k, call)
        packed = _packed if call.keys is None else _packed_pairs
        return packed(q[0], k[0], v[0], call)[None]
    if call.seqlens is not None and has_values(call.seqlens):
        check_seqlens(call.seqlens.tolist(), q.shape[1])
    if call.keys is not None and call.keys.seqlens is not None and has_values(call.keys.seqlens):
        check_seqlens(call.keys.seqlens.tolist(), k.shape[1], "_k")
    mask, valid = masks_of(call)
    # padding tokens may hold anything, NaN included, which must not be multiplied by a zero weight
    if call.seqlens is not None:
        q = torch.where(valid_queries(call)[:, :, None, None], q, 0)  # type: ignore[index]
    if call.cu_seqlens is None and (there := valid_keys(call)) is not None:
        k, v = (torch.where(there[:, :, None, None], x, 0) for x in (k, v))
    q, k = _rotated(q, k, call)
    order = _order(q, k, v) if mask is None else None
    if order is None:
        out = _sdpa(q, k, v, call.scale, mask)
    else:
        before = torch._C._get_sdp_priority_order()
        torch._C._set_sdp_priority_order(order)
        try:
            out = _sdpa(q, k, v, call.scale)
        finally:
            torch._C._set_sdp_priority_order(before)
    return out if valid is None else torch.where(valid[:, :, None, None], out, outside(call))


# Order in which torch's attention tries its kernels, by major compute capability, where it is not torch's default
# (flash first). Published: cuDNN is 1.7 to 2.3 times faster on an H100 (transformers#48163), 2.9 times on a B200
# (sglang#33655); 0.82 times as fast on an A100, 0.88 on an RTX PRO 6000, equal on an L40S: those keep torch's order.
_CUDNN_FIRST = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
ORDERS = {9: _CUDNN_FIRST, 10: _CUDNN_FIRST}
# Up to this version cuDNN is not safe for lengths that are no multiple of 128 (pytorch#169849). From the next one on
# torch itself, 2.10 and newer, tries it first.
CUDNN_NEEDS_128 = 91500
_FLASH_FIRST = (
    *(SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
    *(SDPBackend.CUDNN_ATTENTION, SDPBackend.OVERRIDEABLE),
)
_DEPRIORITIZED = os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED") == "1"  # set by the user
_TORCH_DECIDED = False


def _order(q: Tensor, k: Tensor, v: Tensor) -> list[int] | None:
    """Return the order to set for a dense (B, N, H, D) call, or None to keep the present one.

    Dense calls only: cuDNN builds a plan for each new shape, and packed sequences have many. Only the order is set, in
    1 us. sdpa_kernel takes 70, and also sets which kernels are enabled, in other threads too.
    """
    global _TORCH_DECIDED
    if q.device.type != flash.DEVICE or is_traced(q):
        return None
    if not _TORCH_DECIDED:  # on its first query torch overrules an order that was set before
        if _DEPRIORITIZED or needs_dispatcher((q, k, v)):
            return None
        x, y, z = (x.transpose(1, 2) for x in (q, k, v))
        torch._fused_sdp_choice(x, y, z, enable_gqa=q.shape[2] != k.shape[2])
        _TORCH_DECIDED = True
    if torch._C._get_sdp_priority_order() != _numbers(_FLASH_FIRST):  # torch's own for this GPU, or the user's
        return None
    order = ORDERS.get(flash.major(q.device))
    whole = q.shape[1] % 128 == 0 == k.shape[1] % 128
    if order is None or (not whole and _cudnn() <= CUDNN_NEEDS_128) or needs_dispatcher((q, k, v)):
        return None
    return _numbers((*order, SDPBackend.OVERRIDEABLE))


@functools.cache
def _cudnn() -> int:
    return torch.backends.cudnn.version() or 0


@functools.cache
def _numbers(order: tuple[SDPBackend, ...]) -> list[int]:
    return [int(kernel) for kernel in order]  # type: ignore[call-overload]


def _rotated(q: Tensor, k: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
    if call.rotary is None:
        return q, k
    return apply_rotary_qk(q, k, call.rotary, None if call.keys is None else call.keys.rotary)


def masks_of(call: AttentionCall) -> tuple[Tensor | None, Tensor | None]:
    """Return the mask of the keys of each query, (B|1, 1, N, M) bool, and of the queries that belong to a sequence and
    have keys, (B|1, N) bool; None where all do. Computed from the lengths without reading them.

    A query without keys attends to the first one, so that its softmax stays finite; the result is dropped.
    """
    tokens = call.q.shape[1]
    if call.cu_seqlens is not None:
        sequence, valid = _sequences_of(call.q, call.cu_seqlens)
        if call.keys is None:
            return (sequence[:, None] == sequence)[None, None], valid[None]
        assert call.keys.cu_seqlens is not None
        of_keys, in_one = _sequences_of(call.k, call.keys.cu_seqlens)
        same = (sequence[:, None] == of_keys) & in_one
        valid = valid & same.any(-1)
        first = torch.arange(call.k.shape[1], device=call.q.device) == 0
        return (same | (first & ~valid[:, None]))[None, None], valid[None]
    there, known = valid_keys(call), valid_queries(call)
    if there is None:
        return None, known
    keys = torch.arange(call.k.shape[1], device=call.q.device)
    # as many rows as queries: a view to torch, and ONNX Runtime's Attention does not broadcast
    mask = (there | (keys == 0))[:, None, None, :].expand(-1, -1, tokens, -1)
    if call.keys is None:
        return mask, known
    any_key = there.any(-1, keepdim=True)
    return mask, any_key.expand(-1, tokens) if known is None else known & any_key


def _sequences_of(x: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of the sequence of each token of x (B, N, ...), and whether it belongs to one, (N,) each."""
    token = torch.arange(x.shape[1], device=x.device)
    sequence = (token[:, None] >= bounds).sum(-1)  # 1 .. sequences, 0 and sequences + 1 outside
    return sequence, (sequence > 0) & (token < bounds[-1])


def valid_queries(call: AttentionCall) -> Tensor | None:
    """Return which tokens of a padded batch are there, (B, N) bool, or None if all are."""
    if call.seqlens is None:
        return None
    return torch.arange(call.q.shape[1], device=call.q.device) < call.seqlens[:, None]


def valid_keys(call: AttentionCall) -> Tensor | None:
    """Return which tokens of k are there, (B|1, M) bool, or None if all are."""
    if call.keys is not None and call.keys.cu_seqlens is not None:
        return _sequences_of(call.k, call.keys.cu_seqlens)[1][None]
    if call.cu_seqlens is not None:
        return _sequences_of(call.k, call.cu_seqlens)[1][None]
    lengths = call.seqlens if call.keys is None else call.keys.seqlens
    return None if lengths is None else torch.arange(call.k.shape[1], device=call.k.device) < lengths[:, None]


def outside(call: AttentionCall) -> Tensor:
    """Return the output of tokens of no sequence: 0 for padding, NaN if the lengths do not match the tokens. The latter
    is possible here only if the lengths could not be read before."""
    zero, nan = torch.zeros((), device=call.q.device), torch.full((), torch.nan, device=call.q.device)
    if call.seqlens is None:
        if call.keys is None:
            return nan.to(call.q.dtype)
        return _without_keys(call, zero, nan)
    fits = (call.seqlens >= 0) & (call.seqlens <= call.q.shape[1])
    return torch.where(fits, zero, nan).to(call.q.dtype)[:, None, None, None]


def _without_keys(call: AttentionCall, zero: Tensor, nan: Tensor) -> Tensor:
    """Return, for a call whose queries are all there or packed: 0 for those of a sequence without keys, else NaN."""
    assert call.keys is not None
    if call.cu_seqlens is not None:
        _, valid = _sequences_of(call.q, call.cu_seqlens)
        return torch.where(valid, zero, nan).to(call.q.dtype)[None, :, None, None]
    lengths = call.keys.seqlens
    assert lengths is not None
    fits = (lengths >= 0) & (lengths <= call.k.shape[1])
    return torch.where(fits, zero, nan).to(call.q.dtype)[:, None, None, None]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Compute attention by torch's SDPA, (B, N, H, D) -> (B, N, H, D). Without keys it is 0, whatever q is."""
    if unrecorded(_tokens, k) == 0:
        everywhere = torch.ones((), dtype=torch.bool, device=q.device)
        return q.masked_fill(everywhere, 0) + k.sum() + v.sum()  # no keys, so no elements; but differentiable
    group = unrecorded(_heads, q) // unrecorded(_heads, k)
    if group > 1 and in_torchscript_export():  # has no enable_gqa
        k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
        group = 1
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = {"enable_gqa": True} if group > 1 else {}  # a branch: with symbolic heads the comparison is no bool
    if derivatives_beyond_reverse() is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, **grouped)
    else:
        bias = None  # ONNX's operator would add True as 1
        if mask is not None:
            bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
        attention = torch.ops.aten._scaled_dot_product_attention_math
        out, _ = attention(q, k, v, attn_mask=bias, scale=scale, **grouped)
    return out.transpose(1, 2).contiguous()


def _packed_pairs(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """Compute packed attention to other tokens, (T, H, D) and (S, Hkv, D) -> (T, H, D): one SDPA call per distinct pair
    of lengths; sequences without keys give 0."""
    groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for _, start, stop, first, last in call.pairs():
        if stop > start:
            groups.setdefault((stop - start, last - first), []).append((start, first))
    order, outs = [], []
    for (length, keys), begin in groups.items():
        rows, columns = (
            (torch.tensor(at, device="cpu")[:, None] + torch.arange(n, device="cpu")).to(q.device)
            for at, n in zip(zip(*begin, strict=True), (length, keys), strict=True)
        )
        out = _sdpa(q[rows], k[columns], v[columns], call.scale)
        outs.append(out.flatten(0, 1))
        order.append(rows.flatten())
    if not outs:
        return q + k.sum() + v.sum()  # no queries, so no elements; but differentiable
    return torch.cat(outs)[torch.cat(order).argsort()]


def _tokens(x: Tensor) -> int:
    return x.shape[1]


def _heads(x: Tensor) -> int:
    return x.shape[2]


def _packed(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """Compute packed attention, (T, H, D) -> (T, H, D): one SDPA call per distinct length, not per sequence."""
    assert call.cu_seqlens is not None
    bounds = call.cu_seqlens.tolist()
    check_cu_seqlens(bounds, q.shape[0], call.max_seqlen)
    starts: dict[int, list[int]] = {}
    for start, stop in pairwise(bounds):
        if stop > start:
            starts.setdefault(stop - start, []).append(start)
    if not starts:
        return q + k.sum() + v.sum()  # no tokens, so no elements; but differentiable
    if len(starts) == 1:  # equal windows: (T, H, D) -> (windows, length, H, D) is a view
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
