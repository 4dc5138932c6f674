# SPDX-License-Identifier: Apache-2.0
"""Batches with RoPE: forward(hidden_states (B, N, C), attention_mask, position_embeddings=(cos, sin)).

DINOv3, whose CLS and register tokens come first and have no row in cos; and Pixtral, whose images are packed into a
batch of one: their bounds arrive as ``cu_seq_lens_q`` (see ``grids.PackImages``) and take the place of its mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...attention import rope_attention
from .base import Adapter
from .packed import tables_of
from .tables import rotary_from_tables


class BatchedAttention(Adapter):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        kwargs = self.named(args, kwargs)
        bound = self._spatial_pe
        tables = tables_of(kwargs.get("position_embeddings"), bound.layout.head_dim)
        bounds = kwargs.get("cu_seq_lens_q")
        reason, rotary = self.refusal(kwargs), None
        if reason is None:
            if tables is None:
                reason = "position_embeddings is not (cos, sin) of shape (patches, head_dim)"
            else:
                prefix = hidden_states.shape[1] - tables[0].shape[0]
                rotary = rotary_from_tables(*tables, prefix=prefix, owner=self.original)
                reason = "the halves of cos and sin differ" if rotary is None else None
        if reason is not None:
            if bounds is not None and kwargs.get("attention_mask") is None:
                kwargs = {**kwargs, "attention_mask": self._mask(bounds, hidden_states)}
            return self.fall_back(reason, hidden_states, **kwargs)
        q, k, v = self.project(hidden_states)  # (B, N, H, D)
        scale, backend = bound.layout.scale, bound.backend
        if bounds is None:
            attended = rope_attention(q, k, v, rotary, scale=scale, backend=backend)
        else:
            longest = kwargs.get("max_length_q")
            attended = rope_attention(
                q[0], k[0], v[0], rotary, scale=scale, cu_seqlens=bounds, max_seqlen=longest, backend=backend
            )[None]
        return self.output(attended), None

    def _mask(self, bounds: Tensor, hidden_states: Tensor) -> Tensor | None:
        """The additive (1, 1, S, S) mask that the model would have built, for a call that it computes itself."""
        if "flash" in (getattr(getattr(self, "config", None), "_attn_implementation", None) or ""):
            return None
        token = torch.arange(hidden_states.shape[1], device=bounds.device)
        image = torch.searchsorted(bounds, token, right=True)
        mask = hidden_states.new_zeros(len(token), len(token))
        return mask.masked_fill_(image[:, None] != image[None, :], torch.finfo(mask.dtype).min)[None, None]
