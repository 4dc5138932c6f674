# SPDX-License-Identifier: Apache-2.0
"""Plug-in for SGLang: vision towers of a server rotate inside of their attention.

SGLang's towers share one class, ``VisionAttention``: its forward rotates q and k, and hands them to a backend. The
plug-in calls that forward without its rotation, and puts a backend in front of its own that rotates inside of the
attention. What it does not know (a norm behind the rotation, another function for it, windows with sinks, FlashInfer's
and CUDA graphs' forms of cu_seqlens) is left to SGLang.

``SPATIAL_PE_SGLANG=0`` switches it off, as does an ``SGLANG_PLUGINS`` that does not name ``spatial_pe``. Nothing of
SGLang is imported before SGLang asks.
"""

from __future__ import annotations

import logging
import os
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.tensor_cache import once_per_forward
from ..ops.attention import rope_attention
from ..rotary import Rotary

SWITCH = "SPATIAL_PE_SGLANG"
TARGET = "sglang.srt.layers.attention.vision.VisionAttention.forward"
# table of the forward that runs, for its backend
_ROTARY: ContextVar[Rotary | None] = ContextVar("spatial_pe_rotary", default=None)

logger = logging.getLogger("sglang.spatial_pe")


def register() -> None:
    """Hook the attention of SGLang's vision towers: the entry point of ``sglang.srt.plugins``."""
    if os.environ.get(SWITCH, "1") == "0":
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if any(hook is attend for _, hook, _ in HookRegistry._hooks.get(TARGET, ())):
        return
    HookRegistry.register(TARGET, attend, HookType.AROUND)
    logger.info("spatial_pe: vision attention rotates inside; %s=0 switches it off", SWITCH)


def attend(
    forward: Any,
    self: Any,
    x: Tensor,
    cu_seqlens: Any = None,
    position_embeddings: Any = None,
    rotary_pos_emb_cos: Tensor | None = None,
    rotary_pos_emb_sin: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Run the forward of a VisionAttention, around which SGLang calls this, with the rotation in its attention."""
    rotation = {
        "position_embeddings": position_embeddings,
        "rotary_pos_emb_cos": rotary_pos_emb_cos,
        "rotary_pos_emb_sin": rotary_pos_emb_sin,
    }
    tables = position_embeddings if position_embeddings is not None else (rotary_pos_emb_cos, rotary_pos_emb_sin)
    rotary = _rotary(tables, self.head_size) if _serves(self, cu_seqlens, attention_mask, kwargs) else None
    if rotary is None:
        return forward(self, x, cu_seqlens, attention_mask=attention_mask, **rotation, **kwargs)
    if not isinstance(self.qkv_backend, Fused):
        self.qkv_backend = Fused(self.qkv_backend)
    token = _ROTARY.set(rotary)
    try:
        return forward(self, x, cu_seqlens, **kwargs)
    finally:
        _ROTARY.reset(token)


def _serves(module: Any, cu_seqlens: Any, attention_mask: Any, more: dict[str, Any]) -> bool:
    """Return whether this call is fused, if it rotates."""
    norm_behind = module.qk_normalization and not module.qk_normalization_by_head_size
    other_rotation = module.customized_position_embedding_applier is not None
    sinks = not more.get("full_attn", True) and module.sinks is not None
    packed = cu_seqlens is None or isinstance(cu_seqlens, Tensor)
    known = not any(more.get(name) is not None for name in ("forward_metadata", "sequence_lengths", "output_ws"))
    return packed and known and attention_mask is None and not (norm_behind or other_rotation or sinks)


class Fused(nn.Module):
    """Backend of a VisionAttention that rotates inside; another call goes to the one that was there."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bsz: int, seq_len: int, **kwargs: Any) -> Tensor:
        rotary = _ROTARY.get()
        if rotary is None:
            return self.own.forward(q=q, k=k, v=v, bsz=bsz, seq_len=seq_len, **kwargs)
        cu_seqlens, scale = kwargs.get("cu_seqlens"), kwargs.get("softmax_scale")
        if cu_seqlens is None:  # (B N, H, D)
            q, k, v = (x.unflatten(0, (bsz, seq_len)) for x in (q, k, v))
            if rotary.num_tokens == bsz * seq_len:  # a row for each
                cos, sin = (t.view(bsz, seq_len, 1, -1) for t in (rotary.cos, rotary.sin))
                rotary = Rotary(cos, sin, "half")
            return rope_attention(q, k, v, rotary, scale=scale).flatten(0, 1)
        longest = kwargs.get("max_seqlen")
        return rope_attention(
            q,
            k,
            v,
            rotary,
            scale=scale,
            cu_seqlens=cu_seqlens.to(q.device, torch.int32),
            max_seqlen=longest if isinstance(longest, int) else None,
        )


def _rotary(tables: Any, head_dim: int) -> Rotary | None:
    """Return the table of (cos, sin), (N, D) with each angle twice or (N, D/2); None if there is none of that form."""
    if not (isinstance(tables, tuple | list) and len(tables) == 2 and all(isinstance(t, Tensor) for t in tables)):
        return None
    cos, sin = tables
    if cos.shape != sin.shape or cos.ndim != 2 or cos.shape[-1] not in (head_dim, head_dim // 2):
        return None

    def make() -> Rotary | None:
        half = head_dim // 2
        if cos.shape[-1] == head_dim and not all(torch.equal(t[:, :half], t[:, half:]) for t in (cos, sin)):
            return None
        # copies: a view would keep the key of its own entry alive
        rows = (t[:, :half].to(torch.float32, copy=True).contiguous() for t in (cos, sin))
        return Rotary(next(rows), next(rows), "half")

    return once_per_forward(cos, (sin,), head_dim, make)
