# SPDX-License-Identifier: Apache-2.0
"""Options of ``patch`` that decide what a model computes, as stored on a module and in config.json."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn

from ..encodings import AxialRoPE, MixedRoPE
from ..grid import PatchGrid
from ..rotary import Rotary
from .layout import Layout
from .legacy import LEGACY, Mismatched2DRoPE

FORMAT = 1  # format of the entry in config.json


@dataclass(frozen=True)
class PatchOptions:
    """Arguments of ``patch`` that decide what a model computes."""

    rope: str | nn.Module | None = None
    start: str = "identity"
    keep_absolute: bool = True
    legacy: str | None = None

    def check(self) -> None:
        rope, start = self.rope, self.start
        if isinstance(rope, type):
            raise ValueError(f"rope is the class {rope.__name__}: make one, {rope.__name__}(head_dim)")
        if not isinstance(rope, nn.Module) and rope not in (None, "axial", "mixed"):
            raise ValueError(f'rope must be "axial", "mixed", a module or None, got {rope!r}')
        if start not in ("identity", "full"):
            raise ValueError(f'start must be "identity" or "full", got {start!r}')
        if self.legacy is not None:
            if self.legacy not in LEGACY:
                raise ValueError(f"legacy must be one of {LEGACY} or None, got {self.legacy!r}")
            if rope is not None:
                raise ValueError(f"legacy={self.legacy!r} is an encoding itself: leave rope out, got rope={rope!r}")

    def check_start(self) -> None:
        """Raise unless an encoding given as a module starts as ``start`` says."""
        rope = self.rope
        if isinstance(rope, nn.Module) and self.start == "identity":
            table = _table_of(rope, PatchGrid(3, 5))
            if not isinstance(table, Rotary):
                raise TypeError(_not_a_table(rope, table))
            if not bool((table.cos == 1).all() and (table.sin == 0).all()):
                raise ValueError(
                    'start="identity" needs an encoding that is the identity at initialisation, but '
                    f"{type(rope).__name__} rotates: build it with strength=0.0 or "
                    'init="identity", or pass start="full"'
                )

    @property
    def adds(self) -> bool:
        return self.rope is not None or self.legacy is not None

    @property
    def keeps_absolute(self) -> bool:
        return self.keep_absolute and self.legacy is None  # the paper's code zeroes the position embedding

    @property
    def name(self) -> str:
        if self.legacy is not None:
            return f"legacy {self.legacy}, not a rotation"
        kind = f"{self.rope} RoPE" if isinstance(self.rope, str) else type(self.rope).__name__
        return f"{kind} added, start={self.start}"

    def encoding(self, layout: Layout) -> nn.Module:
        """Return a new encoding for one attention module; a given module is copied."""
        identity = self.start == "identity"
        if self.legacy is not None:
            return Mismatched2DRoPE(layout.head_dim)
        if isinstance(self.rope, nn.Module):
            return copy.deepcopy(self.rope)
        if self.rope == "axial":
            rotated = layout.head_dim - layout.head_dim % 4
            return AxialRoPE(layout.head_dim, rotary_dim=rotated, strength=0.0 if identity else None)
        return MixedRoPE(layout.head_dim, layout.heads, init="identity" if identity else "random")

    def __str__(self) -> str:
        name = type(self.rope).__name__ if isinstance(self.rope, nn.Module) else self.rope
        legacy = f", legacy={self.legacy}" if self.legacy else ""
        return f"rope={name}, start={self.start}, keep_absolute={self.keep_absolute}{legacy}"

    # --------------------------------------------------------------------------------------------------- config.json

    def to_config(self) -> dict[str, Any]:
        rope: Any = self.rope
        if isinstance(rope, nn.Module):
            rope = {"class": f"{type(rope).__module__}.{type(rope).__qualname__}"}
            if isinstance(self.rope, AxialRoPE | MixedRoPE):
                rope["options"] = _options(self.rope)
        return {"format": FORMAT, "rope": rope, "start": self.start, "keep_absolute": self.keep_absolute} | (
            {"legacy": self.legacy} if self.legacy else {}
        )

    @classmethod
    def from_config(cls, saved: dict[str, Any], rope: nn.Module | None = None) -> PatchOptions:
        """Return the saved options; ``rope`` replaces a module that config.json can only name."""
        if not isinstance(saved, dict):
            raise ValueError(f"spatial_pe in config.json must be a table, got {saved!r}")
        if saved.get("format") != FORMAT:
            raise ValueError(
                f"config.json was written by another version of spatial_pe (format {saved.get('format')}, this is "
                f"{FORMAT}): update spatial_pe"
            )
        kind = saved["rope"]
        if isinstance(kind, dict):
            if rope is None and "options" not in kind:
                raise ValueError(
                    f"the encoding is a {kind['class']}, which cannot be rebuilt from config.json: pass rope="
                )
            kind = rope if rope is not None else _rebuild(kind)
        return cls(kind, saved["start"], saved["keep_absolute"], saved.get("legacy"))


def check_encoding(encoding: nn.Module, layout: Layout) -> None:
    """Raise unless its tables match the heads of this attention."""
    with torch.no_grad():
        table = _table_of(encoding, PatchGrid(1, 1))
    name = type(encoding).__name__
    if not isinstance(table, Rotary):
        if not callable(table):
            raise TypeError(_not_a_table(encoding, table))
        return
    if table.rotary_dim > layout.head_dim:
        raise ValueError(
            f"rope rotates {table.rotary_dim} channels, the tower's heads have {layout.head_dim}: build {name} for "
            f"head_dim={layout.head_dim}"
        )
    heads = table.cos.shape[2]
    if heads != 1 and not heads == layout.heads == layout.kv_heads:
        raise ValueError(
            f"rope has a table for each of {heads} heads, the tower's attention has {layout.heads} heads of queries "
            f"and {layout.kv_heads} of keys: they must be as many, or share one table"
        )


def _table_of(rope: nn.Module, grid: PatchGrid) -> Any:
    try:
        return rope(grid)
    except Exception as failed:
        height, width = grid.images[0]
        raise ValueError(
            f"rope={type(rope).__name__} fails on a grid of {height} x {width} patches: "
            f"{type(failed).__name__}: {failed}"
        ) from failed


def _not_a_table(rope: nn.Module, table: Any) -> str:
    return f"rope must return a spatial_pe.Rotary, but {type(rope).__name__} returns {type(table).__name__}"


def _options(rope: nn.Module) -> dict[str, Any]:
    """Return the arguments that rebuild this encoding, without learned values: those are in the state dict."""
    options = {name: getattr(rope, name) for name in signature(type(rope)).parameters}
    if isinstance(options.get("strength"), nn.Parameter):
        options["strength"] = 0.0
    return options


def _rebuild(kind: dict[str, Any]) -> nn.Module:
    known = {f"{cls.__module__}.{cls.__qualname__}": cls for cls in (AxialRoPE, MixedRoPE)}
    if kind["class"] not in known:
        raise ValueError(f"config.json names the encoding {kind['class']}, which is not spatial_pe's: pass rope=")
    options = dict(kind["options"])
    if known[kind["class"]] is MixedRoPE:
        options["init"] = "identity"  # no random numbers; the values come from the state dict
    return known[kind["class"]](**options)
