# SPDX-License-Identifier: Apache-2.0
"""The kernels on a GPU: the cases that every kernel is tested on, in every dtype, against float64 on the CPU.

python -m pytest -m gpu tests/backends/gpu
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracles import Case, check, exact, make, run
from oracles.cases import GROUPS, HEAD_DIMS, LENGTHS, ROTATIONS, SCALES, SEQUENCES, VIEWS
from oracles.cross import CASES as TO_OTHER_TOKENS
from oracles.cross import Cross
from oracles.extreme import BIASES, POISON, biased, poisoned

import spatial_pe
from spatial_pe import rope_attention
from spatial_pe.backends import cuda
from spatial_pe.backends.base import AttentionCall
from spatial_pe.ops import select
from spatial_pe.rotary import rotated

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CASES = [case for case in [*LENGTHS, *HEAD_DIMS, *ROTATIONS, *SEQUENCES, *VIEWS, *GROUPS, *SCALES] if case.dim <= 128]


DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def served(cases: list[Case]) -> list[Case]:
    """Those that the CUDA kernels serve; views with rows at multiples of 16 bytes."""
    aligned = [replace(case, layout="projection") if case.layout in ("fused", "wide") else case for case in cases]
    return [c for c in aligned if c.dim in cuda.HEAD_DIMS and cuda.vector_of(2 * c.pairs, c.pairing) is not None]


def on_gpu(case: Case, backend: str) -> dict[str, torch.Tensor]:
    return {name: x.cpu() for name, x in run(make(case, "cuda"), backend).items()}


@pytest.fixture
def large(monkeypatch):
    """The tiles and the heads per program of a large batch, for the small ones of tests."""
    from spatial_pe.backends.triton import launch_cache, tiles

    monkeypatch.setattr(tiles, "SMS", 0)
    tiles.clear_cache()
    launch_cache.clear_cache()
    yield
    tiles.clear_cache()
    launch_cache.clear_cache()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_rule(case, dtype, large):
    case = replace(case, dtype=dtype)
    inputs = make(case)
    check(on_gpu(case, "triton"), on_gpu(case, "composed"), exact(inputs), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [case for case in TO_OTHER_TOKENS if case.dim <= 128], ids=str)
def test_other_tokens(case: Cross, dtype):
    case.make(dtype)
    case.check(case.run("triton", "cuda"), case.run("composed", "cuda"))


needs_cuda_kernels = pytest.mark.skipif(cuda.unavailable() is not None, reason=f"cuda: {cuda.unavailable()}")


@needs_cuda_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", served(CASES), ids=str)
def test_error_rule_of_the_cuda_kernels(case, dtype):
    case = replace(case, dtype=dtype)
    inputs = make(case)
    check(on_gpu(case, "cuda"), on_gpu(case, "composed"), exact(inputs), inputs)


@needs_cuda_kernels
@pytest.mark.parametrize("tokens", [64, 196, 576, 1100])
def test_cuda_kernels_on_a_stream_and_in_a_graph(tokens):
    """Launched on the current stream, captured and replayed on new values; the same bits every time."""
    inputs = make(Case(batch=2, tokens=tokens, dim=64, dtype=torch.bfloat16), "cuda")
    leaves = [inputs.q, inputs.k, inputs.v]
    with torch.no_grad():
        rotary = inputs.rotary()

    def step() -> list[torch.Tensor]:
        out = rope_attention(*leaves, rotary, backend="cuda")
        return [out, *torch.autograd.grad(out, leaves, inputs.dout)]

    expected = [x.clone() for x in step()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_stream = step()
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(on_stream, expected, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        inputs.q.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
    assert not torch.equal(captured[0], expected[0])


@needs_cuda_kernels
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_cuda_kernels_on_another_device():
    case = Case(batch=2, tokens=196, dim=64, dtype=torch.bfloat16)
    inputs = make(case, "cuda:1")
    assert torch.equal(inputs.call("cuda").cpu(), make(case, "cuda:0").call("cuda").cpu())


@pytest.mark.parametrize("case", [*LENGTHS, *SEQUENCES, *GROUPS], ids=str)
def test_one_image(case):
    """Where blocks of 128 queries would leave SMs without a program."""
    case = replace(case, dtype=torch.bfloat16)
    inputs = make(case)
    check(on_gpu(case, "triton"), on_gpu(case, "composed"), exact(inputs), inputs)


@pytest.mark.parametrize("tokens", [1025, 2304, 4096])
def test_long_sequences(tokens):
    case = Case(tokens=tokens, heads=2, dim=64, dtype=torch.bfloat16)
    inputs = make(case)
    check(on_gpu(case, "triton"), on_gpu(case, "composed"), exact(inputs), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", BIASES)
def test_extreme_scores(bias, dtype):
    """Among them rows that outgrow the reference of their first tile, and take the second pass."""
    inputs, eager, truth = biased(bias, dtype)
    on_device = replace(inputs, **{name: moved(getattr(inputs, name)) for name in ("q", "k", "v", "dout", "angles")})
    check({name: x.cpu() for name, x in run(on_device, "triton").items()}, eager, truth, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", POISON)
def test_nan_and_inf_propagate(poison, dtype):
    inputs, expected = poisoned(poison, dtype)
    on_device = replace(inputs, **{name: moved(getattr(inputs, name)) for name in ("q", "k", "v", "dout", "angles")})
    got = on_device.call("triton").float().cpu()
    bad = expected.isnan().any(-1)
    assert torch.equal(got.isnan().any(-1), bad)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got[~bad], expected[~bad], rtol=8 * eps, atol=8 * eps)


def moved(x: torch.Tensor) -> torch.Tensor:
    return x.detach().cuda().requires_grad_(x.requires_grad)


# ---------------------------------------------------------------------------------------------- every tile of the tuner


@pytest.mark.parametrize("unit", ["forward", "query", "key", "window_forward", "window_backward"])
@pytest.mark.parametrize("dim", [64, 80])
def test_every_candidate_of_the_tuner(unit, dim, monkeypatch, large):
    """Whatever `spatial-pe tune` may choose is right."""
    from spatial_pe import tuning
    from spatial_pe.backends.triton import launch_cache, tiles

    tokens = 64 if unit.startswith("window") else 300
    case = Case(batch=2, tokens=tokens, heads=4, dim=dim, dtype=torch.bfloat16)
    inputs = make(case)
    truth, eager = exact(inputs), on_gpu(case, "composed")
    base = tiles.prebuilt(tiles.family_of(torch.device("cuda", 0)), case.dtype, dim, tiles.bucket(tokens))
    for config in tuning.candidates(unit, tuning.Problem(tokens, dim), base):
        monkeypatch.setattr(tiles, "choice_of", lambda call, config=config: replace(base, **{unit: config}))
        launch_cache.clear_cache()
        try:
            got = on_gpu(case, "triton")
        except Exception as error:  # too much shared memory for this GPU: the tuner leaves it out
            assert "resource" in str(error).lower(), f"{config}: {error}"
            continue
        check(got, eager, truth, inputs)
    launch_cache.clear_cache()


def test_tuning(tmp_path, monkeypatch):
    """The whole of it, for one shape: compiled in processes, timed, saved, used."""
    from spatial_pe import tuning
    from spatial_pe.backends.triton import tiles, tuning_store

    monkeypatch.setenv("SPATIAL_PE_CACHE", str(tmp_path))
    tiles.clear_cache()
    device = torch.device("cuda", torch.cuda.current_device())
    problem = tuning.Problem(196, 64, budget=1960)
    rows = tuning.tune([problem], device, workers=4)
    (row,) = rows.values()
    assert tuning_store.load(device).rows == rows
    inputs = make(Case(batch=70, tokens=200, dtype=torch.bfloat16), "cuda")  # few programs would follow no verdict
    call = AttentionCall(inputs.q, inputs.k, inputs.v, None, 1.0, None, None, None)
    assert tuning_store.plain(tiles.choice_of(call).forward) == row["forward"]
    assert select.select(call, "auto") == row["faster"]["training"]
    monkeypatch.undo()
    tiles.clear_cache()


# ------------------------------------------------------------------------------------------------------ rotation alone


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.pairs and not case.lengths and not case.seqlens], ids=str
)
def test_rotation(case, dtype):
    """Forward, inverse, in place, and gradients, those of the angles too."""
    inputs = make(replace(case, dtype=dtype), "cuda")
    leaves = (inputs.q, inputs.k, inputs.angles)
    rotary = inputs.rotary()
    assert rotary is not None
    got = spatial_pe.apply_rotary_qk(inputs.q, inputs.k, rotary)
    expected = [rotated(x, rotary) for x in (inputs.q, inputs.k)]
    eps = torch.finfo(dtype).eps
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2 * eps, atol=1e-6)
    weights = [torch.randn_like(x) for x in got]
    grads = [torch.autograd.grad(x, leaves, weights, retain_graph=True) for x in (got, expected)]
    for a, b in zip(*grads, strict=True):
        assert (a - b).float().norm() <= 2 * eps * b.float().norm() + 1e-5
    with torch.no_grad():
        q, k = (x.detach().clone() for x in (inputs.q, inputs.k))
        spatial_pe.apply_rotary_qk(q, k, rotary, inplace=True)
        assert torch.equal(q, got[0]) and torch.equal(k, got[1])


# -------------------------------------------------------------------------------------------------- inside of torch


def test_auto_takes_triton(tmp_path, monkeypatch):
    from spatial_pe.backends.triton import tiles

    monkeypatch.setenv("SPATIAL_PE_CACHE", str(tmp_path))  # nothing was tuned
    tiles.clear_cache()
    inputs = make(Case(dtype=torch.bfloat16), "cuda")
    assert select.select(AttentionCall(inputs.q, inputs.k, inputs.v, None, 1.0, None, None, None), "auto") == "triton"
    monkeypatch.undo()
    tiles.clear_cache()


def test_gradients_are_the_same_every_time():
    case = Case(batch=4, tokens=577, heads=8, dtype=torch.bfloat16)
    first, second = on_gpu(case, "triton"), on_gpu(case, "triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_synchronisation():
    """Packed lengths stay on the device."""
    case = Case(lengths=(64,) * 20, dim=80, dtype=torch.bfloat16)
    inputs = make(case, "cuda")
    inputs.call("triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = inputs.call("triton")
        out.backward(inputs.dout)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_inside_a_cuda_graph():
    inputs = make(Case(batch=2, tokens=300, dtype=torch.bfloat16), "cuda")
    q, k, v = (x.detach() for x in (inputs.q, inputs.k, inputs.v))
    rotary = inputs.rotary()
    expected = spatial_pe.rope_attention(q, k, v, rotary, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        got = spatial_pe.rope_attention(q, k, v, rotary, backend="triton")
    graph.replay()
    assert torch.equal(got, expected)


def test_compiled_without_a_graph_break():
    inputs = make(Case(batch=2, tokens=300, dtype=torch.bfloat16), "cuda")
    q, k, v = (x.detach() for x in (inputs.q, inputs.k, inputs.v))
    attention = torch.compile(lambda q, k, v: spatial_pe.rope_attention(q, k, v, backend="triton"), fullgraph=True)
    assert torch.equal(attention(q, k, v), spatial_pe.rope_attention(q, k, v, backend="triton"))


@pytest.mark.parametrize("tokens", [64, 300])
def test_compiled_with_gradients(tokens):
    """Inductor, one graph: outputs and all gradients as eager's, twice, for other tensors of the same shape."""
    case = Case(batch=2, tokens=tokens, dim=64, dtype=torch.bfloat16)

    def attention(q, k, v, angles):
        rotary = spatial_pe.Rotary.from_angles(angles)
        return spatial_pe.rope_attention(q * 1.5, k, v, rotary, backend="triton").sin()

    compiled = torch.compile(attention, fullgraph=True)
    for _ in range(2):
        inputs = make(case, "cuda")
        leaves = list(inputs.leaves.values())
        outs = [function(inputs.q, inputs.k, inputs.v, inputs.angles) for function in (compiled, attention)]
        grads = [torch.autograd.grad(out, leaves, inputs.dout) for out in outs]
        for a, b in zip(*((out, *grad) for out, grad in zip(outs, grads, strict=True)), strict=True):
            # cos and sin of inductor's differ in the last bit, which rounds some of q and k the other way
            assert (a - b).float().norm() <= 0.01 * b.float().norm()


