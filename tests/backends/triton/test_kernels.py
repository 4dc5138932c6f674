# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels in the interpreter: indices, masks and arithmetic, in float32 and float16.

It rounds bfloat16 by cutting it off, and is made to round it here (rounds_bfloat16). Most cases run bfloat16's tiles
and its way of computing, with a fixed reference in the softmax, in float32, where a key too many or too few shows;
float16 has a running maximum. Layouts, races and speed are left to a GPU (tests/backends/gpu); test_budget.py has what
the compiler makes of the kernels.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from oracles import Case, check, exact, make, run
from oracles.cases import GROUPS, HEAD_DIMS, LENGTHS, ROTATIONS, SCALES, SEQUENCES, VIEWS
from oracles.extreme import POISON, biased, extreme_rows, poisoned
from rows import some, some_pairs

from spatial_pe import Rotary, rope_attention
from spatial_pe.backends.triton import backend as triton

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(triton.unavailable() is not None, reason=f"triton: {triton.unavailable()}"),
    pytest.mark.skipif(not triton.INTERPRETED, reason="a GPU is here: tests/backends/gpu runs the kernels on it"),
    # numpy, where a row does not exist
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
FAMILIES = ("ampere", "ada", "hopper", "cdna")  # blackwell has hopper's tiles
SHORT = [case for case in LENGTHS if case.tokens < 500]
LONG = [case for case in LENGTHS if case.tokens >= 500]
CALLS = [*[case for case in ROTATIONS if case.dim <= 128], *SEQUENCES, *VIEWS, *GROUPS, *SCALES]
SMALL_DIMS = [replace(case, tokens=70) for case in HEAD_DIMS if case.dim <= 128]


def choose(monkeypatch, family: str, tiles: torch.dtype = torch.bfloat16, few: bool = False) -> None:
    """The tiles of another kind of GPU and of 16 bits: those of float32 take the interpreter ten times as long."""
    from spatial_pe.backends.triton import tiles

    if tiles == torch.bfloat16:  # float32 adds as bfloat16 does
        monkeypatch.setattr(tiles, "ones", lambda family, dtype: 16 if family == "cdna" else 8)
        monkeypatch.setattr(tiles, "joins", lambda family, dtype: family == "hopper")
    if not few:  # the tiles and the heads per program of a large batch, for the small ones of tests
        monkeypatch.setattr(tiles, "SMS", 0)

    def choice_of(call):
        longest = tiles.bucket(call.longest)
        return tiles.prebuilt(family, tiles, call.q.shape[-1], longest, tiles.few_programs(call))

    monkeypatch.setattr(tiles, "choice_of", choice_of)


def check_kernels(case: Case, monkeypatch, family: str, tiles: torch.dtype = torch.bfloat16) -> None:
    choose(monkeypatch, family, tiles)
    inputs = make(case)
    check(run(inputs, "triton"), run(inputs, "composed"), exact(inputs), inputs)


@pytest.mark.usefixtures("rounds_bfloat16")
@pytest.mark.parametrize(
    ("case", "family"),
    [
        (SHORT[2], "hopper"), (SMALL_DIMS[2], "hopper"), (VIEWS[0], "cdna"),
        (Case(tokens=150, dim=64, kv_heads=1), "ampere"), (Case(tokens=300, heads=1, dim=72), "hopper"),
    ],
    ids=str,
)  # fmt: skip
def test_bfloat16(case, family, monkeypatch):
    check_kernels(replace(case, dtype=torch.bfloat16), monkeypatch, family)


