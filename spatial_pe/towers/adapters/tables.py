# SPDX-License-Identifier: Apache-2.0
"""A tower's own (cos, sin) as a Rotary, made once per forward and not once per layer."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...rotary import Rotary


@dataclass(frozen=True)
class _Entry:
    sin: weakref.ref
    version: tuple[int, int]
    prefix: int
    rotary: Rotary | None


# All layers of a forward get the same cos tensor, so it is the key; the entry goes when the tensor does.
_entries: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_trusted: set[type] = set()


def rotary_from_tables(cos: Tensor, sin: Tensor, prefix: int, owner: type) -> Rotary | None:
    """(N, D) tables whose halves repeat -> Rotary with ``prefix`` unrotated rows before; None if they do not repeat.

    Making a Rotary checks for NaN and costs 20 us, looking it up 3 us.
    """
    if torch.compiler.is_compiling() or cos.requires_grad or sin.requires_grad:
        return _make(cos, sin, prefix)
    entry = _entries.get(cos)
    version = (_version(cos), _version(sin))
    if entry is not None and entry.prefix == prefix and entry.sin() is sin and entry.version == version:
        return entry.rotary
    rotary = _make(cos, sin, prefix) if _halves_repeat(cos, sin, owner) else None
    _entries[cos] = _Entry(weakref.ref(sin), version, prefix, rotary)
    return rotary


def _make(cos: Tensor, sin: Tensor, prefix: int) -> Rotary:
    dtype = torch.float64 if cos.dtype == torch.float64 else torch.float32
    half = cos.shape[-1] // 2
    # copies: a view would keep the key of its own entry alive
    tables = []
    for x, unrotated in ((cos, 1.0), (sin, 0.0)):
        rows = x[:, :half].to(dtype, copy=True, memory_format=torch.contiguous_format)
        tables.append(torch.cat([rows.new_full((prefix, half), unrotated), rows]) if prefix else rows)
    return Rotary(tables[0], tables[1], "half")


def _halves_repeat(cos: Tensor, sin: Tensor, owner: type) -> bool:
    """Looks at the values: always on the CPU, elsewhere (where it waits for the device) once per attention class."""
    if cos.device.type != "cpu" and owner in _trusted:
        return True
    half = cos.shape[-1] // 2
    same = all(torch.equal(x[:, :half], x[:, half:]) for x in (cos, sin))
    if same:
        _trusted.add(owner)
    return same


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version
