# SPDX-License-Identifier: Apache-2.0
"""flash-attn behind the rotation: results, gradients, and which attention is called."""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from dataclasses import replace

import pytest
import torch
from flash_stand_ins import (
    CALLS,
    HALF,
    NAMES,
    STAND_INS,
    call_of,
    fa2,
    fa3,
    fa4,
    module,
    torch_varlen,
    torch_varlen_2_10,
)
from oracles import Case, check, exact, make, run
from torch.nn.attention import SDPBackend, sdpa_kernel

from spatial_pe import rope_attention
from spatial_pe.ops import flash

pytestmark = pytest.mark.usefixtures("poisoned_memory")


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


BOUNDS = torch.tensor([0, 32], dtype=torch.int32)


REFUSED = {
    "no torch.float32": call_of(HALF.float(), bounds=BOUNDS),
    "no torch.float64": call_of(HALF.double(), bounds=BOUNDS),
    "a multiple of 8": call_of(HALF[..., :20], bounds=BOUNDS),
    "flash-attn 2 has no head_dim 264": call_of(HALF.new_zeros(1, 32, 2, 264), bounds=BOUNDS),
    "padded samples": call_of(HALF, seqlens=torch.tensor([3], dtype=torch.int32)),
    "no tokens": call_of(HALF[:, :0], bounds=BOUNDS),
    "at most 65535": call_of(HALF, bounds=torch.zeros(65537, dtype=torch.int32)),
    "runs on GPUs only": call_of(HALF.to("meta")),
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
    flash.clear_cache()
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
