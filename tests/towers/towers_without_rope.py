# SPDX-License-Identifier: Apache-2.0
"""Towers without RoPE, and whole models that hold a tower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from family import VIT, Family, pixels, randn
from torch import Tensor, nn


@dataclass(frozen=True)
class _MaybeEager(Family):
    """A model that some version of transformers does not make with SDPA: eager there."""

    def make(self, seed: int = 0, implementation: str = "sdpa", **options: Any) -> nn.Module:
        model: Any = self.load()[0]
        return super().make(seed, implementation if model._supports_sdpa else "eager", **options)


def _padded() -> dict[str, Any]:
    """SigLIP 2: patches of an image of 4 x 6, and of one of 5 x 3 with padding behind it."""
    shapes = torch.tensor([[4, 6], [5, 3]])
    mask = (torch.arange(24) < shapes.prod(1, keepdim=True)).int()
    return {"pixel_values": randn(2, 24, 192), "pixel_attention_mask": mask, "spatial_shapes": shapes}


def _corner() -> dict[str, Any]:
    """Idefics: an image of 7 x 5 patches, and one of 5 x 3 in the upper left corner: padding right of it and below."""
    mask = torch.ones(2, 7, 5, dtype=torch.bool)
    mask[1, 5:] = mask[1, :, 3:] = False
    return {"pixel_values": randn(2, 3, 56, 40), "patch_attention_mask": mask}


def _full() -> dict[str, Any]:
    """What the processors of Idefics 3 and SmolVLM make: images without padding."""
    return {**_corner(), "patch_attention_mask": torch.ones(2, 7, 5, dtype=torch.bool)}


def _corner_valid(inputs: dict[str, Any]) -> Tensor:
    return inputs["patch_attention_mask"].flatten(1)


def _masked() -> dict[str, Any]:
    """ViT-MAE keeps the half of the patches with the least noise, in the order of the noise."""
    noise = torch.stack([torch.arange(15), torch.arange(15).flip(0)]).float()
    return {"pixel_values": randn(2, 3, 40, 24), "noise": noise, "interpolate_pos_encoding": True}


def _packed(frames: int = 1) -> Callable[[], dict[str, Any]]:
    """An image of 4 x 6 patches, one of 6 x 2, and a video with frames of 2 x 2, in one sequence."""
    grid = torch.tensor([[1, 4, 6], [1, 6, 2], [frames, 2, 2]])
    return lambda: {"pixel_values": randn(int(grid.prod(1).sum()), 192), "grid_thw": grid}


def _tiles_of_mllama() -> dict[str, Any]:
    """An image of one tile, the other padding, and one of two tiles, one beside the other."""
    ids, mask = torch.tensor([[1], [2]]), torch.tensor([[[1, 0]], [[1, 1]]])
    return {"pixel_values": randn(2, 1, 2, 3, 32, 32), "aspect_ratio_ids": ids, "aspect_ratio_mask": mask}


_RESIZED = pixels(40, 24, interpolate_pos_encoding=True)
_WIDE = pixels(16, 64)  # for towers that resize nothing: as many patches as the square, 2 x 8

WITHOUT_ROPE = {
    "clip": Family(
        "clip",
        "CLIPVisionModel",
        "CLIPVisionConfig",
        VIT,
        pixels(32, 32),
        ("CLIPAttention",),
    ),
    "siglip": Family(
        "siglip",
        "SiglipVisionModel",
        "SiglipVisionConfig",
        VIT,
        pixels(40, 24, interpolate_pos_encoding=True),
        ("SiglipAttention",),
    ),
    "dinov2": Family(
        "dinov2",
        "Dinov2Model",
        "Dinov2Config",
        {**VIT, "mlp_ratio": 1},
        pixels(40, 24),
        ("Dinov2Attention", "Dinov2SelfAttention"),
    ),
    "dinov2_with_registers": Family(
        "dinov2_with_registers",
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        {**VIT, "mlp_ratio": 1, "num_register_tokens": 2},
        pixels(40, 24),
        ("Dinov2WithRegistersAttention", "Dinov2WithRegistersSelfAttention"),
    ),
    "vit": Family(
        "vit",
        "ViTModel",
        "ViTConfig",
        VIT,
        pixels(32, 32),
        ("ViTAttention", "ViTSelfAttention"),
    ),
    "altclip": _MaybeEager(
        "altclip",
        "AltCLIPVisionModel",
        "AltCLIPVisionConfig",
        VIT,
        _RESIZED,
        ("AltCLIPAttention",),
    ),
    "chinese_clip": _MaybeEager(
        "chinese_clip",
        "ChineseCLIPVisionModel",
        "ChineseCLIPVisionConfig",
        VIT,
        _RESIZED,
        ("ChineseCLIPVisionAttention",),
    ),
    "metaclip_2": Family(
        "metaclip_2",
        "MetaClip2VisionModel",
        "MetaClip2VisionConfig",
        VIT,
        _RESIZED,
        ("MetaClip2Attention",),
    ),
    "kosmos2": Family(
        "kosmos2",
        "Kosmos2VisionModel",
        "Kosmos2VisionConfig",
        VIT,
        _RESIZED,
        ("Kosmos2VisionAttention",),
    ),
    "git": _MaybeEager(
        "git",
        "GitVisionModel",
        "GitVisionConfig",
        VIT,
        _RESIZED,
        ("GitVisionAttention",),
    ),
    "owlvit": _MaybeEager(
        "owlvit",
        "OwlViTVisionModel",
        "OwlViTVisionConfig",
        VIT,
        _RESIZED,
        ("OwlViTAttention",),
    ),
    "x_clip": _MaybeEager(  # two videos of two frames; a layer attends over frames, then over patches
        "x_clip",
        "XCLIPVisionModel",
        "XCLIPVisionConfig",
        {**VIT, "num_frames": 2},
        pixels(32, 32, batch=4),
        ("XCLIPAttention",),
        layers=4,
    ),
    "aimv2": Family(  # the pooling head has a cls_token, the sequence has none
        "aimv2",
        "Aimv2VisionModel",
        "Aimv2VisionConfig",
        VIT,
        _WIDE,
        ("Aimv2Attention",),
    ),
    "aimv2_native": Family(  # sines and cosines in place of a learned position embedding
        "aimv2",
        "Aimv2VisionModel",
        "Aimv2VisionConfig",
        {**VIT, "is_native": True},
        pixels(40, 24),
        ("Aimv2Attention",),
    ),
    "ovis2": Family(
        "ovis2",
        "Ovis2VisionModel",
        "Ovis2VisionConfig",
        {**VIT, "vocab_size": 20},
        _WIDE,
        ("Ovis2VisionAttention", "Ovis2Attention"),
    ),
    "granite_docling": Family(
        "granite_docling",
        "GraniteDoclingVisionModel",
        "GraniteDoclingVisionConfig",
        {**VIT, "out_hidden_size": 32, "scale_factor": 2, "deepstack_visual_indexes": [0]},
        _WIDE,
        ("GraniteDoclingVisionAttention",),
    ),
    "janus": Family(
        "janus",
        "JanusVisionModel",
        "JanusVisionConfig",
        {**VIT, "mlp_ratio": 1},
        _RESIZED,
        ("JanusVisionAttention",),
    ),
    "internvl": Family(
        "internvl",
        "InternVLVisionModel",
        "InternVLVisionConfig",
        VIT,
        pixels(40, 24),
        ("InternVLVisionAttention",),
    ),
    "internvl_qk_norm": Family(  # norms over all heads at once
        "internvl",
        "InternVLVisionModel",
        "InternVLVisionConfig",
        {**VIT, "use_qk_norm": True},
        pixels(40, 24),
        ("InternVLVisionAttention",),
    ),
    "qianfan_ocr": Family(
        "qianfan_ocr",
        "QianfanOCRVisionModel",
        "QianfanOCRVisionConfig",
        VIT,
        pixels(40, 24),
        ("QianfanOCRVisionAttention",),
    ),
    "ijepa": Family(
        "ijepa",
        "IJepaModel",
        "IJepaConfig",
        VIT,
        _RESIZED,
        ("IJepaAttention", "IJepaSelfAttention"),
    ),
    "vit_msn": Family(
        "vit_msn",
        "ViTMSNModel",
        "ViTMSNConfig",
        VIT,
        _RESIZED,
        ("ViTMSNAttention", "ViTMSNSelfAttention"),
    ),
    "vit_mae": Family(
        "vit_mae",
        "ViTMAEModel",
        "ViTMAEConfig",
        {**VIT, "mask_ratio": 0.5},
        _masked,
        ("ViTMAEAttention", "ViTMAESelfAttention"),
    ),
    "deit": Family(  # CLS and distillation token
        "deit",
        "DeiTModel",
        "DeiTConfig",
        VIT,
        _RESIZED,
        ("DeiTAttention", "DeiTSelfAttention"),
    ),
    "yolos": Family(  # CLS, patches, and then detection tokens
        "yolos",
        "YolosModel",
        "YolosConfig",
        {**VIT, "image_size": [24, 32], "num_detection_tokens": 3},
        pixels(40, 24),
        ("YolosSelfAttention",),
    ),
    "pixio": Family(  # several CLS tokens
        "pixio",
        "PixioModel",
        "PixioConfig",
        {**VIT, "mlp_ratio": 1, "n_cls_tokens": 3},
        pixels(40, 24),
        ("PixioAttention",),
    ),
    "tipsv2": Family(
        "tipsv2",
        "Tipsv2VisionModel",
        "Tipsv2VisionConfig",
        {**VIT, "mlp_ratio": 1, "num_register_tokens": 2},
        pixels(40, 24),
        ("Tipsv2VisionAttention",),
    ),
    "radio": Family(
        "radio",
        "RadioModel",
        "RadioConfig",
        {**VIT, "mlp_ratio": 1.0, "max_img_size": 64, "num_cls_tokens": 2, "num_registers": 3},
        pixels(40, 24),
        ("RadioAttention",),
    ),
    "radio_packed": Family(  # two images in one sequence, each behind its own CLS tokens and registers
        "radio",
        "RadioModel",
        "RadioConfig",
        {**VIT, "mlp_ratio": 1.0, "max_img_size": 64, "num_cls_tokens": 2, "num_registers": 3},
        lambda: {"pixel_values": randn(36, 192), "image_grid_hw": torch.tensor([[4, 6], [6, 2]])},
        ("RadioAttention",),
    ),
    "siglip2": Family(
        "siglip2",
        "Siglip2VisionModel",
        "Siglip2VisionConfig",
        {**VIT, "num_patches": 16},
        _padded,
        ("Siglip2Attention",),
        valid=lambda inputs: inputs["pixel_attention_mask"].bool(),
    ),
    "idefics2": Family(
        "idefics2",
        "Idefics2VisionTransformer",
        "Idefics2VisionConfig",
        VIT,
        _corner,
        ("Idefics2VisionAttention",),
        valid=_corner_valid,
    ),
    "idefics3": Family(
        "idefics3",
        "Idefics3VisionTransformer",
        "Idefics3VisionConfig",
        VIT,
        _full,
        ("Idefics3VisionAttention",),
    ),
    "smolvlm": Family(
        "smolvlm",
        "SmolVLMVisionTransformer",
        "SmolVLMVisionConfig",
        VIT,
        _full,
        ("SmolVLMVisionAttention",),
    ),
    "glm_image": Family(
        "glm_image",
        "GlmImageVisionModel",
        "GlmImageVisionConfig",
        {"hidden_size": 48, "intermediate_size": 64, "depth": 2, "num_heads": 2, "image_size": 32, "patch_size": 8},
        _packed(),
        ("GlmImageVisionAttention",),
    ),
    "cosmos3_edge": Family(
        "cosmos3_edge",
        "Cosmos3EdgeVisionModel",
        "Cosmos3EdgeVisionConfig",
        {**VIT, "num_patches": 16},
        _packed(frames=2),
        ("Cosmos3EdgeVisionAttention",),
    ),
    "hunyuan_vl": Family(
        "hunyuan_vl",
        "HunYuanVLVisionTransformer",
        "HunYuanVLVisionConfig",
        {**VIT, "max_image_size": 32, "text_hidden_size": 32},
        _packed(),
        ("HunYuanVLVisionAttention",),
    ),
    "minicpmv4_6": Family(  # layer 0, windows of 2 x 2 patches that are merged, layer 1 on a quarter of the tokens
        "minicpmv4_6",
        "MiniCPMV4_6VisionModel",
        "MiniCPMV4_6VisionConfig",
        {**VIT, "insert_layer_id": 0},
        lambda: {"pixel_values": randn(1, 3, 8, 8 * 36), "target_sizes": torch.tensor([[4, 6], [6, 2]])},
        ("MiniCPMV4_6VisionAttention",),
        layers=3,
    ),
    "minicpmv4_7": Family(
        "minicpmv4_7",
        "MiniCPMV4_7VisionModel",
        "MiniCPMV4_7VisionConfig",
        {**VIT, "insert_layer_id": 0},
        lambda: {"pixel_values": randn(1, 3, 8, 8 * 36), "target_sizes": torch.tensor([[4, 6], [6, 2]])},
        ("MiniCPMV4_7VisionAttention",),
        layers=3,
    ),
    "minicpm_ocr": Family(
        "minicpm_ocr",
        "MiniCPMOcrVisionModel",
        "MiniCPMOcrVisionConfig",
        {**VIT, "insert_layer_id": 0},
        lambda: {"pixel_values": randn(1, 3, 8, 8 * 36), "target_sizes": torch.tensor([[4, 6], [6, 2]])},
        ("MiniCPMOcrVisionAttention",),
        layers=3,
    ),
    "hy_v4_vl": Family(
        "hy_v4_vl",
        "HYV4VLVisionModel",
        "HYV4VLVisionConfig",
        {**VIT, "max_image_size": 32, "out_hidden_size": 32},
        _packed(),
        ("HYV4VLVisionAttention",),
    ),
    "owlv2": _MaybeEager("owlv2", "Owlv2VisionModel", "Owlv2VisionConfig", VIT, pixels(32, 32), ("Owlv2Attention",)),
    "clipseg": _MaybeEager(
        "clipseg", "CLIPSegVisionModel", "CLIPSegVisionConfig", VIT, pixels(32, 32), ("CLIPSegAttention",)
    ),
    "rf_detr": Family(
        "rf_detr",
        "RfDetrDinov2Backbone",
        "RfDetrDinov2Config",
        {**VIT, "num_windows": 2, "out_features": ["stage2"]},
        pixels(32, 32),
        ("RfDetrDinov2Attention",),
    ),
    "dpt": Family(
        "dpt",
        "DPTModel",
        "DPTConfig",
        {**VIT, "neck_hidden_sizes": [8, 8, 8, 8], "backbone_out_indices": [0, 1, 1, 1]},
        pixels(32, 32),
        ("DPTSelfAttention", "DPTViTAttention"),
    ),
    "vitpose": Family(
        "vitpose_backbone",
        "VitPoseBackbone",
        "VitPoseBackboneConfig",
        {**VIT, "image_size": [32, 24], "patch_size": [8, 8]},
        pixels(32, 24),
        ("VitPoseBackboneSelfAttention", "VitPoseBackboneAttention"),
    ),
    "videomae": Family(
        "videomae",
        "VideoMAEModel",
        "VideoMAEConfig",
        {**VIT, "num_frames": 4, "qkv_bias": False},  # of transformers 4, q and v alone have one
        lambda: {"pixel_values": randn(2, 4, 3, 32, 32)},
        ("VideoMAESelfAttention", "VideoMAEAttention"),
    ),
    "vivit": Family(
        "vivit",
        "VivitModel",
        "VivitConfig",
        {**VIT, "num_frames": 4, "tubelet_size": [2, 8, 8]},
        lambda: {"pixel_values": randn(2, 4, 3, 32, 32)},
        ("VivitAttention", "VivitSelfAttention"),
    ),
    "lw_detr": Family(
        "lw_detr",
        "LwDetrViTBackbone",
        "LwDetrViTConfig",
        {**VIT, "num_windows": 4, "window_block_indices": [0], "out_features": ["stage2"]},
        pixels(32, 32),
        ("LwDetrViTAttention",),
    ),
}

MASKED = {
    "mllama": Family(  # padding may not see padding, and all else may: no mask of keys, so not to be fused
        "mllama",
        "MllamaVisionModel",
        "MllamaVisionConfig",
        {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_global_layers": 1}
        | {"attention_heads": 2, "image_size": 32, "patch_size": 8, "intermediate_layers_indices": [0]}
        | {"max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]},
        _tiles_of_mllama,
        ("MllamaVisionAttention",),
        layers=3,
    ),
}

# ------------------------------------------------------------------------------------------- whole models with a tower

_IMAGE = 39


def _prompts(*counts: int) -> dict[str, Any]:
    """A prompt for each number of image tokens, all of one length."""
    length = max(counts) + 5
    rows = [[1, 4, *[_IMAGE] * n, *range(5, 5 + length - n - 2)] for n in counts]
    return {"input_ids": torch.tensor(rows), "use_cache": False}


def _asked(pixel_values: Callable[[], dict[str, Any]], *counts: int) -> Callable[[], dict[str, Any]]:
    return lambda: {**_prompts(*counts), **pixel_values()}


def _crops() -> dict[str, Any]:
    """LLaVA-NeXT: each image at once, and as two crops: one beside the other, one above the other."""
    return {"pixel_values": randn(2, 3, 3, 32, 32), "image_sizes": torch.tensor([[32, 64], [64, 32]])}


def _two_and_one() -> dict[str, Any]:
    """Idefics 3: two images of 6 x 6 patches in the first prompt, one in the second; its other is padding."""
    pixels = randn(2, 2, 3, 48, 48)
    pixels[1, 1] = 0
    return {"pixel_values": pixels, "pixel_attention_mask": torch.ones(2, 2, 48, 48, dtype=torch.bool)}


def _text(model_type: str, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return {"model_type": model_type, **sizes, **heads, **special, **more}


_CLIP = {**VIT, "model_type": "clip_vision_model"}
_SIGLIP = {**VIT, "model_type": "siglip_vision_model", "vision_use_head": False}
_PINPOINTS = {"image_grid_pinpoints": [[32, 64], [64, 32]], "image_token_index": _IMAGE, "vision_feature_layer": -1}

HOLDERS = {
    "llava": Family(
        "llava",
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "vision_config": _CLIP,
            "text_config": _text("llama"),
            "image_token_index": _IMAGE,
            "vision_feature_layer": -1,
        },
        _asked(pixels(32, 32), 16, 16),
        ("CLIPAttention",),
    ),
    "llava_next": Family(
        "llava_next",
        "LlavaNextForConditionalGeneration",
        "LlavaNextConfig",
        {"vision_config": _CLIP, "text_config": _text("llama"), **_PINPOINTS},
        _asked(_crops, 16 + 4 * 9, 16 + 8 * 5),  # a newline ends each row of patches
        ("CLIPAttention",),
    ),
    "llava_onevision": Family(
        "llava_onevision",
        "LlavaOnevisionForConditionalGeneration",
        "LlavaOnevisionConfig",
        {"vision_config": _SIGLIP, "text_config": _text("qwen2"), "video_token_index": 38, **_PINPOINTS},
        _asked(_crops, 16 + 4 * 9, 16 + 8 * 5),
        ("SiglipAttention",),
    ),
    "paligemma": Family(
        "paligemma",
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        {"vision_config": _SIGLIP, "text_config": _text("gemma"), "image_token_index": _IMAGE, "projection_dim": 32},
        # its own mask depends on the version, and stays in float32 in a float64 model
        _asked(lambda: {"attention_mask": torch.zeros(2, 1, 21, 21), **pixels(32, 32)()}, 16, 16),
        ("SiglipAttention",),
    ),
    "gemma3": Family(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {"vision_config": _SIGLIP, "text_config": _text("gemma3_text"), "mm_tokens_per_image": 4}
        | {"image_token_index": _IMAGE, "boi_token_index": 36, "eoi_token_index": 37},
        _asked(pixels(32, 32), 4, 4),
        ("SiglipAttention",),
    ),
    "aya_vision": Family(
        "aya_vision",
        "AyaVisionForConditionalGeneration",
        "AyaVisionConfig",
        {"vision_config": _SIGLIP, "text_config": _text("cohere2"), "image_token_index": _IMAGE},
        _asked(pixels(32, 32), 4, 4),
        ("SiglipAttention",),
    ),
    "internvl": Family(
        "internvl",
        "InternVLForConditionalGeneration",
        "InternVLConfig",
        {"vision_config": VIT, "text_config": _text("qwen2"), "image_token_id": _IMAGE},
        _asked(pixels(32, 32), 4, 4),
        ("InternVLVisionAttention",),
    ),
    "mistral3": Family(  # the tower has RoPE
        "mistral3",
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        {"vision_config": {**VIT, "model_type": "pixtral", "hidden_size": 64, "image_size": 64, "head_dim": 32}}
        | {"text_config": _text("mistral"), "image_token_index": _IMAGE},
        _asked(pixels(48, 32, image_sizes=torch.tensor([[48, 32], [32, 32]])), 6, 4),
        ("PixtralAttention",),
    ),
    "idefics3": Family(
        "idefics3",
        "Idefics3ForConditionalGeneration",
        "Idefics3Config",
        {"vision_config": {**VIT, "image_size": 40}, "text_config": _text("llama"), "image_token_id": _IMAGE},
        _asked(_two_and_one, 18, 9),
        ("Idefics3VisionAttention",),
    ),
    "smolvlm": Family(
        "smolvlm",
        "SmolVLMForConditionalGeneration",
        "SmolVLMConfig",
        {"vision_config": {**VIT, "image_size": 40}, "text_config": _text("llama"), "image_token_id": _IMAGE},
        _asked(_two_and_one, 18, 9),
        ("SmolVLMVisionAttention",),
    ),
}
