# SPDX-License-Identifier: Apache-2.0
"""The rotation alone and the gradient of its angles, in Triton's interpreter, against plain PyTorch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracles import Case, make
from oracles.cases import HEAD_DIMS, ROTATIONS, VIEWS
from rows import some

from spatial_pe import Rotary, apply_rotary, apply_rotary_qk
from spatial_pe.backends.triton import backend as triton
from spatial_pe.rotary import angle_gradient, rotated

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(triton.unavailable() is not None, reason=f"triton: {triton.unavailable()}"),
    pytest.mark.skipif(not triton.INTERPRETED, reason="a GPU is here: tests/backends/gpu runs the kernels on it"),
]
CASES = [case for case in [*ROTATIONS, *HEAD_DIMS[:5], *VIEWS] if case.dim <= 128 and case.pairs and not case.lengths]
GROUPED = Case(batch=2, tokens=70, heads=5, kv_heads=1, dim=72)


@pytest.fixture
def served(monkeypatch):
    """apply_rotary takes the kernel, as it does on a GPU."""
    from spatial_pe.ops import rotate

    monkeypatch.setattr(rotate, "_kernel_serves", lambda x, plain_on_cpu: True)
    monkeypatch.setattr(rotate, "_backend", lambda xs: triton)


def drawn(case: Case, dtype: torch.dtype = torch.float32):
    inputs = make(replace(case, dtype=dtype, seqlens=None))
    rotary = inputs.rotary()
    return inputs.q.detach(), inputs.k.detach(), Rotary(rotary.cos.detach(), rotary.sin.detach(), rotary.pairing)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Both compute in float32 and round once: at most one rounding apart."""
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got, expected, rtol=2 * eps, atol=8 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.float16])
@pytest.mark.parametrize("case", some([*CASES, GROUPED], 3), ids=str)
def test_rotation(case, dtype):
    q, k, rotary = drawn(case, dtype)
    results = triton.rotation([q, k], rotary)
    for got, x in zip(results, (q, k), strict=True):
        assert got.is_contiguous()
        close(got, rotated(x, rotary))
    back = triton.rotation(results, rotary, inverse=True)
    torch.testing.assert_close(back[0], q, rtol=1e-2, atol=1e-2 if dtype == torch.float16 else 1e-5)
    close(triton.rotation([k], rotary, inverse=True)[0], rotated(k, rotary.inverse()))


@pytest.mark.parametrize("case", some([*CASES, GROUPED], 3, first=1), ids=str)
def test_in_place(case, served):
    """The same tensors come back, and the memory around the views is not touched."""
    q, k, rotary = drawn(case)
    storage = q.untyped_storage()
    around = torch.tensor([], dtype=q.dtype).set_(storage).isnan().sum()
    expected = [rotated(x, rotary) for x in (q, k)]
    got = apply_rotary_qk(q, k, rotary, inplace=True)
    assert got[0] is q and got[1] is k
    for x, y in zip(got, expected, strict=True):
        close(x, y)
    assert torch.tensor([], dtype=q.dtype).set_(storage).isnan().sum() == around


@pytest.mark.parametrize("case", some([*CASES, GROUPED], 3), ids=str)
def test_angle_gradient(case):
    q, k, rotary = drawn(case)
    dq, dk = torch.randn(q.shape), torch.randn(k.shape)
    expected = sum(angle_gradient(x, dx, rotary.cos, rotary.pairing) for x, dx in ((q, dq), (k, dk)))
    got = triton.angle_gradient(q, k, dq, dk, rotary.cos, rotary.pairing, None)
    assert got.shape == rotary.cos.shape and got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    again = triton.angle_gradient(q, k, dq, dk, rotary.cos, rotary.pairing, None)
    assert torch.equal(got, again), "sums in another order"


def test_angle_gradient_of_padded_samples():
    """What lies behind a sample's end may be NaN."""
    q, k, rotary = drawn(Case(batch=3, tokens=40, dim=64))
    dq, dk = torch.randn(q.shape), torch.randn(k.shape)
    lengths = torch.tensor([40, 0, 23], dtype=torch.int32)
    for b, n in enumerate(lengths):
        q[b, n:], k[b, n:], dq[b, n:], dk[b, n:] = torch.nan, torch.nan, 0, 0
    got = triton.angle_gradient(q, k, dq, dk, rotary.cos, "half", lengths)
    expected = sum(angle_gradient(x.nan_to_num(), dx, rotary.cos, "half") for x, dx in ((q, dq), (k, dk)))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------------------- through the op


def of(x: torch.Tensor, angles: torch.Tensor, pairing: str) -> torch.Tensor:
    return apply_rotary(x, Rotary.from_angles(angles, pairing))


