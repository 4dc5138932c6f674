# SPDX-License-Identifier: Apache-2.0
"""Shapes of the benchmark, and random inputs for one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...backends.base import AttentionCall
from ...encodings import AxialRoPE
from ...rotary import Rotary

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class Shape:
    """``batch`` samples of ``tokens``; ``packed``: concatenated into one sequence, as attention windows are; ``keys``:
    the tokens of k and v, where they are other tokens."""

    batch: int
    heads: int
    tokens: int
    head_dim: int
    packed: bool = False
    keys: int | None = None

    @property
    def flops(self) -> int:
        """FLOP of the forward: two matrix products."""
        return 4 * self.batch * self.heads * self.tokens * (self.keys or self.tokens) * self.head_dim

    @property
    def size(self) -> list[int]:
        return [self.batch, self.heads, self.tokens, self.head_dim]

    def elements(self) -> int:
        """Elements of q, and of k, v and the output each."""
        return self.batch * self.heads * self.tokens * self.head_dim

    def __str__(self) -> str:
        what = f"{self.batch} windows of {self.tokens}" if self.packed else f"{self.batch} × {self.tokens}"
        what += f" to {self.keys}" if self.keys else ""
        return f"{what}, {self.heads} heads of {self.head_dim}"


# Shapes of vision towers: ViT-B at 224 px, CLIP-L at 336, SigLIP-so400m at 384, Qwen-VL's head_dim, a large image,
# Qwen2.5-VL's windows of an image of 900 x 500 px
SPEED = {
    "196": Shape(4, 12, 196, 64),
    "576": Shape(4, 16, 576, 64),
    "729": Shape(2, 16, 729, 72),
    "1024": Shape(1, 16, 1024, 80),
    "4096": Shape(1, 16, 4096, 64),
    "windows": Shape(70, 16, 64, 80, packed=True),
}


# Attention to other tokens: SAM 2's memory, DUSt3R's decoder, VGGT's global attention from one view to eight
CROSS = {
    "memory": Shape(1, 1, 4096, 256, keys=16_400),
    "decoder": Shape(1, 12, 768, 64, keys=768),
    "views": Shape(1, 16, 1041, 64, keys=8328),
}


class Inputs:
    """Random q, k, v as views of one fused projection, as in the towers: dense (B, N, H, D), packed (T, H, D).

    ``leaves``: the same, for gradients; ``grad``: that of the output; ``cos``, ``sin``: (N | T, D) float32, each angle
    twice, the format of rotate-half. ``rotary_k``, ``cos_k``, ``sin_k``: those of k; where the tokens attend
    to themselves the same, and ``rotary_k`` None.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str = "cpu") -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        lead = (shape.batch * shape.tokens,) if shape.packed else (shape.batch, shape.tokens)
        generator = torch.Generator(device).manual_seed(0)
        how = {"device": device, "generator": generator}
        qkv = torch.randn(*lead, 3, shape.heads, shape.head_dim, **how).to(dtype)  # type: ignore[call-overload]
        self.qkv = qkv.unbind(-3)
        if shape.keys is not None:
            other = torch.randn(shape.batch, shape.keys, 2, shape.heads, shape.head_dim, **how)  # type: ignore[call-overload]
            self.qkv = (self.qkv[0], *other.to(dtype).unbind(-3))
        self.leaves = [x.detach().requires_grad_() for x in self.qkv]
        self.grad = torch.randn(*lead, shape.heads, shape.head_dim, **how).to(dtype)  # type: ignore[call-overload]
        self.rotary = self._table(shape.tokens, shape.batch if shape.packed else 1)
        self.rotary_k = None if shape.keys is None else self._table(shape.keys, 1)
        self.cos, self.sin = full_width(self.rotary)
        self.cos_k, self.sin_k = full_width(self.rotary_k or self.rotary)
        self.cu_seqlens: Tensor | None = None
        self.max_seqlen: int | None = None
        if shape.packed:
            bounds = torch.arange(0, shape.batch * shape.tokens + 1, shape.tokens, dtype=torch.int32)
            self.cu_seqlens, self.max_seqlen = bounds.to(device), shape.tokens

    def _table(self, tokens: int, repeats: int) -> Rotary:
        """Return the table of a grid that is nearly square, as often as it is packed."""
        side = int((tokens - 1) ** 0.5) + 1
        token = torch.arange(tokens)
        at = torch.stack([token // side, token % side], 1).float().repeat(repeats, 1)
        return AxialRoPE(self.shape.head_dim)(at).to(torch.device(self.device))

    def call(self, rotated: bool = True) -> AttentionCall:
        """Return the arguments of a backend; packed sequences are one sample."""
        q, k, v = (x[None] for x in self.qkv) if self.shape.packed else self.qkv
        rotary = self.rotary if rotated else None
        return AttentionCall(q, k, v, rotary, self.shape.head_dim**-0.5, self.cu_seqlens, self.max_seqlen, None)

    @property
    def batched_grad(self) -> Tensor:
        return self.grad[None] if self.shape.packed else self.grad


def full_width(rotary: Rotary) -> tuple[Tensor, Tensor]:
    """Return cos and sin (N, D), each angle twice, as rotate-half takes them."""
    cos, sin = (table[0, :, 0].repeat(1, 2) for table in (rotary.cos, rotary.sin))
    return cos, sin
