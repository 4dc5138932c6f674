# SPDX-License-Identifier: Apache-2.0
"""Rotary: a table of angles and the pairing of the channels that they rotate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ._utils.dispatcher import fx_node, has_values, unrecorded

Pairing = Literal["half", "interleaved", "axis_half"]
PAIRINGS: tuple[str, ...] = get_args(Pairing)


@dataclass(frozen=True, eq=False)
class Rotary:
    """cos and sin of the angle of every channel pair of every token.

    A pair ``(x1, x2)`` becomes ``(x1 cos - x2 sin, x1 sin + x2 cos)``. With rotary dim R, ``pairing`` says which
    channels make a pair; pairs, and so the columns of the table, are numbered by their first channel:

    - ``"half"``: j and j + R/2 (GPT-NeoX, Qwen-VL, DINOv3, Pixtral);
    - ``"interleaved"``: 2j and 2j + 1 (RoFormer, EVA-02, Llama 4, SAM 3, timm);
    - ``"axis_half"``: j and j + R/4 inside each half of the R channels (Gemma 4).

    Channels past R pass through. A token that is not rotated (CLS, registers) has cos = 1, sin = 0.

    Args:
        cos, sin: float32 (float64 is kept, for references), shape (B|1, N, H|1, R/2), or (N, R/2), which is
            stored as (1, N, 1, R/2). May require grad.
        pairing: see above; ``"axis_half"`` needs R/2 to be even.

    Raises:
        TypeError, ValueError: wrong dtype, shape, pairing, or NaN/Inf in a table on the CPU.
    """

    cos: Tensor
    sin: Tensor
    pairing: Pairing = "half"

    def __new__(cls, *args: Any, **kwargs: Any) -> Rotary:
        node = fx_node(cls, *args, **kwargs)
        return object.__new__(cls) if node is None else node

    def __post_init__(self) -> None:
        if self.pairing not in PAIRINGS:
            raise ValueError(f"pairing must be one of {PAIRINGS}, got {self.pairing!r}")
        for name in ("cos", "sin"):
            table = getattr(self, name)
            unrecorded(_check_table, table, name)
            if table.ndim == 2:
                object.__setattr__(self, name, table[None, :, None, :])
        unrecorded(self.check)
        unrecorded(self._check_values)

    def check(self) -> None:
        """Raise unless the two tables match."""
        if self.cos.shape != self.sin.shape:
            raise ValueError(f"cos has shape {tuple(self.cos.shape)}, sin {tuple(self.sin.shape)}: they must be equal")
        if self.cos.dtype != self.sin.dtype or self.cos.device != self.sin.device:
            raise ValueError("cos and sin must have the same dtype and device")
        if self.pairing == "axis_half" and self.cos.shape[-1] % 2:
            raise ValueError(f'pairing="axis_half" needs an even number of pairs, got {self.cos.shape[-1]}')

    def _check_values(self) -> None:
        if has_values(self.cos):
            for name in ("cos", "sin"):
                # a sum is finite unless a term is not: 10 times as fast as isfinite().all() on a 1024 x 40 table
                if not torch.isfinite(getattr(self, name).detach().sum()):
                    raise ValueError(f"{name} holds NaN or Inf: check the coordinates and frequencies that made it")

    # ------------------------------------------------------------ making one

    @classmethod
    def _unchecked(cls, cos: Tensor, sin: Tensor, pairing: Pairing) -> Rotary:
        """Build a Rotary from canonical (B|1, N, H|1, R/2) tables without the NaN check (40 us at (4480, 40))."""
        rotary = object.__new__(cls)
        for name, value in (("cos", cos), ("sin", sin), ("pairing", pairing)):
            object.__setattr__(rotary, name, value)
        return rotary

    @classmethod
    def from_angles(cls, angles: Tensor, pairing: Pairing = "half") -> Rotary:
        """Build a Rotary from angles in radians, (N, R/2) or (B|1, N, H|1, R/2); differentiable."""
        if (node := fx_node(cls.from_angles, angles, pairing)) is not None:
            return node
        if not isinstance(angles, Tensor):
            raise TypeError(f"angles must be a torch.Tensor, got {type(angles).__name__}")
        return cls(angles.cos(), angles.sin(), pairing)

    @classmethod
    def identity(
        cls, num_tokens: int, rotary_dim: int, pairing: Pairing = "half", device: torch.device | str | None = None
    ) -> Rotary:
        """Return the table of tokens that are not rotated, e.g. for the keys of a cross-attention."""
        shape = (1, num_tokens, 1, rotary_dim // 2)
        return cls(torch.ones(shape, device=device), torch.zeros(shape, device=device), pairing)

    @classmethod
    def cat(cls, tables: Sequence[Rotary]) -> Rotary:
        """Return the rows of several tables behind each other: of images, memories, and tokens that are not rotated.

        Raises:
            ValueError: there are none, or they rotate different pairs.
        """
        kinds = {(table.rotary_dim, table.pairing) for table in tables}
        if len(kinds) != 1:
            raise ValueError(f"tables must rotate the same pairs, got {sorted(kinds) or 'no table'}")
        batch, heads = (max(table.cos.shape[i] for table in tables) for i in (0, 2))
        cos, sin = (
            torch.cat([x.expand(batch, -1, heads, -1) for x in parts], dim=1)
            for parts in ([table.cos for table in tables], [table.sin for table in tables])
        )
        return cls(cos, sin, tables[0].pairing)

    def __fx_create_arg__(self, tracer: Any) -> Any:
        """Return the node of a constant in a torch.fx graph."""
        args = tuple(tracer.create_arg(x) for x in (self.cos, self.sin, self.pairing))
        return tracer.create_node("call_function", Rotary._unchecked, args, {}, name="rotary")

    # ---------------------------------------------------------------- shapes

    @property
    def num_tokens(self) -> int:
        return self.cos.shape[1]

    @property
    def rotary_dim(self) -> int:
        """R: the number of rotated channels."""
        return 2 * self.cos.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.cos.device

    # ------------------------------------------------------------ converting

    def to(self, *args, **kwargs) -> Rotary:
        """Move or cast both tables, like Tensor.to."""
        cos, sin = self.cos.to(*args, **kwargs), self.sin.to(*args, **kwargs)
        if cos is self.cos and sin is self.sin:
            return self  # another NaN check costs 30 us
        return Rotary(cos, sin, self.pairing)

    def index_tokens(self, index: Tensor) -> Rotary:
        """Return the rows in another order, e.g. the permutation of ``PatchGrid.windows``."""
        return self._unchecked(self.cos.index_select(1, index), self.sin.index_select(1, index), self.pairing)

    def slice(self, sample: int, start: int, stop: int) -> Rotary:
        """Return the rows of tokens start..stop of one sample: tables of shape (1, stop - start, H|1, R/2)."""
        b = sample if self.cos.shape[0] > 1 else 0
        return self._unchecked(self.cos[b : b + 1, start:stop], self.sin[b : b + 1, start:stop], self.pairing)

    def inverse(self) -> Rotary:
        """Return the inverse rotation: the transpose, since a rotation is orthogonal."""
        return self._unchecked(self.cos, -self.sin, self.pairing)


def _check_table(table: Tensor, name: str) -> None:
    if not isinstance(table, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(table).__name__}")
    if table.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32, got {table.dtype}: angles in low precision are wrong angles")
    if table.ndim not in (2, 4):
        raise ValueError(f"{name} must be (N, R/2) or (B|1, N, H|1, R/2), got shape {tuple(table.shape)}")


# Mixed precision of FSDP rebuilds every dataclass among a block's arguments with its tensors cast: bfloat16 angles.
del Rotary.__dataclass_fields__


def rotated(x: Tensor, rotary: Rotary) -> Tensor:
    """Compute R(x) in plain PyTorch, (B, N, H, D) or packed (T, H, D): float32 inside (float64 for float64 x)."""
    if x.ndim == 3:
        return rotated(x[None], rotary)[0]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = rotary.cos.to(wide), rotary.sin.to(wide)
    rotary_dim = rotary.rotary_dim
    x1, x2 = split_pairs(x[..., :rotary_dim].to(wide), rotary.pairing)
    out = join_pairs(x1 * cos - x2 * sin, x1 * sin + x2 * cos, rotary.pairing).to(x.dtype)
    return out if rotary_dim == x.shape[-1] else torch.cat([out, x[..., rotary_dim:]], dim=-1)


def angle_gradient(x: Tensor, dx: Tensor, table: Tensor, pairing: str) -> Tensor:
    """Return dφ = x₁·dx₂ - x₂·dx₁, from the un-rotated x and its final gradient: R commutes with a rotation by 90°.

    (B, N, H, D) -> the shape of the table, (B|1, N, H|1, R/2), summed over the samples and heads that share an angle.
    """
    rotary_dim = 2 * table.shape[-1]
    x1, x2 = split_pairs(x[..., :rotary_dim].to(table.dtype), pairing)
    g1, g2 = split_pairs(dx[..., :rotary_dim].to(table.dtype), pairing)
    return (x1 * g2 - x2 * g1).sum_to_size(table.shape)


# How far cos² + sin² of a table that requires a gradient may be from 1: tables in bfloat16 are off by 0.008.
OFF_CIRCLE = 0.02


def table_gradients(cos: Tensor, sin: Tensor, dphi: Tensor) -> tuple[Tensor, Tensor]:
    """Return dcos and dsin from the gradient of the angles, for tables on the unit circle.

    They are the components along the circle; the component that would change a magnitude is not computed. So tables off
    the unit circle are refused where their values can be read, and get NaN where they cannot.
    """
    squared = cos * cos + sin * sin
    on_circle = ((squared - 1).abs() <= OFF_CIRCLE) | (squared == 0)  # timm's rows for padding, where dphi is 0
    if not has_values(squared):
        dphi = torch.where(on_circle, dphi, torch.nan)
    elif not on_circle.all():
        raise ValueError(
            f"spatial_pe: cos² + sin² is {squared[~on_circle][0]:.3g} in a table that requires a gradient, which "
            "exists for rotations only: scale q by the magnitude and pass a Rotary.from_angles(...)"
        )
    dphi = dphi / torch.where(squared == 0, 1, squared)
    return -sin * dphi, cos * dphi


def split_pairs(x: Tensor, pairing: str) -> tuple[Tensor, Tensor]:
    """Split (..., R) into the first and second channels of the pairs, each (..., R/2), as views where possible."""
    if pairing == "half":
        first, second = x.chunk(2, dim=-1)
    elif pairing == "interleaved":
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        first, second = (part.flatten(-2) for part in x.unflatten(-1, (2, 2, -1)).unbind(-2))
    return first, second


def join_pairs(first: Tensor, second: Tensor, pairing: str) -> Tensor:
    """Invert split_pairs: two (..., R/2) -> (..., R)."""
    if pairing == "half":
        return torch.cat([first, second], dim=-1)
    if pairing == "interleaved":
        return torch.stack([first, second], dim=-1).flatten(-2)
    halves = [part.unflatten(-1, (2, -1)) for part in (first, second)]
    return torch.stack(halves, dim=-2).flatten(-3)


def check_rotary_fits(x: Tensor, rotary: Rotary, name: str, table: str = "rotary") -> None:
    """Raise unless the tables match x of shape (B, N, H, D)."""
    if not isinstance(rotary, Rotary):
        raise TypeError(f"{table} must be a spatial_pe.Rotary or None, got {type(rotary).__name__}")
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor, got {x.dtype}")
    if x.ndim != 4:
        raise ValueError(f"{name} must be (B, N, H, D) or packed (T, H, D), got shape {tuple(x.shape)}")
    batch, tokens, heads, dim = x.shape
    table_batch, table_tokens, table_heads, _ = rotary.cos.shape
    if table_tokens != tokens:
        hint = ""
        if heads == table_tokens and tokens != table_tokens:
            hint = f": is {name} (batch, heads, tokens, head_dim)? Pass {name}.transpose(1, 2)"
        elif 0 < tokens - table_tokens <= 16:
            hint = f": did you forget prefix={tokens - table_tokens}?"
        raise ValueError(f"{table} has {table_tokens} tokens, {name} has {tokens}{hint}")
    if rotary.rotary_dim > dim:
        raise ValueError(f"{table} rotates {rotary.rotary_dim} channels, {name} has head_dim {dim}: R must be <= D")
    if table_heads not in (1, heads):
        raise ValueError(f"{table} has {table_heads} heads, {name} has {heads}: it must have 1 or {heads}")
    if table_batch not in (1, batch):
        raise ValueError(f"{table} has batch {table_batch}, {name} has {batch}: it must have 1 or {batch}")
    if rotary.device != x.device:
        raise ValueError(f"{table} is on {rotary.device}, {name} on {x.device}: use {table}.to({str(x.device)!r})")
