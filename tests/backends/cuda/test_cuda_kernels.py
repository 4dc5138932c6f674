# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on the emulator, against the reference: results, and all that a GPU leaves undefined.

The emulator ends a launch at the first race, uninitialised or stray read, diverged warp or result that is written twice
or not at all (csrc/cuda/emulator; test_emulator.py shows that it notices). What it cannot tell is how fast they are,
and whether exp2 and the tensor cores round as it does: tests/backends/gpu runs the same cases on a GPU.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracles import Case, check, exact, make, run
from oracles.cases import GROUPS, HEAD_DIMS, LENGTHS, ROTATIONS, SCALES, SEQUENCES, VIEWS
from oracles.extreme import MORE_SINKS, POISON, biased, extreme_rows, poisoned, with_sinks
from rows import some

from spatial_pe import Rotary, rope_attention
from spatial_pe.backends import cuda

pytestmark = pytest.mark.usefixtures("poisoned_memory")
HALF = [torch.bfloat16, torch.float16]


def served(cases: list[Case]) -> list[Case]:
    """Those with a head_dim and pairs that the kernels have; views with rows at multiples of 16 bytes."""
    aligned = [replace(case, layout="projection") if case.layout in ("fused", "wide") else case for case in cases]
    return [
        case
        for case in aligned
        if case.dim in cuda.HEAD_DIMS and cuda.vector_of(2 * case.pairs, case.pairing) is not None
    ]


# the longest with a head_dim that is served; 64 and 128 keys, all head_dims
ALL_LENGTHS = served([*LENGTHS, Case(tokens=1025, heads=1, dim=64, suffix=1)])
DIMS = served([replace(case, tokens=tokens) for case in HEAD_DIMS for tokens in (50, 100, 150)])
CALLS = served([*ROTATIONS, *SEQUENCES, *VIEWS, *GROUPS, *SCALES])
STREAMED = [
    Case(tokens=300, heads=3, dim=64),
    Case(tokens=290, heads=2, kv_heads=1, dim=72, pairing="interleaved"),
    Case(tokens=260, heads=1, dim=88),
    Case(tokens=210, heads=1, dim=128, layout="projection"),
    Case(lengths=(0, 300, 1, 0, 150, 33), dim=80),
    Case(batch=3, tokens=280, seqlens=(280, 0, 133), dim=64),
]


def check_kernels(case: Case, dtype: torch.dtype) -> None:
    inputs = make(replace(case, dtype=dtype))
    check(run(inputs, "cuda"), run(inputs, "composed"), exact(inputs), inputs)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", DIMS, ids=str)
def test_head_dims(case, dtype, emulated):
    check_kernels(case, dtype)


@pytest.mark.parametrize(
    "case",
    some([*ALL_LENGTHS, *CALLS], first=1),
    ids=str,
)
def test_lengths_rotations_sequences_views(case, emulated):
    check_kernels(case, torch.bfloat16)


def test_tables_that_begin_at_different_alignments(emulated):
    """cos at a multiple of 16 bytes and sin not, both views of wider rows: one table of strides serves both."""
    inputs = make(Case(tokens=64, dim=64, dtype=torch.bfloat16))
    rotary = inputs.rotary()
    wide = torch.full((*rotary.cos.shape[:-1], 40), torch.nan)
    cos = wide.clone()[..., :32]
    sin = torch.cat([torch.zeros(1), wide.flatten()])[1:].view(wide.shape)[..., :32]
    cos.copy_(rotary.cos), sin.copy_(rotary.sin)
    assert cos.stride() == sin.stride() and cos.data_ptr() % 16 == 0 != sin.data_ptr() % 16
    got = rope_attention(inputs.q, inputs.k, inputs.v, Rotary(cos, sin, rotary.pairing), backend="cuda")
    assert torch.equal(got, inputs.call("cuda"))


@pytest.mark.slow
@pytest.mark.parametrize("case", [*ALL_LENGTHS, *CALLS], ids=str)
def test_float16_everywhere(case, emulated):
    check_kernels(case, torch.float16)


