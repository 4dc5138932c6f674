# SPDX-License-Identifier: Apache-2.0
"""Measured shapes, in order, and the inputs of one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import spatial_pe
from spatial_pe.backends.base import AttentionCall

DIMS = (64, 72, 80)
# 64 tokens are a window of Qwen2.5-VL: packed, and an image of 448 x 448 pixels has 16 of them.
WINDOW, WINDOWS_OF_AN_IMAGE = 64, 16
HEADS = 16
# Total tokens in the large batch: 80 MB for each of q, k, v at head_dim 64, more than an L2 holds.
LARGE = 36_864
# Images in the small batches.
SMALL = (1, 8)
# (tokens, head_dim) with targets (report.TARGETS); the windows and the most different ones first, so that a run that
# ends early has one of each kind.
TARGETS = (
    *((64, 80), (576, 64), (196, 64), (729, 72), (1024, 80)),
    *((64, 64), (1024, 64), (4096, 64), (256, 64), (1025, 64)),
)
# torch.compile and FlexAttention compile for half a minute each, whatever the shape
COMPILED = {(576, 64): ("forward", "backward"), (64, 80): ("forward",)}
ATTENTION = ("forward", "backward", "forward+backward")


@dataclass(frozen=True)
class Shape:
    """Shape of a call. batch: samples, or windows where tokens is WINDOW."""

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
        """FLOP of the forward: two matrix products."""
        return 4 * self.batch * self.heads * self.tokens**2 * self.dim

    def __str__(self) -> str:
        what = "windows of" if self.packed else "x"
        return f"{self.batch} {what} {self.tokens}, head_dim {self.dim}"


@dataclass(frozen=True)
class Work:
    """A shape, its measurements ("rotary" is the rotation alone), and its variants (see variants.py)."""

    shape: Shape
    directions: tuple[str, ...]
    rounds: int
    variants: tuple[str, ...]


FUSED = ("ours", "off", "cuda", "cuda-off", "auto")
SEPARATE = ("rotary-cudnn", "rotary-flash", "fa2", "fa3", "fa4")
EAGER = ("eager-cudnn", "eager-flash")
PACKED = ("eager-loop", "rotary-varlen")
TABLE = (*FUSED, *SEPARATE, *EAGER)
COMPILER = ("compiled-cudnn", "flex", "cudnn-rope")


def plan(name: str) -> list[Work]:
    """Return the work, most important first: a run does as much as it has time for, and lists the rest.

    table: the shapes with targets, a large batch of each. small: one image, and eight. compiled: torch.compile, and
    cuDNN's own rotation.
    """
    if name == "table":
        return [Work(large(*pair), ("forward", "backward", "rotary"), 7, _names(pair, TABLE)) for pair in TARGETS]
    if name == "small":
        few = ("ours", "off", "cuda", "auto", *SEPARATE, *EAGER)
        return [Work(small(*pair, n), ("forward",), 5, _names(pair, few)) for n in SMALL for pair in TARGETS[:5]]
    if name == "compiled":
        some = ("ours", "rotary-cudnn", "eager-cudnn", *COMPILER)
        return [Work(large(*pair), directions, 5, some) for pair, directions in COMPILED.items()]
    raise ValueError(f"no plan is called {name!r}")


PLANS = ("table", "small", "compiled")


def _names(pair: tuple[int, int], names: tuple[str, ...]) -> tuple[str, ...]:
    return (*names, *PACKED) if pair[0] == WINDOW else names


def large(tokens: int, dim: int) -> Shape:
    return Shape(LARGE // tokens, tokens, dim)


def small(tokens: int, dim: int, images: int) -> Shape:
    return Shape(images * WINDOWS_OF_AN_IMAGE if tokens == WINDOW else images, tokens, dim)


class Inputs:
    """Random normal q, k, v, as views of one fused projection; dense (B, N, H, D), packed (T, H, D)."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
        self.shape, self.device = shape, device
        sequences, tokens = shape.batch, shape.tokens
        lead = (sequences * tokens,) if shape.packed else (sequences, tokens)
        qkv = torch.randn(*lead, 3, shape.heads, shape.dim, device=device, dtype=dtype)
        self.qkv = qkv.unbind(-3)
        self.leaves = [x.detach().requires_grad_() for x in self.qkv]
        self.grad = torch.randn(*lead, shape.heads, shape.dim, device=device, dtype=dtype)

        side = int(tokens**0.5) + 1
        token = torch.arange(tokens)
        coordinates = torch.stack([token // side, token % side], 1).float()
        rotary = spatial_pe.AxialRoPE(shape.dim)(coordinates.repeat(sequences if shape.packed else 1, 1))
        self.rotary = rotary.to(device)
        # (N or T, D) float32, each angle twice: the format of rotate-half
        self.cos, self.sin = (table[0, :, 0].repeat(1, 2).to(device) for table in (rotary.cos, rotary.sin))
        self.cu_seqlens: Tensor | None = None
        self.max_seqlen: int | None = None
        if shape.packed:
            bounds = torch.arange(0, sequences * tokens + 1, tokens, dtype=torch.int32)
            self.cu_seqlens, self.max_seqlen = bounds.to(device), tokens

    def call(self, rotated: bool = True) -> AttentionCall:
        """Return the arguments of a backend; packed sequences are one sample."""
        q, k, v = (x[None] for x in self.qkv) if self.shape.packed else self.qkv
        rotary = self.rotary if rotated else None
        return AttentionCall(q, k, v, rotary, self.shape.dim**-0.5, self.cu_seqlens, self.max_seqlen, None)

    @property
    def batched_grad(self) -> Tensor:
        return self.grad[None] if self.shape.packed else self.grad
