# SPDX-License-Identifier: Apache-2.0
"""The patched attention module: its state, its forward, and its fallback to the original attention."""

from __future__ import annotations

import sys
import types
import warnings
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._utils.dispatcher import fx_node
from ..backends.longest import longest_sequence
from ..ops.attention import rope_attention
from ..ops.rotate import apply_rotary_qk
from ..rotary import Rotary
from .classes import Swapped
from .eager import eager_attention
from .forms import ForwardForm
from .grid_hooks import Grids
from .layout import Layout, dropout_of, output, project, scale_of
from .options import PatchOptions
from .padding import Padding, attend_padded, padding_of
from .rotary_inputs import Seen, rotation_of


@dataclass
class Binding:
    """State that ``patch`` leaves on an attention module, for its new forward."""

    layout: Layout
    form: ForwardForm
    pairing: str
    returns: str  # "tuple" or "tensor"
    backend: str
    masks: bool = False  # its original forward supports a padding mask
    pads: bool = False  # and its output for padding is dropped
    strict: bool = False  # a call that is not fused raises: a proof must not compare a module with itself
    grids: Grids | None = None  # with an added RoPE: source of its grid
    prefix: int = 0  # with an added RoPE: tokens before the patches, and after them
    suffix: int = 0
    options: PatchOptions = field(default_factory=PatchOptions)
    tables: Seen = field(default_factory=Seen)  # with RoPE of the tower

    @property
    def added(self) -> bool:
        return self.grids is not None


