# SPDX-License-Identifier: Apache-2.0
"""flash-attn behind the rotation: packed cu_seqlens, derivatives."""

from __future__ import annotations

import weakref

import pytest
import torch
from flash_stand_ins import CALLS, HALF, NAMES, STAND_INS, Attend, fa2
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from spatial_pe import Rotary, rope_attention
from spatial_pe.ops import flash
from spatial_pe.ops.rotate import apply_rotary_qk

pytestmark = pytest.mark.usefixtures("poisoned_memory")


TOKENS = 60


WRONG = {
    "end early": ([0, 20, 50], None),
    "end late": ([0, 20, 70], None),
    "begin late": ([5, 20, 60], None),
    "negative": ([0, -4, 60], None),
    "far": ([0, 2**31 - 1, 60], None),
    "decrease": ([0, 40, 20, 60], None),
    "longer than max_seqlen": ([0, 10, 60], 30),
    "max_seqlen of 1": ([0, 10, 60], 1),
    "garbage": ([2**31 - 1, -(2**31), 7], 8),
}


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("provider", ["flash-attn 2", "torch's varlen_attn"])
def test_wrong_bounds_are_nan_and_stay_within_the_tensors(provider, name, rotated, gpu):
    """In all results: whoever reads one row of them sees it. The stand-in asserts that nothing else is read."""
    gpu((9, 0), STAND_INS[provider]())
    values, longest = WRONG[name]
    bounds = torch.tensor(values, dtype=torch.int32)
    q, k, v = (torch.randn(TOKENS, 2, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    rotary = Rotary.from_angles(torch.rand(TOKENS, 32)) if rotated else None
    out = rope_attention(q, k, v, rotary, cu_seqlens=bounds, max_seqlen=longest, backend="composed")
    assert CALLS and all(x.isnan().all() for x in (out, *torch.autograd.grad(out.sum(), (q, k, v))))


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_bounds_of_keys_are_nan_too(name, rotated, gpu):
    gpu((9, 0), fa2())
    values, longest = WRONG[name]
    bounds = torch.tensor(values, dtype=torch.int32)
    right = torch.linspace(0, 40, len(values)).int()
    q, k, v = (torch.randn(n, 2, 64, dtype=torch.bfloat16, requires_grad=True) for n in (40, TOKENS, TOKENS))
    tables = [Rotary.from_angles(torch.rand(n, 32)) if rotated else None for n in (40, TOKENS)]
    out = rope_attention(
        q, k, v, tables[0], rotary_k=tables[1], cu_seqlens=right, cu_seqlens_k=bounds, max_seqlen_k=longest,
        backend="composed",
    )  # fmt: skip
    assert CALLS and all(x.isnan().all() for x in (out, *torch.autograd.grad(out.sum(), (q, k, v))))


@pytest.mark.parametrize("name", STAND_INS)
@pytest.mark.parametrize("form", ["dense", "packed"])
def test_keys_of_other_tokens(form, name, gpu, monkeypatch):
    """A table each, grouped heads, a sequence without keys; as by SDPA."""
    torch.manual_seed(0)
    if form == "dense" and NAMES[name].dense is None:
        pytest.skip("packed only")
    packed = form == "packed"
    monkeypatch.setattr(flash, "ROWS", (flash.Row(packed, (9,), NAMES[name], "for this test"),))
    lead = () if packed else (2,)
    q, k, v = (
        torch.randn(*lead, n, heads, 64, dtype=torch.bfloat16, requires_grad=True)
        for n, heads in ((40, 4), (TOKENS, 2), (TOKENS, 2))
    )
    angles = [torch.rand(n, 32, requires_grad=True) for n in (40, TOKENS)]
    rotary, rotary_k = (Rotary.from_angles(x) for x in angles)
    lengths = {}
    if packed:
        values = {"cu_seqlens": [0, 7, 9, 40], "cu_seqlens_k": [0, 45, 45, 60]}
        lengths = {name: torch.tensor(x, dtype=torch.int32) for name, x in values.items()}

    def results():
        out = rope_attention(q, k, v, rotary, rotary_k=rotary_k, backend="composed", **lengths)
        return out, *torch.autograd.grad(out.float().square().sum(), [q, k, v, *angles], retain_graph=True)

    expected = results()
    gpu((9, 0), STAND_INS[name]())
    found = results()
    assert [kind for kind, _ in CALLS] == [form]
    for x, y in zip(found, expected, strict=True):  # rounded to bfloat16 in other places
        assert (x - y).norm() < 0.02 * y.norm()
    if packed:
        assert (found[0][7:9] == 0).all()


@pytest.mark.parametrize("longest", [50, 55, None])
def test_nobody_waits_for_the_device(longest, gpu, monkeypatch):
    """With max_seqlen no value of a tensor is read; without one, once for a tensor."""
    gpu((9, 0), fa2())
    bounds = torch.tensor([0, 10, 60], dtype=torch.int32)
    reads = []
    for name in ("item", "tolist", "__int__", "__bool__", "__float__", "__index__"):
        real = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self, real=real: reads.append(1) or real(self))
    monkeypatch.setattr(Attend, "apply", lambda q, *others: q.clone())
    q = torch.randn(TOKENS, 2, 64, dtype=torch.bfloat16)
    rotary = Rotary.from_angles(torch.rand(TOKENS, 32))
    reads.clear()
    for _ in range(3):
        rope_attention(q, q, q, rotary, cu_seqlens=bounds, max_seqlen=longest, backend="composed")
    assert len(reads) == (1 if longest is None else 0)
    assert [options["longest"] for _, options in CALLS] == [longest or 50] * 3


def test_bounds_are_kept_for_the_layers_and_follow_changes(gpu):
    gpu((9, 0), fa2())
    bounds = torch.tensor([0, 10, 60], dtype=torch.int32)
    q = torch.randn(TOKENS, 2, 64, dtype=torch.bfloat16)

    def layer(q=q, bounds=bounds):
        return rope_attention(q, q, q, cu_seqlens=bounds, backend="composed")

    before = layer()
    layer()
    assert CALLS[0][1]["bounds"] is CALLS[1][1]["bounds"]
    bounds[1] = 30
    after = layer()
    assert torch.equal(after, layer(bounds=bounds.clone())) and not torch.equal(after, before)
    assert layer(q=q[:50]).isnan().all()  # the same bounds, other tokens
    with torch.inference_mode():  # such tensors count no versions
        bounds = torch.tensor([0, 10, 60], dtype=torch.int32)
        layer(bounds=bounds)
        bounds[1] = 30
        assert torch.equal(layer(bounds=bounds), after)


def test_in_a_cuda_graph_any_length_fits(gpu, monkeypatch):
    """Replays have lengths that are not known when it is captured."""
    gpu((9, 0), fa2())
    monkeypatch.setattr(flash, "longest_sequence", lambda bounds: None)
    q = torch.randn(TOKENS, 2, 64, dtype=torch.bfloat16)
    rope_attention(q, q, q, cu_seqlens=torch.tensor([0, 10, 60], dtype=torch.int32), backend="composed")
    assert CALLS[0][1]["longest"] == TOKENS


@pytest.mark.parametrize("make_module", STAND_INS.values(), ids=STAND_INS)
def test_second_derivatives_raise(make_module, gpu):
    gpu((9, 0), make_module())
    q, k, v = (torch.randn(TOKENS, 2, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    bounds = torch.tensor([0, 10, 60], dtype=torch.int32)
    rotary = Rotary.from_angles(torch.rand(TOKENS, 32))
    weight = torch.ones((), requires_grad=True)

    def first(**options):
        out = rope_attention(q, k, v, rotary, cu_seqlens=bounds, backend="composed")
        return torch.autograd.grad((out * weight).float().square().sum(), (q, k, v), **options)

    recorded = first(create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first(), recorded, strict=True))
    for x in (q, k, v, weight):
        with pytest.raises(RuntimeError, match=r"flash-attn has no double backward: .*MATH"):
            torch.autograd.grad(recorded[0].float().sum(), x, retain_graph=True)
    with sdpa_kernel(SDPBackend.MATH):
        (dq, _, _) = first(create_graph=True)
    assert torch.isfinite(torch.autograd.grad(dq.float().sum(), k)[0]).all()


def test_backward_lets_go_of_the_rotated_tensors(gpu, monkeypatch):
    """What the hook holds must not outlive what autograd has saved; without it, second derivatives raise at once."""
    gpu((9, 0), fa2())
    rotated = []

    def rotate(*args):
        result = apply_rotary_qk(*args)
        rotated.extend(map(weakref.ref, result))
        return result

    monkeypatch.setattr(flash, "apply_rotary_qk", rotate)
    q = torch.randn(TOKENS, 2, 64, dtype=torch.bfloat16, requires_grad=True)
    bounds = torch.tensor([0, 60], dtype=torch.int32)
    rotary = Rotary.from_angles(torch.rand(TOKENS, 32))
    out = rope_attention(q, q, q, rotary, cu_seqlens=bounds, backend="composed").float().sum()
    assert all(x() is not None for x in rotated)
    out.backward()
    assert all(x() is None for x in rotated)

    out = rope_attention(q, q, q, rotary, cu_seqlens=bounds, backend="composed").float().sum()
    torch.autograd.grad(out, q, retain_graph=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(out, q, create_graph=True)


def test_deterministic_algorithms_are_asked_for(gpu, monkeypatch):
    gpu((9, 0), fa2())
    monkeypatch.setattr(flash, "ROWS", (flash.Row(False, (9,), flash.FA2, "for this test"),))
    for wanted in (False, True):
        torch.use_deterministic_algorithms(wanted)
        try:
            rope_attention(HALF, HALF, HALF, backend="composed")
        finally:
            torch.use_deterministic_algorithms(False)
    assert [options["deterministic"] for _, options in CALLS] == [False, True]
