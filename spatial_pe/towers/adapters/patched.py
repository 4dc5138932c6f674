# SPDX-License-Identifier: Apache-2.0
"""What a patched attention module has beside its forward: its binding, and the way back to the model's own forward."""

from __future__ import annotations

import sys
import types
import warnings
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import nn

from ..classes import Swapped
from ..grids import Grids
from ..layout import Layout, dropout_of
from ..request import Request
from .shapes import Shape
from .tables import Seen


@dataclass
class Binding:
    """What ``patch`` leaves on an attention module: all that its new forward needs to know."""

    layout: Layout
    shape: Shape
    pairing: str
    returns: str  # "tuple" or "tensor"
    backend: str
    masks: bool = False  # its own forward takes a mask of padding as padding
    pads: bool = False  # and what it returns for padding is dropped
    strict: bool = False  # a call that is not fused raises: a proof must not compare a module with itself
    grids: Grids | None = None  # with an added RoPE: where its grid comes from
    prefix: int = 0  # with an added RoPE: tokens before the patches, and after them
    suffix: int = 0
    request: Request = field(default_factory=Request)
    tables: Seen = field(default_factory=Seen)  # with a RoPE of its own

    @property
    def added(self) -> bool:
        return self.grids is not None


class Patched(Swapped):
    """Base of the patched classes: ``class Patched<Original>(FusedAttention, <Original>)``, see ``swapped_class``.

    Nothing here has state of its own but the Binding.
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

    def named(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Positional arguments by name: their order differs between versions of transformers."""
        return {**dict(zip(self.arguments[: len(args)], args, strict=True)), **kwargs}

    def refusal(self, call: dict[str, Any]) -> str | None:
        """Why the fused op must not serve this call, or None."""
        for name in ("causal_attention_mask", "head_mask"):
            if call.get(name) is not None:
                return f"{name} is given"
        if call.get("is_causal"):
            return "is_causal=True"
        if self.training and dropout_of(self, self._spatial_pe.layout) > 0:
            return "attention dropout is active"
        if self.wants_weights(call):
            return "attention weights are asked for"
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

    def fall_back(self, reason: str, call: dict[str, Any]) -> Any:
        """This call by the model's own attention."""
        self.warn(f"{reason}, so the model's own attention computes such calls")
        return super().forward(**call)

    def warn(self, message: str) -> None:
        _warn_once(self.original.__name__, message)


_warned: set[tuple[str, str]] = set()


def _warn_once(name: str, message: str) -> None:
    if (name, message) not in _warned and not torch.compiler.is_compiling():
        _warned.add((name, message))
        warnings.warn(f"{name}: {message}", stacklevel=5)