def test_opcheck():
    inputs = make(Case(batch=2, tokens=20, dim=24, kv_heads=1, dtype=torch.bfloat16), "cuda")
    rotary = inputs.rotary()
    assert rotary is not None
    cos, sin = (x.detach().requires_grad_() for x in (rotary.cos, rotary.sin))
    args = (inputs.q, inputs.k, inputs.v, cos, sin, "half", 0.2, None, None, None, "triton")
    assert set(torch.library.opcheck(torch.ops.spatial_pe.rope_attention, args).values()) == {"SUCCESS"}
    args = ([inputs.q, inputs.k], cos, sin, "half", False)
    assert set(torch.library.opcheck(torch.ops.spatial_pe.rotate, args).values()) == {"SUCCESS"}


def test_autocast_and_checkpointing():
    from torch.utils.checkpoint import checkpoint

    inputs = make(Case(batch=2, tokens=200, dim=64), "cuda")
    leaves = list(inputs.leaves.values())

    def block(q, k, v, angles):
        return spatial_pe.rope_attention(q, k, v, spatial_pe.Rotary.from_angles(angles), backend="triton")

    with torch.autocast("cuda", torch.bfloat16):
        out = block(*leaves)
        again = checkpoint(block, *leaves, use_reentrant=False)
    assert out.dtype == torch.bfloat16 and torch.equal(out, again)
    grads = [torch.autograd.grad(x, leaves, inputs.dout.bfloat16()) for x in (out, again)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_on_another_stream_and_replayed():
    """Calls of one signature on a side stream, with fresh tensors each, while the default stream is busy."""
    stream = torch.cuda.Stream()
    torch.cuda._sleep(10_000_000)
    with torch.cuda.stream(stream):
        for _ in range(3):
            inputs = make(Case(batch=2, tokens=300, dtype=torch.bfloat16), "cuda")
            got = inputs.call("triton")
            stream.synchronize()
            expected = inputs.call("composed")
            assert (got - expected).float().norm() <= 0.02 * expected.float().norm()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_the_second_gpu():
    inputs = make(Case(batch=2, tokens=300, dtype=torch.bfloat16), "cuda:1")
    got, expected = inputs.call("triton"), inputs.call("composed")
    assert got.device.index == 1 and torch.cuda.current_device() == 0
    assert (got - expected).float().norm() <= 0.02 * expected.float().norm()


def test_more_than_2_31_elements():
    """64-bit offsets: 2.4e9 elements in q, k and v, and the last sample is like the others."""
    free, _ = torch.cuda.mem_get_info()
    if free < 40e9:
        pytest.skip("needs 40 GB of free memory")
    samples, tokens, heads, dim = 18_000, 256, 8, 64
    qkv = torch.empty(samples, tokens, 3, heads, dim, device="cuda", dtype=torch.bfloat16)
    qkv[:] = torch.randn(1, tokens, 3, heads, dim, device="cuda", dtype=torch.bfloat16)
    q, k, v = qkv.unbind(2)
    out = spatial_pe.rope_attention(q, k, v, backend="triton")
    assert out.numel() > 2**31 and torch.equal(out[-1], out[0])
    first = spatial_pe.rope_attention(*(x[:1] for x in (q, k, v)), backend="triton")
    assert torch.equal(first[0], out[0])
