# SPDX-License-Identifier: Apache-2.0
"""Layers for Hugging Face ``kernels``: forwards of vision attention for ``kernelize``, one for each signature.

A layer of a kernel has no constructor and no state: its forward is called with the module that it replaces as ``self``.
``tools.kernel_hub`` copies this file, and what it needs, into a kernel that loads without this package.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..ops.attention import rope_attention
from ..towers.forms import FORMS
from ..towers.layout import Layout, output, project, read_layout, scale_of
from ..towers.rotary_inputs import Seen, rotation_of

_FORMS = {form.name: form for form in FORMS}
_KNOWN: WeakKeyDictionary[nn.Module, tuple[Layout, Seen]] = WeakKeyDictionary()


def _attend(
    module: nn.Module, form: str, x: Tensor, rotation: Any, bounds: Tensor | None = None, longest: int | None = None
) -> Tensor:
    """Compute the attention of a module of transformers, (T, C) with bounds or (B, N, C), half pairing."""
    if module not in _KNOWN:
        layout = read_layout(module, _FORMS[form])
        if isinstance(layout, str):
            raise NotImplementedError(f"{type(module).__name__} {layout}")
        _KNOWN[module] = (layout, Seen())
    layout, seen = _KNOWN[module]
    rotary = rotation_of(rotation, _FORMS[form], x.shape[-2], layout.head_dim, "half", seen)
    if isinstance(rotary, str):
        raise NotImplementedError(f"{type(module).__name__}: {rotary}")
    q, k, v = project(module, layout, x)
    lengths: dict[str, Any] = {} if bounds is None else {"cu_seqlens": bounds.to(torch.int32), "max_seqlen": longest}
    return output(module, layout, rope_attention(q, k, v, rotary, scale=scale_of(module, layout), **lengths), x)


class PackedVisionAttention(nn.Module):
    """Qwen2-VL's, Qwen2.5-VL's, Qwen3-VL's and GLM-4V's: images and windows in one sequence."""

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        max_seqlen: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        return _attend(self, "packed", hidden_states, position_embeddings, cu_seqlens, max_seqlen)


class BatchedVisionAttention(nn.Module):
    """DINOv3's: CLS and registers in front are not rotated."""

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if attention_mask is not None:
            raise NotImplementedError("attention_mask")
        return _attend(self, "batched", hidden_states, position_embeddings), None
