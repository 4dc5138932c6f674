# SPDX-License-Identifier: Apache-2.0
"""The rotation alone by the C++ kernel, against float64, and which calls take it."""

from __future__ import annotations

import pytest
import torch
from oracles import CPU_KERNELS, threads
from torch import Tensor

from spatial_pe import Rotary, apply_rotary, apply_rotary_qk
from spatial_pe.backends import cpu
from spatial_pe.ops import rotate
from spatial_pe.rotary import PAIRINGS, rotated

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"cpu: {cpu.unavailable()}")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (2, 37, 3, 64, 64),
    (1, 1, 1, 16, 16),
    (3, 70, 2, 72, 36),
    (1, 33, 5, 88, 40),
    (2, 300, 2, 256, 256),
    (2, 5, 3, 24, 8),
]


def draw(batch: int, tokens: int, heads: int, dim: int, rotary_dim: int, dtype: torch.dtype, table: str, pairing: str):
    """x amid NaN, and a table of its own for each sample or head."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.full((batch, tokens, heads + 1, dim + 8), torch.nan, dtype=dtype)
    x = wide[:, :, 1:, :dim].copy_(torch.randn(batch, tokens, heads, dim, generator=generator))
    samples, table_heads = batch if table == "sample" else 1, heads if table == "head" else 1
    angles = 3 * torch.randn(samples, tokens, table_heads, rotary_dim // 2, generator=generator)
    return x, Rotary.from_angles(angles, pairing)


@pytest.mark.parametrize("table", ["shared", "head", "sample"])
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_rounding_from_exact(dtype, shape, pairing, table):
    x, rotary = draw(*shape, dtype, table, pairing)
    exact = rotated(x.double(), rotary)
    bound = torch.finfo(dtype).eps * exact.abs() + 1e-6 * (1 + exact.abs())
    for kernel in CPU_KERNELS:
        with kernel.selected():
            (got,) = cpu.rotation([x], rotary)
            back = cpu.rotation([got], rotary, inverse=True)[0]
            changed = x.clone()
            cpu.rotation([changed], rotary, inplace=True)
        assert got.is_contiguous() and got.dtype == dtype and torch.equal(changed, got)
        assert ((got.double() - exact).abs() <= bound).all(), str(kernel)
        torch.testing.assert_close(back.float(), x.float(), rtol=1e-2, atol=1e-5 if dtype == torch.float32 else 3e-2)


def test_threads_change_no_bit():
    x, rotary = draw(3, 500, 4, 80, 80, torch.bfloat16, "sample", "half")
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append(cpu.rotation([x], rotary)[0])
    assert all(torch.equal(results[0], x) for x in results)


def test_small_numbers_and_those_that_are_none():
    """Nothing is flushed to zero; NaN and infinity stay in their pair, and out of channels that are not rotated."""
    x, rotary = draw(1, 4, 1, 64, 32, torch.bfloat16, "shared", "half")
    x[0, 0] = 1e-40
    x[0, 1, 0, 3], x[0, 2, 0, 40] = torch.nan, torch.inf
    (got,) = cpu.rotation([x], rotary)
    assert torch.equal(got.isnan(), rotated(x, rotary).isnan()) and got.isnan().sum() == 2
    assert got[0, 2, 0, 40] == torch.inf and (got[0, 0, 0, 32:] == x[0, 0, 0, 32:]).all() and got[0, 0].any()


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many tensors each call of the kernel rotates."""
    found: list[int] = []
    kernel = cpu.rotation
    monkeypatch.setattr(
        cpu, "rotation", lambda xs, *args, **kwargs: found.append(len(xs)) or kernel(xs, *args, **kwargs)
    )
    return found


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_gradients(pairing, calls):
    x, _ = draw(2, 20, 3, 64, 64, torch.float32, "shared", pairing)
    q, k = x.clone().requires_grad_(), x.flip(1).clone().requires_grad_()
    angles = torch.randn(20, 32, requires_grad=True)

    def grads(rotate_both, learned: bool) -> tuple[Tensor, ...]:
        table = Rotary.from_angles(angles if learned else angles.detach(), pairing)
        loss = sum(y.square().mul(y + 1).sum() for y in rotate_both(table))
        return torch.autograd.grad(loss, (q, k, angles) if learned else (q, k))

    for learned in (False, True):
        expected = grads(lambda table: (rotated(q, table), rotated(k, table)), learned)
        calls.clear()
        for x, y in zip(grads(lambda table: apply_rotary_qk(q, k, table), learned), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-4)
        assert calls == ([] if learned else [2, 2])


def test_calls_that_take_plain_operators(calls):
    """float64, odd head_dims, channels that are not adjacent, and whoever traces; tables with a gradient: see above."""
    rotary = Rotary.from_angles(torch.randn(5, 4))
    for x in (
        torch.randn(1, 5, 2, 16, dtype=torch.float64),
        torch.randn(1, 5, 2, 12),
        torch.randn(1, 5, 16, 2).transpose(2, 3),
    ):
        torch.testing.assert_close(apply_rotary(x, rotary), rotated(x, rotary))
    x = torch.randn(1, 5, 2, 16)
    torch.compile(lambda x: apply_rotary(x, rotary), backend="aot_eager", fullgraph=True)(x)
    torch.vmap(lambda x: apply_rotary(x, rotary))(torch.randn(3, 1, 5, 2, 16))
    assert not calls
    apply_rotary(x, rotary)
    assert calls == [1]
    assert rotate._kernel_serves(x, plain_on_cpu=False) and not rotate._kernel_serves(x, plain_on_cpu=True)


@pytest.mark.parametrize("which", ["x", "table", "both", "sin"])
def test_the_op_in_vmap(which):
    """Lanes of x, of the table, or of both; by hand one after the other."""
    xs, angles = torch.randn(3, 2, 5, 2, 16), torch.randn(3, 1, 5, 1, 8)
    dims = {"x": (0, None, None), "table": (None, 0, 0), "both": (0, 0, 0), "sin": (0, None, 0)}[which]
    args = [x if dim == 0 else x[0] for x, dim in zip((xs, angles.cos(), angles.sin()), dims, strict=True)]

    def one(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.ops.spatial_pe.rotate([x, x[:, :, :1]], cos, sin, "half", False)[0]

    lanes = [[x[i] if dim == 0 else x for x, dim in zip(args, dims, strict=True)] for i in range(3)]
    torch.testing.assert_close(torch.vmap(one, dims)(*args), torch.stack([one(*lane) for lane in lanes]))


@pytest.mark.parametrize("wanted", [("q", "k"), ("angles",), ("q", "k", "angles")], ids="+".join)
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_batched_gradients(pairing, wanted, calls):
    leaves = {"q": torch.randn(1, 5, 2, 16), "k": torch.randn(1, 5, 1, 16), "angles": torch.randn(5, 6)}
    for name in wanted:
        leaves[name].requires_grad_()
    out = torch.cat(apply_rotary_qk(leaves["q"], leaves["k"], Rotary.from_angles(leaves["angles"], pairing)), 2)
    assert calls == ([] if "angles" in wanted else [2])
    batch, inputs = torch.randn(3, *out.shape), [leaves[name] for name in wanted]
    found = torch.autograd.grad(out, inputs, batch, retain_graph=True, is_grads_batched=True)
    each = [torch.autograd.grad(out, inputs, one, retain_graph=True) for one in batch]
    for x, ys in zip(found, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(x, torch.stack(ys))
