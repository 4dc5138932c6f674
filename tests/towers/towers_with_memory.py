# SPDX-License-Identifier: Apache-2.0
"""transformers' attention to memories, and its encoding that is no rotation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from family import Family, randn
from torch import nn

_SIZES = {
    "memory_attention_hidden_size": 64,
    "memory_attention_num_layers": 2,
    "memory_attention_rope_feat_sizes": [4, 4],
    "memory_attention_rope_dropout": 0.0,
    "memory_attention_dropout": 0.0,
}


@dataclass(frozen=True)
class _OneHead(Family):
    """A tower with one wide head, whose scores are made smaller: what bfloat16 makes of one-hot attention is luck."""

    def make(self, seed: int = 0, implementation: str = "sdpa", **options: Any) -> nn.Module:
        model = super().make(seed, implementation, **options)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "q_proj" in name:
                    parameter.mul_(0.3)
        return model


def _memory(keys: int, width: int, **more: Any) -> Callable[[], dict[str, Any]]:
    """A frame of 4 x 4 patches of two objects, and the memory that it looks at, of which 4 are pointers."""
    return lambda: {
        "current_vision_features": randn(16, 2, 64),
        "current_vision_position_embeddings": randn(16, 2, 64, seed=2),
        "memory": randn(keys, 2, width, seed=3),
        "num_object_pointer_tokens": 4,
        **more,
    }


WITH_MEMORY = {
    "sam2_video": _OneHead(
        "sam2_video",
        "Sam2VideoMemoryAttention",
        "Sam2VideoConfig",
        {**_SIZES, "memory_attention_feed_forward_hidden_size": 64},
        _memory(52, 64, memory_posision_embeddings=randn(52, 2, 64, seed=4)),
        ("Sam2VideoRoPEAttention",),
        layers=4,
    ),
    "sam3_tracker_video": _OneHead(
        "sam3_tracker_video",
        "Sam3TrackerVideoMemoryAttention",
        "Sam3TrackerVideoConfig",
        {**_SIZES, "memory_attention_feed_forward_hidden_size": 64, "image_size": 56},
        _memory(52, 64, memory_posision_embeddings=randn(52, 2, 64, seed=4)),
        ("Sam3TrackerVideoRoPEAttention",),
        layers=4,
    ),
    "edgetam_video": _OneHead(
        "edgetam_video",
        "EdgeTamVideoMemoryAttention",
        "EdgeTamVideoConfig",
        {**_SIZES, "memory_attention_mlp_hidden_size": 64, "memory_attention_rope_k_sizes": [2, 2]},
        _memory(18, 64, memory_posision_embeddings=randn(18, 2, 64, seed=4), num_spatial_memory_tokens=2),
        ("EdgeTamVideoRoPESelfAttention", "EdgeTamVideoRoPECrossAttention"),
        layers=4,
    ),
    "vjepa2": Family(
        "vjepa2",
        "VJEPA2Model",
        "VJEPA2Config",
        {
            "hidden_size": 48,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "crop_size": 32,
            "patch_size": 8,
            "frames_per_clip": 4,
            "pred_num_hidden_layers": 2,
            "pred_hidden_size": 48,
            "pred_num_attention_heads": 2,
        },
        lambda: {"pixel_values_videos": randn(1, 4, 3, 32, 32)},
        ("VJEPA2RopeAttention",),
        layers=4,
    ),
}
