# SPDX-License-Identifier: Apache-2.0
"""Calls whose lengths are wrong, as a GPU gets them unread, and what must come of them: what the lengths say of a part
of the tokens, NaN in all others. tests/backends/cuda has the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spatial_pe import Rotary, rope_attention
from spatial_pe.backends.base import AttentionCall

HEADS, KV_HEADS = 3, 1


@dataclass(frozen=True)
class Wrong:
    """Packed sequences of at most `longest` tokens, or samples of `tokens`."""

    name: str
    bounds: tuple[int, ...]
    tokens: int
    right: tuple[tuple[int, int, int], ...]  # (sample, start, stop) of what is computed
    longest: int | None = None  # None: bounds are lengths of samples

    def __str__(self) -> str:
        return self.name

    @property
    def samples(self) -> int:
        return len(self.bounds) if self.longest is None else 1


def wrong_cases(longest: int) -> list[Wrong]:
    """Whose bounds do not decrease."""
    a, b = longest // 3, longest
    n, far = a + b, 2**31 - 1
    behind = n + b + 3  # where a sequence of 2 b + 3 tokens ends that begins at a

    def packed(name: str, bounds: tuple[int, ...], tokens: int, *right: tuple[int, int]) -> Wrong:
        return Wrong(name, bounds, tokens, tuple((0, *one) for one in right), longest)

    return [
        packed("a longer one", (0, a, behind, behind + a), behind + a, (0, a), (behind, behind + a)),
        packed("the first is longer", (0, b + 1, n + 1), n + 1, (b + 1, n + 1)),
        packed("the last is longer", (0, a, n + a), n + a, (0, a)),
        packed("all are longer", (0, 3 * b), 3 * b),
        packed("tokens behind the last", (0, a, n), n + 2 * b + 5, (0, a), (a, n)),
        packed("one token behind the last", (0, a, n), n + 1, (0, a), (a, n)),
        packed("no tokens but those behind", (0, 0, 0), n),
        packed("too few tokens", (0, a, n), n - 1, (0, a)),
        packed("far too few tokens", (0, a, n, far), n, (0, a), (a, n)),
        packed("all too few tokens", (0, far), n),
        packed("tokens before the first", (2, a, n), n, (a, n)),
        packed("no sequence before the last", (a, a, a), n),
        packed("negative", (-5, a, n), n, (a, n)),
        packed("far negative", (-far - 1, -far, a, n), n, (a, n)),
        packed("empty ones among them", (0, 0, a, a, n, n, n), n + 1, (0, a), (a, n)),
        Wrong("lengths of samples", (b + 1, a, -1, 0, b, far, -far - 1), b, ((1, 0, a), (4, 0, b))),
        Wrong("of one sample", (b + 20,), b, ()),
    ]


def decreasing_cases(longest: int) -> list[Wrong]:
    """Sequences that overlap: which of them has a row is not said."""
    a, b = longest // 3, longest
    n, far = a + b, 2**31 - 1
    found = {
        "lengths": (a, b, a, b),
        "back to the start": (0, a, 0, a),
        "back and forth": (0, b, a, n),
        "behind an empty one": (0, a, a, 1, 1, n),
        "at the end": (0, a, n, a),
        "by one": (0, a, a - 1, n),
        "overflow": (0, a, -far - 1, far, n),
        "all": (n, a, 0),
        "to nothing": (0, n, 0),
    }
    return [Wrong(name, bounds, n, (), longest) for name, bounds in found.items()]


def call_of(wrong: Wrong, dim: int, dtype: torch.dtype, seed: int = 0) -> tuple[AttentionCall, Tensor]:
    """The call, and dout. Behind the lengths of samples there is NaN."""
    random = torch.Generator().manual_seed(seed)
    rows = (wrong.samples, wrong.tokens)
    q, k, v, dout = (
        torch.randn(*rows, heads, dim, generator=random).to(dtype) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    rotary = Rotary.from_angles(torch.randn(wrong.tokens, dim // 2, generator=random))
    bounds = torch.tensor(wrong.bounds, dtype=torch.int32)
    if wrong.longest is not None:
        return AttentionCall(q, k, v, rotary, dim**-0.5, bounds, wrong.longest, None), dout
    for sample, _, stop in wrong.right:
        for x in (q, k, v, dout):
            x[sample, stop:] = torch.nan
    return AttentionCall(q, k, v, rotary, dim**-0.5, None, None, bounds), dout


def expected(wrong: Wrong, call: AttentionCall, dout: Tensor) -> dict[str, Tensor]:
    """out, dq, dk, dv: by the reference where the bounds are right, 0 behind right lengths, NaN elsewhere."""
    like = {"out": dout, "dq": call.q, "dk": call.k, "dv": call.v}
    found = {name: torch.full(x.shape, torch.nan) for name, x in like.items()}
    assert call.rotary is not None
    for sample, start, stop in wrong.right:
        rows = (slice(sample, sample + 1), slice(start, stop))
        q, k, v = (x[rows].float().requires_grad_() for x in (call.q, call.k, call.v))
        rotary = Rotary(call.rotary.cos[:, start:stop], call.rotary.sin[:, start:stop], call.rotary.pairing)
        out = rope_attention(q, k, v, rotary, backend="reference")
        grads = torch.autograd.grad(out, (q, k, v), dout[rows].float())
        for name, x in zip(found, (out.detach(), *grads), strict=True):
            if wrong.longest is None:
                found[name][sample] = 0.0
            found[name][rows] = x
    if wrong.longest is None:
        for sample in [i for i, length in enumerate(wrong.bounds) if length == 0]:
            for x in found.values():
                x[sample] = 0.0
    return found


def check_lse(lse: Tensor, out: Tensor) -> None:
    """NaN in the rows where out is."""
    nan = out.isnan().all(-1)
    assert torch.equal(nan, out.isnan().any(-1))
    assert torch.equal(lse.isnan(), nan.transpose(1, 2))