@pytest.mark.parametrize("table", ["shared", "head", "both"])
@pytest.mark.parametrize("pairing", ["half", "interleaved", "axis_half"])
def test_gradients_of_apply_rotary(pairing, table, served):
    inputs = make(Case(batch=2, tokens=20, heads=3, dim=64, rotary_dim=40, pairing=pairing, table=table))
    leaves = (inputs.q, inputs.k, inputs.angles)
    rotary = inputs.rotary()
    got = torch.cat(apply_rotary_qk(inputs.q, inputs.k, rotary), 2)
    expected = torch.cat([rotated(x, rotary) for x in (inputs.q, inputs.k)], 2)
    torch.testing.assert_close(got, expected)
    weights = torch.randn(got.shape)
    grads = [torch.autograd.grad(x, leaves, weights, retain_graph=True) for x in (got, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_twice_differentiable(served):
    """The gradient of a rotation is a rotation."""
    x = torch.randn(1, 8, 2, 16, requires_grad=True)
    rotary = Rotary.from_angles(torch.randn(8, 8))
    (dx,) = torch.autograd.grad(apply_rotary(x, rotary).square().sum(), x, create_graph=True)
    torch.testing.assert_close(dx, 2 * x)
    (ddx,) = torch.autograd.grad(dx.sum(), x)
    torch.testing.assert_close(ddx, torch.full_like(x, 2.0))


@pytest.mark.parametrize("want", [(True, False), (False, True), (True, True)])
def test_opcheck(want):
    q, k = (torch.randn(2, 9, h, 24, requires_grad=want[0]) for h in (2, 1))
    angles = torch.randn(1, 9, 1, 8)
    cos, sin = (f(angles).requires_grad_(want[1]) for f in (torch.cos, torch.sin))
    done = torch.library.opcheck(torch.ops.spatial_pe.rotate, ([q, k], cos, sin, "half", False))
    assert set(done.values()) == {"SUCCESS"}


def test_opcheck_in_place_and_angle_gradient():
    q, k = torch.randn(2, 9, 2, 24), torch.randn(2, 9, 1, 24)
    cos, sin = torch.randn(1, 9, 1, 8), torch.randn(1, 9, 1, 8)
    for op, args in (
        (torch.ops.spatial_pe.rotate_, ([q, k], cos, sin, "half")),
        (torch.ops.spatial_pe.angle_gradient, (q, k, q, k, cos, "half", None, "triton")),
    ):
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        assert set(torch.library.opcheck(op, args, test_utils=tests).values()) == {"SUCCESS"}


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_without_a_graph_break(inplace, served):
    rotary = Rotary.from_angles(torch.randn(9, 12), "interleaved")

    def function(q, k):
        q, k = apply_rotary_qk(q * 2, k * 2, rotary, inplace=inplace)
        return q + k

    q, k = torch.randn(2, 9, 2, 24), torch.randn(2, 9, 2, 24)
    with torch.no_grad():
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(q, k)
        torch.testing.assert_close(compiled, function(q, k))


def test_refusals():
    q = torch.randn(2, 9, 2, 24, requires_grad=True)
    rotary = Rotary.from_angles(torch.randn(9, 12))
    with pytest.raises(ValueError, match=r"inplace=True overwrites what the gradient needs: .*no_grad"):
        apply_rotary(q, rotary, inplace=True)
    with pytest.raises(TypeError, match=r"q and k must share a dtype, got q torch.float32, k torch.float16"):
        apply_rotary_qk(q, q.half(), rotary)
    with pytest.raises(ValueError, match=r"same head_dim, got 24 and 32"):
        apply_rotary_qk(q, torch.randn(2, 9, 2, 32), rotary)
    with pytest.raises(ValueError, match=r"same batch, got \(2, 9, 2, 24\) and \(3, 9, 2, 24\)"):
        apply_rotary_qk(q, torch.randn(3, 9, 2, 24), rotary)
    with pytest.raises(ValueError, match=r"rotary has 9 tokens, k has 10"):
        apply_rotary_qk(q, torch.randn(2, 10, 2, 24), rotary)


@pytest.mark.parametrize("inplace", [False, True])
def test_without_a_kernel(inplace):
    """On a CPU, in float64, with a last dimension of any stride: plain PyTorch."""
    rotary = Rotary.from_angles(torch.randn(9, 4))
    q, k = torch.randn(2, 9, 8, 2, dtype=torch.float64).transpose(2, 3), torch.randn(2, 9, 1, 8, dtype=torch.float64)
    expected = [rotated(x, rotary) for x in (q, k)]
    for got, x in zip(apply_rotary_qk(q, k, rotary, inplace=inplace), expected, strict=True):
        torch.testing.assert_close(got, x)
    packed = apply_rotary_qk(q[0], k[0], rotary)
    assert packed[0].shape == q[0].shape


def test_batched_gradients(served):
    """Of q, k and the angles: by plain operators, as the op of lists has no rule for them."""
    q, k, angles = torch.randn(1, 5, 2, 16), torch.randn(1, 5, 1, 16), torch.randn(5, 8)
    leaves = [x.requires_grad_() for x in (q, k, angles)]
    out = torch.cat(apply_rotary_qk(q, k, Rotary.from_angles(angles)), 2)
    batch = torch.randn(2, *out.shape)
    found = torch.autograd.grad(out, leaves, batch, retain_graph=True, is_grads_batched=True)
    each = [torch.autograd.grad(out, leaves, one, retain_graph=True) for one in batch]
    for x, ys in zip(found, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(x, torch.stack(ys), rtol=1e-5, atol=1e-5)
