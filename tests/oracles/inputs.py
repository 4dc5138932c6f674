# SPDX-License-Identifier: Apache-2.0
"""Cases and their random inputs."""

from __future__ import annotations

import os
import time
import zlib
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from spatial_pe import Rotary, rope_attention

# Inputs are new in every run; a failure names the seed, and SPATIAL_PE_SEED=<it> repeats the run.
SEED = int(os.environ.get("SPATIAL_PE_SEED") or time.time_ns() % 1_000_000_007)


@dataclass(frozen=True)
class Case:
    """One call of rope_attention, without its values."""

    batch: int = 1
    tokens: int = 64
    heads: int = 2
    dim: int = 64
    dtype: torch.dtype = torch.float32
    kv_heads: int | None = None  # None: heads
    rotary_dim: int | None = None  # None: dim; 0: no rotary
    pairing: str = "half"
    table: str = "shared"  # by all samples and heads; or one per "head", per "sample", or "both"
    prefix: int = 0  # tokens that are not rotated: angle 0
    suffix: int = 0
    lengths: tuple[int, ...] | None = None  # packed: of the sequences; then batch and tokens are not used
    seqlens: tuple[int, ...] | None = None  # padded: tokens that exist, NaN behind them
    layout: str = "contiguous"  # or "fused", "projection", "wide", "heads_first": views with NaN in the memory between
    scale: float | None = None

    def __str__(self) -> str:
        """What differs from the defaults, as a test id."""
        parts = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default and not (field.name == "tokens" and self.lengths):
                text = str(value).removeprefix("torch.")
                parts.append(f"{field.name}={text.replace(' ', '')}")
        return "-".join(parts) or "default"

    @property
    def pairs(self) -> int:
        return (self.dim if self.rotary_dim is None else self.rotary_dim) // 2

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of q, and of k and v."""
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        rows = (self.batch, self.tokens) if self.lengths is None else (sum(self.lengths),)
        return (*rows, self.heads, self.dim), (*rows, kv_heads, self.dim)


@dataclass
class Inputs:
    """q, k, v, dout in the dtype and layout of the case; angles (B|1, N, H|1, R/2) float32 (float64 for float64)."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    angles: Tensor | None
    cu_seqlens: Tensor | None = None
    seqlens: Tensor | None = None

    @property
    def leaves(self) -> dict[str, Tensor]:
        named = {"q": self.q, "k": self.k, "v": self.v, "angles": self.angles}
        return {name: x for name, x in named.items() if x is not None}

    @property
    def scale(self) -> float:
        return self.case.dim**-0.5 if self.case.scale is None else self.case.scale

    def rotary(self) -> Rotary | None:
        return None if self.angles is None else Rotary.from_angles(self.angles, self.case.pairing)  # type: ignore[arg-type]

    def call(self, backend: str) -> Tensor:
        return rope_attention(
            self.q,
            self.k,
            self.v,
            self.rotary(),
            scale=self.case.scale,
            cu_seqlens=self.cu_seqlens,
            seqlens=self.seqlens,
            backend=backend,
        )

    def sequences(self) -> list[tuple[int, int, int]]:
        """(sample, start, stop); packed tensors are one sample."""
        case = self.case
        if case.lengths is not None:
            stops = torch.tensor(case.lengths).cumsum(0).tolist()
            return [(0, stop - n, stop) for n, stop in zip(case.lengths, stops, strict=True)]
        lengths = case.seqlens or (case.tokens,) * case.batch
        return [(b, 0, n) for b, n in enumerate(lengths)]


def generator(case: object) -> torch.Generator:
    """The same numbers for a case within a run, whatever ran before it; others in the next run."""
    return torch.Generator().manual_seed(SEED ^ zlib.crc32(repr(case).encode()))


def make(case: Case, device: str = "cpu") -> Inputs:
    """Draw the inputs of a case.

    q, k, v and dout are standard normal; angles are normal times 3, so that they wrap around. Memory that the op has
    no business to read, and tokens past ``seqlens``, hold NaN.
    """
    random = generator(case)
    q_shape, kv_shape = case.shapes()
    values = [torch.randn(shape, generator=random) for shape in (q_shape, kv_shape, kv_shape, q_shape)]
    if case.seqlens is not None:
        for x in values:
            for b, n in enumerate(case.seqlens):
                x[b, n:] = torch.nan
    values = [x.to(device, case.dtype) for x in values]
    q, k, v, dout = _laid_out(values, case.layout)
    angles = None
    if case.pairs:
        samples = case.batch if case.table in ("sample", "both") and case.lengths is None else 1
        heads = case.heads if case.table in ("head", "both") else 1
        tokens = case.tokens if case.lengths is None else sum(case.lengths)
        angles = 3 * torch.randn(samples, tokens, heads, case.pairs, generator=random)
        angles[:, : case.prefix] = 0
        angles[:, tokens - case.suffix :] = 0
        wide = torch.float64 if case.dtype == torch.float64 else torch.float32
        angles = angles.to(device, wide).requires_grad_()
    inputs = Inputs(case, q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout, angles)
    if case.lengths is not None:
        inputs.cu_seqlens = torch.tensor([0, *case.lengths], device=device).cumsum(0).to(torch.int32)
    if case.seqlens is not None:
        inputs.seqlens = torch.tensor(case.seqlens, dtype=torch.int32, device=device)
    return inputs


def _laid_out(values: list[Tensor], layout: str) -> list[Tensor]:
    """q, k, v, dout (.., N, H, D) with the same values in other memory. What lies between them is NaN."""
    if layout == "contiguous":
        return values
    if layout in ("fused", "projection"):  # as a qkv projection writes them
        q, k, v, dout = values
        heads = [q.shape[-2], k.shape[-2], v.shape[-2]]
        # fused: an odd first channel, so that nothing is aligned; projection: rows at multiples of 8, as in towers
        left, right = (1, 2) if layout == "fused" else (8, 8)
        buffer = q.new_full((*q.shape[:-3], q.shape[-3] + 2, sum(heads) + 1, q.shape[-1] + left + right), torch.nan)
        parts = buffer[..., 1:-1, :-1, left:-right].split(heads, dim=-2)
        for part, x in zip(parts, (q, k, v), strict=True):
            part.copy_(x)
        return [*parts, dout]
    if layout == "wide":  # every other token and head of a buffer
        outs = []
        for x in values:
            *rows, n, h, dim = x.shape
            buffer = x.new_full((*rows, 2 * n + 1, 2 * h + 1, dim + 5), torch.nan)
            view = buffer[..., 1::2, 1::2, 2:-3]
            view.copy_(x)
            outs.append(view)
        return outs
    assert layout == "heads_first"  # (.., H, N, D), as eager attention keeps them
    return [x.transpose(-2, -3).contiguous().transpose(-2, -3) for x in values]
