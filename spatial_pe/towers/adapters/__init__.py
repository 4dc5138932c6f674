# SPDX-License-Identifier: Apache-2.0
"""One adapter per attention shape, and the table that says how a shape is known.

An attention module is recognised by the arguments of its forward and by its projections, never by its name. A family
whose class is in ``TESTED`` is part of this package's tests: it is trusted with ``verify=False``, and a difference
found by ``verify`` raises. Any other class that has the form is patched only if verification proves it right.
"""

from __future__ import annotations

from dataclasses import dataclass

from .base import Adapter, Binding, patched_class
from .batched import BatchedAttention
from .packed import PackedAttention
from .plain import PlainAttention

__all__ = ["SHAPES", "TESTED", "Adapter", "Binding", "Shape", "patched_class"]


@dataclass(frozen=True)
class Shape:
    """A form of attention module: its forward takes hidden_states, all of ``needs``, and no more than ``takes``."""

    name: str
    adapter: type[Adapter]
    needs: frozenset[str]
    takes: frozenset[str]
    convention: str
    has_rope: bool


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


SHAPES = (
    Shape(
        "packed",
        PackedAttention,
        needs=_names("cu_seqlens position_embeddings"),
        takes=_names("cu_seqlens position_embeddings rotary_pos_emb max_seqlen attention_mask"),
        convention="own RoPE (half), packed",
        has_rope=True,
    ),
    Shape(
        "batched",
        BatchedAttention,
        needs=_names("attention_mask position_embeddings"),
        takes=_names("attention_mask position_embeddings output_attentions"),
        convention="own RoPE (half)",
        has_rope=True,
    ),
    Shape(
        "plain",
        PlainAttention,
        needs=_names(""),
        takes=_names("attention_mask causal_attention_mask head_mask output_attentions"),
        convention="no RoPE",
        has_rope=False,
    ),
)

# Attention classes that tests/towers run, on the oldest and the newest supported transformers where they exist there.
TESTED = _names(
    """
    VisionAttention Qwen2_5_VLVisionAttention Qwen3VLVisionAttention Glm4vVisionAttention
    Ernie4_5_VLMoeVisionAttention GlmOcrVisionAttention PixtralAttention DINOv3ViTAttention
    CLIPAttention SiglipAttention Dinov2Attention Dinov2SelfAttention
    Dinov2WithRegistersAttention Dinov2WithRegistersSelfAttention ViTAttention ViTSelfAttention
    """
)
