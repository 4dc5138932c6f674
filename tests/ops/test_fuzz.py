# SPDX-License-Identifier: Apache-2.0
"""Whatever the arguments: a public function returns, or raises what Python code can catch, and says which argument.

A crash of the process is what this looks for (the test run loses its worker then); an IndexError or an AssertionError
from deep inside would be a crash of another kind for whoever reads it.
"""

from __future__ import annotations

import functools
import warnings

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import spatial_pe
from spatial_pe import AxialRoPE, MixedRoPE, PatchGrid, RoPE2DAttention, Rotary

UNDERSTOOD = (ValueError, TypeError, RuntimeError, NotImplementedError)
FUZZED = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))

small = st.integers(-2, 20)
numbers = st.one_of(small, st.sampled_from([2**50, -(2**63), 0.5, -0.0, float("nan"), float("inf"), True, None]))
dtypes = st.sampled_from(
    [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64, torch.bool]
)
words = st.sampled_from(
    ["", "auto", "cpu", "reference", "composed", "triton", "cuda", "half", "interleaved", "axial", "ü"]
)


@st.composite
def tensors(draw) -> torch.Tensor:
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 8, 16, 17]), max_size=5))
    x = torch.randn(shape).to(draw(dtypes))
    how = draw(st.sampled_from(["plain", "plain", "transposed", "expanded", "sliced", "gradient", "meta"]))
    if how == "transposed" and x.ndim > 1:
        return x.transpose(0, -1)
    if how == "expanded" and x.ndim:
        return x[:1].expand(x.shape) if x.shape[0] else x
    if how == "sliced" and x.ndim:
        return x[..., ::2]
    if how == "gradient" and x.is_floating_point():
        return x.requires_grad_()
    return x.to("meta") if how == "meta" else x


grids = st.builds(
    lambda h, w, prefix, suffix: PatchGrid(h, w, prefix=prefix, suffix=suffix),
    *(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2), st.integers(0, 1)),
)
rotaries = st.builds(
    lambda grid, half, pairing: Rotary.from_angles(torch.randn(grid.num_tokens, half), pairing),
    *(grids, st.sampled_from([1, 4, 8, 16]), st.sampled_from(["half", "interleaved"])),
)
anything = st.one_of(
    numbers, words, tensors(), grids, rotaries, st.lists(small, max_size=3), st.just(torch.nn.Linear(2, 2))
)


def tried(function, *args, **kwargs) -> object:
    """Calls it, and what it returns where that is an encoding or a grid; None where it raised what it may."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return function(*args, **kwargs)
        except UNDERSTOOD as error:
            assert str(error).strip(), f"{type(error).__name__} without a word"
            return None


@FUZZED
@given(st.data())
def test_attention(data):
    """A call that would do, with one or two arguments that may not."""
    batch, tokens, heads, dim = data.draw(
        st.tuples(*(st.sampled_from(s) for s in ([1, 2], [1, 7, 17], [1, 2], [16, 24])))
    )
    q, k, v = (torch.randn(batch, tokens, heads, dim) for _ in range(3))
    call = {"q": q, "k": k, "v": v, "rotary": Rotary.from_angles(torch.randn(tokens, dim // 2), "half")}
    names = ["q", "k", "v", "rotary", "scale", "cu_seqlens", "seqlens", "max_seqlen", "backend"]
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)):
        call[name] = data.draw(anything, label=name)
    out = tried(spatial_pe.rope_attention, call.pop("q"), call.pop("k"), call.pop("v"), call.pop("rotary"), **call)
    if isinstance(out, torch.Tensor) and out.requires_grad and out.device.type == "cpu":
        tried(torch.autograd.backward, out, torch.ones_like(out))


@FUZZED
@given(anything, anything, st.one_of(rotaries, anything), st.booleans())
def test_rotation(q, k, rotary, inplace):
    tried(spatial_pe.apply_rotary, q, rotary)
    tried(spatial_pe.apply_rotary_qk, q, k, rotary, inplace=inplace)


@FUZZED
@given(anything, anything, st.one_of(words, anything))
def test_tables(cos, sin, pairing):
    for make in (Rotary, Rotary.from_angles):
        made = tried(make, cos, sin, pairing) if make is Rotary else tried(make, cos, pairing)
        if isinstance(made, Rotary):
            tried(spatial_pe.verify_rotary, made, PatchGrid(2, 2))


@FUZZED
@given(
    numbers, numbers, st.fixed_dictionaries({}, optional={"prefix": numbers, "suffix": numbers, "merge_size": numbers})
)
def test_grids(height, width, how):
    for made in (
        tried(PatchGrid, height, width, **how),
        tried(PatchGrid.packed, [(height, width), (2, 2)], **how),
    ):
        if isinstance(made, PatchGrid) and made.num_tokens < 10_000:
            tried(made.coordinates)
            tried(made.windows, height)


@FUZZED
@given(numbers, numbers, anything)
def test_encodings(head_dim, theta, where):
    for make in (
        AxialRoPE,
        functools.partial(MixedRoPE, heads=2),
        lambda d, *_: spatial_pe.convention("dinov3", head_dim=d),
    ):
        made = tried(make, head_dim, theta) if make is AxialRoPE else tried(make, head_dim)
        if made is not None:
            tried(made, where)
            tried(made, PatchGrid(2, 3))


@FUZZED
@given(numbers, numbers, st.one_of(words, anything), tensors(), st.one_of(grids, anything))
def test_module(width, heads, rope, x, grid):
    if (isinstance(width, int) and abs(width) > 4096) or (isinstance(heads, int) and abs(heads) > 4096):
        return
    made = tried(RoPE2DAttention, width, heads, rope=rope)
    if made is not None:
        tried(made, x, grid)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    anything,
    st.fixed_dictionaries(
        {}, optional=dict.fromkeys(["rope", "start", "keep_absolute", "legacy", "backend"], anything)
    ),
)
def test_patching(model, how):
    tried(spatial_pe.patch, model, **how)
    tried(spatial_pe.inspect, model)
    tried(spatial_pe.unpatch, model)


@FUZZED
@given(st.one_of(rotaries, anything), st.one_of(grids, anything))
def test_verification(rotary, grid):
    tried(spatial_pe.verify_rotary, rotary, grid)


@FUZZED
@given(st.one_of(st.sampled_from(list(spatial_pe.CONVENTIONS)), anything), numbers)
def test_conventions(name, head_dim):
    made = tried(spatial_pe.convention, name, head_dim)
    if made is not None:
        tried(made, PatchGrid(2, 2))
