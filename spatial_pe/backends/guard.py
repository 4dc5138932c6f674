# SPDX-License-Identifier: Apache-2.0
"""Check of kernels on the device at hand: every row against float64, and two runs bit for bit.

A row is the D numbers of one head of one token. The norm of a whole tensor hides a wrong row: one of 196 is 7 % of it,
one of 4096 is 1.6 %.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from . import reference
from .base import AttentionCall

# Limits relative to a row's norm. The worst of 100,000 rows of torch's attention is off by 0.011 in bfloat16, 0.0012 in
# float16.
LIMITS = {torch.bfloat16: 0.03, torch.float16: 0.005, torch.float32: 1e-4}
RESULTS = ("out", "dq", "dk", "dv")
# Elements of float64 scores at a time, 0.5 GB: the reference holds up to six such matrices.
MOST_SCORES = 1 << 26


def exact(call: AttentionCall, dout: Tensor) -> dict[str, Tensor]:
    """Return RESULTS in float64, and lse (B, H, N) float32: on the device of the call, a few heads at a time."""
    heads, kv_heads = call.q.shape[2], call.k.shape[2]
    longest = call.q.shape[1] if call.max_seqlen is None else call.max_seqlen
    step = max(1, MOST_SCORES // max(1, longest * longest))
    if heads != kv_heads or (call.rotary is not None and call.rotary.cos.shape[2] > 1):
        step = heads
    found = []
    for begin in range(0, heads, step):
        q, k, v, g = (x[:, :, begin : begin + step].double() for x in (call.q, call.k, call.v, dout))
        part = replace(call, q=q, k=k, v=v)
        out, lse = reference.forward(part)
        found.append((out, *reference.backward(part, out, lse, g), lse))
    *results, sums = zip(*found, strict=True)
    return {name: torch.cat(x, 2) for name, x in zip(RESULTS, results, strict=True)} | {"lse": torch.cat(sums, 1)}


def worst_row(x: Tensor, expected: Tensor) -> float:
    """Return the largest ‖x - expected‖ / ‖expected‖ of a row; NaN stays NaN, and nonzero instead of 0 is inf."""
    if x.numel() == 0:
        return 0.0
    error, norm = (x.double() - expected).norm(dim=-1), expected.norm(dim=-1)
    return torch.where(error == 0, 0.0, error / norm).max().item()


def wrong(
    run: Callable[[], Mapping[str, Tensor]], expected: Mapping[str, Tensor], dtype: torch.dtype, twice: bool = True
) -> str | None:
    """Return what is wrong with the results of a call, or None.

    Args:
        run: returns results by name, each of them among the expected ones.
        twice: run again, and compare bits.
    """
    first = {name: x.clone() for name, x in run().items()}
    errors = {name: worst_row(x, expected[name]) for name, x in first.items()}
    found = [f"{name}: a row is off by {x:.1e} of its norm" for name, x in errors.items() if not x < LIMITS[dtype]]
    if twice and not found:
        found = [f"{name}: two runs differ" for name, x in run().items() if not torch.equal(x, first[name])]
    return "; ".join(found) or None
