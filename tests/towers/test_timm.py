# SPDX-License-Identifier: Apache-2.0
"""timm's models, patched against unpatched: outputs and gradients, all calls of its attention."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from families import randn
from test_families import assert_error_rule, run
from timm_path import import_timm
from torch import nn

from spatial_pe.towers import patch, unpatch
from spatial_pe.towers.forms import TESTED
from spatial_pe.towers.fused_attention import FusedAttention

timm = import_timm()
from timm_cases import (  # noqa: E402
    CASES,
    DIM,
    DTYPES,
    FLEX,
    HEADS,
    HEIGHT,
    OWN_ROPE,
    PLAIN,
    WIDTH,
    attentions,
    distance,
    images,
)


@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_follow_the_error_rule(name, dtype, calls):
    case = CASES[name]
    inputs = case.inputs()
    exact, exact_grads = run(case.build().double(), case, inputs, torch.float64)
    model = case.build().to(dtype)
    assert model.num_prefix_tokens == case.prefix
    theirs, their_grads = run(model, case, inputs, dtype)
    report = patch(model)
    calls.clear()  # those of the proof
    assert [row.attention for row in report.patched] == [case.attention] * case.layers
    assert all(row.error is not None for row in report.patched)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours, our_grads = run(model, case, inputs, dtype)
    assert len(calls) == case.layers
    for i, triple in enumerate(zip(ours, theirs, exact, strict=True)):
        assert_error_rule(*triple, dtype, f"output {i}")
    assert our_grads.keys() == exact_grads.keys() and len(our_grads) > 5 * case.layers
    everything = torch.stack([g.norm() for g in exact_grads.values()]).norm()
    for key, gradient in exact_grads.items():
        learned = key == "rope.freqs"
        assert not learned or gradient.norm() > 1e-2 * everything
        assert_error_rule(
            our_grads[key], their_grads[key], gradient, dtype, key, floor=0.0 if learned else 0.03 * everything
        )


def test_the_table_of_tested_classes_is_what_is_run():
    found = set()
    for case in CASES.values():
        model = case.build()
        patch(model, verify=False)
        originals = [m.original for m in model.modules() if isinstance(m, FusedAttention)]
        assert len(originals) == case.layers
        found |= {f"{cls.__module__}.{cls.__qualname__}" for cls in originals}
    assert found == {path for path in TESTED if path.startswith("timm.")}


@pytest.mark.parametrize("name", CASES)
def test_in_float64_nothing_is_left_but_what_timm_computes_in_float32(name):
    """Some tables and norms."""
    case = CASES[name]
    model = case.build().double()
    theirs, their_grads = run(model, case, case.inputs(), torch.float64)
    patch(model, backend="reference")
    ours, our_grads = run(model, case, case.inputs(), torch.float64)
    everything = torch.stack([g.norm() for g in their_grads.values()]).norm()
    for a, b in zip(ours, theirs, strict=True):
        assert distance(a, b) <= 1e-6
    for key, gradient in their_grads.items():
        assert (our_grads[key] - gradient).norm() <= 1e-6 * everything, key


@pytest.mark.parametrize("name", CASES)
def test_unpatched_is_what_it_was_bit_for_bit(name):
    case = CASES[name]
    model, inputs = case.build(), case.inputs()
    classes = [type(m) for m in model.modules()]
    with torch.no_grad():
        before = case.outputs(model, inputs)
        rope = None if name not in PLAIN else "mixed"
        patch(model, rope=rope)
        case.outputs(model, inputs)
        unpatch(model)
        after = case.outputs(model, inputs)
    assert [type(m) for m in model.modules()] == classes
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any("_spatial_pe" in str(key) for m in model.modules() for key in m.__dict__)
    assert not any("spatial_pe" in type(hook).__module__ for m in model.modules() for hook in m._forward_hooks.values())


@pytest.mark.parametrize(
    ("name", "convention"),
    [
        ("eva02_tiny", "own RoPE (interleaved)"),
        ("dinov3", "own RoPE (half)"),
        ("mrope", "own RoPE (half)"),
        ("pe_core", "own RoPE (interleaved)"),
        ("qwen3_vit", "own RoPE (half)"),
        ("naflex, dinov3", "own RoPE (half)"),
        ("vit", "no RoPE"),
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_the_pairing_is_the_modules_own_also_where_nothing_is_proven(name, convention, verify):
    case = CASES[name]
    model, inputs = case.build(), case.inputs()
    with torch.no_grad():
        before = case.outputs(model, inputs)
        report = patch(model, verify=verify)
        after = case.outputs(model, inputs)
    assert {row.convention for row in report.patched} == {convention}
    assert all((row.error is None) != verify for row in report.patched)
    for a, b in zip(after, before, strict=True):
        assert distance(a, b) <= 1e-5


def test_two_towers_that_differ_in_nothing_but_the_pairing():
    towers = [OWN_ROPE["eva02_tiny"].build(rope_rotate_half=half) for half in (False, True)]
    x = images()["x"]
    with torch.no_grad():
        before = [tower(x) for tower in towers]
        report = patch(nn.ModuleList(towers))
        after = [tower(x) for tower in towers]
    assert [row.convention for row in report.patched] == ["own RoPE (interleaved)"] * 2 + ["own RoPE (half)"] * 2
    for a, b in zip(after, before, strict=True):
        assert distance(a, b) <= 1e-5


@pytest.mark.parametrize("name", ["dinov3", "rope-vit axial", "eva02_tiny", "naflex, axial"])
def test_the_rotation_is_made_once_and_the_fused_projection_read_in_place(name, calls):
    case = CASES[name]
    model = case.build()
    patch(model)
    calls.clear()
    with torch.no_grad():
        case.outputs(model, case.inputs())
    assert len({id(args[3]) for args, _ in calls}) == 1 and calls[0][0][3] is not None
    for (q, k, v, _), _ in calls:
        assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()


def test_padding_reaches_the_kernel_as_lengths(calls):
    for name, key in (("axial", "seqlens"), ("axial, scattered", "cu_seqlens")):
        case = FLEX[name]
        model = case.build()
        patch(model)
        calls.clear()
        case.outputs(model, case.inputs())
        expected = [12, 6, 5] if key == "seqlens" else [0, 10, 17, 23]
        assert [kwargs[key].tolist() for _, kwargs in calls] == [expected] * 2


@pytest.mark.parametrize("name", ["eva02_tiny", "rope-vit mixed", "dinov3"])
def test_another_resolution_after_patching(name, calls):
    """set_input_size makes new tables; a dynamic size makes them in every forward."""
    case = OWN_ROPE[name]
    models = [case.build(), case.build()]
    patch(models[1])
    for side in ((2, 5), (4, 1), (HEIGHT, WIDTH)):
        x = images(*side)["x"]
        found = []
        for model in models:
            if name != "dinov3":
                model.set_input_size((8 * side[0], 8 * side[1]))
            with torch.no_grad():
                found.append(model(x))
        assert distance(found[1], found[0]) <= 1e-5


def test_calls_of_the_attention_alone(calls):
    """With no rope, with one, with one per head and per sample: rows of the rope are the last tokens."""
    for name in ("eva02_tiny", "rope-vit mixed", "dinov3"):
        case = OWN_ROPE[name]
        model = case.build()
        own = attentions(copy.deepcopy(model), case)[0]
        patch(model)
        fused = attentions(model, case)[0]
        tokens = own.num_prefix_tokens + 6
        x, angles = randn(2, tokens, HEADS * DIM), randn(2, HEADS, 6, DIM // 2, seed=4)
        double = angles.repeat(1, 1, 1, 2) if own.rotate_half else angles.repeat_interleave(2, dim=-1)
        rope = torch.cat([double.sin(), double.cos()], dim=-1)
        calls.clear()
        forms = [None, rope[0, 0], rope[0, :1], rope[0], rope[:, :1], rope]
        for given in forms:
            expected = own(x, rope=given)
            for found in (fused(x, rope=given), fused(x, given)):
                assert distance(found, expected) <= 1e-5
        assert len(calls) == 2 * len(forms) and not torch.allclose(fused(x), fused(x, rope))