@pytest.mark.parametrize(
    "family", [name if name == "hopper" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
@pytest.mark.parametrize("case", some([*SHORT, *SMALL_DIMS], first=1), ids=str)
def test_lengths_and_head_dims(case, family, monkeypatch):
    check_kernels(case, monkeypatch, family)


@pytest.mark.parametrize("case", some([*SHORT[1:3], SMALL_DIMS[2], SEQUENCES[0], GROUPS[0]], 5, first=1), ids=str)
def test_one_image(case, monkeypatch):
    """Where blocks of 128 queries would leave SMs without a program."""
    choose(monkeypatch, "hopper", few=True)
    inputs = make(case)
    check(run(inputs, "triton"), run(inputs, "composed"), exact(inputs), inputs)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_sequences(case, family, monkeypatch):
    check_kernels(case, monkeypatch, family)


@pytest.mark.parametrize("case", some(CALLS, 4), ids=str)
def test_rotations_sequences_views(case, monkeypatch):
    check_kernels(case, monkeypatch, "hopper")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", [*SHORT, *SMALL_DIMS, *CALLS], ids=str)
def test_float16_everywhere(case, family, monkeypatch):
    check_kernels(replace(case, dtype=torch.float16), monkeypatch, family)


@pytest.mark.parametrize("case", some([SHORT[2], ROTATIONS[3], *SEQUENCES[1:8:3], VIEWS[1]], 6, first=1), ids=str)
def test_float16(case, monkeypatch):
    check_kernels(replace(case, dtype=torch.float16), monkeypatch, "ampere")


@pytest.mark.parametrize("case", [SHORT[1], SMALL_DIMS[1], SEQUENCES[4], *SCALES], ids=str)
def test_float32_in_its_own_tiles(case, monkeypatch):
    check_kernels(case, monkeypatch, "hopper", torch.float32)


@pytest.mark.parametrize("hint", [64, 100, 1000, None])
@pytest.mark.parametrize("lengths", [(64,) * 5, (0, 1, 37, 0, 100, 3, 0), (0, 0, 1)], ids=str)
def test_max_seqlen_is_a_hint(lengths, hint):
    """It may be missing or too large; with one that is small enough windows.py serves the call."""
    if hint is not None and hint < max(lengths):
        pytest.skip("not a bound")
    inputs = make(Case(lengths=lengths, dim=40, dtype=torch.float16))
    expected = inputs.call("reference")
    got = rope_attention(
        inputs.q, inputs.k, inputs.v, inputs.rotary(), cu_seqlens=inputs.cu_seqlens, max_seqlen=hint, backend="triton"
    )
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.usefixtures("rounds_bfloat16")
@pytest.mark.parametrize(("bias", "dtype"), extreme_rows([torch.float32, torch.float16, torch.bfloat16]))
def test_extreme_scores(bias, dtype, monkeypatch):
    """Among them rows that outgrow the reference of their first tile, and take the second pass."""
    choose(monkeypatch, "hopper")
    inputs, eager, truth = biased(bias, dtype)
    check(run(inputs, "triton"), eager, truth, inputs)


@pytest.mark.usefixtures("rounds_bfloat16")
def test_the_sum_is_that_of_the_rounded_weights(monkeypatch):
    """A row whose one large weight is 2^x: added as it is, that weight's rounding is left in the quotient."""
    from spatial_pe.backends.triton import tiles

    choose(monkeypatch, "hopper")
    inputs, eager, truth = biased("below the limit", torch.bfloat16)
    eager, truth = {"out": eager["out"]}, replace(truth, values={"out": truth.values["out"]})
    check({"out": inputs.call("triton")}, eager, truth, inputs)
    monkeypatch.setattr(tiles, "ones", lambda family, dtype: 0)
    got = inputs.call("triton")
    with pytest.raises(AssertionError, match="error"):
        check({"out": got}, eager, truth, inputs)


def test_the_second_pass_is_needed_and_seldom(monkeypatch):
    """Without it, a row that grows by 300 nats is lost; rows like those of a model do without it."""
    from spatial_pe.backends.triton.kernels import forward

    def never(*args, **kwargs):
        raise AssertionError("the second pass")

    choose(monkeypatch, "hopper")
    monkeypatch.setattr(forward, "_running", never)
    inputs = make(Case(tokens=300, dim=64))
    inputs.call("triton")
    inputs, _, _ = biased("late peak", torch.float32)
    with pytest.raises(Exception, match="the second pass"):
        inputs.call("triton")


@pytest.mark.parametrize(("poison", "dtype"), some_pairs(POISON, [torch.float32, torch.float16]))
def test_nan_and_inf_propagate(poison, dtype, monkeypatch):
    choose(monkeypatch, "hopper")
    inputs, expected = poisoned(poison, dtype)
    got = inputs.call("triton").float()
    bad = expected.isnan().any(-1)
    assert torch.equal(got.isnan().any(-1), bad)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got[~bad], expected[~bad], rtol=8 * eps, atol=8 * eps)


def test_long_sequences_pre_rotate_k():
    """Above tiles.ROTATE_IN_LOOP_UP_TO the plan has a launch more, and the result stays."""
    from spatial_pe.backends.base import AttentionCall
    from spatial_pe.backends.triton.plan import plan_forward

    inputs = make(Case(tokens=300, heads=1, dim=16, dtype=torch.float16))
    names = [
        launch.kernel.fn.__name__
        for launch in plan_forward(
            AttentionCall(inputs.q, inputs.k, inputs.v, inputs.rotary(), 0.25, None, None, None)
        ).launches
    ]
    assert names == ["operands_kernel", "forward_kernel"]
    check(run(inputs, "triton"), run(inputs, "composed"), exact(inputs), inputs)


# packed: k rotated before (300) or in the loop (200), windows of the forward (128), and of the backward too (64)
@pytest.mark.parametrize("hint", some(["dense", 300, 200, 128, 64]))
def test_offsets_beyond_32_bits(hint, tmp_path):
    """The last token lies more than 2^32 elements behind the first: an address must not wrap around."""
    tokens, dim = 300, 16
    stride = triton.MOST_BETWEEN_TOKENS - 8
    # a sparse file of 10 GiB: 300 of its pages are ever touched
    size = stride * (tokens - 1) + 64
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2 * size)
    buffer = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.float16)
    far = [torch.as_strided(buffer, (1, tokens, 1, dim), (0, stride, dim, 1), i * dim) for i in range(4)]
    for x in far:
        x.copy_(torch.randn(x.shape))
    rotary = Rotary.from_angles(torch.randn(tokens, dim // 2))
    bounds = {}
    if hint != "dense":
        far = [x[0] for x in far]
        stops = [*range(min(hint, 200), tokens, min(hint, 200)), tokens]
        bounds = {"cu_seqlens": torch.tensor([0, *stops], dtype=torch.int32), "max_seqlen": hint}

    def results(q, k, v, dout):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = rope_attention(*leaves, rotary, backend="triton", **bounds)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    near = results(*(x.contiguous() for x in far))
    assert all(torch.equal(a, b) for a, b in zip(results(*far), near, strict=True))


REFUSALS = {
    "head_dim is 20": {"dim": 20},
    "head_dim is 136": {"dim": 136},
    "head_dim is 8": {"dim": 8},
    "no torch.float64 kernel": {"dtype": torch.float64},
}


def test_refuses_tokens_too_far_apart():
    from spatial_pe.backends.base import AttentionCall

    q = torch.empty(1, 4, 2, 16)
    v = torch.empty_strided(q.shape, (0, 2**24, 16, 1), device="meta")
    call = AttentionCall(q, q, v, None, 1.0, None, None, None)
    assert triton.cannot_serve(call) == "v has 16,777,216 elements between tokens: at most 16,777,215"


@pytest.mark.parametrize("reason", REFUSALS)
def test_refusals_say_why(reason):
    inputs = make(Case(tokens=4, **REFUSALS[reason]))
    with pytest.raises(ValueError, match=f'backend="triton" cannot serve this call: .*{reason}'):
        inputs.call("triton")


@pytest.mark.parametrize(
    ("device", "dtype", "tokens", "dim", "packed", "reason"),
    [
        ("cpu", torch.float16, 64, 64, False, "interpreter"),
        ("meta", torch.float16, 4096, 80, False, None),
        ("meta", torch.float16, 1024, 128, False, None),
        ("meta", torch.float16, 1025, 128, False, "128 and 1025 tokens"),
        ("meta", torch.float32, 64, 64, False, "float32"),
        ("meta", torch.float32, 2048, 128, True, None),
    ],
)
def test_auto_leaves_to_others_what_they_likely_do_faster(device, dtype, tokens, dim, packed, reason):
    """Of a GPU, "meta" has all that this looks at."""
    from spatial_pe.backends.base import AttentionCall
    from spatial_pe.ops.select import _slower

    q = torch.empty(1, tokens, 2, dim, dtype=dtype, device=device)
    bounds = torch.empty(3, dtype=torch.int32, device=device) if packed else None
    why = _slower("triton", AttentionCall(q, q, q, None, 1.0, bounds, None, None))
    assert why is None if reason is None else reason in why


def test_gradients_are_the_same_every_time(monkeypatch):
    """No atomics: the same bits."""
    choose(monkeypatch, "hopper")
    inputs = make(Case(tokens=150, heads=2, kv_heads=1, dtype=torch.float16))
    first, second = run(inputs, "triton"), run(inputs, "triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("tokens", some([64, 150, 300]))
def test_identity_start_is_exact(tokens):
    """Angles of 0 and no rotary give the same bits: a tower that starts as the identity is the pretrained one."""
    inputs = make(Case(batch=2, tokens=tokens, dim=72, rotary_dim=0, dtype=torch.float16))
    identity = Rotary.from_angles(torch.zeros(tokens, 36))
    plain = rope_attention(inputs.q, inputs.k, inputs.v, backend="triton")
    with warnings.catch_warnings():
        assert torch.equal(rope_attention(inputs.q, inputs.k, inputs.v, identity, backend="triton"), plain)


# ------------------------------------------------------------------------------------------- the tables of tiles


def test_few_programs():
    """An image of 576 tokens and 16 heads has 80 blocks of 128 queries for 132 SMs; four of them have enough."""
    from spatial_pe.backends.base import AttentionCall
    from spatial_pe.backends.triton import tiles

    def call(shape, bounds=None):
        q = torch.empty(shape, device="meta")
        return AttentionCall(q, q, q, None, 1.0, bounds, None, None)

    assert tiles.few_programs(call((1, 576, 16, 64)))
    assert not tiles.few_programs(call((4, 576, 16, 64)))
    assert not tiles.few_programs(call((1, 1024, 16, 80), torch.empty(17, dtype=torch.int32, device="meta")))
    window = tiles.Window(64, 4, per_program=4)
    assert [tiles.heads_per_program(window, windows, 16) for windows in (4, 16, 32, 64, 500)] == [1, 1, 1, 2, 4]


def test_options_of_a_launch():
    """What is launched is what the budget compiles: half as many warps on AMD, whose wavefronts have 64 lanes."""
    from spatial_pe.backends.base import AttentionCall
    from spatial_pe.backends.triton import tiles
    from spatial_pe.backends.triton.plan import plan_forward

    q = torch.empty(300, 576, 4, 64, dtype=torch.bfloat16, device="meta")
    choice = tiles.prebuilt("hopper", q.dtype, 64, 640)
    for maxnreg in (None, 128):
        tile = replace(choice.forward, maxnreg=maxnreg)
        launch = plan_forward(
            AttentionCall(q, q, q, None, 1.0, None, None, None), replace(choice, forward=tile)
        ).launches[-1]
        most = {} if maxnreg is None else {"maxnreg": maxnreg}
        assert launch.options() == launch.options(hip=False) == {"num_warps": 8, "enable_fp_fusion": True} | most
        assert launch.options(hip=True) == {"num_warps": 4, "enable_fp_fusion": True}
        assert ("maxnreg=128" in str(launch)) == bool(maxnreg)


@pytest.mark.parametrize("family", ["ampere", "ada", "hopper", "blackwell", "cdna"])
def test_every_call_has_tiles(family):
    from spatial_pe.backends.triton import tiles

    for dtype in triton.DTYPES:
        for dim in range(16, 129, 8):
            for tokens in (1, 16, 17, 64, 65, 128, 129, 256, 257, 5000):
                few = tiles.prebuilt(family, dtype, dim, tiles.bucket(tokens), few=True)
                choice = tiles.prebuilt(family, dtype, dim, tiles.bucket(tokens))
                assert few.forward.bm <= choice.forward.bm and few.forward.rotate_k == choice.forward.rotate_k
                if (family, dim) == ("hopper", 64) and dtype == torch.bfloat16:
                    assert (few.forward.bm, choice.forward.bm) == (64, 128)
                for window in (choice.window_forward, choice.window_backward):
                    assert window is None or tokens <= window.block <= 128
                too_wide = {"hopper": 96 < dim <= 112, "blackwell": dim > 112}.get(family) and dtype != torch.float32
                in_loop = tokens <= tiles.ROTATE_IN_LOOP_UP_TO and not too_wide
                assert choice.forward.rotate_k == ("loop" if in_loop else "before")


@pytest.mark.parametrize(
    ("capability", "family"),
    [
        ((8, 0), "ampere"),
        ((8, 6), "ampere"),
        ((8, 9), "ada"),
        ((9, 0), "hopper"),
        ((10, 0), "blackwell"),
        ((12, 0), "ada"),
    ],
)
def test_families(capability, family, monkeypatch):
    """Consumer Blackwell multiplies by mma.sync, as Ampere does."""
    from spatial_pe.backends.triton import tiles

    monkeypatch.setattr(tiles, "capability", lambda index: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert tiles.family_of(torch.device("cuda", 0)) == family


def test_an_old_gpu_says_so(monkeypatch):
    from spatial_pe.backends.base import AttentionCall

    class Fake:
        """Of a tensor on a GPU, what cannot_serve looks at."""

        device, dtype, shape = torch.device("cuda", 0), torch.float16, (1, 4, 2, 64)

        def stride(self, dim):
            return 128

    monkeypatch.setattr(triton, "capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    x = Fake()
    assert triton.cannot_serve(AttentionCall(x, x, x, None, 1.0, None, None, None)) == (
        "Tesla T4 is sm_75: needs sm_80 (Ampere) or newer"
    )
