# SPDX-License-Identifier: Apache-2.0
"""Encodings of the published model families: one row per family, with the source that it was read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .encodings import AxialRoPE, MixedRoPE


@dataclass(frozen=True)
class Convention:
    """Encoding class of a model family, its options, and the source that it was read from."""

    encoding: type[AxialRoPE | MixedRoPE]
    options: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""


_QWEN = Convention(AxialRoPE, {}, "transformers: Qwen2VLVisionRotaryEmbedding; position ids in merge blocks")
_DINOV3 = Convention(
    AxialRoPE,
    {"theta": 100.0, "frequency": "period", "normalize": "separate"},
    "facebookresearch/dinov3 rope_position_encoding.py; transformers: DINOv3ViTRopePositionEmbedding (inference)",
)
_SAM = Convention(
    AxialRoPE,
    {"pairing": "interleaved", "axis_order": "wh"},
    "transformers: Sam3ViTRotaryEmbedding, Sam2VideoVisionRotaryEmbedding; SAM 3's global layers add "
    "scale=window_size / width",
)
_MUSE = Convention(
    AxialRoPE, {"axis_order": "wh", "offset": 1.0}, "transformers: MuseGlimmerVisionModel (position ids flipped, + 1)"
)

CONVENTIONS: dict[str, Convention] = {
    "qwen2_5_vl": _QWEN,
    "pixtral": Convention(AxialRoPE, {"layout": "split"}, "transformers: PixtralVisionRotaryEmbedding"),
    "dinov3": _DINOV3,
    "llama4": Convention(
        AxialRoPE,
        {"pairing": "interleaved", "axis_order": "wh", "offset": 1.0},
        "transformers: Llama4VisionRotaryEmbedding; CLS comes last: PatchGrid(..., suffix=1)",
    ),
    "sam3": _SAM,
    "gemma4": Convention(
        AxialRoPE,
        {"theta": 100.0, "pairing": "axis_half", "axis_order": "wh"},
        "transformers: Gemma4VisionRotaryEmbedding, apply_multidimensional_rope; position ids are (x, y)",
    ),
    "kimi": Convention(
        AxialRoPE,
        {"axis_order": "wh", "layout": "alternating"},
        "transformers: Kimi_K25VisionRotaryEmbedding, whose weights are permuted on loading; the original MoonViT "
        'code has pairing="interleaved"',
    ),
    "eva02": Convention(
        AxialRoPE,
        {"pairing": "interleaved", "reference_size": 16},
        "baaivision/EVA EVA-02/asuka/rope.py VisionRotaryEmbeddingFast, pretrained on 16 x 16; timm: "
        "RotaryEmbeddingCat(in_pixels=False, ref_feat_shape=(16, 16))",
    ),
    "perception_encoder": Convention(
        AxialRoPE,
        {"pairing": "interleaved", "axis_order": "wh", "offset": 1.0},
        "facebookresearch/perception_models core/vision_encoder/rope.py Rope2D; offset 0 without CLS; timm: "
        'RotaryEmbeddingCat(in_pixels=False, grid_offset=1, grid_indexing="xy")',
    ),
    "rope_vit_axial": Convention(
        AxialRoPE,
        {"theta": 100.0, "pairing": "interleaved", "axis_order": "wh"},
        "naver-ai/rope-vit deit/models_v2_rope.py compute_axial_cis",
    ),
    "rope_vit_mixed": Convention(
        MixedRoPE,
        {},
        "naver-ai/rope-vit deit/models_v2_rope.py init_random_2d_freqs, compute_mixed_cis; needs num_heads",
    ),
    # further families, each compared with its own class by the tests
    "qwen2_vl": _QWEN,
    "qwen2_5_omni": _QWEN,
    "qwen3_vl": _QWEN,
    "qwen3_vl_moe": _QWEN,
    "qwen3_omni_moe": _QWEN,
    "qwen3_5": _QWEN,
    "qwen3_5_moe": _QWEN,
    "qwen4_exp": _QWEN,
    "glm4v": _QWEN,
    "glm4v_moe": _QWEN,
    "glm_ocr": _QWEN,
    "glm5_next": _QWEN,
    "ernie4_5_vl_moe": _QWEN,
    "paddleocr_vl": _QWEN,
    "video_llama_3": _QWEN,
    "exaone4_5": _QWEN,
    "cohere_compass": _QWEN,
    "dots3_note": _QWEN,
    "lfm3_vl": Convention(AxialRoPE, {"theta": 1_000_000.0}, "transformers: Lfm3VlVisionRotaryEmbedding"),
    "step3p7": Convention(AxialRoPE, {"axis_order": "wh"}, "transformers: Step3p7VisionRotaryEmbedding"),
    "muse_glimmer": _MUSE,
    "muse_spark": _MUSE,
    "inkling2": Convention(
        AxialRoPE,
        {"pairing": "interleaved", "axis_order": "wh", "offset": 1.0},
        "transformers: Inkling2VisionRotaryEmbedding; CLS comes first: PatchGrid(..., prefix=1)",
    ),
    "sam2_video": _SAM,
    "eomt_dinov3": _DINOV3,
    "sapiens2": _DINOV3,
}


def convention(name: str, head_dim: int, **overrides: Any) -> AxialRoPE | MixedRoPE:
    """Return the encoding of a model family, e.g. ``convention("dinov3", 64)``.

    Args:
        name: a key of ``CONVENTIONS``.
        head_dim: D, channels of a head.
        overrides: options of ``AxialRoPE`` or ``MixedRoPE`` that differ from the family's, such as ``theta``;
            ``convention("rope_vit_mixed", 64, num_heads=6)`` needs the number of heads.

    Raises:
        ValueError: unknown name, or an option out of range.
        TypeError: an option that the encoding does not have.
    """
    if name not in CONVENTIONS:
        raise ValueError(f"unknown convention {name!r}: it must be one of {', '.join(CONVENTIONS)}")
    row = CONVENTIONS[name]
    return row.encoding(head_dim, **{**row.options, **overrides})
