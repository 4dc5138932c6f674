# SPDX-License-Identifier: Apache-2.0
"""Vision towers that rotate: real classes of transformers at the widths of their checkpoints, with few layers, random
weights and random pixels (speed does not depend on them)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Size = tuple[int, int]  # height, width of an image in pixels
Built = tuple[nn.Module, Callable[[nn.Module, torch.dtype], Tensor]]  # a tower, and its forward


def qwen2_5_vl(layers: int, sizes: Sequence[Size]) -> Built:
    """Return Qwen2.5-VL's tower on images in one sequence: windows of 112 px, full attention in the last layer."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    config = Qwen2_5_VLVisionConfig(
        hidden_size=1280,
        num_heads=16,
        intermediate_size=3420,
        depth=layers,
        fullatt_block_indexes=[layers - 1],
        out_hidden_size=2048,
    )
    model = Qwen2_5_VisionTransformerPretrainedModel._from_config(config)
    grid = torch.tensor([[1, height // 14, width // 14] for height, width in sizes])
    patches = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 14 * 14)
    return model, lambda m, dtype: m(patches.to(dtype), grid_thw=grid)


def pixtral(layers: int, sizes: Sequence[Size]) -> Built:
    """Return Pixtral's tower on images of any sizes in one sequence."""
    from transformers import PixtralVisionConfig, PixtralVisionModel

    config = PixtralVisionConfig(
        hidden_size=1024, num_attention_heads=16, intermediate_size=4096, num_hidden_layers=layers
    )
    image_sizes = torch.tensor(sizes)
    pixels = torch.randn(len(sizes), 3, *image_sizes.amax(0).tolist())
    return PixtralVisionModel._from_config(config), lambda m, dtype: m(pixels.to(dtype), image_sizes).last_hidden_state


def dinov3_large(layers: int, sizes: Sequence[Size]) -> Built:
    """Return DINOv3-L on a batch of images, all of one size."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    config = DINOv3ViTConfig(
        hidden_size=1024,
        num_attention_heads=16,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_register_tokens=4,
    )
    (size,) = set(sizes)
    pixels = torch.randn(len(sizes), 3, *size)
    return DINOv3ViTModel._from_config(config), lambda m, dtype: m(pixels.to(dtype)).last_hidden_state


def tokens(module: nn.Module, sizes: Sequence[Size]) -> int:
    """Return how many tokens attend in one forward: the patches of all images, and their prefix tokens."""
    config: Any = module.config
    registers = getattr(config, "num_register_tokens", None)
    prefix = 0 if registers is None else 1 + registers
    return sum((height // config.patch_size) * (width // config.patch_size) + prefix for height, width in sizes)
