# SPDX-License-Identifier: Apache-2.0
"""timm's models of the tests: every kind of attention, NaFlex and its padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from families import randn, randomize
from timm_path import import_timm
from torch import Tensor, nn

timm = import_timm()
from timm.models import eva, naflexvit  # noqa: E402
from timm.models.vision_transformer import (  # noqa: E402
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


HEADS, DIM = 2, 16  # heads, and channels of each


SMALL: dict[str, Any] = {"patch_size": 8, "embed_dim": HEADS * DIM, "depth": 2, "num_heads": HEADS}


HEIGHT, WIDTH = 3, 4  # patches of an image


IMAGES: dict[str, Any] = {**SMALL, "img_size": (8 * HEIGHT, 8 * WIDTH), "num_classes": 5}


def images(height: int = HEIGHT, width: int = WIDTH, batch: int = 2) -> dict[str, Any]:
    return {"x": randn(batch, 3, 8 * height, 8 * width)}


@dataclass(frozen=True)
class Case:
    """One timm model. ``prefix``: tokens before the patches; ``valid(inputs)``: which tokens are compared."""

    make: Callable[..., nn.Module]
    attention: str
    prefix: int = 1
    layers: int = 2
    inputs: Callable[[], dict[str, Any]] = images
    valid: Callable[[dict[str, Any]], Tensor] | None = None

    def build(self, **options: Any) -> nn.Module:
        torch.manual_seed(0)
        return randomize(self.make(**options)).eval()

    def outputs(self, model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
        """The tokens of the last layer, and what the head makes of them."""
        (x, *_), rest = inputs.values(), {k: v for k, v in inputs.items() if k != "x"}
        features = model.forward_features(x, **rest)
        if isinstance(features, dict):
            tokens, pooled = features["patches"], model.forward_head(**features)
        else:
            tokens, pooled = features, model.forward_head(features)
        return [tokens[self.valid(inputs)] if self.valid else tokens, pooled]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def named(name: str, **options: Any) -> Callable[..., nn.Module]:
    return partial(timm.create_model, name, **{**IMAGES, **options})


def grouped(**options: Any) -> nn.Module:
    """Sapiens 2: grouped keys and values in the middle layer only."""
    args = eva._sapiens2_args(embed_dim=64, depth=3, num_heads=4, num_kv_heads=2, num_full_attn_blocks=1)
    return eva.Eva(**{**args, "img_size": IMAGES["img_size"], "patch_size": 8, "num_classes": 5, **options})


def bias_beside(**options: Any) -> nn.Module:
    model = named("eva02_tiny_patch14_224", scale_attn_inner=True)(**options)
    for block in model.blocks:
        block.attn.qkv_bias_separate = True
    return model


def gated(attention: str, **flex: Any) -> Callable[..., nn.Module]:
    return partial(
        naflexvit.NaFlexVit, **IMAGES, class_token=True, pos_embed="none", rope_type="axial", global_pool="avg",
        attn_type=attention, attn_gated=True, embed_proj_type="conv", **flex,
    )  # fmt: skip


OWN_ROPE = {
    # EvaAttention: fused qkv with biases of q and v beside it, or three projections
    "eva_giant, no rope": Case(named("eva_giant_patch14_224"), "EvaAttention"),
    "eva02_tiny": Case(named("eva02_tiny_patch14_224"), "EvaAttention"),
    "eva02_base, separate q k v": Case(named("eva02_base_patch14_224"), "EvaAttention"),
    "eva02_clip, scale norm": Case(named("eva02_base_patch16_clip_224"), "EvaAttention"),
    "eva02_enormous, post-norm, no rope": Case(named("eva02_enormous_patch14_clip_224"), "EvaAttention"),
    "eva02, qkv_bias_separate": Case(bias_beside, "EvaAttention"),
    "eva, no bias": Case(named("vit_mediumd_patch16_rope_reg1_gap_256"), "EvaAttention"),
    "eva, qk_norm": Case(named("eva02_base_patch14_224", qk_norm=True), "EvaAttention"),
    "eva, gated": Case(gated("eva", qk_norm=True), "EvaAttention"),
    "sbb, registers": Case(named("vit_medium_patch16_rope_reg1_gap_256"), "EvaAttention"),
    # rotate_half
    "dinov3": Case(named("vit_small_patch16_dinov3"), "EvaAttention", 5),
    "dinov3, biases": Case(named("vit_small_patch16_dinov3_qkvb"), "EvaAttention", 5),
    "dinov3 7B, swiglu": Case(named("vit_7b_patch16_dinov3"), "EvaAttention", 5),
    "mrope": Case(named("eva02_tiny_patch14_224", rope_type="mrope", rope_mrope_section=(2, 3, 3)), "EvaAttention"),
    # AttentionRope
    "pe_core": Case(named("vit_pe_core_tiny_patch16_384"), "AttentionRope"),
    "pe_core, no cls": Case(named("vit_pe_core_gigantic_patch14_448"), "AttentionRope", 0),
    "pe_lang": Case(named("vit_pe_lang_large_patch14_448"), "AttentionRope"),
    "pe_spatial": Case(named("vit_pe_spatial_tiny_patch16_512"), "AttentionRope"),
    "rope-vit axial": Case(named("vit_small_patch16_rope_224"), "AttentionRope"),
    "rope-vit mixed": Case(named("vit_small_patch16_rope_mixed_224"), "AttentionRope"),
    "rope-vit mixed ape": Case(named("vit_small_patch16_rope_mixed_ape_224", num_reg_tokens=2), "AttentionRope", 3),
    "rope, separate q k v, norms": Case(
        named("vit_small_patch16_rope_224", qk_norm=True, scale_attn_inner=True, qkv_fused=False), "AttentionRope"
    ),
    "rope, gated": Case(gated("rope", qk_norm=True, scale_attn_inner_norm=True), "AttentionRope"),
    "rope, grouped": Case(gated("rope", qkv_fused=False, num_kv_heads=1, reg_tokens=1), "AttentionRope", 2),
    "sapiens2": Case(grouped, "AttentionRope", 9, layers=3),
    "qwen3_vit": Case(
        named("qwen3_vit_88m"), "AttentionRope", 0, inputs=partial(images, 4, 6)
    ),
    "deepseek_vit": Case(named("deepseek_vit_412m"), "AttentionRope", 0),
}  # fmt: skip


PLAIN = {
    "vit": Case(named("vit_tiny_patch16_224"), "Attention"),
    "dinov2, registers": Case(named("vit_small_patch14_reg4_dinov2"), "Attention", 5),
    "clip": Case(named("vit_base_patch16_clip_224"), "Attention"),
    "siglip": Case(named("vit_base_patch16_siglip_224"), "Attention", 0),
    "deit, distilled": Case(named("deit_tiny_distilled_patch16_224"), "Attention", 2),
    "vit, norms": Case(partial(VisionTransformer, **IMAGES, qk_norm=True, scale_attn_norm=True), "Attention"),
    "vit, post-norm": Case(partial(VisionTransformer, **IMAGES, block_fn=ResPostBlock, init_values=1.0), "Attention"),
    "vit, parallel": Case(
        partial(VisionTransformer, **IMAGES, block_fn=ParallelThingsBlock, no_embed_class=True), "Attention", layers=4
    ),
    "vit, registers, no cls": Case(
        partial(VisionTransformer, **IMAGES, class_token=False, reg_tokens=3, global_pool="avg", pos_embed="none"),
        "Attention", 3,
    ),
    "naflex, convolution": Case(
        partial(naflexvit.NaFlexVit, **IMAGES, class_token=True, reg_tokens=1, embed_proj_type="conv",
                global_pool="avg", pos_embed_grid_size=(4, 4)),
        "Attention", 2,
    ),
}  # fmt: skip


GRIDS = [(HEIGHT, WIDTH), (2, 3), (1, 5)]  # of three images, padded to 12 patches


def padded(scattered: bool = False) -> dict[str, Any]:
    """What NaFlexVit takes: flattened patches, their rows and columns, which exist. Padding is noise, not zeros."""
    most = max(h * w for h, w in GRIDS)
    coord, valid = torch.zeros(len(GRIDS), most, 2, dtype=torch.long), torch.zeros(len(GRIDS), most, dtype=torch.bool)
    for i, (h, w) in enumerate(GRIDS):
        coord[i, : h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w))
        valid[i, : h * w] = True
    if scattered:
        valid[0, 1:9:3] = False
    return {"x": randn(len(GRIDS), most, 3 * 64), "patch_coord": coord, "patch_valid": valid}


def flex(attention: str, prefix: int = 0, scattered: bool = False, **options: Any) -> Case:
    def valid(inputs: dict[str, Any]) -> Tensor:
        found = inputs["patch_valid"]
        return torch.cat([found.new_ones(len(found), prefix), found], dim=1)

    tokens = {"class_token": prefix > 0, "reg_tokens": max(prefix - 1, 0)}
    chosen = {"pos_embed": "none", "global_pool": "avg", **SMALL, **tokens, **options}
    make = partial(naflexvit.NaFlexVit, **chosen, num_classes=5, embed_proj_type="linear")
    return Case(make, attention, prefix, inputs=partial(padded, scattered), valid=valid)


FLEX = {
    "plain, learned": flex("Attention", pos_embed="learned", pos_embed_grid_size=(4, 4), global_pool="map"),
    "plain, factorized, tokens": flex("Attention", 2, pos_embed="factorized", pos_embed_grid_size=(4, 4)),
    "plain, key mask": flex("Attention", 1, use_key_only_attn_mask=True, global_pool="token"),
    "axial": flex("AttentionRope", rope_type="axial"),
    "axial, tokens": flex("AttentionRope", 3, rope_type="axial", rope_ref_feat_shape=(4, 4), qk_norm=True),
    "axial, eva": flex("EvaAttention", 1, rope_type="axial", attn_type="eva", global_pool="token"),
    "axial, key mask": flex("AttentionRope", 1, rope_type="axial", use_key_only_attn_mask=True),
    "axial, scattered": flex("AttentionRope", 1, scattered=True, rope_type="axial"),
    "dinov3": flex("EvaAttention", 2, rope_type="dinov3", rope_rotate_half=True, attn_type="eva"),
    "mrope, gated": flex("AttentionRope", 1, rope_type="mrope", rope_mrope_section=(2, 3, 3), attn_gated=True),
    "mixed": flex("AttentionRope", rope_type="mixed"),
    "mixed, tokens": flex("AttentionRope", 2, rope_type="mixed", global_pool="token"),
    "mixed, scattered": flex("AttentionRope", 1, scattered=True, rope_type="mixed"),
    "grouped": flex("AttentionRope", rope_type="axial", num_kv_heads=(1, 2), qkv_fused=False),
}


CASES = {**OWN_ROPE, **PLAIN, **{f"naflex, {name}": case for name, case in FLEX.items()}}


ADDED = [*PLAIN, *(f"naflex, {name}" for name in FLEX if name.startswith("plain"))]  # to which RoPE can be added


def attentions(model: nn.Module, case: Case) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__ in (case.attention, f"Patched{case.attention}")]


def shaken(model: nn.Module, case: Case) -> nn.Module:
    """Its encodings moved away from where they started."""
    for i, module in enumerate(attentions(model, case)):
        for parameter in module.rope.parameters():
            parameter.data.copy_(0.3 * randn(*parameter.shape, seed=20 + i))
    return model
