# SPDX-License-Identifier: Apache-2.0
"""Lengths that are wrong show as NaN, and nothing is read or written outside the tensors. On the CPU they would raise;
here the launches run without that check, as on a GPU, in small tiles."""

from __future__ import annotations

import random

import pytest
import torch
from allocations import Memory
from rows import some, some_pairs
from torch import Tensor
from wrong_bounds import HEADS, KV_HEADS, Wrong, call_of, check_lse, decreasing_cases, expected, wrong_cases

from spatial_pe import Rotary
from spatial_pe.backends.base import AttentionCall
from spatial_pe.backends.triton import backend as triton

pytestmark = [
    pytest.mark.skipif(triton.unavailable() is not None, reason=f"triton: {triton.unavailable()}"),
    pytest.mark.skipif(not triton.INTERPRETED, reason="a GPU is here: an access out of bounds would end the process"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
# Of windows and tiles alike; the tiles need no max_seqlen.
BLOCK = 16
# the way through the softmax: relative to the first tile, or float16's running maximum
KERNELS = {"windows": torch.float32, "k rotated before": torch.float32, "k rotated in the loop": torch.float16}
FEW = ("windows", "k rotated before")


@pytest.fixture
def memory(monkeypatch):
    return Memory(monkeypatch)


def choice_of(kernels: str):
    from spatial_pe.backends.triton.tiles import Choice, Tile, Window

    window = Window(BLOCK, 4, per_program=2) if kernels == "windows" else None
    forward = Tile(BLOCK, BLOCK, 4, 1, "before" if kernels == "k rotated before" else "loop")
    backward = Tile(BLOCK, BLOCK, 4, 1, split=kernels == "k rotated before")
    return Choice("hopper", forward, backward, backward, window, window)


def results(call: AttentionCall, dout: Tensor, kernels: str, memory: Memory) -> dict[str, Tensor]:
    from spatial_pe.backends.triton.plan import plan_backward, plan_forward

    forward = plan_forward(call, choice_of(kernels))
    forward.run(call.q.device)
    out, lse = forward.results
    backward = plan_backward(call, out, lse, dout, choice_of(kernels))
    backward.run(call.q.device)
    dq, dk, dv = backward.results
    memory.check(out, lse, dq, dk, dv)
    check_lse(lse, out)
    return {"out": out, "dq": dq, "dk": dk, "dv": dv}


def around(call: AttentionCall, memory: Memory) -> AttentionCall:
    """The call with its tensors in the midst of other memory, lengths included: far away is a long way."""

    def moved(x: Tensor | None) -> Tensor | None:
        return None if x is None else memory.tensor(x.shape, x.dtype).copy_(x)

    q, k, v = (moved(x) for x in (call.q, call.k, call.v))
    assert call.rotary is not None and q is not None and k is not None and v is not None
    bounds = moved(call.cu_seqlens), call.max_seqlen, moved(call.seqlens)
    return AttentionCall(q, k, v, call.rotary, call.scale, *bounds)


OTHERS = [kernels for kernels in KERNELS if kernels not in FEW]


@pytest.mark.parametrize(("wrong", "kernels"), some_pairs(wrong_cases(BLOCK), FEW), ids=str)
def test_nan_where_the_lengths_are_wrong(wrong, kernels, memory):
    check_wrong(wrong, kernels, memory)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", OTHERS)
@pytest.mark.parametrize("wrong", wrong_cases(BLOCK), ids=str)
def test_nan_where_the_lengths_are_wrong_for_the_others(wrong, kernels, memory):
    check_wrong(wrong, kernels, memory)


def check_wrong(wrong: Wrong, kernels: str, memory: Memory) -> None:
    dtype = KERNELS[kernels]
    call, dout = call_of(wrong, 24, dtype)
    wanted = expected(wrong, call, dout)
    if wrong.longest is not None and kernels != "windows":
        wanted = expected(any_length(wrong), call, dout)
    got = results(around(call, memory), dout, kernels, memory)
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2}[dtype]
    for name, x in wanted.items():
        torch.testing.assert_close(got[name].float(), x, rtol=tolerance, atol=tolerance, equal_nan=True, msg=name)


def any_length(wrong: Wrong) -> Wrong:
    """What kernels compute to which no sequence is too long."""
    pairs = zip(wrong.bounds, wrong.bounds[1:], strict=False)
    starts = [
        (0, start, stop)
        for i, (start, stop) in enumerate(pairs)
        if 0 <= start < stop <= wrong.tokens and (i > 0 or start == 0)
    ]
    return Wrong(wrong.name, wrong.bounds, wrong.tokens, tuple(starts), wrong.longest)


def check_decreasing(wrong: Wrong, kernels: str, memory: Memory) -> None:
    call, dout = call_of(wrong, 16, torch.float32)
    got = results(around(call, memory), dout, kernels, memory)
    assert all(x[:, 0].isnan().all() for x in got.values())


@pytest.mark.parametrize(("wrong", "kernels"), some_pairs(decreasing_cases(BLOCK), FEW), ids=str)
def test_nan_where_cu_seqlens_decrease(wrong, kernels, memory):
    check_decreasing(wrong, kernels, memory)


@pytest.mark.parametrize("at", some([31, 32, 33, 37], first=1))
def test_a_decrease_among_many(at, memory):
    """They are looked at 32 in one go."""
    from spatial_pe.backends.triton.plan import plan_forward

    bounds = [0, *[7] * 37, 9]
    bounds[at] -= 1
    call, _ = call_of(Wrong("many", tuple(bounds), 9, (), BLOCK), 16, torch.float32)
    forward = plan_forward(around(call, memory), choice_of("windows"))
    forward.run(call.q.device)
    assert all(x.isnan().any() for x in forward.results)


@pytest.mark.parametrize("seed", [pytest.param(i, marks=pytest.mark.slow) if i > 1 else i for i in range(24)])
def test_any_numbers(seed, memory):
    """Whatever stands there, every row is written, and nothing else."""
    chance = random.Random(seed)
    tokens = chance.randrange(1, 80)
    low, high = (0, tokens) if seed % 3 else (-10, tokens + 10)
    bounds = [chance.randint(low, high) for _ in range(chance.randrange(2, 9))]
    if seed % 2:
        bounds[0], bounds[-1] = 0, tokens
    wrong = Wrong("random", tuple(bounds), tokens, (), BLOCK)
    call, dout = call_of(wrong, 16, torch.float32, seed)
    call = around(call, memory)
    for kernels in FEW:
        got = results(call, dout, kernels, memory)
        if bounds != sorted(bounds):
            assert all(x[:, 0].isnan().all() for x in got.values())


@pytest.mark.parametrize("table_heads", [1, HEADS])
def test_gradient_of_the_angles(table_heads, memory):
    """0 behind a length; NaN in a sample with a length that is not one, whose gradients are."""
    from spatial_pe.backends.triton.plan import plan_angles

    lengths = torch.tensor([20, 3, -1, 0, 2**31 - 1], dtype=torch.int32)
    q, dq = (memory.tensor((5, 19, HEADS, 16), torch.float32).normal_() for _ in range(2))
    heads = KV_HEADS if table_heads == 1 else HEADS
    k, dk = (memory.tensor((5, 19, heads, 16), torch.float32).normal_() for _ in range(2))
    for sample in (0, 2, 4):
        dq[sample], dk[sample] = torch.nan, torch.nan
    plan = plan_angles(q, k, dq, dk, torch.Size((1, 19, table_heads, 8)), "half", lengths)
    plan.run(q.device)
    (got,) = plan.results
    memory.check(got)
    assert got[[0, 2, 4]].isnan().all()
    assert got[1, :3].isfinite().all() and (got[1, 3:] == 0).all() and (got[3] == 0).all()


def test_a_hint_of_nothing():
    """max_seqlen=0 is too small for any sequence but an empty one."""
    from spatial_pe.backends.triton.plan import plan_forward

    call, _ = call_of(Wrong("", (0, 40), 40, (), 0), 16, torch.float16)
    plan = plan_forward(call)
    plan.run(call.q.device)
    assert all(x.isnan().all() for x in plan.results)


def test_right_calls_have_the_same_bits():
    """Sequences are computed as each is alone, whatever their neighbours."""
    from spatial_pe.backends.triton.plan import plan_forward

    call, _ = call_of(Wrong("right", (0, 5, 21, 21, 22), 22, (), BLOCK), 24, torch.float32)
    assert call.rotary is not None
    for kernels in KERNELS:
        whole = plan_forward(call, choice_of(kernels))
        whole.run(call.q.device)
        for start, stop in ((0, 5), (5, 21), (21, 22)):
            q, k, v = (x[:, start:stop] for x in (call.q, call.k, call.v))
            rotary = Rotary(call.rotary.cos[:, start:stop], call.rotary.sin[:, start:stop], "half")
            alone = plan_forward(AttentionCall(q, k, v, rotary, call.scale, None, None, None), choice_of(kernels))
            alone.run(call.q.device)
            assert torch.equal(whole.results[0][:, start:stop], alone.results[0])
            assert torch.equal(whole.results[1][:, :, start:stop], alone.results[1])
