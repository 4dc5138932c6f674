# SPDX-License-Identifier: Apache-2.0
"""Calls that ask much of a softmax: scores that grow, peak and sink along the keys; NaN and Inf in one element."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spatial_pe import apply_rotary

from .exact import Exact, exact
from .inputs import Case, Inputs, generator, make
from .rule import run

# What is added to the scores of key j, along 300 keys. The kernels take a row's softmax relative to its maximum over
# the first 64 keys (fewer for narrow vectors), and start again where the sum of weights passes 2^60 = exp(41.6).
BIASES = {
    "rising": lambda j: 400 * j / 300,
    "falling": lambda j: -400 * j / 300,
    "rising in the first tile": lambda j: 50.0 * torch.minimum(j, torch.tensor(8.0)),
    "late peak": lambda j: 300.0 * (j == 250),
    "last": lambda j: 90.0 * (j == 299),
    "first": lambda j: 300.0 * (j == 0),
    "below the limit": lambda j: 36.0 * (j == 200),
    "at the limit": lambda j: 42.0 * (j >= 290),
    "above the limit": lambda j: 60.0 * (j == 200),
    "all low": lambda j: -3000 + 0 * j,
    "all high": lambda j: 3000 + 0 * j,
    "waves": lambda j: 200 * torch.sin(j / 20),
}


@dataclass(frozen=True)
class Sinks:
    """Keys `gap` nats above the others in every row, with small values: CLS and register tokens of many ViTs. What
    the row is about is in the weights behind them, which in 16 bits are soon subnormal, or gone."""

    gap: float
    first: int = 0
    count: int = 1
    tokens: int = 300
    dim: int = 64

    def __str__(self) -> str:
        return f"{self.count} at {self.first} of {self.tokens} by {self.gap:g} nats, D={self.dim}"

    def inputs(self, dtype: torch.dtype) -> Inputs:
        inputs = make(Case(tokens=self.tokens, dim=self.dim, rotary_dim=32, dtype=dtype))
        random = generator(self)
        at = slice(self.first, self.first + self.count)
        # 16 channels that are not rotated carry the gap; spread, so that no single element decides the error of dk
        signs = torch.randint(0, 2, (16,), generator=random) * 2.0 - 1
        with torch.no_grad():
            inputs.q[..., -16:] = signs
            inputs.k[..., -16:] = 0
            inputs.k[:, at, :, -16:] = signs * self.gap / (16 * inputs.scale)
            # with a mean: the rest of a row is more than noise
            inputs.v.mul_(0.3).add_(torch.randn(self.dim, generator=random))
            inputs.v[:, at] *= 0.1
        return inputs


SINKS = [Sinks(11, tokens=197, dim=80), Sinks(13, first=1, count=4, tokens=150)]
MORE_SINKS = [
    Sinks(gap, first, count, tokens, dim)
    for gap in (8, 10, 14)
    for first, count, tokens, dim in [
        (0, 1, 64, 80),
        (1, 4, 128, 72),
        (0, 1, 197, 128),
        (0, 5, 400, 80),
        (0, 1, 577, 64),
        (296, 4, 300, 64),
    ]
]
BIASES |= {str(sinks): sinks for sinks in SINKS}
# What `make test` runs of them where kernels are interpreted or emulated, 2 to 4 s each.
QUICK_BIASES = {
    torch.bfloat16: ("late peak", "at the limit", str(SINKS[0])),
    torch.float16: ("above the limit", str(SINKS[1])),
}


def extreme_rows(dtypes: Sequence[torch.dtype]) -> list:
    """(bias, dtype) of test_extreme_scores for such kernels."""
    return [
        pytest.param(bias, dtype, marks=[] if bias in QUICK_BIASES.get(dtype, ()) else [pytest.mark.slow])
        for dtype in dtypes
        for bias in BIASES
    ]


@functools.lru_cache(maxsize=2)
def with_sinks(sinks: Sinks, dtype: torch.dtype) -> tuple[Inputs, dict, Exact]:
    inputs = sinks.inputs(dtype)
    return inputs, run(inputs, "composed"), exact(inputs)


@functools.lru_cache(maxsize=2)
def biased(bias: str, dtype: torch.dtype) -> tuple[Inputs, dict, Exact]:
    if isinstance(sinks := BIASES[bias], Sinks):
        return with_sinks(sinks, dtype)
    case = Case(tokens=300, dim=64, rotary_dim=32, dtype=dtype, scale=0.125)
    inputs = make(case)
    with torch.no_grad():
        # one channel that is not rotated carries the bias: q has 8, the scale is 1/8. Every third row is rotated
        # around, every third is indifferent, so that rows of a block differ in what they need
        inputs.q[..., 60] = 8 * torch.tensor([1.0, -1.0, 0.0]).repeat(100)[None, :, None]
        inputs.k[..., 60] = BIASES[bias](torch.arange(300.0))[None, :, None]
    return inputs, run(inputs, "composed"), exact(inputs)


POISON = {
    "NaN in q": ("q", (0, 11, 1, 5), torch.nan),
    "NaN in k, first tile": ("k", (0, 3, 1, 5), torch.nan),
    "NaN in k, later": ("k", (0, 140, 1, 5), torch.nan),
    "NaN in k, a channel that passes through": ("k", (0, 140, 1, 30), torch.nan),
    "NaN in v": ("v", (0, 140, 1, 5), torch.nan),
    "inf in q": ("q", (0, 11, 1, 30), torch.inf),
    "-inf in q": ("q", (0, 11, 1, 30), -torch.inf),
    "inf in a rotated channel of q": ("q", (0, 11, 1, 5), torch.inf),
    "inf in k, first tile": ("k", (0, 3, 1, 30), torch.inf),
    "inf in k, later": ("k", (0, 140, 1, 30), torch.inf),
    "-inf in k": ("k", (0, 140, 1, 30), -torch.inf),
    "inf in v": ("v", (0, 140, 1, 5), torch.inf),
    "-inf in v": ("v", (0, 3, 1, 5), -torch.inf),
}


def poisoned(poison: str, dtype: torch.dtype, dim: int = 32) -> tuple[Inputs, Tensor]:
    """Inputs with one bad element, and what SDPA makes of them in float32."""
    inputs = make(Case(tokens=150, dim=dim, rotary_dim=16, dtype=dtype))
    name, at, value = POISON[poison]
    with torch.no_grad():
        getattr(inputs, name)[at] = value
        rotated = [apply_rotary(x.float(), inputs.rotary()) for x in (inputs.q, inputs.k)]
        expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (*rotated, inputs.v.float())))
    return inputs, expected.transpose(1, 2)
