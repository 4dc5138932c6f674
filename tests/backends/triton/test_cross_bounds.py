# SPDX-License-Identifier: Apache-2.0
"""Attention to other tokens whose lengths, those of the queries or those of the keys, are wrong: NaN in the rows that
they concern, and nothing is read or written outside the tensors."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from allocations import Memory
from rows import some
from torch import Tensor
from wrong_bounds import HEADS, KV_HEADS, Wrong, check_lse, decreasing_cases, wrong_cases

from spatial_pe import Rotary, rope_attention
from spatial_pe.backends.base import AttentionCall, Keys
from spatial_pe.backends.triton import backend as triton

pytestmark = [
    pytest.mark.skipif(triton.unavailable() is not None, reason=f"triton: {triton.unavailable()}"),
    pytest.mark.skipif(not triton.INTERPRETED, reason="a GPU is here: an access out of bounds would end the process"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
BLOCK, DIM, OTHERS = 16, 16, 37


@pytest.fixture
def memory(monkeypatch):
    return Memory(monkeypatch)


@dataclass
class Side:
    """Packed tokens, or samples, and what their lengths say."""

    bounds: tuple[int, ...]
    tokens: int
    packed: bool

    @property
    def samples(self) -> int:
        return 1 if self.packed else len(self.bounds)

    def sequences(self) -> list[tuple[int, int, int, bool, bool]]:
        """(sample, start, stop, right, whole): whether there is such a sequence, and no token behind the last one."""
        if not self.packed:
            fits = [0 <= length <= self.tokens for length in self.bounds]
            return [(i, 0, self.bounds[i] if right else 0, right, right) for i, right in enumerate(fits)]
        found = []
        for i, (start, stop) in enumerate(zip(self.bounds, self.bounds[1:], strict=False)):
            right = 0 <= start <= stop <= self.tokens and (i > 0 or start == 0)
            whole = right and (i + 2 < len(self.bounds) or stop == self.tokens)
            found.append((0, start if right else 0, stop if right else 0, right, whole))
        return found


def right_side(wrong: Side) -> Side:
    """Other tokens in as many sequences, some of them empty."""
    if not wrong.packed:
        return Side(tuple(13 * i % 21 for i in range(len(wrong.bounds))), 20, False)
    count = len(wrong.bounds) - 1
    inner = sorted(i * 29 % OTHERS for i in range(1, count))
    return Side((0, *inner, OTHERS), OTHERS, True)


def make(queries: Side, keys: Side, rotated: bool, memory: Memory) -> tuple[AttentionCall, Tensor]:
    """The call, in the midst of other memory, and dout. Behind the lengths of samples there is NaN."""
    random = torch.Generator().manual_seed(0)

    def tensor(side: Side, heads: int) -> Tensor:
        made = memory.tensor((side.samples, side.tokens, heads, DIM), torch.float32).normal_(generator=random)
        if not side.packed:
            for sample, _, stop, _, _ in side.sequences():
                made[sample, stop:] = torch.nan
        return made

    q, k, v, dout = tensor(queries, HEADS), tensor(keys, KV_HEADS), tensor(keys, KV_HEADS), tensor(queries, HEADS)
    tables: list[Rotary | None] = [None, None]
    if rotated:
        tables = [Rotary.from_angles(torch.randn(x.shape[1], DIM // 2, generator=random)) for x in (q, k)]

    def lengths(side: Side) -> tuple[Tensor | None, Tensor | None]:
        values = memory.tensor((len(side.bounds),), torch.int32).copy_(torch.tensor(side.bounds))
        return (values, None) if side.packed else (None, values)

    (bounds, seqlens), (bounds_k, seqlens_k) = lengths(queries), lengths(keys)
    of_keys = Keys(tables[1], bounds_k, None, seqlens_k)
    return AttentionCall(q, k, v, tables[0], DIM**-0.5, bounds, None, seqlens, of_keys), dout


def expected(queries: Side, keys: Side, call: AttentionCall, dout: Tensor) -> dict[str, Tensor]:
    """By the reference where both sides are right; 0 behind right lengths; NaN elsewhere."""
    like = {"out": call.q, "dq": call.q, "dk": call.k, "dv": call.v}
    found = {name: torch.full(x.shape, torch.nan) for name, x in like.items()}
    for (b, start, stop, right, whole), (_, first, last, right_k, whole_k) in zip(
        queries.sequences(), keys.sequences(), strict=True
    ):
        rows, columns = (slice(b, b + 1), slice(start, stop)), (slice(b, b + 1), slice(first, last))
        q, k, v = (x.clone().requires_grad_() for x in (call.q[rows], call.k[columns], call.v[columns]))
        tables = [
            table and Rotary(table.cos[:, part], table.sin[:, part], table.pairing)
            for table, (_, part) in ((call.rotary, rows), (call.key_rotary, columns))
        ]
        out = rope_attention(q, k, v, tables[0], rotary_k=tables[1], backend="reference")
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout[rows])
        of_rows = {"out": out.detach(), "dq": dq} if right and whole_k else {}
        # of queries without an output there is no gradient
        of_columns = {"dk": dk, "dv": dv} if right_k and whole and (whole_k or stop == start) else {}
        for values, part in ((of_rows, rows), (of_columns, columns)):
            for name, x in values.items():
                if not queries.packed:
                    found[name][b] = 0.0
                found[name][part] = x
    return found


def results(call: AttentionCall, dout: Tensor, memory: Memory) -> dict[str, Tensor]:
    from spatial_pe.backends.triton.plan import plan_backward, plan_forward
    from spatial_pe.backends.triton.tiles import Choice, Tile

    tile = Tile(BLOCK, BLOCK, 4, 1, split=True)
    choice = Choice("hopper", tile, tile, tile, None, None)
    forward = plan_forward(call, choice)
    forward.run(call.q.device)
    out, lse = forward.results
    backward = plan_backward(call, out, lse, dout, choice)
    backward.run(call.q.device)
    dq, dk, dv = backward.results
    memory.check(out, lse, dq, dk, dv)
    check_lse(lse, out)
    return {"out": out, "dq": dq, "dk": dk, "dv": dv}


@pytest.mark.parametrize("side", ["queries", "keys", "both"])
@pytest.mark.parametrize("wrong", some(wrong_cases(BLOCK), 3), ids=str)
def test_nan_where_the_lengths_are_wrong(wrong, side, memory):
    check(wrong, side, memory)


def check(wrong: Wrong, side: str, memory: Memory) -> None:
    bad = Side(wrong.bounds, wrong.tokens, wrong.longest is not None)
    good = right_side(bad)
    queries, keys = {"queries": (bad, good), "keys": (good, bad), "both": (bad, bad)}[side]
    call, dout = make(queries, keys, wrong.tokens % 2 == 1, memory)
    wanted = expected(queries, keys, call, dout)
    got = results(call, dout, memory)
    for name, x in wanted.items():
        torch.testing.assert_close(got[name], x, rtol=1e-5, atol=1e-5, equal_nan=True, msg=name)


@pytest.mark.parametrize("wrong", some(decreasing_cases(BLOCK), 3), ids=str)
def test_nan_where_cu_seqlens_decrease(wrong, memory):
    """Of the keys: in the queries of just that sequence. Of the queries: in the rows of the first token too."""
    bad = Side(wrong.bounds, wrong.tokens, True)
    good = right_side(bad)
    call, dout = make(good, bad, True, memory)
    wanted, got = expected(good, bad, call, dout), results(call, dout, memory)
    for name in ("out", "dq"):
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-5, atol=1e-5, equal_nan=True)
    call, dout = make(bad, good, True, memory)
    assert results(call, dout, memory)["out"][:, 0].isnan().all()


def test_right_lengths_leave_no_nan(memory):
    """Of all pairs of forms, empty sequences among them."""
    packed, padded = Side((0, 5, 5, 22, 40), 40, True), Side((7, 0, 30), 30, False)
    for queries in (packed, padded):
        keys = right_side(queries)
        call, dout = make(queries, keys, True, memory)
        wanted, got = expected(queries, keys, call, dout), results(call, dout, memory)
        for name, x in wanted.items():
            assert x.isfinite().all()
            torch.testing.assert_close(got[name], x, rtol=1e-5, atol=1e-5)
