# SPDX-License-Identifier: Apache-2.0
"""Batches without RoPE of their own: forward(hidden_states (B, N, C), masks that are None in vision towers).

CLIP, SigLIP, DINOv2, ViT. ``patch(model, rope=...)`` puts an encoding on the module as ``rope``; its tables are made
from the grid that the tower's patch embedding recorded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...attention import rope_attention
from ...rotary import Rotary
from ...rotation import apply_rotary_qk
from ..layout import dropout_of
from .base import Adapter


class PlainAttention(Adapter):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        kwargs = self.named(args, kwargs)
        bound = self._spatial_pe
        reason = self.refusal(kwargs)
        if bound.grids is None:
            if reason is not None:
                return self.fall_back(reason, hidden_states, **kwargs)
            rotary = None
        else:
            tokens = hidden_states.shape[1]
            rotary = bound.grids.rotary(self.rope, tokens, bound.prefix, hidden_states)  # type: ignore[arg-type]
            if reason is not None:  # the model's own forward would leave the rotation out
                return self._eager(hidden_states, rotary, kwargs)
        q, k, v = self.project(hidden_states)  # (B, N, H, D)
        attended = rope_attention(q, k, v, rotary, scale=bound.layout.scale, backend=bound.backend)
        return self.output(attended), None

    def _eager(self, hidden_states: Tensor, rotary: Rotary, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Masks, dropout and attention weights together with an added RoPE."""
        for name in ("is_causal", "head_mask"):
            if kwargs.get(name) is not None and kwargs[name] is not False:
                raise NotImplementedError(f"{name} together with an added 2D RoPE: unpatch the model for such calls")
        layout = self._spatial_pe.layout
        q, k, v = self.project(hidden_states)
        q, k = apply_rotary_qk(q, k, rotary)
        groups = layout.heads // layout.kv_heads
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * layout.scale
        for name in ("attention_mask", "causal_attention_mask"):
            mask = kwargs.get(name)
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        weights = torch.nn.functional.dropout(weights, dropout_of(self, layout))
        attended = torch.einsum("bhnm,bmhd->bnhd", weights, v).contiguous()
        return self.output(attended), weights
