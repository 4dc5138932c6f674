# SPDX-License-Identifier: Apache-2.0
"""Towers that have a RoPE of their own; inputs with several images and odd grids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from family import Family, randn


def _patches(width: int, frames: int = 2) -> Callable[[], dict[str, Any]]:
    """Qwen-like input: an image of 4 x 6 patches, one of 10 x 2, and a video with frames of 2 x 2."""
    grid = torch.tensor([[1, 4, 6], [1, 10, 2], [frames, 2, 2]])
    tokens = int(grid.prod(1).sum())
    return lambda: {"hidden_states": randn(tokens, width), "grid_thw": grid}


def _pixels(height: int, width: int, **more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": randn(2, 3, height, width), **more}


_QWEN = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
_VIT = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}

WITH_ROPE = {
    "qwen2_vl": Family(
        "qwen2_vl",
        "Qwen2VisionTransformerPretrainedModel",
        "Qwen2VLVisionConfig",
        {**_QWEN, "embed_dim": 80, "hidden_size": 32},  # head_dim 40
        _patches(96),
        ("VisionAttention",),
    ),
    "qwen2_5_vl": Family(  # windows of 2 x 2 merged patches in layer 0, full attention in layer 1
        "qwen2_5_vl",
        "Qwen2_5_VisionTransformerPretrainedModel",
        "Qwen2_5_VLVisionConfig",
        {**_QWEN, "hidden_size": 80, "intermediate_size": 64, "out_hidden_size": 32}
        | {"window_size": 16, "fullatt_block_indexes": [1]},
        _patches(96),
        ("Qwen2_5_VLVisionAttention",),
    ),
    "qwen3_vl": Family(
        "qwen3_vl",
        "Qwen3VLVisionModel",
        "Qwen3VLVisionConfig",
        {**_QWEN, "hidden_size": 72, "num_heads": 3, "intermediate_size": 64, "out_hidden_size": 32}  # head_dim 24
        | {"num_position_embeddings": 16, "deepstack_visual_indexes": [1]},
        _patches(96),
        ("Qwen3VLVisionAttention",),
    ),
    "glm4v": Family(
        "glm4v",
        "Glm4vVisionModel",
        "Glm4vVisionConfig",
        {**_QWEN, "hidden_size": 64, "intermediate_size": 64, "out_hidden_size": 32, "image_size": 16},
        _patches(96, frames=1),
        ("Glm4vVisionAttention",),
    ),
    "glm_ocr": Family(  # norms on q and k
        "glm_ocr",
        "GlmOcrVisionModel",
        "GlmOcrVisionConfig",
        {**_QWEN, "hidden_size": 64, "intermediate_size": 64, "out_hidden_size": 32, "image_size": 16},
        _patches(96),
        ("GlmOcrVisionAttention",),
    ),
    "ernie4_5_vl_moe": Family(
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeVisionTransformerPretrainedModel",
        "Ernie4_5_VLMoeVisionConfig",
        {**_QWEN, "hidden_size": 80, "intermediate_size": 64},
        _patches(48),
        ("Ernie4_5_VLMoeVisionAttention",),
    ),
    "pixtral": Family(  # two images of different size in one sequence
        "pixtral",
        "PixtralVisionModel",
        "PixtralVisionConfig",
        {**_VIT, "hidden_size": 64, "image_size": 64, "head_dim": 32},
        _pixels(40, 24, image_sizes=torch.tensor([[40, 16], [24, 24]])),
        ("PixtralAttention",),
    ),
    "dinov3": Family(  # CLS + 3 registers are not rotated; k has no bias
        "dinov3_vit",
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {**_VIT, "hidden_size": 64, "num_register_tokens": 3},
        _pixels(40, 24),
        ("DINOv3ViTAttention",),
    ),
}
