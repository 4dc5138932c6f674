# SPDX-License-Identifier: Apache-2.0
"""What the patched attention classes share: projections, refusals, and the way back to the model's own forward."""

from __future__ import annotations

import sys
import types
import warnings
from dataclasses import dataclass
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..grids import GridRecorder
from ..layout import Layout, dropout_of, project

MASKS = ("attention_mask", "causal_attention_mask", "head_mask")


@dataclass
class Binding:
    """What ``patch`` leaves on an attention module: all that its new forward needs to know."""

    layout: Layout
    backend: str
    grids: GridRecorder | None = None  # with an added RoPE: where its grid comes from
    prefix: int = 0  # with an added RoPE: tokens before the patches
    request: tuple = (None, "identity", True)  # rope, start, keep_absolute as given to patch()


class Adapter(nn.Module):
    """Base of the patched classes: ``class Patched<Original>(<Adapter>, <Original>)``, see ``patched_class``.

    An instance gets such a class by ``module.__class__ = ...``; nothing here has state of its own but the Binding.
    """

    original: ClassVar[type[nn.Module]]
    arguments: ClassVar[tuple[str, ...]]  # of the original forward, after hidden_states
    collector: ClassVar[Any]
    _spatial_pe: Binding

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return project(self, self._spatial_pe.layout, hidden_states)

    def output(self, attended: Tensor) -> Tensor:
        """(..., H, D) -> (..., C)"""
        name = self._spatial_pe.layout.out
        flat = attended.view(*attended.shape[:-2], -1)
        return flat if name is None else getattr(self, name)(flat)

    def named(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Positional arguments by name: their order differs between versions of transformers."""
        return {**dict(zip(self.arguments, args, strict=False)), **kwargs} if args else kwargs

    def refusal(self, kwargs: dict[str, Any]) -> str | None:
        """Why the fused op must not serve this call, or None."""
        for name in MASKS:
            if kwargs.get(name) is not None:
                return f"{name} is given"
        if kwargs.get("is_causal"):
            return "is_causal=True"
        if self.training and dropout_of(self, self._spatial_pe.layout) > 0:
            return "attention dropout is active"
        if self.wants_weights(kwargs):
            return "attention weights are asked for"
        return None

    def wants_weights(self, kwargs: dict[str, Any]) -> bool:
        if kwargs.get("output_attentions"):
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

    def fall_back(self, reason: str, hidden_states: Tensor, **kwargs: Any) -> Any:
        """This call by the model's own attention."""
        _warn_once(self.original.__name__, reason)
        return super().forward(hidden_states, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # the class is made at run time and has no importable name: pickle and deepcopy make it again
        reduced = super().__reduce_ex__(2)
        assert isinstance(reduced, tuple)
        adapter = type(self).__mro__[1]
        return (_new, (adapter, self.original), *reduced[2:])


_classes: dict[tuple[type[Adapter], type[nn.Module]], type[Adapter]] = {}


def patched_class(adapter: type[Adapter], original: type[nn.Module]) -> type[Adapter]:
    """The subclass of both, made once."""
    if (adapter, original) not in _classes:
        _classes[adapter, original] = _make_class(adapter, original)
    return _classes[adapter, original]


def _make_class(adapter: type[Adapter], original: type[nn.Module]) -> type[Adapter]:
    capturing = sys.modules.get("transformers.utils.output_capturing")
    return type(
        f"Patched{original.__name__}",
        (adapter, original),
        {
            "__module__": original.__module__,
            "__doc__": f"{original.__name__} with its attention computed by spatial_pe.rope_attention.",
            "original": original,
            "arguments": tuple(signature(original.forward).parameters)[2:],
            "collector": getattr(capturing, "_active_collector", None),  # transformers 5 collects weights through it
        },
    )


def _new(adapter: type[Adapter], original: type[nn.Module]) -> Adapter:
    cls = patched_class(adapter, original)
    return cls.__new__(cls)


_warned: set[tuple[str, str]] = set()


def _warn_once(name: str, reason: str) -> None:
    if (name, reason) not in _warned:
        _warned.add((name, reason))
        warnings.warn(f"{name}: {reason}, so the model's own attention computes such calls", stacklevel=4)
