# SPDX-License-Identifier: Apache-2.0
"""Towers without RoPE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from family import Family, randn


def _pixels(height: int, width: int, **more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": randn(2, 3, height, width), **more}


_VIT = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}

WITHOUT_ROPE = {
    "clip": Family(
        "clip",
        "CLIPVisionModel",
        "CLIPVisionConfig",
        _VIT,
        _pixels(32, 32),
        ("CLIPAttention",),
    ),
    "siglip": Family(
        "siglip",
        "SiglipVisionModel",
        "SiglipVisionConfig",
        _VIT,
        _pixels(40, 24, interpolate_pos_encoding=True),
        ("SiglipAttention",),
    ),
    "dinov2": Family(
        "dinov2",
        "Dinov2Model",
        "Dinov2Config",
        {**_VIT, "mlp_ratio": 1},
        _pixels(40, 24),
        ("Dinov2Attention", "Dinov2SelfAttention"),
    ),
    "dinov2_with_registers": Family(
        "dinov2_with_registers",
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        {**_VIT, "mlp_ratio": 1, "num_register_tokens": 2},
        _pixels(40, 24),
        ("Dinov2WithRegistersAttention", "Dinov2WithRegistersSelfAttention"),
    ),
    "vit": Family(
        "vit",
        "ViTModel",
        "ViTConfig",
        _VIT,
        _pixels(32, 32),
        ("ViTAttention", "ViTSelfAttention"),
    ),
}