class FusedAttention(Swapped):
    """Attention of a tower by one call of rope_attention for all images, windows and heads of a layer.

    Base of ``class Patched<Original>(FusedAttention, <Original>)``, see ``swapped_class``; its state is its Binding.
    Tokens are (T, C) or (1, T, C) with cu_seqlens; (B, N, C); or (B, h, w, C), where SAM 3 has a window or an image.
    """

    arguments: ClassVar[tuple[str, ...]]  # of the original forward
    collector: ClassVar[Any]
    _spatial_pe: Binding

    @classmethod
    def attributes(cls, original: type[nn.Module]) -> dict[str, Any]:
        capturing = sys.modules.get("transformers.utils.output_capturing")
        return {
            "__doc__": f"{original.__name__} with its attention computed by spatial_pe.rope_attention.",
            "arguments": tuple(signature(original.forward).parameters)[1:],
            "collector": getattr(capturing, "_active_collector", None),  # transformers 5 collects weights through it
        }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if (node := fx_node(self, *args, **kwargs)) is not None:
            return node
        call = self.named(args, kwargs)
        if isinstance(mask := call.get("attn_mask"), Tensor) and mask.ndim == 2:
            call["attn_mask"] = mask[None, None]  # timm passes it to SDPA: (queries, keys), and not (samples, keys)
        bound = self._spatial_pe
        x = call[bound.form.first]
        bounds = self._bounds(call)
        flat = x.flatten(1, 2) if x.ndim == 4 else x
        rotary = None
        reason = self.refusal(call)
        if bound.added:
            rotary = bound.grids.rotary(self, flat, bound.prefix, bound.suffix)  # type: ignore[union-attr, arg-type]
        elif bound.form.rotation and reason is None:
            found = self._own_rotation(call.get(bound.form.rotation), flat)
            rotary, reason = (None, found) if isinstance(found, str) else (found, None)
        padding = None
        if reason is None:
            padding, reason = self._padding(call, flat)
        if reason is None and (x.ndim == 2 if bounds is None else x.ndim == 3 and x.shape[0] > 1):
            reason = "packed tokens come without cu_seqlens" if bounds is None else "a batch is packed"
        if reason is not None:
            return self._unfused(reason, flat, rotary, bounds, call)
        attended = self._attend(flat, rotary, bounds, padding, call)
        out = output(self, bound.layout, attended, flat).view(*x.shape[:-1], -1)
        return (out, None) if bound.returns == "tuple" else out

    def _attend(
        self, x: Tensor, rotary: Any, bounds: Tensor | None, padding: Padding | None, call: dict[str, Any]
    ) -> Tensor:
        bound = self._spatial_pe
        scale, backend = scale_of(self, bound.layout), bound.backend
        q, k, v = project(self, bound.layout, x)  # (B, N, H, D), or (T, H, D)
        if rotary is not None and not isinstance(rotary, Rotary):  # not a rotation of pairs but a function of q and k
            q, k, rotary = rotary(q), rotary(k), None
        if bounds is not None:
            batch_of_one = x.ndim == 3  # Pixtral, HunYuan-VL
            if batch_of_one:
                q, k, v = q[0], k[0], v[0]
            out = rope_attention(
                q,
                k,
                v,
                rotary,
                scale=scale,
                cu_seqlens=bounds.to(q.device, torch.int32),
                max_seqlen=self._longest(bounds, call, q.device),
                backend=backend,
            )
            return out[None] if batch_of_one else out
        if padding is not None:
            return attend_padded(q, k, v, rotary, padding, scale, backend)
        return rope_attention(q, k, v, rotary, scale=scale, backend=backend)

    # ------------------------------------------------------------------------------------ what a call brings along

    def named(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments by name: their order differs between versions of transformers."""
        return {**dict(zip(self.arguments[: len(args)], args, strict=True)), **kwargs}

    def _bounds(self, call: dict[str, Any]) -> Tensor | None:
        """Return cu_seqlens: an argument of packed attention, or recorded for Pixtral by ``PackImages``."""
        name = self._spatial_pe.form.bounds
        return call.get(name or "cu_seq_lens_q")

    def _longest(self, bounds: Tensor, call: dict[str, Any], device: torch.device) -> int | None:
        """Return the longest packed sequence: as passed in the call, or read if GPU kernels need it."""
        said = call.get("max_seqlen", call.get("max_length_q"))
        if isinstance(said, int):
            return said
        on_gpu = device.type != "cpu" or self._spatial_pe.backend in ("triton", "cuda")  # run on the CPU in tests
        return longest_sequence(bounds, id(self)) if on_gpu else None

    def _own_rotation(self, value: Any, x: Tensor) -> Rotary | str | None:
        bound = self._spatial_pe
        if value is None and bound.form.first == "x":
            return None  # timm: no rotation in this call
        return rotation_of(value, bound.form, x.shape[-2], bound.layout.head_dim, bound.pairing, bound.tables)

    def _padding(self, call: dict[str, Any], x: Tensor) -> tuple[Padding | None, str | None]:
        """Return the padding of a mask, or why the fused op cannot compute the call."""
        name = self._spatial_pe.form.mask
        mask = call.get(name)
        if mask is None:
            return None, None
        if not self._spatial_pe.masks or not isinstance(mask, Tensor) or x.ndim != 3:
            return None, f"{name} is given"
        found = padding_of(mask, x.shape[0], x.shape[1])
        if isinstance(found, Padding) and not self._spatial_pe.pads:  # the fused op returns 0 there
            found = f"{name} masks padding"
        return (None, found) if isinstance(found, str) else (found, None)

    # --------------------------------------------------------------------------------- calls that are not for the op

    def refusal(self, call: dict[str, Any]) -> str | None:
        """Return why the fused op cannot compute this call, or None."""
        for name in ("causal_attention_mask", "head_mask"):
            if call.get(name) is not None:
                return f"{name} is given"
        if call.get("is_causal"):
            return "is_causal=True"
        if self.training and dropout_of(self, self._spatial_pe.layout) > 0:
            return "attention dropout is active"
        if self.wants_weights(call):
            return "attention weights are requested"
        return None

    def wants_weights(self, call: dict[str, Any]) -> bool:
        if call.get("output_attentions"):
            return True
        # transformers 4 wraps forward on the instance for as long as it collects attention weights
        if type(self.__dict__.get("forward")) is types.FunctionType:
            return True
        if self.collector is None:
            return False
        if torch.compiler.is_compiling() and not self._forward_hooks:
            # a ContextVar would break the graph; without hooks on this module nothing collects its weights either
            return False
        active = self.collector.get()
        return active is not None and "attentions" in active

    def _unfused(self, reason: str, x: Tensor, rotary: Any, bounds: Tensor | None, call: dict[str, Any]) -> Any:
        bound = self._spatial_pe
        if bound.strict:
            raise RuntimeError(f"not fused: {reason}")
        if bound.added:  # the original forward would leave the rotation out
            self.warn(f"{reason}: falling back to attention without the fused kernel")
            q, k, v = project(self, bound.layout, x)
            q, k = (rotary(q), rotary(k)) if not isinstance(rotary, Rotary) else apply_rotary_qk(q, k, rotary)
            scale = scale_of(self, bound.layout)
            attended, weights = eager_attention(q, k, v, scale, dropout_of(self, bound.layout), call)
            out = output(self, bound.layout, attended, x)
            return (out, weights) if bound.returns == "tuple" else out
        if bounds is not None and not bound.form.bounds and call.get("attention_mask") is None:
            call = {**call, "attention_mask": self._mask(bounds, x)}
        return self.fall_back(reason, call)

    def _mask(self, bounds: Tensor, x: Tensor) -> Tensor | None:
        """Return the additive (1, 1, S, S) mask that Pixtral would have built, for a call of its original attention."""
        if "flash" in (getattr(getattr(self, "config", None), "_attn_implementation", None) or ""):
            return None
        token = torch.arange(x.shape[1], device=bounds.device)
        image = torch.searchsorted(bounds, token, right=True)
        mask = x.new_zeros(len(token), len(token))
        return mask.masked_fill_(image[:, None] != image[None, :], torch.finfo(mask.dtype).min)[None, None]

    def fall_back(self, reason: str, call: dict[str, Any]) -> Any:
        """Compute this call by the original attention."""
        self.warn(f"{reason}: falling back to the original attention")
        return super().forward(**call)

    def warn(self, message: str) -> None:
        _warn_once(self.original.__name__, message)


_warned: set[tuple[str, str]] = set()


def _warn_once(name: str, message: str) -> None:
    if (name, message) not in _warned and not torch.compiler.is_compiling():
        _warned.add((name, message))
        warnings.warn(f"{name}: {message}", stacklevel=5)
