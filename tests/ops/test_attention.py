# SPDX-License-Identifier: Apache-2.0
"""rope_attention: every kernel against the exact result, and what must hold to the last bit."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    CPU_KERNELS,
    KERNELS,
    Case,
    Exact,
    Inputs,
    Kernel,
    check,
    check_bound,
    distinct_kernels,
    exact,
    generator,
    make,
    pair_channels,
    run,
    threads,
)
from oracles.cases import GROUPS, HEAD_DIMS, LENGTHS, ROTATIONS, SCALES, SEQUENCES, VIEWS
from oracles.extreme import BIASES, MORE_SINKS, POISON, biased, poisoned, with_sinks

from spatial_pe import Rotary, apply_rotary, rope_attention
from spatial_pe.rotary import PAIRINGS

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.usefixtures("poisoned_memory")
FUSED = [Kernel("reference"), *CPU_KERNELS]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Where threads are not what is tested, one is faster: the tensors are small."""
    with threads(1):
        yield


@functools.lru_cache(maxsize=2)
def prepared(case: Case) -> tuple[Inputs, dict, Exact]:
    """Inputs, eager and exact results: the same for all kernels."""
    inputs = make(case)
    return inputs, run(inputs, "composed"), exact(inputs)


def by_kernel(cases: list[Case], kernels: list[Kernel] | None = None):
    """Parametrize by case and kernel; kernels of a case follow each other, so that they share what is prepared."""
    pairs = []
    for case in cases:
        distinct = distinct_kernels(case.dtype)
        for kernel in kernels or [*distinct, Kernel("reference")]:
            if kernel.backend != "cpu" or kernel in distinct:
                pairs.append(pytest.param(case, kernel, id=f"{case}-{kernel}"))
    return pytest.mark.parametrize(("case", "kernel"), pairs)


def in_dtypes(cases: list[Case], dtypes=FLOATS) -> list[Case]:
    return [replace(case, dtype=dtype) for case in cases for dtype in dtypes]


def check_kernel(case: Case, kernel: Kernel) -> None:
    inputs, eager, truth = prepared(case)
    with kernel.selected() as backend:
        check(run(inputs, backend), eager, truth, inputs)


# ------------------------------------------------------------------------------------------------------ the error rule


@by_kernel(in_dtypes(LENGTHS + HEAD_DIMS + ROTATIONS + SEQUENCES + VIEWS + GROUPS + SCALES))
def test_error_rule(case, kernel):
    check_kernel(case, kernel)


@pytest.mark.slow
@by_kernel(in_dtypes([replace(case, heads=3, dim=80, table="head") for case in LENGTHS[3:]]))
def test_error_rule_more_work(case, kernel):
    check_kernel(case, kernel)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize(
    "case", [LENGTHS[2], LENGTHS[4], *ROTATIONS[:6], *SEQUENCES, *VIEWS, GROUPS[0], *SCALES[:3]], ids=str
)
@pytest.mark.parametrize("backend", ["reference", "composed"])
def test_plain_pytorch_backends(case, dtype, backend):
    """The eager path is the rule's other half: here it is held to the rounding of its dtype."""
    inputs = make(replace(case, dtype=dtype))
    check_bound(run(inputs, backend), exact(inputs), inputs)


