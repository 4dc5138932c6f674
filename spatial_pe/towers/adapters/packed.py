# SPDX-License-Identifier: Apache-2.0
"""Packed sequences: forward(hidden_states (T, C), cu_seqlens, position_embeddings=(cos, sin)).

Qwen2-VL, Qwen2.5-VL, Qwen3-VL, GLM-4V, ERNIE-4.5-VL and the families that share their forward. One call for all images
and windows, where the model's own forward reads the lengths and attends image by image in every layer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...attention import rope_attention
from .base import Adapter
from .tables import rotary_from_tables


class PackedAttention(Adapter):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs = self.named(args, kwargs)
        bound = self._spatial_pe
        tables = tables_of(kwargs.get("position_embeddings"), bound.layout.head_dim)
        cu_seqlens = kwargs.get("cu_seqlens")
        reason, rotary = self.refusal(kwargs), None
        if reason is None:
            if hidden_states.ndim != 2 or cu_seqlens is None:
                reason = "tokens are not packed"
            elif tables is None:
                reason = "position_embeddings is not (cos, sin) of shape (tokens, head_dim)"
            else:
                rotary = rotary_from_tables(*tables, prefix=0, owner=self.original)
                reason = "the halves of cos and sin differ" if rotary is None else None
        if reason is not None:
            return self.fall_back(reason, hidden_states, **kwargs)
        longest = kwargs.get("max_seqlen")
        q, k, v = self.project(hidden_states)  # (T, H, D)
        attended = rope_attention(
            q,
            k,
            v,
            rotary,
            scale=bound.layout.scale,
            cu_seqlens=cu_seqlens.int(),  # type: ignore[union-attr]
            max_seqlen=longest if isinstance(longest, int) else None,
            backend=bound.backend,
        )
        return self.output(attended)


def tables_of(value: Any, head_dim: int) -> tuple[Tensor, Tensor] | None:
    """value if it is (cos, sin), each (tokens, head_dim)."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        return None
    cos, sin = value
    fits = all(isinstance(t, Tensor) and t.ndim == 2 and t.shape[-1] == head_dim for t in value)
    return (cos, sin) if fits else None
