# SPDX-License-Identifier: Apache-2.0
"""Data: the forms of attention modules, the classes that the tests run, and those that are left alone.

An attention module is recognised by the arguments of its forward and by its projections, never by its name. A class in
``TESTED`` is part of this package's tests: it is trusted with ``verify=False``, and a difference found by ``verify``
raises. Any other class that has a form is patched only if verification proves it right, which also finds its pairing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Shape:
    """A form of attention module: its forward takes ``first``, all of ``needs``, and no more than ``takes``.

    rotation: the argument that holds the rotation, if any. bounds: the argument that bounds packed sequences, if any.
    mask: the argument that may hold a mask of padding.
    returns: what classes of this form return unless ``TESTED`` or a proof says otherwise.
    """

    name: str
    needs: frozenset[str]
    takes: frozenset[str]
    first: str = "hidden_states"
    rotation: str = ""
    bounds: str = ""
    returns: str = "tuple"  # (output, weights), or "tensor"
    mask: str = "attention_mask"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_OPTIONS = "attention_mask output_attentions past_key_value past_key_values cache"

SHAPES = (
    Shape(
        "packed",
        needs=_names("cu_seqlens position_embeddings"),
        takes=_names(f"cu_seqlens position_embeddings rotary_pos_emb max_seqlen {_OPTIONS}"),
        rotation="position_embeddings",
        bounds="cu_seqlens",
        returns="tensor",
    ),
    Shape(  # Qwen2.5-Omni in transformers 4
        "packed, from angles",
        needs=_names("cu_seqlens rotary_pos_emb"),
        takes=_names("cu_seqlens rotary_pos_emb"),
        rotation="rotary_pos_emb",
        bounds="cu_seqlens",
        returns="tensor",
    ),
    Shape(
        "packed without RoPE",
        needs=_names("cu_seqlens"),
        takes=_names(f"cu_seqlens max_seqlen {_OPTIONS}"),
        bounds="cu_seqlens",
        returns="tensor",
    ),
    Shape(
        "batched",
        needs=_names("position_embeddings"),
        takes=_names(f"position_embeddings position_ids {_OPTIONS}"),
        rotation="position_embeddings",
    ),
    Shape(
        "complex",
        needs=_names("freqs_ci"),
        takes=_names(f"freqs_ci {_OPTIONS}"),
        rotation="freqs_ci",
    ),
    Shape(
        "timm",
        needs=_names("rope"),
        takes=_names("rope attn_mask is_causal"),
        first="x",
        rotation="rope",
        returns="tensor",
        mask="attn_mask",
    ),
    Shape(
        "timm without RoPE",
        needs=_names("attn_mask"),
        takes=_names("attn_mask is_causal"),
        first="x",
        returns="tensor",
        mask="attn_mask",
    ),
    Shape(
        "plain",
        needs=_names(""),
        takes=_names(f"causal_attention_mask head_mask {_OPTIONS}"),
    ),
)


class Known(NamedTuple):
    """What a tested class does that its form leaves open."""

    pairing: str = "half"
    returns: str | None = None  # None: as its form does
    pads: bool = False  # its tower pads, masks the padding, and drops what attention returns for it


# Attention classes that tests/towers run, on the oldest and the newest supported transformers where they exist there.
_HALF = """
    VisionAttention Qwen2_5_VLVisionAttention Qwen3VLVisionAttention Qwen3VLMoeVisionAttention
    Qwen3_5VisionAttention Qwen3_5MoeVisionAttention Qwen4ExpVisionAttention Qwen3OmniMoeVisionAttention
    Qwen2_5OmniVisionAttention Glm4vVisionAttention Glm4vMoeVisionAttention GlmOcrVisionAttention
    Glm5NextVisionAttention Dots3NoteVisionAttention CohereCompassVisionAttention Exaone4_5_VisionAttention
    Ernie4_5_VLMoeVisionAttention Kimi_K25VisionAttention MuseGlimmerVisionAttention MuseSparkVisionAttention
    PixtralAttention DINOv3ViTAttention EomtDinov3Attention Sapiens2Attention Step3p7VisionAttention MLCDAttention
    GlmImageVisionAttention Cosmos3EdgeVisionAttention
"""
_PLAIN = """
    CLIPAttention AltCLIPAttention ChineseCLIPVisionAttention MetaClip2Attention XCLIPAttention
    Kosmos2VisionAttention GitVisionAttention OwlViTAttention SiglipAttention JanusVisionAttention
    Aimv2Attention Ovis2VisionAttention Ovis2Attention InternVLVisionAttention QianfanOCRVisionAttention
    Idefics3VisionAttention SmolVLMVisionAttention GraniteDoclingVisionAttention
    Dinov2Attention Dinov2SelfAttention Dinov2WithRegistersAttention Dinov2WithRegistersSelfAttention ViTAttention
    ViTSelfAttention IJepaAttention IJepaSelfAttention ViTMSNAttention ViTMSNSelfAttention ViTMAEAttention
    ViTMAESelfAttention DeiTAttention DeiTSelfAttention YolosSelfAttention PixioAttention Tipsv2VisionAttention
"""
_HALF_TUPLE = """
    PaddleOCRVisionAttention VideoLlama3VisionAttention Lfm3VlVisionAttention MiniMaxM3VLVisionAttention
    HunYuanVLVisionAttention MiniCPMV4_6VisionAttention
"""
_PADDING = """
    Siglip2Attention Idefics2VisionAttention Attention
"""
TESTED: dict[str, Known] = {
    **dict.fromkeys(_HALF.split(), Known()),
    **dict.fromkeys(_HALF_TUPLE.split(), Known(returns="tuple")),
    **dict.fromkeys(_PLAIN.split(), Known()),
    **dict.fromkeys(_PADDING.split(), Known(pads=True)),
    "Inkling2VisionAttention": Known("interleaved", returns="tuple"),
    "RadioAttention": Known(returns="tuple"),
    "Llama4VisionAttention": Known("interleaved"),
    "Sam3ViTRoPEAttention": Known("interleaved"),
    "Gemma4VisionAttention": Known("axis_half", pads=True),
    "EvaAttention": Known("interleaved", pads=True),
    "AttentionRope": Known("interleaved", pads=True),
}

# Attention that looks right and is not: by class, with the reason that the report gives.
LEFT_ALONE: dict[str, str] = {
    "VJEPA2RopeAttention": "its tables are not a rotation: cos and sin are tiled, but neighbouring channels paired",
    "Phi4MultimodalVisionAttention": "is_causal is True: with no padding its SDPA runs causal, which bidirectional "
    "attention would change",
}

# Towers whose tokens are not a grid of patches behind a prefix: no RoPE is added to them.
NO_GRID: dict[str, str] = {
    "ViTMAE": "its tokens are a shuffled part of the patches",
    "XCLIP": "it adds a token after the patches, and attends over frames",
}
