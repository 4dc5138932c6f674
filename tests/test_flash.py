# SPDX-License-Identifier: Apache-2.0
"""flash-attn behind the rotation. Stand-ins with the signatures of the real functions compute on the CPU."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import sys
import types
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from oracles import Case, check, exact, make, run
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from spatial_pe import Rotary, rope_attention
from spatial_pe.backends.base import AttentionCall
from spatial_pe.ops import composed, flash
from spatial_pe.ops.rotate import apply_rotary_qk

pytestmark = pytest.mark.usefixtures("poisoned_memory")
NAMES = {provider.name: provider for provider in flash.PROVIDERS}

# ---------------------------------------------------------------------------------------------------------- stand-ins


class Attend(torch.autograd.Function):
    """Float32 inside. Like the kernels it trusts its bounds, computes the first `longest` rows of a sequence, leaves
    what is in the memory in all others, and records nothing in its backward."""

    @staticmethod
    def forward(ctx, q, k, v, bounds, longest, scale):
        ctx.save_for_backward(q, k, v)
        ctx.rest = (bounds, longest, scale)
        with torch.no_grad():
            return attend(q, k, v, *ctx.rest)

    @staticmethod
    def backward(ctx, dout):
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            grads = torch.autograd.grad(attend(*leaves, *ctx.rest), leaves, dout.detach())
        return (*grads, None, None, None)


def attend(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, longest: int | None, scale: float) -> Tensor:
    for x in (q, k, v):
        assert x.dtype in (torch.bfloat16, torch.float16) and x.stride(-1) == 1 and x.data_ptr() % 16 == 0
        assert all(stride % 8 == 0 or size == 1 for stride, size in zip(x.stride()[:-1], x.shape, strict=False))
    group = q.shape[-2] // k.shape[-2]

    def one(q, k, v):  # (..., N, H, D)
        q, k, v = (x.transpose(-2, -3).float() for x in (q, k, v))
        k, v = (x.repeat_interleave(group, -3) for x in (k, v))
        return (torch.softmax(q @ k.mT * scale, -1) @ v).transpose(-2, -3).to(torch.get_default_dtype())

    if bounds is None:
        return one(q, k, v).to(q.dtype)
    assert bounds.dtype == torch.int32 and bounds.is_contiguous() and longest is not None
    out = torch.full(q.shape, 7.0)
    for start, stop in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        assert 0 <= start <= stop <= q.shape[0], "read past the tensors"
        rows = slice(start, min(stop, start + longest))
        if stop > start:
            out[rows] = one(q[rows], k[start:stop], v[start:stop])
    return out.to(q.dtype)


CALLS: list[tuple[str, dict]] = []


def fa2() -> types.ModuleType:
    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        CALLS.append(("dense", {"deterministic": deterministic}))
        return Attend.apply(q, k, v, None, None, softmax_scale)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        assert cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
        CALLS.append(("packed", {"longest": max_seqlen_q, "bounds": cu_seqlens_q}))
        return Attend.apply(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale)

    return module("flash_attn", flash_attn_func, flash_attn_varlen_func)


def fa3() -> types.ModuleType:
    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        CALLS.append(("dense", {}))
        return Attend.apply(q, k, v, None, None, softmax_scale)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        CALLS.append(("packed", {}))
        return Attend.apply(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale)

    return module("flash_attn_interface", flash_attn_func, flash_attn_varlen_func)


def fa4() -> types.ModuleType:
    """Returns (out, lse)."""

    def flash_attn_func(
        q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
        learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
        score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,
        block_sparse_tensors_bwd=None, return_lse=False,
    ):  # fmt: skip
        CALLS.append(("dense", {}))
        return Attend.apply(q, k, v, None, None, softmax_scale), None

    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
        softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1,
        pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None,
        block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False, scheduler_metadata=None,
        seqlen_k_per_split=None, disable_scheduler_metadata=False,
    ):  # fmt: skip
        CALLS.append(("packed", {}))
        return Attend.apply(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale), None

    return module("flash_attn.cute", flash_attn_func, flash_attn_varlen_func)


def torch_varlen() -> types.ModuleType:
    """As of torch 2.13."""

    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
        enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
    ):  # fmt: skip
        assert enable_gqa or query.size(1) == key.size(1)
        CALLS.append(("packed", {}))
        return Attend.apply(query, key, value, cu_seq_q, max_q, scale)

    return module("torch.nn.attention.varlen", varlen_attn)


def torch_varlen_2_10() -> types.ModuleType:
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        CALLS.append(("packed", {}))
        return Attend.apply(query, key, value, cu_seq_q, max_q, query.shape[-1] ** -0.5)

    return module("torch.nn.attention.varlen", varlen_attn)


def module(name: str, *functions) -> types.ModuleType:
    made = types.ModuleType(name)
    for function in functions:
        setattr(made, function.__name__, function)
    return made


STAND_INS = {"flash-attn 2": fa2, "flash-attn 3": fa3, "flash-attn 4": fa4, "torch's varlen_attn": torch_varlen}


@pytest.fixture
def gpu(monkeypatch):
    """A function: pretend that the CPU is a GPU of this capability, with these modules and no others."""

    def pretend(capability: tuple[int, int], *modules: types.ModuleType) -> None:
        monkeypatch.setattr(flash, "DEVICE", "cpu")
        monkeypatch.setattr(flash, "major", lambda device: capability[0])
        monkeypatch.setattr(flash, "_FAILED", {})
        for provider in flash.PROVIDERS:
            monkeypatch.setitem(sys.modules, provider.module, None)
        for made in modules:
            if made.__name__ == "flash_attn.cute" and sys.modules["flash_attn"] is None:
                monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))  # a namespace
            monkeypatch.setitem(sys.modules, made.__name__, made)
        flash.forget()
        CALLS.clear()

    yield pretend
    monkeypatch.undo()
    flash.forget()


def call_of(q: Tensor, k: Tensor | None = None, bounds: Tensor | None = None, **others) -> AttentionCall:
    k = q if k is None else k
    arguments = {"rotary": None, "scale": 1 / math.sqrt(q.shape[-1]), "max_seqlen": None, "seqlens": None} | others
    return AttentionCall(q, k, k, cu_seqlens=bounds, **arguments)


# ------------------------------------------------------------------------------------------------- results, gradients

PACKED = [
    Case(lengths=(0, 1, 37, 0, 0, 130, 1, 16, 0), dim=72, prefix=1),
    Case(lengths=(64,) * 3, dim=80, layout="fused"),
    Case(lengths=(40, 50), heads=4, kv_heads=2, dim=64, pairing="interleaved", table="shared"),
    Case(lengths=(50, 33), heads=4, kv_heads=1, dim=64, scale=0.3),
    Case(lengths=(30, 70), dim=64, rotary_dim=0),
    Case(lengths=(30, 70), dim=64, table="head", layout="wide"),
]
DENSE = [
    Case(batch=2, tokens=196, dim=64),
    Case(batch=2, tokens=70, heads=8, kv_heads=2, dim=80, pairing="axis_half"),
    Case(tokens=37, dim=72, layout="fused", rotary_dim=0, scale=0.2),
    Case(batch=2, tokens=50, heads=3, dim=88, layout="heads_first"),
]


CASES = [replace(case, dtype=torch.bfloat16) for case in (*PACKED, *DENSE)]
CASES += [replace(case, dtype=torch.float16) for case in (PACKED[0], DENSE[1])]


@functools.lru_cache(maxsize=1)
def prepared(case: Case) -> tuple:
    inputs = make(case)
    return inputs, run(inputs, "composed"), exact(inputs)


@pytest.mark.parametrize(
    ("case", "name"),
    [(case, name) for case in CASES for name in NAMES if case.lengths or NAMES[name].dense],
    ids=lambda x: str(x).replace(" ", "-"),
)
def test_error_rule(name, case, gpu, monkeypatch):
    packed = case.lengths is not None
    inputs, eager, truth = prepared(case)
    gpu((9, 0), STAND_INS[name]())
    monkeypatch.setattr(flash, "ROWS", (flash.Row(packed, (9,), NAMES[name], "for this test"),))
    check(run(inputs, "composed"), eager, truth, inputs)
    assert [form for form, _ in CALLS] == ["packed" if packed else "dense"]


def test_long_images_on_hopper(gpu):
    """The dense row as it stands."""
    inputs = make(Case(tokens=2048, heads=1, dim=16, dtype=torch.bfloat16))
    eager = run(inputs, "composed")
    gpu((9, 0), fa3())
    check(run(inputs, "composed"), eager, exact(inputs), inputs)
    assert CALLS
    CALLS.clear()
    x = torch.randn(1, 1024, 1, 64, dtype=torch.bfloat16)
    rope_attention(x, x, x, backend="composed")
    assert not CALLS


def test_out_is_contiguous_and_rows_are_aligned(gpu):
    """A tensor that begins anywhere is copied: the stand-in asserts it."""
    gpu((8, 0), fa2())
    flat = torch.randn(3 * 20 * 2 * 64 + 1, dtype=torch.float16)[1:]
    q, k, v = flat.view(3, 20, 2, 64)
    out = rope_attention(q, k, v, cu_seqlens=torch.tensor([0, 8, 20], dtype=torch.int32), backend="composed")
    assert out.is_contiguous() and out.shape == q.shape and CALLS


# ------------------------------------------------------------------------------------------------------ who is called

MODULES = {"2": fa2, "3": fa3, "4": fa4, "torch": torch_varlen}


@pytest.mark.parametrize(
    ("capability", "installed", "packed", "tokens", "name"),
    [
        ((9, 0), ("2", "3", "4", "torch"), True, 64, "flash-attn 3"),
        ((9, 0), ("2", "4", "torch"), True, 64, "flash-attn 4"),
        ((9, 0), ("2", "torch"), True, 64, "flash-attn 2"),
        ((9, 0), ("torch",), True, 64, "torch's varlen_attn"),
        ((9, 0), (), True, 64, None),
        ((10, 0), ("2", "3", "4", "torch"), True, 64, "flash-attn 4"),
        ((10, 3), ("3", "torch"), True, 64, "torch's varlen_attn"),
        ((8, 0), ("2", "3", "4", "torch"), True, 64, "flash-attn 2"),
        ((12, 0), ("3", "4", "torch"), True, 64, "torch's varlen_attn"),
        ((7, 5), ("2", "3", "4", "torch"), True, 64, None),
        ((9, 0), ("2", "3", "4"), False, 4096, "flash-attn 3"),
        ((9, 0), ("2", "3", "4"), False, 576, None),
        ((9, 0), ("2", "4"), False, 4096, None),
        ((10, 0), ("2", "3", "4"), False, 4096, None),
        ((8, 6), ("2", "3", "4"), False, 4096, None),
    ],
)
def test_the_table(capability, installed, packed, tokens, name, gpu):
    gpu(capability, *(MODULES[key]() for key in installed))
    x = torch.empty(1, tokens, 2, 64, dtype=torch.bfloat16)
    row, why = flash.choose(call_of(x, bounds=torch.tensor([0, tokens], dtype=torch.int32) if packed else None))
    assert (row and row.provider.name) == name and why


HALF = torch.zeros(1, 32, 2, 64, dtype=torch.float16)
BOUNDS = torch.tensor([0, 32], dtype=torch.int32)
REFUSED = {
    "no torch.float32": call_of(HALF.float(), bounds=BOUNDS),
    "no torch.float64": call_of(HALF.double(), bounds=BOUNDS),
    "a multiple of 8": call_of(HALF[..., :20], bounds=BOUNDS),
    "flash-attn 2 has no head_dim 264": call_of(HALF.new_zeros(1, 32, 2, 264), bounds=BOUNDS),
    "padded samples": call_of(HALF, seqlens=torch.tensor([3], dtype=torch.int32)),
    "no tokens": call_of(HALF[:, :0], bounds=BOUNDS),
    "at most 65535": call_of(HALF, bounds=torch.zeros(65537, dtype=torch.int32)),
    "computes on a GPU": call_of(HALF.to("meta")),
    "as fast a kernel": call_of(HALF),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_say_why(reason, gpu):
    gpu((9, 0), fa2())
    row, why = flash.choose(REFUSED[reason])
    assert row is None and reason in why


def test_who_watches_gets_torch_operators(gpu):
    """Traces, transforms, forward mode, compiled graphs, and users who have switched flash attention off."""
    q = torch.randn(40, 2, 64, dtype=torch.bfloat16)
    bounds = torch.tensor([0, 13, 40], dtype=torch.int32)
    plain = rope_attention(q, q, q, cu_seqlens=bounds, backend="composed")
    gpu((9, 0), fa2())

    def function(q):
        return rope_attention(q, q, q, cu_seqlens=bounds, backend="composed")

    close = functools.partial(torch.testing.assert_close, expected=plain, atol=0.02, rtol=0.02)
    close(torch.compile(function, fullgraph=True, backend="eager")(q))
    close(torch.jit.trace(function, (q,), check_trace=False)(q))
    close(torch.func.vmap(function)(q[None])[0])
    close(torch.func.jvp(function, (q,), (q,))[0])
    with torch.autograd.forward_ad.dual_level():
        close(torch.autograd.forward_ad.unpack_dual(function(torch.autograd.forward_ad.make_dual(q, q))).primal)
    with sdpa_kernel(SDPBackend.MATH):
        close(function(q))
    assert not CALLS
    close(function(q))
    assert len(CALLS) == 1


def test_traces_see_no_size_that_is_compared(gpu):
    """Sizes stay free in an export, and a TorchScript trace warns of none."""
    gpu((9, 0), fa2(), fa3())

    class Dense(torch.nn.Module):
        def forward(self, x):
            return rope_attention(x, x, x, backend="composed")

    x = torch.randn(2, 2100, 1, 16, dtype=torch.bfloat16)
    tokens = torch.export.Dim("tokens", min=2, max=8192)
    exported = torch.export.export(Dense(), (x,), dynamic_shapes=({1: tokens},), strict=False).module()
    torch.testing.assert_close(exported(x[:, :40]), Dense()(x[:, :40]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        torch.jit.trace(Dense(), (x[:, :40],), check_trace=False)
    assert not CALLS


def test_installed_torch_has_the_signature():
    try:
        importlib.import_module(flash.VARLEN.module)
    except ImportError:
        pytest.skip("this torch has no varlen_attn")
    flash.forget()
    functions = flash._functions(flash.VARLEN)
    assert not isinstance(functions, str)
    real = importlib.import_module(flash.VARLEN.module).varlen_attn
    if "scale" in inspect.signature(real).parameters and "enable_gqa" in inspect.signature(real).parameters:
        assert not functions.plain_only and functions.options == ("enable_gqa",)


def test_torch_2_10_takes_no_scale_and_no_groups(gpu):
    gpu((9, 0), torch_varlen_2_10())
    assert flash.choose(call_of(HALF, bounds=BOUNDS))[0] is not None
    out = rope_attention(HALF[0], HALF[0], HALF[0], cu_seqlens=BOUNDS, backend="composed")
    assert len(CALLS) == 1 and out.shape == HALF[0].shape
    for call in (call_of(HALF, bounds=BOUNDS, scale=0.3), call_of(HALF, HALF[:, :, :1], bounds=BOUNDS)):
        row, why = flash.choose(call)
        assert row is None and "takes no scale and no grouped heads" in why


def test_another_signature_and_a_broken_package_are_not_called(gpu):
    gpu((9, 0), module("flash_attn", lambda q, k, v: q))
    assert "is not installed" in flash.choose(call_of(HALF, bounds=BOUNDS))[1]

    def flash_attn_varlen_func(q, k, v, lengths):
        return q

    made = fa2()
    made.flash_attn_varlen_func = flash_attn_varlen_func
    gpu((9, 0), made)
    assert "this flash-attn 2 has another signature" in flash.choose(call_of(HALF, bounds=BOUNDS))[1]


def test_what_raises_is_not_asked_again(gpu):
    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None):
        CALLS.append(("packed", {}))
        raise RuntimeError("This build has no headdim 64\nmore")

    q = torch.randn(32, 2, 64, dtype=torch.float16)
    plain = rope_attention(q, q, q, cu_seqlens=BOUNDS, backend="composed")
    made = fa2()
    made.flash_attn_varlen_func = flash_attn_varlen_func
    gpu((9, 0), made)
    with pytest.warns(UserWarning, match=r"flash-attn 2 failed \(RuntimeError: This build has no headdim 64\)"):
        first = rope_attention(q, q, q, cu_seqlens=BOUNDS, backend="composed")
    again = rope_attention(q, q, q, cu_seqlens=BOUNDS, backend="composed")
    assert torch.equal(first, plain) and torch.equal(again, plain) and len(CALLS) == 1
    assert "flash-attn 2 failed" in flash.choose(call_of(HALF, bounds=BOUNDS))[1]


# ------------------------------------------------------------------------------------------------------ packed bounds

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


# -------------------------------------------------------------------------------------------------------- derivatives


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


# ------------------------------------------------------------------------------------ the order within torch's SDPA

FLASH_FIRST, CUDNN_FIRST = [1, 2, 0, 3, 4], [3, 1, 2, 0, 4]  # torch's own order, and what is asked for


@pytest.fixture
def orders(monkeypatch):
    """The order in force at each call of torch's attention."""
    seen = []

    def attention(*args, **kwargs):
        seen.append(torch._C._get_sdp_priority_order())
        return real(*args, **kwargs)

    real = composed.F.scaled_dot_product_attention
    monkeypatch.setattr(composed.F, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(composed, "_TORCH_DECIDED", False)
    monkeypatch.setattr(composed, "_cudnn", lambda: 91600)
    assert torch._C._get_sdp_priority_order() == FLASH_FIRST
    yield seen
    assert torch._C._get_sdp_priority_order() == FLASH_FIRST


@pytest.mark.parametrize(
    ("capability", "tokens", "cudnn", "order"),
    [
        ((9, 0), 256, 91002, CUDNN_FIRST),
        ((9, 0), 196, 91600, CUDNN_FIRST),
        ((9, 0), 196, 91500, FLASH_FIRST),
        ((9, 0), 196, 0, FLASH_FIRST),
        ((10, 0), 256, 91500, CUDNN_FIRST),
        ((10, 3), 196, 91600, CUDNN_FIRST),
        ((8, 0), 256, 91600, FLASH_FIRST),
        ((8, 9), 256, 91600, FLASH_FIRST),
        ((12, 0), 256, 91600, FLASH_FIRST),
    ],
)
def test_the_kernel_that_is_fastest_on_the_chip_is_asked_first(
    capability, tokens, cudnn, order, gpu, orders, monkeypatch
):
    gpu(capability)
    monkeypatch.setattr(composed, "_cudnn", lambda: cudnn)
    x = torch.zeros(1, tokens, 2, 64, dtype=torch.bfloat16)
    rope_attention(x, x, x, backend="composed")
    assert orders == [order]


def test_the_order_changes_for_dense_calls_that_nobody_watches_only(gpu, orders, monkeypatch):
    x = torch.zeros(1, 128, 2, 64, dtype=torch.bfloat16)
    bounds = torch.tensor([0, 60, 128], dtype=torch.int32)
    rope_attention(x, x, x, backend="composed")  # on the CPU
    gpu((9, 0))
    rope_attention(x, x, x, seqlens=torch.tensor([60], dtype=torch.int32), backend="composed")
    rope_attention(x[0], x[0], x[0], cu_seqlens=bounds, backend="composed")
    assert orders and all(order == FLASH_FIRST for order in orders)


def test_a_compiled_graph_sets_no_order(gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setattr(composed, "_numbers", None)  # not callable
    x = torch.zeros(1, 128, 2, 64, dtype=torch.bfloat16)
    torch.compile(lambda x: rope_attention(x, x, x, backend="composed"), fullgraph=True, backend="eager")(x)


def test_the_order_of_the_user_and_what_is_switched_off_stay(gpu, orders, monkeypatch):
    gpu((9, 0))
    x = torch.zeros(1, 128, 2, 64, dtype=torch.bfloat16)
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION], set_priority=True):
        rope_attention(x, x, x, backend="composed")
    assert orders[0][:2] == [0, 3]
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]):
        rope_attention(x, x, x, backend="composed")
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(composed, "_DEPRIORITIZED", True)
    monkeypatch.setattr(composed, "_TORCH_DECIDED", False)
    rope_attention(x, x, x, backend="composed")
    assert orders[2] == FLASH_FIRST


def test_the_order_is_put_back_after_an_error(gpu, orders, monkeypatch):
    gpu((9, 0))

    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(composed, "_sdpa", fails)
    x = torch.zeros(1, 128, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="out of memory"):
        rope_attention(x, x, x, backend="composed")
