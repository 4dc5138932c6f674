# SPDX-License-Identifier: Apache-2.0
"""Models that see space, before and after ``patch``: classes of public packages at the widths of their checkpoints,
with random weights; and the patch embedding of Qwen-VL.

A package that is not installed is left out of the suite: ``pip install --no-deps mini-dust3r depth-anything-3
open_clip_torch`` and what they import (see ``make models``).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...towers import patch
from ...towers.cost import cost_of
from .. import random_towers
from . import timing


class Model(NamedTuple):
    """A model with ``build() -> (module, forward(module, dtype))``, and what it is."""

    what: str
    package: str  # that is imported
    build: Callable[[], tuple[nn.Module, Callable[[nn.Module, torch.dtype], Tensor]]]


def places(height: int, width: int, batch: int) -> Tensor:
    """Return the row and column of each patch of a grid, (B, N, 2)."""
    return torch.cartesian_prod(torch.arange(height), torch.arange(width))[None].repeat(batch, 1, 1)


def dust3r_block(height: int, width: int) -> tuple[nn.Module, Callable]:
    from mini_dust3r.croco.blocks import Block
    from mini_dust3r.croco.pos_embed import RoPE2D

    block = Block(1024, 16, qkv_bias=True, rope=RoPE2D(100.0))
    x, where = torch.randn(1, height * width, 1024), places(height, width, 1)
    return block, lambda m, dtype: m(x.to(dtype), where)


def dust3r_decoder_block() -> tuple[nn.Module, Callable]:
    from mini_dust3r.croco.blocks import DecoderBlock
    from mini_dust3r.croco.pos_embed import RoPE2D

    block = DecoderBlock(768, 12, qkv_bias=True, rope=RoPE2D(100.0))
    x, y, where = torch.randn(1, 768, 768), torch.randn(1, 768, 768), places(24, 32, 1)
    return block, lambda m, dtype: m(x.to(dtype), y.to(dtype), where, where)[0]


def global_attention() -> tuple[nn.Module, Callable]:
    from depth_anything_3.model.dinov2.layers.attention import Attention
    from depth_anything_3.model.dinov2.layers.rope import RotaryPositionEmbedding2D

    attention = Attention(1024, 16, qkv_bias=True, qk_norm=True, rope=RotaryPositionEmbedding2D(100.0))
    # 26 x 40 patches, and a camera token without a place, of each of 8 frames
    where = nn.functional.pad(places(26, 40, 8) + 1, (0, 0, 1, 0)).flatten(0, 1)[None]
    x = torch.randn(1, where.shape[1], 1024)
    return attention, lambda m, dtype: m(x.to(dtype), pos=where)


def open_clip_tower() -> tuple[nn.Module, Callable]:
    from open_clip.transformer import VisionTransformer

    tower = VisionTransformer(
        image_size=224, patch_size=16, width=768, layers=12, heads=12, mlp_ratio=4.0, output_dim=512
    )
    pixels = torch.randn(4, 3, 224, 224)
    return tower, lambda m, dtype: m(pixels.to(dtype))


def patch_embedding() -> tuple[nn.Module, Callable]:
    tower, _ = random_towers.qwen2_5_vl(1, [(14 * 50, 14 * 90)])
    patches = torch.randn(4500, 3 * 2 * 14 * 14)
    return tower, lambda m, dtype: m.patch_embed(patches.to(dtype))


MODELS = {
    "dust3r_block": Model(
        "DUSt3R's encoder block, ViT-L width, 768 tokens.", "mini_dust3r", lambda: dust3r_block(24, 32)
    ),
    "dust3r_block_4096": Model(
        "DUSt3R's encoder block, ViT-L width, 4,096 tokens.", "mini_dust3r", lambda: dust3r_block(64, 64)
    ),
    "dust3r_decoder_block": Model(
        "DUSt3R's decoder block, ViT-B width, 768 tokens to 768.", "mini_dust3r", dust3r_decoder_block
    ),
    "depth_anything_3_global": Model(
        "Depth Anything 3's global attention, ViT-L width, 8 frames of 1,041 tokens.",
        "depth_anything_3",
        global_attention,
    ),
    "open_clip_vit_b_16": Model("open_clip's ViT-B/16, 224 px, batch 4.", "open_clip", open_clip_tower),
    "patch_embedding": Model("Qwen2.5-VL's patch embedding, 4,500 patches.", "transformers", patch_embedding),
}


@torch.no_grad()
def measure(name: str, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Return seconds of a forward before and after, and the peak bytes that each allocates beside the tokens."""
    model = MODELS[name]
    with contextlib.redirect_stdout(io.StringIO()):  # of a package that misses its extension
        module, forward = model.build()
    before = module.eval().to(dtype)
    after = copy.deepcopy(before)
    report = patch(after)
    calls = {"before": functools.partial(forward, before, dtype), "after": functools.partial(forward, after, dtype)}
    difference = (calls["after"]() - calls["before"]()).norm() / calls["before"]().norm()
    costs = {key: cost_of(call, {}, "") for key, call in calls.items()}
    return {
        "what": model.what,
        "seconds": timing.interleaved(calls, rounds),
        "peak": {key: cost.peak for key, cost in costs.items()},
        "kernels": {key: cost.kernels for key, cost in costs.items()},
        "difference": float(difference),
        "patched": len(report.patched),
        "refused": {},
    }
