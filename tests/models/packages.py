# SPDX-License-Identifier: Apache-2.0
"""Small models of public packages, from the index as they are (see the Makefile), with random weights."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from family import randn, randomize
from own_code import places
from timm_path import define_operators
from torch import Tensor, nn

BESIDE = Path(__file__).parents[2] / ".venv" / "models"


def on_the_path() -> None:
    """Put the packages on the path, or skip. torchvision's wheel is for CUDA: see tests/towers/timm_path.py."""
    if not BESIDE.exists():
        pytest.skip("no public packages: make .venv/models", allow_module_level=True)
    if str(BESIDE) not in sys.path:
        sys.path.append(str(BESIDE))
        define_operators()


@dataclass(frozen=True)
class Package:
    """A model: ``build()``, and ``run(model, dtype)`` -> its outputs. ``patched``: how many of each attention class."""

    name: str  # on the index
    build: Callable[[], nn.Module]
    run: Callable[[nn.Module, torch.dtype], Any]
    patched: dict[str, int]
    added: bool = False  # RoPE can be added
    gradients: bool = True  # its own forward has them on a CPU

    @property
    def version(self) -> str:
        return importlib.metadata.version(self.name)

    def make(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(0)
        logging.disable(logging.WARNING)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # some print what they miss
                model = self.build()
        finally:
            logging.disable(logging.NOTSET)
        for module in model.modules():  # a table that is no parameter stays
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return randomize(model, seed).eval()

    def outputs(self, model: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        found = self.run(model, dtype)
        return [found] if isinstance(found, Tensor) else [x for x in found if isinstance(x, Tensor)]


def pixels(dtype: torch.dtype, *size: int) -> Tensor:
    return randn(*size).to(dtype)


# ---------------------------------------------------------------------------------------------------------- DUSt3R, 3D


def dust3r() -> nn.Module:
    from mini_dust3r.model import AsymmetricCroCo3DStereo

    return AsymmetricCroCo3DStereo(
        pos_embed="RoPE100",
        img_size=(32, 48),
        patch_embed_cls="PatchEmbedDust3R",
        enc_embed_dim=48,
        enc_depth=2,
        enc_num_heads=2,
        dec_embed_dim=48,
        dec_depth=2,
        dec_num_heads=2,
        landscape_only=False,
    )


def run_dust3r(model: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    shape = torch.tensor([[32, 48]] * 2)
    views = [{"img": randn(2, 3, 32, 48, seed=i).to(dtype), "true_shape": shape, "instance": "01"} for i in (1, 2)]
    _, features, where = model._encode_symmetrized(*views)  # type: ignore[operator]
    return [x[-1] for x in model._decoder(features[0], where[0], features[1], where[1])]  # type: ignore[operator]


def croco_blocks() -> nn.Module:
    """uniception's copy of CroCo's blocks, and its own."""
    from uniception.models.libs.croco.blocks import Block, DecoderBlock
    from uniception.models.libs.croco.pos_embed import RoPE2D
    from uniception.models.utils.transformer_blocks import CrossAttentionBlock, SelfAttentionBlock

    rope = RoPE2D(100.0)
    model = nn.Module()
    model.encoder = Block(48, 2, qkv_bias=True, rope=rope)
    model.decoder = DecoderBlock(48, 2, qkv_bias=True, rope=rope)
    model.own = SelfAttentionBlock(48, 2, qkv_bias=True, qk_norm=True, custom_positional_encoding=rope)
    model.across = CrossAttentionBlock(48, 2, qkv_bias=True, qk_norm=True, custom_positional_encoding=rope)
    model.without = SelfAttentionBlock(48, 2)
    return model


def run_croco_blocks(model: Any, dtype: torch.dtype) -> list[Tensor]:
    x, y = randn(2, 12, 48).to(dtype), randn(2, 20, 48, seed=2).to(dtype)
    of_x, of_y = places((3, 4), 2), places((4, 5), 2)
    x, y = model.encoder(x, of_x), model.encoder(y, of_y)
    x, y = model.decoder(x, y, of_x, of_y)
    return [model.across(model.own(x, of_x), y, of_x, of_y), model.without(y)]


def depth_anything() -> nn.Module:
    from depth_anything_3.model.dinov2.vision_transformer import DinoVisionTransformer

    return DinoVisionTransformer(
        img_size=56,
        patch_size=14,
        embed_dim=48,
        depth=4,
        num_heads=2,
        alt_start=2,
        rope_start=1,
        qknorm_start=1,
        cat_token=False,
    )


def run_depth_anything(model: Any, dtype: torch.dtype) -> Tensor:
    return model.get_intermediate_layers(pixels(dtype, 1, 3, 3, 56, 42), n=[3])[0][0][0]


def sam2() -> nn.Module:
    from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
    from sam2.modeling.sam.transformer import RoPEAttention

    own = RoPEAttention(48, 1, 1, feat_sizes=(4, 4))
    across = RoPEAttention(48, 1, 1, kv_in_dim=16, feat_sizes=(4, 4), rope_k_repeat=True)
    return MemoryAttention(48, True, MemoryAttentionLayer("relu", across, 48, 64, 0.0, False, True, False, own), 2)


def run_sam2(model: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    found = []
    for tokens in (16, 25):
        frame, memory = (2 * [randn(n, 2, c).to(dtype)] for n, c in ((tokens, 48), (3 * tokens + 4, 16)))
        found.append(model(frame[0], memory[0], frame[1], memory[1], 4))
    return found


# ---------------------------------------------------------------------------------------------------------------- CLIP


def open_clip(**options: Any) -> nn.Module:
    from open_clip.transformer import VisionTransformer

    sizes = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 2, "heads": 2, "mlp_ratio": 2, "output_dim": 16}
    return VisionTransformer(**sizes, **options)


def torchvision() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 2, 2, 48, 64, num_classes=8)


def vit_pytorch(name: str) -> nn.Module:
    sizes = {"num_classes": 8, "dim": 48, "depth": 2, "heads": 2, "mlp_dim": 64, "dim_head": 16}
    if name == "ViTND":
        from vit_pytorch.vit_nd_rotary import ViTND

        return ViTND(ndim=2, input_shape=(32, 32), patch_size=8, rope_max_freq=10.0, **sizes)
    import vit_pytorch

    return getattr(vit_pytorch, name)(image_size=32, patch_size=8, **sizes)


def image(model: nn.Module, dtype: torch.dtype) -> Any:
    return model(pixels(dtype, 2, 3, 32, 32))


PACKAGES = {
    "DUSt3R": Package("mini-dust3r", dust3r, run_dust3r, {"Attention": 6, "CrossAttention": 4}),
    "MapAnything": Package("uniception", croco_blocks, run_croco_blocks, {"Attention": 5, "CrossAttention": 2}),
    "Depth Anything 3": Package("depth-anything-3", depth_anything, run_depth_anything, {"Attention": 4}),
    "SAM 2's memory": Package("sam2", sam2, run_sam2, {"RoPEAttention": 4}),
    "open_clip": Package("open_clip_torch", open_clip, image, {"MultiheadAttention": 2}, added=True),
    "open_clip, its own attention": Package(
        "open_clip_torch", lambda: open_clip(block_type="custom", qk_norm=True), image, {"Attention": 2}, added=True
    ),
    "torchvision": Package("torchvision", torchvision, image, {"MultiheadAttention": 2}, added=True),
    "ViT": Package("vit-pytorch", lambda: vit_pytorch("ViT"), image, {"Attention": 2}),
    "SimpleViT": Package("vit-pytorch", lambda: vit_pytorch("SimpleViT"), image, {"Attention": 2}),
    "ViTND, rotary": Package("vit-pytorch", lambda: vit_pytorch("ViTND"), image, {"Attention": 2}, gradients=False),
}