@pytest.mark.parametrize("kernel", [*KERNELS], ids=str)
@pytest.mark.parametrize("case", SEQUENCES[-3:] + VIEWS[-2:], ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_padding_is_zero(case, kernel, dtype):
    """Not small: 0. What is behind the end of a sample is NaN, in q, k, v and in the gradient that comes in."""
    inputs = make(replace(case, dtype=dtype, table="sample" if case.kv_heads is None else "shared"))
    with kernel.selected() as backend:
        got = run(inputs, backend)
    for b, length in enumerate(case.seqlens):
        for name, x in got.items():
            if name == "angles" and x.shape[0] == 1:
                length, b = max(case.seqlens), 0
            assert torch.equal(x[b, length:], torch.zeros_like(x[b, length:])), name
            assert (x[b, :length] != 0).any() or length <= 1, name


@by_kernel(in_dtypes([LENGTHS[0], LENGTHS[4], SEQUENCES[1], SEQUENCES[4], SEQUENCES[6]]), [*FUSED])
def test_lse(case, kernel):
    """The second output of the op: log of the sum of exponentials, float32, 0 where there is no token."""
    inputs, _, truth = prepared(case)
    q, k, v = (x[None] if case.lengths else x for x in (inputs.q, inputs.k, inputs.v))
    rotary = inputs.rotary()
    sequences = (inputs.cu_seqlens, None, inputs.seqlens)
    with kernel.selected() as backend:
        _, lse = torch.ops.spatial_pe.rope_attention(
            q, k, v, rotary.cos, rotary.sin, rotary.pairing, inputs.scale, *sequences, backend
        )
    assert lse.dtype == torch.float32
    assert torch.equal(lse == 0, truth.lse == 0)
    # a score of D products, each off by an epsilon of q's type
    scores = case.dim**0.5 * inputs.scale * torch.finfo(case.dtype).eps
    torch.testing.assert_close(lse.double(), truth.lse, rtol=1e-6, atol=4 * scores)


def test_lower_instruction_set_serves_what_the_higher_lacks():
    """avx512_bf16 has bfloat16 kernels only: float32 and float16 come from avx512, bit for bit."""
    by_name = {kernel.isa: kernel for kernel in CPU_KERNELS}
    if not {"avx512", "avx512_bf16"} <= set(by_name):
        pytest.skip("this CPU has no AVX-512-BF16")
    for dtype in FLOATS:
        inputs = make(Case(tokens=150, dtype=dtype))
        got = []
        for isa in ("avx512", "avx512_bf16"):
            with by_name[isa].selected() as backend:
                got.append(run(inputs, backend))
        same = all(torch.equal(got[0][name], got[1][name]) for name in got[0])
        assert same == (dtype != torch.bfloat16)


def test_kernel_restores_the_instruction_set():
    from spatial_pe import _C

    before = _C.cpu_features()["isa"]
    with pytest.raises(ZeroDivisionError), Kernel("cpu", "portable").selected():
        assert _C.cpu_features()["isa"] == "portable"
        raise ZeroDivisionError
    assert _C.cpu_features()["isa"] == before
    with pytest.raises(ValueError, match="no kernels for pdp11"):
        _C.use_isa("pdp11")


# ------------------------------------------------------------------------------------------------------ extreme scores


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("kernel", FUSED, ids=str)
def test_extreme_scores(bias, dtype, kernel):
    if kernel.backend == "cpu" and kernel not in distinct_kernels(dtype):
        pytest.skip("served by avx512")
    inputs, eager, truth = biased(bias, dtype)
    with kernel.selected() as backend:
        check(run(inputs, backend), eager, truth, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sinks", MORE_SINKS, ids=str)
@pytest.mark.parametrize("kernel", FUSED, ids=str)
def test_sinks(sinks, dtype, kernel):
    if kernel.backend == "cpu" and kernel not in distinct_kernels(dtype):
        pytest.skip("served by avx512")
    inputs, eager, truth = with_sinks(sinks, dtype)
    with kernel.selected() as backend:
        check(run(inputs, backend), eager, truth, inputs)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("poison", POISON)
def test_nan_and_inf_propagate(poison, dtype, kernel):
    """As in SDPA of float32: rows with NaN, infinities with their sign, and the rest untouched."""
    if kernel.backend == "composed" and dtype != torch.float32:
        pytest.skip("this is torch's SDPA, which in 16 bits gives 0 for some rows that are NaN in float32")
    inputs, expected = poisoned(poison, dtype)
    name = POISON[poison][0]
    with torch.no_grad(), kernel.selected() as backend:
        got = inputs.call(backend).float()
    bad = expected.isnan()
    assert bad.any() or expected.isinf().any() or name != "v"
    assert torch.equal(got.isnan().any(-1), bad.any(-1))
    fine = ~bad.any(-1)
    assert torch.equal(got.isinf(), expected.isinf() & ~bad) or not fine.any()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got[fine], expected[fine], rtol=8 * eps, atol=8 * eps)


# ---------------------------------------------------------------------------------------------------------- invariants


@by_kernel(
    in_dtypes(
        [
            Case(batch=2, tokens=150, table="both"),
            Case(batch=2, tokens=37, table="both", dim=80, rotary_dim=76, pairing="axis_half"),
            Case(lengths=(40, 1, 129), table="head", pairing="interleaved"),
        ]
    ),
    [Kernel("composed"), *FUSED],
)
def test_rotating_all_tokens_alike_changes_nothing(case, kernel):
    """So dφ sums to 0 over the tokens of a sequence, per (sample, head, pair)."""
    inputs, _, truth = prepared(case)
    with kernel.selected() as backend:
        dangles = run(inputs, backend)["angles"].double()
    epsilon = torch.finfo(case.dtype).eps
    for b, start, stop in inputs.sequences():
        total = dangles[b, start:stop].sum(0)
        noise = epsilon * truth.noise["angles"][b, start:stop].sum(0).sqrt()
        assert (total.abs() <= 6 * noise).all()
        if stop - start > 1:  # and not because it is 0 everywhere
            assert (dangles[b, start:stop].square().sum(0).sqrt() > 10 * noise).all() or case.dtype != torch.float32


@by_kernel(in_dtypes([Case(tokens=150), Case(tokens=37, dim=80, rotary_dim=78, pairing="interleaved")]), KERNELS)
def test_only_differences_of_angles_matter(case, kernel):
    inputs, _, truth = prepared(case)
    shift = 3 * torch.randn(inputs.angles.shape[-1], generator=generator(("shift", case)))
    shifted = replace(inputs, angles=(inputs.angles + shift).detach().requires_grad_())
    with kernel.selected() as backend:
        here, there = run(inputs, backend), run(shifted, backend)
    # 16 bits may hide that anything was computed anew
    assert case.dtype != torch.float32 or not torch.equal(here["out"], there["out"])
    check_bound(there, truth, inputs)
    # but rotating the queries alone matters: the table is not ignored
    other = replace(inputs, q=apply_rotary(inputs.q, Rotary.from_angles(shift.expand(case.tokens, -1))).detach())
    with kernel.selected() as backend:
        assert (other.call(backend) - here["out"]).norm() > 0.1 * here["out"].norm()


@pytest.mark.parametrize("dtype", FLOATS)
def test_no_rotary_is_plain_attention(dtype):
    inputs = make(Case(tokens=150, rotary_dim=0, dtype=dtype, scale=0.3))
    q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    expected = F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2)
    assert torch.equal(inputs.call("composed"), expected)
    # the kernels without rotary are under the error rule above; angles of 0 must be the same
    identity = Rotary.from_angles(torch.zeros(150, 32))
    truth = exact(inputs)
    for kernel in KERNELS:
        with kernel.selected() as backend:
            rotated = rope_attention(inputs.q, inputs.k, inputs.v, identity, scale=0.3, backend=backend)
            check_bound(run(inputs, backend) | {"out": rotated}, truth, inputs)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_prefix_tokens_are_not_rotated(kernel):
    """A table with cos = 1, sin = 0 in its first row equals one without that row, and a token rotated by 0."""
    inputs = make(Case(tokens=65, prefix=1))
    rotary = inputs.rotary()
    parts = [torch.cat([x[:, :1], apply_rotary(x[:, 1:], rotary.slice(0, 1, 65))], 1) for x in (inputs.q, inputs.k)]
    with kernel.selected() as backend:
        torch.testing.assert_close(inputs.call(backend), rope_attention(*parts, inputs.v, backend=backend))


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("kernel", CPU_KERNELS, ids=str)
def test_each_channel_meets_its_partner(pairing, kernel):
    """One-hot q and k: the score is cos or sin of one pair, so a wrong partner or column shows as such."""
    dim = 72
    angles = 0.1 + torch.rand(dim, dim // 2, generator=generator(pairing))
    first, second = pair_channels(dim, pairing)
    partner = {a: (b, p) for p, (a, b) in enumerate(zip(first, second, strict=True))}
    partner |= {b: (a, p) for p, (a, b) in enumerate(zip(first, second, strict=True))}
    # token i has channel i; keys are not rotated, but for a pass through the same table
    x = torch.eye(dim)[None, :, None]
    with kernel.selected() as backend:
        out = rope_attention(x, x, x, Rotary.from_angles(angles, pairing), scale=1.0, backend=backend)[0, :, 0]
    # out[i, j] = softmax over j of <R_i e_i, R_j e_j>, which is not 0 for j = i and j = i's partner only
    scores = torch.zeros(dim, dim, dtype=torch.float64)
    for i in range(dim):
        scores[i, i] = 1
        j, p = partner[i]
        difference = (angles[j, p] - angles[i, p]).double()
        # <R(a) e1, R(b) e2> = -sin(b - a); the other way round it is sin(b - a)
        scores[i, j] = -difference.sin() if i < j else difference.sin()
    torch.testing.assert_close(out.double(), torch.softmax(scores, -1), rtol=1e-6, atol=0)


# --------------------------------------------------------------------------------------- gradients that arrive oddly


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_gradient_of_any_strides(kernel, dtype):
    """out.sum() sends an expanded gradient, a transposition one whose last dimension is not contiguous."""
    inputs = make(Case(batch=2, tokens=37, heads=3, dtype=dtype))
    with kernel.selected() as backend:
        out = inputs.call(backend)
        for dout in (
            torch.ones((), dtype=dtype).expand(out.shape),
            inputs.dout[:1, :1].expand(out.shape),
            inputs.dout.transpose(1, 3).contiguous().transpose(1, 3),
        ):
            leaves = list(inputs.leaves.values())
            got = torch.autograd.grad(out, leaves, dout, retain_graph=True)
            expected = torch.autograd.grad(out, leaves, dout.contiguous(), retain_graph=True)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("kernel", CPU_KERNELS, ids=str)
def test_gradient_reaches_the_projection(kernel):
    """q, k, v are views of one tensor that wants a gradient: all three parts arrive, each in its place."""
    inputs = make(Case(batch=2, tokens=37, heads=3))
    qkv = torch.stack([inputs.q, inputs.k, inputs.v], dim=2).detach().requires_grad_()  # (B, N, 3, H, D)
    with kernel.selected() as backend:
        out = rope_attention(*qkv.unbind(2), inputs.rotary(), backend=backend)
        got = torch.autograd.grad(out, qkv, inputs.dout)[0].unbind(2)
        expected = run(inputs, backend)
    assert all(torch.equal(x, expected[name]) for name, x in zip("qkv", got, strict=True))


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_inputs_are_left_alone(kernel):
    inputs = make(Case(batch=2, tokens=37, layout="wide"))
    names = ("q", "k", "v", "dout", "angles")
    before = {name: getattr(inputs, name).detach().clone() for name in names}
    with kernel.selected() as backend:
        run(inputs, backend)
    assert all(torch.equal(getattr(inputs, name), before[name]) for name in names)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize(
    "case",
    [Case(batch=0, tokens=7), Case(batch=2, tokens=0), Case(lengths=(0, 0)), Case(batch=2, seqlens=(0, 0))],
    ids=str,
)
def test_nothing_to_attend_to(case, kernel):
    inputs = make(case)
    with kernel.selected() as backend:
        got = run(inputs, backend)
    for name, x in got.items():
        assert x.shape == (inputs.q if name == "out" else inputs.leaves[name]).shape
        assert torch.equal(x, torch.zeros_like(x))


# --------------------------------------------------------------------------------------------------- to the last bit


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "case",
    [
        # key heads of all sequences: 3, 5, 7, 10, 2, 1. With 2 to 4 threads some are left over and shared
        Case(tokens=300, heads=3, dim=64),
        Case(tokens=300, heads=5, dim=72, table="head"),
        Case(lengths=(0, 64, 1, 200, 64, 16, 3, 130), heads=1, dim=80),
        Case(batch=2, tokens=130, heads=10, kv_heads=5, dim=40),
        Case(tokens=530, heads=6, kv_heads=2, dim=64),
        Case(batch=3, tokens=250, heads=1, seqlens=(250, 0, 121)),
    ],
    ids=str,
)
@pytest.mark.parametrize("kernel", CPU_KERNELS, ids=str)
def test_threads_change_no_bit(case, dtype, kernel):
    if kernel not in distinct_kernels(dtype):
        pytest.skip("served by avx512")
    inputs = make(replace(case, dtype=dtype))
    with kernel.selected() as backend, threads(1):
        expected = run(inputs, backend)
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            for _ in range(2 if count > 1 else 1):
                got = run(inputs, backend)
                differing = [name for name in got if not torch.equal(got[name], expected[name])]
                assert not differing, f"{differing} with {count} threads"


