# SPDX-License-Identifier: Apache-2.0
"""``attn_implementation="spatial_pe"``: the fused op without rotation, by transformers' attention interface.

It receives q and k after the tower has rotated them, so it cannot fuse the rotation: ``patch`` does. It is for towers
without RoPE, and where only a string in a config can be changed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..ops.attention import rope_attention
from .padding import attend_padded, padding_of

NAME = "spatial_pe"


def register_attention_interface() -> str:
    """Register "spatial_pe" with transformers, masks included; return the name.

    ``AutoModel.from_pretrained(..., attn_implementation="spatial_pe")`` or ``model.set_attn_implementation(...)`` then
    use it. Bidirectional self-attention is fused, with or without padding, where the output for padding is 0, as with
    transformers' flash attention; any other call (causal, cached, dropout, a bias) is computed by transformers' sdpa.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    # without a mask function transformers passes no mask, and padding would be attended to
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return NAME


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute (B, H, N, D), keys and values (B, Hkv, N, D) -> (B, N, H, D), None. The signature is transformers'."""
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    same = query.shape[2] == key.shape[2] == value.shape[2] and key.shape == value.shape
    padding: Any = None
    fused = same and dropout == 0.0 and not (causal and attention_mask is None and query.shape[2] > 1)
    if fused and attention_mask is not None:
        padding = padding_of(attention_mask, query.shape[0], query.shape[2])
        fused = not isinstance(padding, str)
    if not fused:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)  # type: ignore[return-value]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    if padding is not None:
        return attend_padded(q, k, v, None, padding, scale, "auto"), None
    return rope_attention(q, k, v, scale=scale), None
