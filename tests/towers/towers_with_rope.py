# SPDX-License-Identifier: Apache-2.0
"""Towers that have a RoPE of their own; inputs with several images and odd grids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from family import VIT, Family, pixels, randn
from torch import Tensor, nn


def _patches(*patch: int, frames: int = 2, name: str = "hidden_states") -> Callable[[], dict[str, Any]]:
    """Qwen-like input: an image of 4 x 6 patches, one of 10 x 2, and a video with frames of 2 x 2."""
    grid = torch.tensor([[1, 4, 6], [1, 10, 2], [frames, 2, 2]])
    tokens = int(grid.prod(1).sum())
    return lambda: {name: randn(tokens, *patch), "grid_thw": grid}


def _paddleocr() -> dict[str, Any]:
    inputs = _patches(3, 4, 4, name="pixel_values")()
    return {**inputs, "pixel_values": inputs["pixel_values"][None]}


def _video_llama() -> dict[str, Any]:
    """One image keeps its 10 x 2 patches, the others are merged 2 x 2: this also orders their patches."""
    return {**_patches(48, name="pixel_values")(), "merge_sizes": torch.tensor([2, 1, 2])}


def _inkling() -> dict[str, Any]:
    """Images of 2 x 3, 5 x 1 and 1 x 1 merged patches; the tower puts a class token in front of each."""
    grid = torch.tensor([[1, 2, 3], [1, 5, 1], [1, 1, 1]])
    return {"pixel_values": randn(int(grid.prod(1).sum()), 8, 8, 3), "image_grid_thw": grid}


def _gemma() -> dict[str, Any]:
    """An image of 4 x 6 patches, and one of 6 x 2 with 12 patches of padding."""
    positions = torch.full((2, 24, 2), -1)
    for i, (height, width) in enumerate([(4, 6), (6, 2)]):
        positions[i, : height * width, 0] = torch.arange(width).repeat(height)
        positions[i, : height * width, 1] = torch.arange(height).repeat_interleave(width)
    return {"pixel_values": randn(2, 24, 48), "pixel_position_ids": positions, "output_hidden_states": True}


def _exists(inputs: dict[str, Any]) -> Tensor:
    return (inputs["pixel_position_ids"] >= 0).all(-1)


@dataclass(frozen=True)
class _Prepared(Family):
    """A tower that needs more than its config: ``prepare`` changes the new model."""

    prepare: Callable[[nn.Module], None] = lambda model: None

    def make(self, seed: int = 0, implementation: str = "sdpa", **options: Any) -> nn.Module:
        model = super().make(seed, implementation, **options)
        self.prepare(model)
        return model


def _annealed(model: nn.Module) -> None:
    """EoMT's training ends without the masks of the last layers; a fresh model has them."""
    model.get_buffer("attn_mask_probs").zero_()


def _complex(model: nn.Module) -> None:
    """model.to(dtype) makes a complex buffer real; transformers 4 has none, from_pretrained does not do this."""
    rotary = model.get_submodule("rotary_embedding")
    vars(rotary)["freqs_ci"] = rotary._buffers.pop("freqs_ci", rotary.freqs_ci)


_QWEN = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}

