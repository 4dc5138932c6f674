# SPDX-License-Identifier: Apache-2.0
"""Which shapes are measured, in which order, and the inputs of one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import spatial_pe

DIMS = (64, 72, 80, 96, 128)
TOKENS = (64, 196, 256, 576, 729, 1024, 1025, 2304, 4096)
# 64 tokens are a window of Qwen2.5-VL: packed, and an image of 448 x 448 pixels has 16 of them.
WINDOW, WINDOWS_OF_AN_IMAGE = 64, 16
HEADS = 16
# Tokens of all samples in the large batch: 80 MB for each of q, k, v at head_dim 64, more than an L2 holds.
LARGE = 36_864
# Images in the small batches, the ends first.
SMALL = (1, 8, 4, 2)
# (tokens, head_dim) that the project has promised figures for (report.TARGETS): measured first.
TARGETS = (
    *((64, 80), (64, 64), (196, 64), (256, 64), (576, 64)),
    *((729, 72), (1024, 64), (1025, 64), (1024, 80), (4096, 64)),
)
QUICK = ((64, 80), (196, 64), (576, 64), (729, 72), (1024, 80), (4096, 64))
ATTENTION = ("forward", "backward", "forward+backward")


@dataclass(frozen=True)
class Shape:
    """batch: samples, or windows where tokens is WINDOW."""

    batch: int
    tokens: int
    dim: int
    heads: int = HEADS

    @property
    def packed(self) -> bool:
        return self.tokens == WINDOW

    @property
    def size(self) -> list[int]:
        return [self.batch, self.heads, self.tokens, self.dim]

    @property
    def flops(self) -> int:
        """Of the forward: two matrix products."""
        return 4 * self.batch * self.heads * self.tokens**2 * self.dim

    def __str__(self) -> str:
        what = "windows of" if self.packed else "x"
        return f"{self.batch} {what} {self.tokens}, head_dim {self.dim}"


@dataclass(frozen=True)
class Work:
    """A shape and what is measured of it. "rotary" is the rotation alone. compiled: torch.compile takes part too, which
    costs half a minute of compilation for a shape."""

    shape: Shape
    directions: tuple[str, ...]
    rounds: int
    compiled: bool


def plan(quick: bool) -> list[Work]:
    """Most important first: a run does as many as it has time for, and lists the others.

    The shapes with targets come first, then small batches of them, then all other shapes, at last their small batches.
    """
    if quick:
        return [Work(_large(*pair), ("rotary", *ATTENTION), 5, True) for pair in QUICK]
    others = [(tokens, dim) for dim in DIMS for tokens in TOKENS if (tokens, dim) not in TARGETS]
    return [
        *(Work(_large(*pair), ("rotary", *ATTENTION), 9, True) for pair in TARGETS),
        *(Work(_small(*pair, batch), ATTENTION, 5, False) for batch in SMALL for pair in TARGETS),
        *(Work(_large(*pair), ("forward", "backward"), 5, False) for pair in others),
        *(Work(_small(*pair, batch), ("forward",), 5, False) for batch in SMALL for pair in others),
    ]


def _large(tokens: int, dim: int) -> Shape:
    return Shape(LARGE // tokens, tokens, dim)


def _small(tokens: int, dim: int, images: int) -> Shape:
    return Shape(images * WINDOWS_OF_AN_IMAGE if tokens == WINDOW else images, tokens, dim)


class Inputs:
    """Random normal bfloat16 q, k, v, as views of one fused projection; dense (B, N, H, D), packed (T, H, D)."""

    def __init__(self, shape: Shape, device: str) -> None:
        self.shape, self.device = shape, device
        sequences, tokens = shape.batch, shape.tokens
        lead = (sequences * tokens,) if shape.packed else (sequences, tokens)
        qkv = torch.randn(*lead, 3, shape.heads, shape.dim, device=device, dtype=torch.bfloat16)
        self.qkv = qkv.unbind(-3)
        self.leaves = [x.detach().requires_grad_() for x in self.qkv]
        self.grad = torch.randn(*lead, shape.heads, shape.dim, device=device, dtype=torch.bfloat16)

        side = int(tokens**0.5) + 1
        token = torch.arange(tokens)
        coordinates = torch.stack([token // side, token % side], 1).float()
        rotary = spatial_pe.AxialRoPE(shape.dim)(coordinates.repeat(sequences if shape.packed else 1, 1))
        self.rotary = rotary.to(device)
        # (N or T, D) float32, each angle twice: what rotate-half takes
        self.cos, self.sin = (table[0, :, 0].repeat(1, 2).to(device) for table in (rotary.cos, rotary.sin))
        self.cu_seqlens: Tensor | None = None
        self.max_seqlen: int | None = None
        if shape.packed:
            bounds = torch.arange(0, sequences * tokens + 1, tokens, dtype=torch.int32)
            self.cu_seqlens, self.max_seqlen = bounds.to(device), tokens
