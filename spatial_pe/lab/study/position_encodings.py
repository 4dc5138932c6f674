# SPDX-License-Identifier: Apache-2.0
"""Position encodings that the study compares, behind one interface, so that models differ in nothing else.

An encoding adds a table to the patch embeddings (``absolute``), or enters the attention (``attend``), or both. All
attention runs through ``rope_attention``, except ALiBi's, whose bias rotary kernels do not support.

At another resolution than that of training, the grid needs coordinates: ``stretch=False`` numbers its patches from 0 as
in training, beyond what was seen; ``stretch=True`` spreads the training grid's coordinates over it. Learned tables
support only the second: they are resized.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...encodings import AxialRoPE, MixedRoPE
from ...grid import PatchGrid
from ...ops.attention import rope_attention
from ...rotary import Rotary
from ...towers.legacy import Mismatched2DRoPE


@dataclass(frozen=True)
class Where:
    """Grid of patches, and the side of the training grid."""

    height: int
    width: int
    trained: int
    stretch: bool = False
    device: torch.device | None = None

    def coordinates(self) -> Tensor:
        """Return (N, 2) row and column, float32. If stretched, patch centres keep their relative position."""
        at = PatchGrid(self.height, self.width).coordinates().to(self.device)
        if not self.stretch:
            return at
        size = torch.tensor([self.height, self.width], device=self.device)
        return (at + 0.5) * self.trained / size - 0.5


@dataclass(frozen=True)
class Shape:
    """Shape of the tower: width C, heads H, head_dim D, side of the training grid in patches."""

    width: int
    heads: int
    trained: int

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


# ----------------------------------------------------------------------------- added to the patch embeddings: (N, C)


class LearnedTable(nn.Module):
    """One learned vector per patch of the 1D sequence (ViT, CLIP, SigLIP, DINOv2), resized by bicubic interpolation."""

    def __init__(self, shape: Shape, spread: float = 0.02) -> None:
        super().__init__()
        self.table = nn.Parameter(spread * torch.randn(1, shape.width, shape.trained, shape.trained))

    def forward(self, where: Where) -> Tensor:
        size = (where.height, where.width)
        table: Tensor = self.table
        if table.shape[-2:] != size:
            table = F.interpolate(table, size, mode="bicubic", align_corners=False)
        return table[0].flatten(1).T


class LearnedAxes(nn.Module):
    """Half of the channels learned for each row, half for each column (ViT, appendix D.4), resized linearly."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.axes = nn.Parameter(0.02 * torch.randn(2, shape.width // 2, shape.trained))

    def forward(self, where: Where) -> Tensor:
        rows, columns = (
            F.interpolate(axis[None], size, mode="linear", align_corners=False)[0].T
            for axis, size in zip(self.axes, (where.height, where.width), strict=True)
        )
        grid = (where.height, where.width, -1)
        return torch.cat([rows[:, None].expand(grid), columns[None].expand(grid)], dim=-1).flatten(0, 1)


class SinCos(nn.Module):
    """Fixed sines and cosines of the row and of the column, a quarter of the channels each (MAE)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        quarter = shape.width // 4
        self.frequencies: Tensor
        self.register_buffer("frequencies", 10000.0 ** (-torch.arange(quarter) / quarter), persistent=False)

    def forward(self, where: Where) -> Tensor:
        angles = where.coordinates()[..., None] * self.frequencies  # (N, 2, C/4)
        return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)


# ------------------------------------------------------------------------- in the attention: q, k, v (B, N, H, D)


class Alibi2D(nn.Module):
    """A penalty on the score that grows with the distance of two patches, in patches; a slope per head (CROMA)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.slopes: Tensor
        slopes = 2.0 ** (-8.0 * torch.arange(1, shape.heads + 1) / shape.heads)
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(self, at: Tensor) -> Bias:
        return Bias(-self.slopes[:, None, None] * torch.cdist(at, at))


@dataclass(frozen=True)
class Bias:
    """Bias (H, N, N), added to the scores."""

    values: Tensor


def attend(qkv: tuple[Tensor, ...], how: object) -> Tensor:
    """Compute attention of ``qkv``, each (B, N, H, D); ``how``: the result of an encoding's ``relative`` module: a
    Rotary, a Bias, a function of q and k, or None."""
    q, k, v = qkv
    if isinstance(how, Bias):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=how.values).transpose(1, 2)
    if how is None or isinstance(how, Rotary):
        return rope_attention(q, k, v, how)
    return rope_attention(how(q), how(k), v)  # type: ignore[operator]


# ------------------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Encoding:
    label: str
    absolute: Callable[[Shape], nn.Module] | None = None
    relative: Callable[[Shape], nn.Module] | None = None

    @property
    def stretches(self) -> bool:
        """True if it can be evaluated with and without stretched coordinates."""
        return self.relative is not None or self.absolute is SinCos


def _axial(theta: float) -> Callable[[Shape], nn.Module]:
    return lambda shape: AxialRoPE(shape.head_dim, theta)


def _mixed(shape: Shape) -> nn.Module:
    return MixedRoPE(shape.head_dim, shape.heads)


def _mismatched(shape: Shape) -> nn.Module:
    return Mismatched2DRoPE(shape.head_dim)


ENCODINGS = {
    "none": Encoding("none"),
    "learned-1d": Encoding("learned", LearnedTable),
    # as large as the patch embeddings from the start, like the sines and cosines: to separate the table from its size
    "learned-large": Encoding("learned, std 0.7", lambda shape: LearnedTable(shape, 0.7)),
    "learned-2d": Encoding("learned, rows and columns", LearnedAxes),
    "sincos-2d": Encoding("2D sin-cos", SinCos),
    "axial": Encoding("axial RoPE, base 100", None, _axial(100.0)),  # rope-vit's base
    "axial-10000": Encoding("axial RoPE, base 10,000", None, _axial(10000.0)),  # Qwen-VL's and Pixtral's
    "mixed": Encoding("mixed RoPE", None, _mixed),
    "axial+learned": Encoding("axial RoPE and learned", LearnedTable, _axial(100.0)),
    "mismatched": Encoding("2601.09954's code", None, _mismatched),
    "alibi-2d": Encoding("ALiBi-2D", None, Alibi2D),
}


class PositionEncoding(nn.Module):
    """One row of ENCODINGS, with its parameters: a table for the embeddings, and one encoding for each layer."""

    def __init__(self, name: str, shape: Shape, depth: int) -> None:
        super().__init__()
        encoding = ENCODINGS[name]
        self.absolute = encoding.absolute(shape) if encoding.absolute else None
        relative = encoding.relative
        self.relative = nn.ModuleList([relative(shape) for _ in range(depth)]) if relative else None

    def table(self, where: Where) -> Tensor | None:
        """Return (N, C), or None."""
        return None if self.absolute is None else self.absolute(where)

    def layers(self, where: Where, depth: int) -> list[object]:
        """Return the argument of ``attend`` for each layer."""
        if self.relative is None:
            return [None] * depth
        at = where.coordinates()
        return [module(at) for module in self.relative]