_QWEN3_5 = {**_QWEN, "hidden_size": 64, "intermediate_size": 64, "out_hidden_size": 32, "num_position_embeddings": 16}
_MUSE = {**VIT, "patch_size": 4, "pos_emb_height": 4, "pos_emb_width": 4} | {  # windows of 4 x 4 patches in layer 0
    "layer_types": ["window_attention", "full_attention"]
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
        {**VIT, "hidden_size": 64, "image_size": 64, "head_dim": 32},
        pixels(40, 24, image_sizes=torch.tensor([[40, 16], [24, 24]])),
        ("PixtralAttention",),
    ),
    "dinov3": Family(  # CLS + 3 registers are not rotated; k has no bias
        "dinov3_vit",
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {**VIT, "hidden_size": 64, "num_register_tokens": 3},
        pixels(40, 24),
        ("DINOv3ViTAttention",),
    ),
    "qwen3_vl_moe": Family(
        "qwen3_vl_moe",
        "Qwen3VLMoeVisionModel",
        "Qwen3VLMoeVisionConfig",
        {**_QWEN, "hidden_size": 72, "num_heads": 3, "intermediate_size": 64, "out_hidden_size": 32}
        | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        _patches(96),
        ("Qwen3VLMoeVisionAttention",),
    ),
    "qwen3_5": Family(
        "qwen3_5",
        "Qwen3_5VisionModel",
        "Qwen3_5VisionConfig",
        _QWEN3_5,
        _patches(96),
        ("Qwen3_5VisionAttention",),
    ),
    "qwen3_5_moe": Family(
        "qwen3_5_moe",
        "Qwen3_5MoeVisionModel",
        "Qwen3_5MoeVisionConfig",
        _QWEN3_5,
        _patches(96, frames=3),
        ("Qwen3_5MoeVisionAttention",),
    ),
    "qwen4_exp": Family(
        "qwen4_exp",
        "Qwen4ExpVisionModel",
        "Qwen4ExpVisionConfig",
        _QWEN3_5,
        _patches(96),
        ("Qwen4ExpVisionAttention",),
    ),
    "qwen2_5_omni": Family(  # windows in layer 0; transformers 4 passes the angles alone, as rotary_pos_emb
        "qwen2_5_omni",
        "Qwen2_5OmniVisionEncoder",
        "Qwen2_5OmniVisionEncoderConfig",
        {**_QWEN, "hidden_size": 80, "intermediate_size": 64, "out_hidden_size": 32}
        | {"window_size": 16, "fullatt_block_indexes": [1]},
        _patches(96),
        ("Qwen2_5OmniVisionAttention",),
    ),
    "qwen3_omni_moe": Family(
        "qwen3_omni_moe",
        "Qwen3OmniMoeVisionEncoder",
        "Qwen3OmniMoeVisionEncoderConfig",
        {**_QWEN, "hidden_size": 80, "intermediate_size": 64, "out_hidden_size": 32}
        | {"num_position_embeddings": 16, "deepstack_visual_indexes": [1]},
        _patches(96),
        ("Qwen3OmniMoeVisionAttention",),
    ),
    "glm4v_moe": Family(
        "glm4v_moe",
        "Glm4vMoeVisionModel",
        "Glm4vMoeVisionConfig",
        {**_QWEN, "hidden_size": 48, "intermediate_size": 64, "out_hidden_size": 32, "image_size": 16}  # head_dim 24
        | {"attention_bias": True},
        _patches(96, frames=1),
        ("Glm4vMoeVisionAttention",),
    ),
    "glm5_next": Family(  # norms on q and k
        "glm5_next",
        "Glm5NextVisionModel",
        "Glm5NextVisionConfig",
        {**_QWEN, "hidden_size": 64, "intermediate_size": 64, "out_hidden_size": 32}
        | {"projection_intermediate_size": 32},
        _patches(96),
        ("Glm5NextVisionAttention",),
    ),
    "cohere_compass": Family(
        "cohere_compass",
        "CohereCompassVisionModel",
        "CohereCompassVisionConfig",
        {**_QWEN, "hidden_size": 96, "num_heads": 3, "intermediate_size": 64, "out_hidden_size": 32}  # head_dim 32
        | {"num_position_embeddings": 16, "deepstack_visual_indexes": [1]},
        _patches(96),
        ("CohereCompassVisionAttention",),
    ),
    "exaone4_5": Family(  # 4 heads of q for 2 of k and v, in one projection; windows in layer 0
        "exaone4_5",
        "Exaone4_5_VisionModel",
        "Exaone4_5_VisionConfig",
        {**_QWEN, "hidden_size": 96, "num_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
        | {"out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]},
        _patches(96),
        ("Exaone4_5_VisionAttention",),
    ),
    "paddleocr_vl": Family(
        "paddleocr_vl",
        "PaddleOCRVisionModel",
        "PaddleOCRVisionConfig",
        {**VIT, "hidden_size": 64, "patch_size": 4, "image_size": 16},
        _paddleocr,
        ("PaddleOCRVisionAttention",),
    ),
    "video_llama_3": Family(
        "video_llama_3",
        "VideoLlama3VisionModel",
        "VideoLlama3VisionConfig",
        {**VIT, "patch_size": 4},
        _video_llama,
        ("VideoLlama3VisionAttention",),
    ),
    "lfm3_vl": Family(  # norms on q and k, 4 heads of q for 2 of k and v; the layers between are convolutions
        "lfm3_vl",
        "Lfm3VlVisionModel",
        "Lfm3VlVisionConfig",
        {**VIT, "hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "patch_size": 4}
        | {"num_hidden_layers": 3, "layer_types": ["full_attention", "conv", "full_attention"]},
        _patches(96, name="pixel_values"),
        ("Lfm3VlVisionAttention",),
    ),
    "kimi_k25": Family(  # angles of x and y alternate; the frames of a video are one sequence
        "kimi_k25",
        "Kimi_K25VisionModel",
        "Kimi_K25VisionConfig",
        {**VIT, "patch_size": 4, "pos_emb_height": 4, "pos_emb_width": 4, "pos_emb_time": 2},
        _patches(3, 4, 4, name="pixel_values"),
        ("Kimi_K25VisionAttention",),
    ),
    "muse_glimmer": Family(
        "muse_glimmer",
        "MuseGlimmerVisionModel",
        "MuseGlimmerVisionConfig",
        _MUSE,
        _patches(96, name="pixel_values"),
        ("MuseGlimmerVisionAttention",),
    ),
    "muse_spark": Family(
        "muse_spark",
        "MuseSparkVisionModel",
        "MuseSparkVisionConfig",
        _MUSE,
        _patches(96, name="pixel_values"),
        ("MuseSparkVisionAttention",),
    ),
    "inkling2": Family(  # channels 2i and 2i + 1 are a pair; a class token at (0, 0) in front of each image
        "inkling2",
        "Inkling2VisionModel",
        "Inkling2VisionConfig",
        {**VIT, "patch_size": 4, "posemb_grid_size": 4, "projection_hidden_dim": 32, "text_hidden_size": 32},
        _inkling,
        ("Inkling2VisionAttention",),
    ),
    "minimax_m3_vl": Family(  # t, y and x rotate 30 of 32 channels; the frames of a video are one sequence
        "minimax_m3_vl",
        "MiniMaxM3VLVisionModel",
        "MiniMaxM3VLVisionConfig",
        {**VIT, "hidden_size": 64, "patch_size": 4},
        _patches(96, name="pixel_values"),
        ("MiniMaxM3VLVisionAttention",),
    ),
    "dots3_note": Family(  # norms on q and k
        "dots3_note",
        "Dots3NoteVisionModel",
        "Dots3NoteVisionConfig",
        {**VIT, "hidden_size": 64, "patch_size": 4, "mlp_layer_types": ["dense", "dense"]}
        | {"adapter_in_dim": 64, "adapter_out_dim": 32},
        _patches(48, name="pixel_values"),
        ("Dots3NoteVisionAttention",),
    ),
    "step3p7": Family(
        "step3p7",
        "Step3p7VisionModel",
        "Step3p7VisionConfig",
        {**VIT, "hidden_size": 80},  # head_dim 40
        pixels(40, 24),
        ("Step3p7VisionAttention",),
    ),
    "mlcd": Family(  # the class token has a learned angle
        "mlcd",
        "MLCDVisionModel",
        "MLCDVisionConfig",
        VIT,
        pixels(40, 24),
        ("MLCDAttention",),
    ),
    "sapiens2": Family(  # norms on q and k; CLS + 3 registers; 2 heads of k and v in layer 1, 4 in layer 0
        "sapiens2",
        "Sapiens2Model",
        "Sapiens2Config",
        {**VIT, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads_per_layer": [4, 2]}
        | {"num_register_tokens": 3},
        pixels(40, 24),
        ("Sapiens2Attention",),
    ),
    "eomt_dinov3": _Prepared(  # 5 queries in front of CLS + 3 registers in layer 1; its masks want 16 patches
        "eomt_dinov3",
        "EomtDinov3ForUniversalSegmentation",
        "EomtDinov3Config",
        {**VIT, "hidden_size": 64, "num_register_tokens": 3, "num_queries": 5, "num_blocks": 1}
        | {"num_upscale_blocks": 1},
        pixels(64, 16),
        ("EomtDinov3Attention",),
        prepare=_annealed,
    ),
    "gemma4": Family(  # norms on q, k and v; each axis has half of the channels to itself; padding
        "gemma4",
        "Gemma4VisionModel",
        "Gemma4VisionConfig",
        {**VIT, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4}
        | {"position_embedding_size": 8, "pooling_kernel_size": 2},
        _gemma,
        ("Gemma4VisionAttention",),
        valid=_exists,
    ),
    "llama4": _Prepared(  # complex angles; CLS comes last; square images only
        "llama4",
        "Llama4VisionModel",
        "Llama4VisionConfig",
        {**VIT, "intermediate_size": 192, "vision_output_dim": 16}
        | {"projector_input_dim": 16, "projector_output_dim": 16},
        pixels(32, 32),
        ("Llama4VisionAttention",),
        prepare=_complex,
    ),
    "sam3": Family(  # windows of 2 x 2 with padding in layer 0, 5 x 3 patches in layer 1
        "sam3",
        "Sam3ViTModel",
        "Sam3ViTConfig",
        {**VIT, "image_size": [24, 40], "pretrain_image_size": 16, "window_size": 2, "global_attn_indexes": [1]},
        pixels(40, 24),
        ("Sam3ViTRoPEAttention",),
    ),
}