# ---------------------------------------------------------------------------------------------------------- properties


@st.composite
def calls(draw) -> Case:
    dim = 8 * draw(st.integers(2, 32))
    kv_heads = draw(st.integers(1, 3))
    group = draw(st.integers(1, 3))
    pairing = draw(st.sampled_from(PAIRINGS))
    pair_step = 4 if pairing == "axis_half" else 2
    rotary_dim = pair_step * draw(st.integers(0, dim // pair_step))
    tables = ("shared", "sample", "head", "both") if group == 1 else ("shared", "sample")
    common = {
        "heads": group * kv_heads,
        "kv_heads": kv_heads,
        "dim": dim,
        "rotary_dim": rotary_dim,
        "pairing": pairing,
        "table": draw(st.sampled_from(tables)),
        "dtype": draw(st.sampled_from(FLOATS)),
        "layout": draw(st.sampled_from(("contiguous", "fused", "wide", "heads_first"))),
        "scale": draw(st.sampled_from((None, 0.05, 1.0, -0.1))),
    }
    form = draw(st.sampled_from(("dense", "packed", "padded")))
    if form == "packed":
        return Case(lengths=tuple(draw(st.lists(st.integers(0, 150), min_size=1, max_size=5))), **common)
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 150))
    if form == "dense":
        return Case(batch=batch, tokens=tokens, **common)
    seqlens = draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
    return Case(batch=batch, tokens=tokens, seqlens=tuple(seqlens), **common)


@pytest.mark.parametrize("kernel", CPU_KERNELS, ids=str)
@settings(deadline=None, max_examples=25)
@given(case=calls(), count=st.integers(1, 4))
def test_any_call(kernel, case, count):
    inputs = make(case)
    with kernel.selected() as backend, threads(count):
        check_bound(run(inputs, backend), exact(inputs), inputs)


@settings(deadline=None, max_examples=30)
@given(case=calls(), data=st.data())
def test_samples_do_not_see_each_other(case, data):
    """Each sequence alone gives the same bits as among others."""
    inputs = make(case)
    sequences = [s for s in inputs.sequences() if s[2] > s[1]]
    if not sequences or not CPU_KERNELS:
        return
    whole = inputs.call("cpu").detach()
    b, start, stop = data.draw(st.sampled_from(sequences))
    parts = [x[start:stop][None] if case.lengths else x[b : b + 1, start:stop] for x in (inputs.q, inputs.k, inputs.v)]
    rotary = inputs.rotary()
    alone = rope_attention(*parts, rotary and rotary.slice(b, start, stop), scale=case.scale, backend="cpu")
    assert torch.equal(alone[0], whole[start:stop] if case.lengths else whole[b, start:stop])
