# SPDX-License-Identifier: Apache-2.0
"""Small towers of transformers' own classes, random weights, with inputs that have several images and odd grids."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")


@dataclass(frozen=True)
class Family:
    """One tower. ``options`` are the config's; ``attention`` the class that must be patched, ``layers`` how often."""

    module: str
    model: str
    config: str
    options: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]
    attention: tuple[str, ...]  # the newest name first
    layers: int = 2

    def load(self) -> tuple[type, type]:
        """The model's class and its config's."""
        package = f"transformers.models.{self.module}"
        modeling = importlib.import_module(f"{package}.modeling_{self.module}")
        configuration = importlib.import_module(f"{package}.configuration_{self.module}")
        return getattr(modeling, self.model), getattr(configuration, self.config)

    def available(self) -> bool:
        try:
            self.load()
        except (ImportError, AttributeError):
            return False
        return True

    def make(self, seed: int = 0, implementation: str = "sdpa", **options: Any) -> nn.Module:
        model, config = self.load()
        chosen = config(**{**self.options, **options})
        chosen._attn_implementation = implementation
        return randomize(model(chosen), seed).eval()


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that make attention uneven: with the usual std of 0.02 every rotation would look right."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_gain = parameter.ndim == 1 and name.endswith("weight")
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        with torch.no_grad():
            parameter.copy_(1 + 0.1 * noise if is_gain else noise * (1.5 / fan_in**0.5 if fan_in > 1 else 0.1))
    return model


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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

FAMILIES = {
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
HERE = [name for name, family in FAMILIES.items() if family.available()]
WITH_TABLES = [name for name in HERE if name not in ("clip", "siglip", "dinov2", "dinov2_with_registers", "vit")]
WITHOUT_ROPE = ["clip", "siglip", "dinov2", "dinov2_with_registers", "vit"]


def outputs(model: nn.Module, inputs: dict[str, Any], **more: Any) -> list[Tensor]:
    """All floating point tensors that a tower returns."""
    result = model(**inputs, **more)
    if isinstance(result, Tensor):
        result = (result,)
    flat: list[Any] = []
    for value in result.values() if hasattr(result, "values") else result:
        flat += value if isinstance(value, tuple | list) else [value]
    return [value for value in flat if isinstance(value, Tensor) and value.is_floating_point()]


def to(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
