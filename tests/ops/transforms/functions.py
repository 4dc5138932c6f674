# SPDX-License-Identifier: Apache-2.0
"""The rows of the table: every public function on tensors, and patched towers, as functions of float32 tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from families import FAMILIES
from torch import Tensor, nn

import spatial_pe
from spatial_pe import (
    AxialRoPE,
    MixedRoPE,
    PatchGrid,
    RoPE2DAttention,
    Rotary,
    apply_rotary,
    apply_rotary_qk,
    rope_attention,
)

GRID = PatchGrid(3, 4)
HEADS, DIM = 2, 16
WIDTH = HEADS * DIM
ANGLES = torch.randn(GRID.num_tokens, DIM // 2, generator=torch.Generator().manual_seed(7))


@dataclass(frozen=True)
class Function:
    """call(*args) returns one tensor; all args are float32 tensors, without a batch that transforms may not touch.

    module: the module that call runs, if it is one. own: the same before it was patched: where a transform cannot do
    that either, nobody expects it to do ours.
    """

    call: Callable[..., Tensor]
    args: tuple[Tensor, ...]
    module: nn.Module | None = None
    own: Callable[..., Tensor] | None = None


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def qkv(*lead: int, kv_heads: int = HEADS) -> tuple[Tensor, ...]:
    return tuple(randn(*lead, heads, DIM, seed=i) for i, heads in enumerate((HEADS, kv_heads, kv_heads)))


def constant_table(x: Tensor, pairing: str = "half") -> Rotary:
    return Rotary.from_angles(ANGLES.to(x.device), pairing)


def int32(x: Tensor, *values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=x.device)


# ------------------------------------------------------------------------------------------------------------- the op


def dense() -> Function:
    return Function(lambda q, k, v: rope_attention(q, k, v, constant_table(q)), qkv(2, GRID.num_tokens))


def grouped() -> Function:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return rope_attention(q, k, v, constant_table(q, "interleaved"), scale=-0.3)

    return Function(call, qkv(2, GRID.num_tokens, kv_heads=1))


def plain() -> Function:
    return Function(lambda q, k, v: rope_attention(q, k, v), qkv(1, 7))


def angles() -> Function:
    """Gradients of the angles too: one table per head and sample."""

    def call(q: Tensor, k: Tensor, v: Tensor, angles: Tensor) -> Tensor:
        return rope_attention(q, k, v, Rotary.from_angles(angles))

    return Function(call, (*qkv(2, 5), randn(2, 5, HEADS, DIM // 2, seed=5)))


def packed() -> Function:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lengths = int32(q, 0, 5, 5, 6, 12)
        return rope_attention(q, k, v, constant_table(q), cu_seqlens=lengths, max_seqlen=6)

    return Function(call, qkv(GRID.num_tokens))


def padded() -> Function:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return rope_attention(q, k, v, constant_table(q), seqlens=int32(q, 12, 0, 5))

    return Function(call, qkv(3, GRID.num_tokens))


def _to_other_tokens(*lead: int, **lengths: tuple[int, ...]) -> Function:
    """Keys of 9 other tokens; gradients of both tables too."""

    def call(q: Tensor, k: Tensor, v: Tensor, angles: Tensor, angles_k: Tensor) -> Tensor:
        given = {name: int32(q, *values) for name, values in lengths.items()}
        return rope_attention(q, k, v, Rotary.from_angles(angles), rotary_k=Rotary.from_angles(angles_k), **given)

    (q, _, _), (_, k, v) = qkv(*lead, GRID.num_tokens), qkv(*lead, 9, kv_heads=1)
    return Function(call, (q, k, v, ANGLES, randn(9, DIM // 2, seed=8)))


def cross() -> Function:
    return _to_other_tokens(2)


def cross_packed() -> Function:
    return _to_other_tokens(cu_seqlens=(0, 5, 5, 6, 12), cu_seqlens_k=(0, 2, 4, 4, 9))


def cross_padded() -> Function:
    return _to_other_tokens(3, seqlens=(12, 7, 5), seqlens_k=(4, 0, 9))


# ---------------------------------------------------------------------------------------------- rotation and encodings


def rotate() -> Function:
    return Function(lambda x: apply_rotary(x, constant_table(x, "interleaved")), qkv(2, GRID.num_tokens)[:1])


def rotate_qk() -> Function:
    def call(q: Tensor, k: Tensor) -> Tensor:
        return torch.cat(apply_rotary_qk(q, k, constant_table(q)), 2)

    return Function(call, qkv(2, GRID.num_tokens, kv_heads=1)[:2])


def _table(encoding: nn.Module) -> Function:
    def call(coordinates: Tensor) -> Tensor:
        rotary = encoding(coordinates)
        return torch.cat([rotary.cos, rotary.sin], dim=-1)

    return Function(call, (randn(6, 2, seed=3),), encoding)


def axial() -> Function:
    return _table(AxialRoPE(DIM, strength=0.7))


def mixed() -> Function:
    torch.manual_seed(0)
    return _table(MixedRoPE(DIM, HEADS))


# -------------------------------------------------------------------------------------------------------------- modules


def _module(rope: str) -> Function:
    torch.manual_seed(0)
    module = RoPE2DAttention(WIDTH, HEADS, rope=rope)
    return Function(lambda x: module(x, GRID), (randn(2, GRID.num_tokens, WIDTH),), module)


def module_axial() -> Function:
    return _module("axial")


def module_mixed() -> Function:
    return _module("mixed")


def module_packed() -> Function:
    torch.manual_seed(0)
    module, grid = RoPE2DAttention(WIDTH, HEADS), PatchGrid.packed([(2, 3), (1, 4)])
    return Function(lambda x: module(x, grid), (randn(grid.num_tokens, WIDTH),), module)


# --------------------------------------------------------------------------------------------------------------- towers


class Tower(nn.Module):
    """A tower as a module of its pixels alone; the tokens that exist, in one tensor."""

    def __init__(self, model: nn.Module, inputs: dict, valid: Tensor | None) -> None:
        super().__init__()
        self.model, self.inputs, self.valid = model, inputs, valid

    def forward(self, x: Tensor) -> Tensor:
        name = "hidden_states" if "hidden_states" in self.inputs else "pixel_values"
        result = self.model(**{**self.inputs, name: x})
        out = result if isinstance(result, Tensor) else result[0]
        return out if self.valid is None else torch.where(self.valid[..., None], out, 0.0)


def _tower(family: str, **options) -> Function:
    chosen = FAMILIES[family]
    inputs = chosen.inputs()
    valid = chosen.valid(inputs) if chosen.valid else None
    own, tower = (Tower(chosen.make(), inputs, valid).eval() for _ in range(2))
    torch.manual_seed(0)
    assert spatial_pe.patch(tower.model, **options).patched
    x = inputs.get("pixel_values", inputs.get("hidden_states"))
    return Function(tower, (x,), tower, own)


TOWERS: dict[str, Callable[[], Function]] = {
    "tower": functools.partial(_tower, "clip"),
    "tower, own RoPE": functools.partial(_tower, "dinov3"),
    "tower, packed": functools.partial(_tower, "qwen2_5_vl"),
    "tower, padded": functools.partial(_tower, "siglip2"),
    "tower, axial added": functools.partial(_tower, "clip", rope="axial", start="full"),
    "tower, mixed added": functools.partial(_tower, "clip", rope="mixed", start="full"),
    "tower, padded, axial added": functools.partial(_tower, "siglip2", rope="axial", start="full"),
}

FUNCTIONS: dict[str, Callable[[], Function]] = {
    "rope_attention": dense,
    "rope_attention, grouped": grouped,
    "rope_attention, no rotary": plain,
    "rope_attention, angles": angles,
    "rope_attention, packed": packed,
    "rope_attention, padded": padded,
    "rope_attention, other tokens": cross,
    "rope_attention, other tokens, packed": cross_packed,
    "rope_attention, other tokens, padded": cross_padded,
    "apply_rotary": rotate,
    "apply_rotary_qk": rotate_qk,
    "AxialRoPE": axial,
    "MixedRoPE": mixed,
    "RoPE2DAttention, axial": module_axial,
    "RoPE2DAttention, mixed": module_mixed,
    "RoPE2DAttention, packed": module_packed,
    **TOWERS,
}
