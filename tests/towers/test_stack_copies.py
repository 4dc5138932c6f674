# SPDX-License-Identifier: Apache-2.0
"""Copies, casts, autocast, int8 and the model's own attention implementations."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from families import FAMILIES, outputs
from stack import SMALL, assert_rule, equal, shaken
from test_families import run
from torch import nn

from spatial_pe.towers import patch, unpatch


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("name", SMALL)
def test_copies_learn_the_same(name, way, calls):
    """The copy of a tower in training has the gradients of its own weights, and none of the original's."""
    family = FAMILIES[name]
    model, inputs = family.make(), family.inputs()
    patch(model)
    model.train()
    torch.manual_seed(1)
    expected = run(model, family, inputs, torch.float32)
    model.zero_grad(set_to_none=True)
    twin = way(model)
    assert all(m.training for m in twin.modules())
    calls.clear()
    torch.manual_seed(1)
    found = run(twin, family, inputs, torch.float32)
    assert len(calls) == family.layers
    assert equal(found[0], expected[0]) and found[1].keys() == expected[1].keys()
    assert all(torch.equal(found[1][key], gradient) for key, gradient in expected[1].items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", SMALL)
def test_a_tower_cast_after_patching(name, dtype, calls):
    """Proven in float32, then cast, as from_pretrained, patch, model.half() do; test_families patches what is cast."""
    family = FAMILIES[name]
    inputs, model = family.inputs(), family.make()
    patch(model)
    calls.clear()
    found = run(model.to(dtype), family, inputs, dtype)
    assert len(calls) == family.layers
    assert_rule(
        found,
        run(family.make().to(dtype), family, inputs, dtype),
        run(family.make().double(), family, inputs, torch.float64),
        dtype,
    )


@pytest.mark.parametrize("name", SMALL)
def test_autocast(name, calls):
    """Weights in float32, products in bfloat16: outputs and gradients as exact as those of the unpatched tower."""
    family = FAMILIES[name]
    inputs, model = family.inputs(), family.make()
    exact = run(family.make().double(), family, inputs, torch.float64)
    patch(model)
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        found = run(model, family, inputs, torch.float32)
        theirs = run(family.make(), family, inputs, torch.float32)
    assert {args[0].dtype for args, _ in calls} == {torch.bfloat16} and len(calls) == family.layers
    assert_rule(found, theirs, exact, torch.bfloat16)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_autocast_leaves_the_angles_alone(name, calls):
    """bfloat16 angles are wrong angles: the table of an added encoding is the same with and without autocast."""
    family = FAMILIES[name]
    inputs, model = family.inputs(), family.make()
    patch(model, rope="mixed")
    shaken(model)
    tables = []
    for enabled in (False, True):
        calls.clear()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs(model, inputs)
        tables.append([args[3].cos for args, _ in calls])
    assert equal(*tables) and tables[0][0].dtype == torch.float32


@pytest.mark.skipif(torch.backends.quantized.engine == "none", reason="torch was built without quantized kernels")
@pytest.mark.parametrize("order", ["patched then quantized", "quantized then patched"])
@pytest.mark.parametrize("name", ["clip", "qwen2_5_vl"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_projections_in_int8(name, order, calls):
    """A quantized projection has no parameters: nothing to read a dtype from, and nothing that we have to."""
    family = FAMILIES[name]
    inputs = family.inputs()

    def quantized(model):
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)

    if order == "patched then quantized":
        model = family.make()
        patch(model)
        model = quantized(model)
    else:
        model = quantized(family.make())
        patch(model)
    calls.clear()
    with torch.no_grad():
        found, expected = outputs(model, inputs), outputs(quantized(family.make()), inputs)
    assert len(calls) == family.layers
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() < b.norm() / 127  # a rounding to int8 may fall to the other side


@pytest.mark.parametrize("order", ["set then patched", "patched then set"])
@pytest.mark.parametrize("name", SMALL)
def test_set_attn_implementation(name, order, calls):
    """Which attention the model would run without us: kept for unpatch, and no matter while it is patched."""
    family = FAMILIES[name]
    inputs = family.inputs()
    with torch.no_grad():
        theirs = {how: outputs(family.make(implementation=how), inputs) for how in ("eager", "sdpa")}
        fused = family.make()
        patch(fused)
        ours = outputs(fused, inputs)
        for how, before in (("eager", "sdpa"), ("sdpa", "eager")):
            model = family.make(implementation=before)
            steps = [lambda model=model, how=how: model.set_attn_implementation(how), lambda model=model: patch(model)]
            for step in steps if order == "set then patched" else reversed(steps):
                step()
            calls.clear()
            assert equal(outputs(model, inputs), ours) and len(calls) == family.layers
            assert model.config._attn_implementation == how
            unpatch(model)
            assert equal(outputs(model, inputs), theirs[how])


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in SMALL[1:]] + [(name, {"rope": "mixed"}) for name in ("clip", "siglip")],
)
def test_output_attentions_warns_once(name, options, calls):
    """A fallback costs what the patch was for, so it says so: once, not in each layer of each call."""
    family = FAMILIES[name]
    model, inputs = family.make(implementation="eager"), family.inputs()
    patch(model, **options)
    calls.clear()
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert len(model(**inputs, output_attentions=True).attentions) == family.layers
    assert not calls
    assert len([w for w in caught if w.category is UserWarning and "attention" in str(w.message)]) == 1
    outputs(model, inputs)
    assert len(calls) == family.layers