@pytest.mark.parametrize("shared", [99, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", STREAMED, ids=str)
def test_streaming(case, shared, emulated):
    """Keys and values that do not fit: rings of 3 slots and more."""
    emulated.use_device(shared_per_block=shared * 1024)
    check_kernels(case, torch.bfloat16)


@pytest.mark.parametrize("seed", [1, *(pytest.param(i, marks=pytest.mark.slow) for i in (2, 3))])
@pytest.mark.parametrize("case", [ALL_LENGTHS[2], ALL_LENGTHS[3], DIMS[4], *CALLS[-8:-4], *STREAMED[::4]], ids=str)
def test_any_order_of_threads(case, seed, emulated):
    """Threads in random orders: what is not ordered shows, as a race or in the result."""
    emulated.set_schedule(seed)
    check_kernels(case, torch.bfloat16)


@pytest.mark.parametrize("multiprocessors", [1, 3, 64])
@pytest.mark.parametrize(
    "case",
    [
        Case(batch=3, tokens=50, heads=4, dim=80),
        Case(batch=2, tokens=196, heads=3, dim=64),
        Case(lengths=(64, 0, 0, 13, 64), heads=3, dim=72),
        Case(lengths=(0, 200, 0, 0, 135, 1), heads=2, dim=64),
    ],
    ids=str,
)
def test_blocks_with_many_items_and_with_one(case, multiprocessors, emulated):
    """One block that goes round its ring many times, and more SMs than there are (sequence, head): parts of queries."""
    emulated.use_device(multiprocessors=multiprocessors)
    check_kernels(case, torch.bfloat16)


def test_one_window_at_a_time(emulated):
    """Where two windows do not fit shared memory."""
    emulated.use_device(shared_per_block=40 * 1024)
    inputs = make(Case(batch=2, tokens=64, heads=3, dim=80, dtype=torch.bfloat16))
    with torch.no_grad():
        got = inputs.call("cuda")
    torch.testing.assert_close(got.float(), inputs.call("reference").float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("hint", [64, 100, 1000, None])
@pytest.mark.parametrize("lengths", [(64,) * 5, (0, 1, 37, 0, 100, 3, 0), (0, 0, 1)], ids=str)
def test_max_seqlen_is_a_hint(lengths, hint, emulated):
    """It may be missing or too large; with one that is small enough windows serve the call."""
    if hint is not None and hint < max(lengths):
        pytest.skip("not a bound")
    inputs = make(Case(lengths=lengths, dim=72, dtype=torch.float16))
    got = rope_attention(
        inputs.q, inputs.k, inputs.v, inputs.rotary(), cu_seqlens=inputs.cu_seqlens, max_seqlen=hint, backend="cuda"
    )
    torch.testing.assert_close(got, inputs.call("reference"), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("bias", "dtype"), extreme_rows(HALF))
def test_extreme_scores(bias, dtype, emulated):
    """Among them rows that outgrow the reference of their first tile, so that it is raised."""
    inputs, eager, truth = biased(bias, dtype)
    check(run(inputs, "cuda"), eager, truth, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("sinks", MORE_SINKS, ids=str)
def test_sinks(sinks, dtype, emulated):
    """float16 has 24 bits below a weight of 1: none to spare behind a token that takes nearly all of a row."""
    inputs, eager, truth = with_sinks(sinks, dtype)
    check(run(inputs, "cuda"), eager, truth, inputs)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize("poison", POISON)
def test_nan_and_inf_propagate(poison, dim, dtype, emulated):
    inputs, expected = poisoned(poison, dtype, dim)
    with torch.no_grad():
        got = inputs.call("cuda").float()
    bad = expected.isnan().any(-1)
    assert torch.equal(got.isnan().any(-1), bad)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got[~bad], expected[~bad], rtol=8 * eps, atol=8 * eps)


def test_gradients_are_the_same_every_time(emulated):
    """No atomics: the same bits, in any order of threads."""
    inputs = make(Case(batch=2, tokens=150, heads=4, kv_heads=2, dim=80, dtype=torch.float16))
    first = run(inputs, "cuda")
    emulated.set_schedule(7)
    second = run(inputs, "cuda")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("tokens", [64, 150])
def test_identity_start_is_exact(tokens, emulated):
    """Angles of 0 and no rotary give the same bits: a tower that starts as the identity is the pretrained one."""
    inputs = make(Case(batch=2, tokens=tokens, dim=72, rotary_dim=0, dtype=torch.float16))
    identity = Rotary.from_angles(torch.zeros(tokens, 36))
    plain = rope_attention(inputs.q, inputs.k, inputs.v, backend="cuda")
    assert torch.equal(rope_attention(inputs.q, inputs.k, inputs.v, identity, backend="cuda"), plain)


def test_under_torch_compile(emulated):
    """In one graph, as a torch op; dynamic lengths."""
    compiled = torch.compile(
        lambda q, k, v, rotary: rope_attention(q, k, v, rotary, backend="cuda"), fullgraph=True, backend="aot_eager"
    )
    for tokens in (20, 33, 150):
        inputs = make(Case(batch=2, tokens=tokens, dim=72, dtype=torch.bfloat16))
        out = compiled(inputs.q, inputs.k, inputs.v, inputs.rotary())
        assert torch.equal(out, inputs.call("cuda"))
        grads = torch.autograd.grad(out, [inputs.q, inputs.k, inputs.v], inputs.dout)
        eager = torch.autograd.grad(inputs.call("cuda"), [inputs.q, inputs.k, inputs.v], inputs.dout)
        assert all(torch.equal(a, b) for a, b in zip(grads, eager, strict=True))


def test_a_tensor_that_begins_anywhere(emulated):
    """Parameters sharded into a flat buffer, say: aligned strides, an odd first element."""
    inputs = make(Case(tokens=20, dim=64, dtype=torch.bfloat16))
    flat = torch.full((3 + inputs.q.numel(),), torch.nan, dtype=torch.bfloat16)
    flat[3:] = inputs.q.detach().flatten()
    odd = flat[3:].view(inputs.q.shape).requires_grad_()
    assert torch.equal(replace(inputs, q=odd).call("cuda"), inputs.call("cuda"))


REFUSALS = {
    "head_dim is 104": Case(tokens=4, dim=104, dtype=torch.bfloat16),
    "no torch.float32 kernel": Case(tokens=4, dim=64),
    "q has rows that do not start at multiples of 16 bytes": Case(
        tokens=4, dim=64, dtype=torch.bfloat16, layout="fused"
    ),
    'rotary_dim is 78, pairing "half"': Case(tokens=4, dim=80, dtype=torch.bfloat16, rotary_dim=78),
    'rotary_dim is 76, pairing "axis_half"': Case(
        tokens=4, dim=80, dtype=torch.bfloat16, rotary_dim=76, pairing="axis_half"
    ),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_refusals_say_why(reason, emulated):
    with pytest.raises(ValueError, match=f'backend="cuda" cannot serve this call: .*{reason}'):
        make(REFUSALS[reason]).call("cuda")


def test_dout_and_tables_of_any_layout(emulated):
    """dout, and tables that are slices of larger ones, are copied where their rows start at odd addresses."""
    inputs = make(Case(tokens=40, dim=72, dtype=torch.bfloat16))
    truth = exact(inputs)
    eager = run(inputs, "composed")
    wide = inputs.dout.new_full((1, 40, 2, 75), torch.nan)[..., 3:]
    wide.copy_(inputs.dout)
    check(run(replace(inputs, dout=wide), "cuda"), eager, truth, inputs)
    cos, sin = (x.detach() for x in (inputs.rotary().cos, inputs.rotary().sin))
    cut = [torch.cat([x, x[..., :1]], -1)[..., :36] for x in (cos, sin)]
    got = rope_attention(inputs.q, inputs.k, inputs.v, Rotary(*cut, "half"), backend="cuda")
    assert torch.equal(got, inputs.call("cuda"))
