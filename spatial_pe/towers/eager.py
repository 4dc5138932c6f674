# SPDX-License-Identifier: Apache-2.0
"""Attention that returns its weights, in plain PyTorch: for calls with an added RoPE that the fused op cannot compute.

The module's original forward would leave out the added rotation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MASKS = ("attention_mask", "attn_mask", "causal_attention_mask")


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float, call: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Compute q (B, N, H, D), k and v (B, N, Hkv, D), q and k rotated -> (B, N, H, D), weights (B, H, N, N)."""
    for name in ("is_causal", "head_mask", "key_padding_mask"):
        if call.get(name) is not None and call[name] is not False:
            raise NotImplementedError(f"{name} together with an added 2D RoPE: unpatch the model for such calls")
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale
    for name in MASKS:
        mask = call.get(name)
        if mask is not None:
            if mask.ndim == 2:
                mask = mask.bool()[:, None, None]
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    nothing = (scores == -torch.inf).all(-1, keepdim=True)  # attends to nothing: 0, as SDPA gives, and not 0 / 0
    weights = torch.nn.functional.dropout(weights.masked_fill(nothing, 0.0), dropout)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v).contiguous(), weights
