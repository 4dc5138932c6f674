# SPDX-License-Identifier: Apache-2.0
"""Convert the rotation that a tower passes to its attention into a Rotary, once per forward and not once per layer.

Four forms are in use, with one column per channel (each angle twice) or per pair:

- ``(cos, sin)``, each (N, R), (1, N, R) or (B, N, R): transformers;
- complex (N, R/2) or (N, 1, R/2): Llama 4;
- the angles (N, R/2), ``rotary_pos_emb``: Qwen2.5-Omni in transformers 4;
- ``[sin | cos]`` (N, 2R), (H, N, 2R), (B, 1, N, 2R): timm, per head where the encoding is mixed.

Or it passes positions, and the module has a callable that rotates by them (CroCo, DUSt3R, VGGT): the table is read off
that. A vector with 1 in the first channel of each pair and 0 in the second comes back as cos and sin.

With a column per channel, the two columns of a pair must be equal: of tables ordered for another pairing a Rotary would
hold half, and the proof does not notice, since it has its own tables. Eager calls read the values: on the CPU in every
forward; on a GPU, which they wait for, until those of a module were equal once. Traced calls (torch.compile, export,
jit.trace, vmap) cannot read values: there a column that differs from its partner becomes NaN, and so does the output. A
module that was called before it was traced, and got such tables, is traced with its original forward.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.dispatcher import is_traced
from .._utils.tensor_cache import once_per_forward
from ..rotary import Rotary, join_pairs, split_pairs
from .forms import ForwardForm

# types as a tuple: dynamo of torch 2.9 supports no union of them
PAIR = (tuple, list)
DIFFER = "the two halves of cos and sin differ"


@dataclass
class Seen:
    """State of the tables that the tower last passed to one attention module: none yet, or which."""

    alike: bool = False
    differ: bool = False


def rotation_of(value: Any, form: ForwardForm, tokens: int, head_dim: int, pairing: str, seen: Seen) -> Rotary | str:
    """Return a Rotary of ``tokens`` rows, unrotated ones first where the tables have fewer; or why value is none.

    Making a Rotary checks for NaN and costs 20 us, a cache hit 3 us.
    """
    tables = _tables(value, form, head_dim)
    if isinstance(tables, str):
        return tables
    key = value[0] if isinstance(value, PAIR) else value
    others = tuple(value[1:]) if isinstance(value, PAIR) else ()
    cos, sin, repeated = tables
    prefix = tokens - cos.shape[1]
    if prefix < 0:
        return f"its rotation has {cos.shape[1]} rows for {tokens} tokens"
    if is_traced(cos):
        return DIFFER if repeated and seen.differ else _make(cos, sin, repeated, prefix, pairing, unseen=True)
    differentiable = cos.requires_grad or sin.requires_grad

    def make() -> Rotary | str | None:
        if repeated and not _alike(cos, sin, pairing, seen):
            return DIFFER
        # if cached, a differentiable one would hold the graph of its own key
        return None if differentiable else _make(cos, sin, repeated, prefix, pairing)

    found = once_per_forward(key, others, (prefix, pairing, differentiable), make)
    seen.alike, seen.differ = found is not DIFFER, found is DIFFER
    return _make(cos, sin, repeated, prefix, pairing) if found is None else found


Rope = Callable[..., Any]


def rope_of(module: nn.Module, form: ForwardForm) -> Rope | None:
    """Return the callable by which a module rotates, if it has one."""
    if form.function:
        original = getattr(type(module), "original", type(module))
        return inspect.unwrap(original.forward).__globals__.get(form.function)
    return next((rope for name in form.rope if (rope := getattr(module, name, None)) is not None), None)


@dataclass(frozen=True)
class OwnRotation:
    """A tower's own callable for q and k (B, N, H, D), where that is no rotation of pairs."""

    rope: Rope
    positions: Any
    positions_k: Any
    both: bool

    def __call__(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        if self.both:
            q, k = self.rope(q, k, self.positions)
        else:
            q, k = self.rope(q, self.positions), self.rope(k, self.positions_k)
        return q.transpose(1, 2), k.transpose(1, 2)


def table_at(rope: Rope, positions: Any, x: Tensor, dim: int, pairing: str, both: bool = False) -> Rotary | str:
    """Return the Rotary of a callable for heads of ``dim`` channels, at the positions of tokens x (B, N, C), or why it
    has none.

    The callable gets (B|1, 1, N, D) and may return more heads. Its angles are those that it has for float32 (float64
    for float64): some round them to the dtype of the tokens.
    """
    batch, tokens = x.shape[:2]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    is_table = isinstance(positions, Tensor) and positions.ndim == 3
    if isinstance(positions, Tensor) and not (
        is_table and positions.shape[0] in (1, batch) and positions.shape[1] == tokens
    ):
        return f"its positions are {tuple(positions.shape)} for {batch} x {tokens} tokens"

    def make() -> Rotary | str:
        one = torch.ones(dim // 2, dtype=wide, device=x.device)
        samples = positions.shape[0] if is_table else 1
        probe = join_pairs(one, torch.zeros_like(one), pairing).repeat(samples, 1, tokens, 1)
        with torch.autocast(x.device.type, enabled=False):
            result = rope(probe, probe.clone(), positions)[0] if both else rope(probe, positions)
        if not isinstance(result, Tensor) or result.ndim != 4 or result.shape[2:] != (tokens, dim):
            return "its rope does not return what it got, rotated"
        cos, sin = (table.transpose(1, 2) for table in split_pairs(result.to(wide), pairing))
        make = Rotary._unchecked if is_traced(cos) else Rotary
        return make(cos.contiguous(), sin.contiguous(), pairing)  # type: ignore[arg-type]

    learned = isinstance(rope, nn.Module) and next(rope.parameters(), None) is not None
    if learned or not isinstance(positions, Tensor) or positions.requires_grad or is_traced(positions):
        return make()
    return once_per_forward(positions, (), (rope, _state(rope), dim, wide, pairing), make)


def _state(rope: Any) -> tuple:
    """Return what the angles of a callable depend on: its numbers, and its buffers."""
    if not isinstance(rope, nn.Module):
        return ()
    numbers = tuple((name, value) for name, value in vars(rope).items() if isinstance(value, int | float))
    return numbers, tuple((id(x), -1 if x.is_inference() else x._version) for x in rope.buffers())


def table_of_grid(module: nn.Module, form: ForwardForm, tokens: int) -> Any:
    """Return the module's own table for the queries, of a square grid; where that is of another size it is made again,
    and kept as the module itself does."""
    table = getattr(module, form.rotation)
    if table.shape[0] != tokens:
        side = math.isqrt(tokens)
        if side * side != tokens:
            return None
        table = module.compute_cis(end_x=side, end_y=side)  # type: ignore[operator]
        setattr(module, form.rotation, table)
    return table


def of_keys(rotary: Rotary, tokens: int, excluded: int, groups: int | None) -> Rotary | str:
    """Return the table of keys that are ``groups`` times the rows of ``rotary``, each behind as many keys that are not
    rotated as there are too many, and in front of ``excluded`` others that are not rotated.

    groups: None: as often as they fit. Memories of frames, each with tokens without a place (EdgeTAM), and then the
    pointers to objects (SAM 2).
    """
    rotated, rows = tokens - excluded, rotary.num_tokens
    groups = max(rotated // rows, 1) if groups is None and rows else groups or 1
    before = rotated // groups - rows  # unrotated ones of each group
    if rotated == 0:
        groups = before = 0
    if not 0 <= excluded <= tokens or groups < 0 or before < 0 or (groups and rotated % groups):
        return f"its rotation has {rows} rows for {rotated} keys in {groups} groups"
    if rows == tokens and not excluded:
        return rotary

    def make() -> Rotary:
        parts = [_unrotated(rotary, before), rotary] * groups + [_unrotated(rotary, excluded)]
        return Rotary.cat([part for part in parts if part.num_tokens])

    if is_traced(rotary.cos) or rotary.cos.requires_grad:
        return make()
    return once_per_forward(rotary.cos, (rotary.sin,), (rotary.pairing, tokens, excluded, groups), make)


def _unrotated(rotary: Rotary, tokens: int) -> Rotary:
    made = Rotary.identity(tokens, rotary.rotary_dim, rotary.pairing, rotary.device)
    return made.to(rotary.cos.dtype)


def _tables(value: Any, form: ForwardForm, head_dim: int) -> tuple[Tensor, Tensor, bool] | str:
    """Return cos and sin as (B|1, N, H|1, columns), and whether there is a column for each channel of a pair."""
    if isinstance(value, PAIR) and len(value) == 2 and all(isinstance(x, Tensor) for x in value):
        cos, sin = value
        if cos.shape == sin.shape and cos.ndim in (2, 3) and cos.shape[-1] <= head_dim and cos.shape[-1] % 2 == 0:
            lead = (1,) * (3 - cos.ndim)
            return *(x.view(*lead, *x.shape).unsqueeze(2) for x in (cos, sin)), True  # type: ignore[return-value]
    elif form.tables == "angles" and isinstance(value, Tensor) and value.ndim == 2:
        angles = value[None, :, None]
        return angles.cos(), angles.sin(), False
    elif isinstance(value, Tensor) and value.is_complex():
        if value.shape[-1] == head_dim // 2 and value.numel() == value.shape[0] * value.shape[-1]:
            rows = value.view(1, value.shape[0], 1, -1)
            return rows.real, rows.imag, False
    elif isinstance(value, Tensor) and value.ndim in (2, 3, 4) and value.shape[-1] in range(4, 2 * head_dim + 1, 4):
        sin, cos = value.chunk(2, dim=-1)  # (N, R), (H, N, R) or (B, H|1, N, R)
        lead = (1,) * (4 - value.ndim)
        return *(x.reshape(*lead, *x.shape).transpose(1, 2) for x in (cos, sin)), True  # type: ignore[return-value]
    return f"its rotation is not a pair of tables for {head_dim} channels"


def _make(cos: Tensor, sin: Tensor, repeated: bool, prefix: int, pairing: str, unseen: bool = False) -> Rotary:
    """Make the Rotary. unseen: columns of one channel each whose values could not be compared."""
    wide = torch.float64 if cos.dtype == torch.float64 else torch.float32
    tables = []
    for x, unrotated in ((cos, 1.0), (sin, 0.0)):
        rows, others = split_pairs(x, pairing) if repeated else (x, x)
        if repeated and unseen:
            rows = torch.where((rows - others).abs() <= _rounding(x.dtype), rows, torch.nan)
        # copies: a view would keep the key of its own entry alive
        rows = rows.to(wide, copy=True, memory_format=torch.contiguous_format)
        if prefix:
            rows = torch.cat([rows.new_full((rows.shape[0], prefix, *rows.shape[2:]), unrotated), rows], dim=1)
        tables.append(rows)
    make = Rotary._unchecked if unseen else Rotary  # jit.trace would find the NaN, and blame the tower
    return make(tables[0], tables[1], pairing)  # type: ignore[arg-type]


def _rounding(dtype: torch.dtype) -> float:
    """Return how much equal columns may differ where a compiler computes each: an angle of 1000 has an ulp of 6e-5."""
    return max(1e-3, 4 * torch.finfo(dtype).eps)


def _alike(cos: Tensor, sin: Tensor, pairing: str, seen: Seen) -> bool:
    if seen.alike and not _free_to_look(cos):
        return True
    return all(torch.equal(*split_pairs(x, pairing)) for x in (cos, sin))


def _free_to_look(x: Tensor) -> bool:
    return x.device.type == "cpu"
