# SPDX-License-Identifier: Apache-2.0
"""Lengths that are wrong show as NaN, in the CUDA kernels on the emulator, which ends a launch that reads or writes
outside the tensors or leaves a result unwritten."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spatial_pe.backends import cuda
from spatial_pe.backends.base import AttentionCall

sys.path.append(str(Path(__file__).parents[1] / "triton"))
from wrong_bounds import Wrong, call_of, check_lse, decreasing_cases, expected, wrong_cases

# Of the longest sequence that is right, the head_dim, and KB of shared memory: what each is computed by.
SHAPES = {
    "a window of 64": (40, 72, 227),
    "a window of 128": (100, 64, 227),
    "keys in shared memory": (150, 80, 227),
    "keys passing through, backward in parts": (270, 64, 64),
}


def results(call: AttentionCall, dout: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        out, lse = cuda.forward(call)
        grads = cuda.backward(call, out, lse, dout)
    check_lse(lse, out)
    return dict(zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True))


@pytest.fixture
def rewrites(emulated):
    """Sequences that overlap write some rows twice."""
    emulated.allow_rewrites(True)
    yield emulated
    emulated.allow_rewrites(False)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [wrong.name for wrong in wrong_cases(9)])
def test_nan_where_the_lengths_are_wrong(name, shape, emulated):
    longest, dim, shared = SHAPES[shape]
    emulated.use_device(shared_per_block=shared * 1024)
    (wrong,) = (one for one in wrong_cases(longest) if one.name == name)
    call, dout = call_of(wrong, dim, torch.float16)
    got = results(call, dout)
    for result, x in expected(wrong, call, dout).items():
        torch.testing.assert_close(got[result].float(), x, rtol=2e-2, atol=2e-2, equal_nan=True, msg=result)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [wrong.name for wrong in decreasing_cases(9)])
def test_nan_where_cu_seqlens_decrease(name, shape, rewrites):
    """At least for the first token, in head 0."""
    longest, dim, shared = SHAPES[shape]
    rewrites.use_device(shared_per_block=shared * 1024)
    (wrong,) = (one for one in decreasing_cases(longest) if one.name == name)
    check_decreasing(wrong, dim)


def check_decreasing(wrong: Wrong, dim: int, seed: int = 0) -> None:
    call, dout = call_of(wrong, dim, torch.bfloat16, seed)
    with torch.no_grad():
        out, lse = cuda.forward(call)
        grads = cuda.backward(call, out, lse, dout)
    assert lse[:, 0, 0].isnan().all()
    assert all(x[:, 0, 0].isnan().all() for x in (out, *grads))


@pytest.mark.parametrize("at", [31, 32, 33, 64])
def test_a_decrease_among_many(at, rewrites):
    """They are looked at 32 in one go."""
    bounds = [0, *[7] * 64, 9]
    bounds[at] -= 1
    check_decreasing(Wrong("many", tuple(bounds), 9, (), 9), 64)


@pytest.mark.parametrize("seed", range(16))
def test_any_numbers(seed, rewrites):
    """Whatever stands there, every row is written, and nothing else; threads in any order."""
    chance = random.Random(seed)
    tokens = chance.randrange(1, 400)
    low, high = (0, tokens) if seed % 3 else (-10, tokens + 10)
    bounds = [chance.randint(low, high) for _ in range(chance.randrange(2, 9))]
    if seed % 2:
        bounds[0], bounds[-1] = 0, tokens
    rewrites.use_device(shared_per_block=chance.choice((227, 64)) * 1024)
    rewrites.set_schedule(seed)
    wrong = Wrong("random", tuple(bounds), tokens, (), chance.choice((1, 50, 120, 200, 400)))
    if bounds != sorted(bounds):
        return check_decreasing(wrong, 64, seed)
    call, dout = call_of(wrong, 64, torch.float16, seed)
    got = results(call, dout)
    if (bounds[0], bounds[-1]) != (0, tokens):
        assert all(x.isnan().any() for x in got.values())


@pytest.mark.usefixtures("poisoned_memory")
def test_a_hint_of_nothing(emulated):
    """max_seqlen=0 is too small for any sequence but an empty one."""
    call, dout = call_of(Wrong("", (0, 40), 40, (), 0), 64, torch.float16)
    assert all(x.isnan().all() for x in results(call, dout).values())
