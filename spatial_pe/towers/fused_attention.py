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
from .forms import OWN, ForwardForm, attention_method
from .grid_hooks import Grids
from .layout import Layout, dropout_of, output, project, scale_of
from .options import PatchOptions
from .padding import Padding, attend_padded, padding_of
from .rotary_inputs import PAIR, OwnRotation, Seen, of_keys, rope_of, rotation_of, table_at, table_of_grid

Tokens = tuple[Tensor, Tensor, Tensor]  # of q, k and v


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
    optional: bool = True  # with positions: a call without them does not rotate
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
    Attention to other tokens takes (B, N, C) and keys (B, Nk, C), or (B, objects, N, C) in SAM 2; torch's may have the
    batch second.
    """

    arguments: ClassVar[tuple[str, ...]]  # of the original attention
    method: ClassVar[str]  # that is attention
    collector: ClassVar[Any]
    _spatial_pe: Binding

    @classmethod
    def attributes(cls, original: type[nn.Module]) -> dict[str, Any]:
        capturing = sys.modules.get("transformers.utils.output_capturing")
        method = attention_method(original)
        # a layer: its forward stays, and calls the method
        layer = {} if method == "forward" else {"forward": original.forward, method: cls.forward}
        return {
            "__doc__": f"{original.__name__} with its attention computed by spatial_pe.rope_attention.",
            "arguments": tuple(signature(getattr(original, method)).parameters)[1:],
            "method": method,
            "collector": getattr(capturing, "_active_collector", None),  # transformers 5 collects weights through it
            **layer,
        }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if (node := fx_node(self, *args, **kwargs)) is not None:
            return node
        call = self.named(args, kwargs)
        bound = self._spatial_pe
        if bound.form.first == "x" and isinstance(mask := call.get("attn_mask"), Tensor) and mask.ndim == 2:
            call["attn_mask"] = mask[None, None]  # timm passes it to SDPA: (queries, keys), and not (samples, keys)
        x = call[bound.form.first]
        bounds = self._bounds(call)
        tokens = self._tokens(call)
        flat = tokens[0]
        rotary: Any = None
        rotary_k: Rotary | None = None
        reason = self.refusal(call)
        if bound.added:
            if tokens[1] is not flat:
                raise NotImplementedError(
                    "attention to other tokens has no patch grid: unpatch the model for such calls"
                )
            rotary = bound.grids.rotary(self, flat, bound.prefix, bound.suffix)  # type: ignore[union-attr, arg-type]
        elif reason is None:
            found = self._own_rotations(call, tokens)
            if isinstance(found, str):
                reason = found
            else:
                rotary, rotary_k = found
        padding = None
        if reason is None:
            padding, reason = self._padding(call, flat)
        if reason is None and (x.ndim == 2 if bounds is None else x.ndim == 3 and x.shape[0] > 1):
            reason = "packed tokens come without cu_seqlens" if bounds is None else "a batch is packed"
        if reason is not None:
            return self._unfused(reason, tokens, rotary, bounds, call)
        attended = self._attend(tokens, rotary, rotary_k, bounds, padding, call)
        out = self._shaped(output(self, bound.layout, attended, flat), x)
        return (out, None) if bound.returns == "tuple" else out

    def _attend(
        self,
        tokens: Tokens,
        rotary: Any,
        rotary_k: Rotary | None,
        bounds: Tensor | None,
        padding: Padding | None,
        call: dict[str, Any],
    ) -> Tensor:
        bound = self._spatial_pe
        scale, backend = scale_of(self, bound.layout), bound.backend
        q, k, v = project(self, bound.layout, *tokens)  # (B, N, H, D), or (T, H, D)
        if isinstance(rotary, OwnRotation):
            (q, k), rotary = rotary(q, k), None
        elif rotary is not None and not isinstance(rotary, Rotary):  # not a rotation of pairs but a function
            q, k, rotary = rotary(q), rotary(k), None
        if bounds is not None:
            batch_of_one = q.ndim == 4  # Pixtral, HunYuan-VL
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
        return rope_attention(q, k, v, rotary, rotary_k=rotary_k, scale=scale, backend=backend)

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

    def _tokens(self, call: dict[str, Any]) -> Tokens:
        """Return the tokens of q, k and v, each (B, N, C) or (T, C); the same object where they are the same."""
        form = self._spatial_pe.form
        x = call[form.first]
        flat: dict[int, Tensor] = {}

        def of(given: Tensor) -> Tensor:
            if id(given) not in flat:
                flat[id(given)] = self._flat(given)
            return flat[id(given)]

        return (of(x), of(call[form.keys]), of(call[form.values])) if form.keys else (of(x),) * 3

    def _flat(self, x: Tensor) -> Tensor:
        if x.ndim == 4:  # SAM 2: objects of an image; SAM 3: rows of an image
            return x.flatten(0, 1) if self._spatial_pe.form.keys else x.flatten(1, 2)
        return x.transpose(0, 1) if x.ndim == 3 and not getattr(self, "batch_first", True) else x

    def _shaped(self, out: Tensor, x: Tensor) -> Tensor:
        """Return out (B, N, C) or (T, C) with the leading dimensions of x, the tokens of the call."""
        if x.ndim == 3 and not getattr(self, "batch_first", True):
            return out.transpose(0, 1)
        return out.view(*x.shape[:-1], -1)

    def _own_rotations(self, call: dict[str, Any], tokens: Tokens) -> tuple[Any, Rotary | None] | str:
        """Return the tables of the queries and of the keys (None: the same), or why there are none."""
        bound = self._spatial_pe
        form, dim = bound.form, bound.layout.head_dim
        q, k, _ = tokens
        if not form.rotation:
            return None, None
        if form.calls:
            return self._read_rotations(call, tokens)
        value = table_of_grid(self, form, q.shape[-2]) if form.own_table else call.get(form.rotation)
        if value is None and form.first == "x":
            return None, None  # timm: no rotation in this call
        rotary = rotation_of(value, form, q.shape[-2], dim, bound.pairing, bound.tables)
        if isinstance(rotary, str) or not form.keys:
            return rotary if isinstance(rotary, str) else (rotary, None)
        rows: Rotary | str = rotary
        if form.rotation_k:
            value = call.get(form.rotation_k)
            tokens_k = value[0].shape[-2] if isinstance(value, PAIR) else k.shape[-2]
            rows = rotation_of(value, form, tokens_k, dim, bound.pairing, bound.tables)
        if isinstance(rows, str):
            return rows
        groups = call.get(form.groups) if form.groups else None
        rotary_k = of_keys(rows, k.shape[-2], call.get(form.excluded) or 0, groups)
        if isinstance(rotary_k, str) or rotary_k is rotary:
            return rotary_k if isinstance(rotary_k, str) else (rotary, None)
        return rotary, rotary_k

    def _read_rotations(self, call: dict[str, Any], tokens: Tokens) -> tuple[Any, Rotary | None] | str:
        """Return the tables of a module that rotates by a callable of its own, or that callable."""
        bound = self._spatial_pe
        form = bound.form
        rope = rope_of(self, form)
        positions, of_k = call.get(form.rotation), call.get(form.rotation_k or form.rotation)
        if form.places:
            positions = of_k = getattr(self, form.places)(tokens[0], masks=positions)
        if rope is None or (positions is None and of_k is None and bound.optional):
            return None, None
        if positions is None or of_k is None:
            return f"{form.rotation} is None"
        if bound.pairing == OWN:
            return OwnRotation(rope, positions, of_k, form.both), None
        found: list[Rotary] = []
        for given, x in ((positions, tokens[0]), (of_k, tokens[1])):
            if found and given is positions and x.shape[-2] == tokens[0].shape[-2]:
                break
            rotary = table_at(rope, given, x, bound.layout.head_dim, bound.pairing, form.both)
            if isinstance(rotary, str):
                return rotary
            found.append(rotary)
        return found[0], (found[1] if len(found) > 1 else None)

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
        if call.get("key_padding_mask") is not None:
            return "key_padding_mask is given"
        return None

    def wants_weights(self, call: dict[str, Any]) -> bool:
        if call.get("output_attentions") or call.get("need_weights", "need_weights" in self.arguments):
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

    def _unfused(self, reason: str, tokens: Tokens, rotary: Any, bounds: Tensor | None, call: dict[str, Any]) -> Any:
        bound = self._spatial_pe
        x = tokens[0]
        if bound.strict:
            raise RuntimeError(f"not fused: {reason}")
        if bound.added:  # the original forward would leave the rotation out
            self.warn(f"{reason}: falling back to attention without the fused kernel")
            q, k, v = project(self, bound.layout, *tokens)
            q, k = (rotary(q), rotary(k)) if not isinstance(rotary, Rotary) else apply_rotary_qk(q, k, rotary)
            scale = scale_of(self, bound.layout)
            attended, weights = eager_attention(q, k, v, scale, dropout_of(self, bound.layout), call)
            out = self._shaped(output(self, bound.layout, attended, x), call[bound.form.first])
            if "average_attn_weights" in self.arguments:  # torch's
                weights = weights.mean(1) if call.get("average_attn_weights", True) else weights
                weights = weights if self.wants_weights(call) else None  # type: ignore[assignment]
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
        return getattr(self.original, self.method)(self, **call)

    def warn(self, message: str) -> None:
        _warn_once(self.original.__name__, message)


_warned: set[tuple[str, str]] = set()


def _warn_once(name: str, message: str) -> None:
    if (name, message) not in _warned and not torch.compiler.is_compiling():
        _warned.add((name, message))
        warnings.warn(f"{name}: {message}", stacklevel=5)
