# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for flash-attn 2, 3 and 4 and torch's varlen_attn, with their signatures, computing on the CPU."""

from __future__ import annotations

import math
import sys
import types
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from spatial_pe.backends.base import AttentionCall
from spatial_pe.ops import flash

NAMES = {provider.name: provider for provider in flash.PROVIDERS}


class Attend(torch.autograd.Function):
    """Float32 inside. Like the kernels it trusts its bounds, computes the first `longest` rows of a sequence, leaves
    what is in the memory in all others, and records nothing in its backward."""

    @staticmethod
    def forward(ctx, q, k, v, bounds, longest, scale):
        ctx.save_for_backward(q, k, v)
        ctx.rest = (bounds, longest, scale)
        with torch.no_grad():
            return attend(q, k, v, *ctx.rest)

    @staticmethod
    def backward(ctx, dout):
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            grads = torch.autograd.grad(attend(*leaves, *ctx.rest), leaves, dout.detach())
        return (*grads, None, None, None)


def attend(
    q: Tensor, k: Tensor, v: Tensor, bounds: tuple[Tensor, Tensor] | None, longest: tuple[int, int] | None, scale: float
) -> Tensor:
    """bounds, longest: of the queries and of the keys. A sequence without keys gives 0."""
    for x in (q, k, v):
        assert x.dtype in (torch.bfloat16, torch.float16) and x.stride(-1) == 1 and x.data_ptr() % 16 == 0
        assert all(stride % 8 == 0 or size == 1 for stride, size in zip(x.stride()[:-1], x.shape, strict=False))
    group = q.shape[-2] // k.shape[-2]

    def one(q, k, v):  # (..., N, H, D)
        q, k, v = (x.transpose(-2, -3).float() for x in (q, k, v))
        k, v = (x.repeat_interleave(group, -3) for x in (k, v))
        return (torch.softmax(q @ k.mT * scale, -1) @ v).transpose(-2, -3).to(torch.get_default_dtype())

    if bounds is None:
        return one(q, k, v).to(q.dtype)
    assert longest is not None and all(x.dtype == torch.int32 and x.is_contiguous() for x in bounds)
    out = torch.full(q.shape, 7.0)
    sides = [list(pairwise(x.tolist())) for x in bounds]
    for (start, stop), (first, last) in zip(*sides, strict=True):
        assert 0 <= start <= stop <= q.shape[0] and 0 <= first <= last <= k.shape[0], "read past the tensors"
        assert last - first <= longest[1]
        rows, columns = slice(start, min(stop, start + longest[0])), slice(first, last)
        if stop > start:
            out[rows] = one(q[rows], k[columns], v[columns]) if last > first else 0.0
    return out.to(q.dtype)


CALLS: list[tuple[str, dict]] = []


def fa2() -> types.ModuleType:
    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        CALLS.append(("dense", {"deterministic": deterministic}))
        return Attend.apply(q, k, v, None, None, softmax_scale)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        CALLS.append(("packed", {"longest": max_seqlen_q, "bounds": cu_seqlens_q}))
        return Attend.apply(q, k, v, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), softmax_scale)

    return module("flash_attn", flash_attn_func, flash_attn_varlen_func)


def fa3() -> types.ModuleType:
    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        CALLS.append(("dense", {}))
        return Attend.apply(q, k, v, None, None, softmax_scale)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        CALLS.append(("packed", {}))
        return Attend.apply(q, k, v, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), softmax_scale)

    return module("flash_attn_interface", flash_attn_func, flash_attn_varlen_func)


def fa4() -> types.ModuleType:
    """Returns (out, lse)."""

    def flash_attn_func(
        q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
        learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
        score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,
        block_sparse_tensors_bwd=None, return_lse=False,
    ):  # fmt: skip
        CALLS.append(("dense", {}))
        return Attend.apply(q, k, v, None, None, softmax_scale), None

    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
        softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1,
        pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None,
        block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False, scheduler_metadata=None,
        seqlen_k_per_split=None, disable_scheduler_metadata=False,
    ):  # fmt: skip
        CALLS.append(("packed", {}))
        return Attend.apply(q, k, v, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), softmax_scale), None

    return module("flash_attn.cute", flash_attn_func, flash_attn_varlen_func)


def torch_varlen() -> types.ModuleType:
    """As of torch 2.13."""

    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
        enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
    ):  # fmt: skip
        assert enable_gqa or query.size(1) == key.size(1)
        CALLS.append(("packed", {}))
        return Attend.apply(query, key, value, (cu_seq_q, cu_seq_k), (max_q, max_k), scale)

    return module("torch.nn.attention.varlen", varlen_attn)


def torch_varlen_2_10() -> types.ModuleType:
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        CALLS.append(("packed", {}))
        return Attend.apply(query, key, value, (cu_seq_q, cu_seq_k), (max_q, max_k), query.shape[-1] ** -0.5)

    return module("torch.nn.attention.varlen", varlen_attn)


def module(name: str, *functions) -> types.ModuleType:
    made = types.ModuleType(name)
    for function in functions:
        setattr(made, function.__name__, function)
    return made


STAND_INS = {"flash-attn 2": fa2, "flash-attn 3": fa3, "flash-attn 4": fa4, "torch's varlen_attn": torch_varlen}


@pytest.fixture
def gpu(monkeypatch):
    """A function: pretend that the CPU is a GPU of this capability, with these modules and no others."""

    def pretend(capability: tuple[int, int], *modules: types.ModuleType) -> None:
        monkeypatch.setattr(flash, "DEVICE", "cpu")
        monkeypatch.setattr(flash, "major", lambda device: capability[0])
        monkeypatch.setattr(flash, "_FAILED", {})
        for provider in flash.PROVIDERS:
            monkeypatch.setitem(sys.modules, provider.module, None)
        for made in modules:
            if made.__name__ == "flash_attn.cute" and sys.modules["flash_attn"] is None:
                monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))  # a namespace
            monkeypatch.setitem(sys.modules, made.__name__, made)
        flash.clear_cache()
        CALLS.clear()

    yield pretend
    monkeypatch.undo()
    flash.clear_cache()


def call_of(q: Tensor, k: Tensor | None = None, bounds: Tensor | None = None, **others) -> AttentionCall:
    k = q if k is None else k
    arguments = {"rotary": None, "scale": 1 / math.sqrt(q.shape[-1]), "max_seqlen": None, "seqlens": None} | others
    return AttentionCall(q, k, k, cu_seqlens=bounds, **arguments)


HALF = torch.zeros(1, 32, 2, 64, dtype=torch.float16)
