# SPDX-License-Identifier: Apache-2.0
"""Whole vision-language models: the vision tower inside is found and patched, the language model is left alone."""

from __future__ import annotations

import warnings

import pytest
import torch
from families import outputs
from test_families import assert_error_rule, run
from towers_without_rope import HOLDERS, MASKED

from spatial_pe import patch, unpatch

# The layers behind the tower amplify a rounding by a factor that is not the same for any two. So the measure is the
# larger error of two runs of the unpatched model, which differ by their roundings.
UNPATCHED = ("sdpa", "eager")
FACTOR = 2.0
HERE = [name for name, family in HOLDERS.items() if family.available()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", HERE)
def test_outputs_and_gradients_follow_the_error_rule(name, dtype, calls):
    family = HOLDERS[name]
    inputs = family.inputs()
    exact, exact_grads = run(family.make().double(), family, inputs, torch.float64)
    unpatched = [run(family.make(implementation=i).to(dtype), family, inputs, dtype) for i in UNPATCHED]
    model = family.make().to(dtype)
    report = patch(model)
    calls.clear()
    assert len(report.patched) == family.layers and {row.attention for row in report.patched} <= set(family.attention)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours, our_grads = run(model, family, inputs, dtype)
    assert len(calls) == family.layers
    for i, (mine, truth) in enumerate(zip(ours, exact, strict=True)):
        theirs = max((outs[i] for outs, _ in unpatched), key=lambda x, truth=truth: (x - truth).norm())
        assert_error_rule(mine, theirs, truth, dtype, f"output {i}", factor=FACTOR)
    floor = 0.03 * torch.stack([g.norm() for g in exact_grads.values()]).norm()
    for key, exact_grad in exact_grads.items():
        theirs = max((grads[key] for _, grads in unpatched), key=lambda x, truth=exact_grad: (x - truth).norm())
        assert_error_rule(our_grads[key], theirs, exact_grad, dtype, f"gradient of {key}", floor, FACTOR)


@pytest.mark.parametrize("name", [name for name in HERE if name != "mistral3"])
def test_rope_is_added_to_the_tower_and_starts_as_the_identity(name, calls):
    family = HOLDERS[name]
    plain, model, inputs = family.make(), family.make(), family.inputs()
    patch(plain)
    report = patch(model, rope="axial")
    calls.clear()
    expected, found = outputs(plain, inputs), outputs(model, inputs)
    assert len(calls) == 2 * family.layers
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    sum(x.float().square().sum() for x in found).backward()
    added = list(report.parameters())
    assert len(added) == family.layers and all(p.grad is not None and p.grad.any() for p in added)
    unpatch(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in family.make().modules()]


@pytest.mark.parametrize("name", [name for name, family in MASKED.items() if family.available()])
def test_a_tower_whose_mask_is_no_padding_keeps_its_own_attention(name, calls):
    """Mllama masks padding for padding only: real patches see it."""
    family = MASKED[name]
    model, inputs = family.make(), family.inputs()
    before = outputs(model, inputs)
    try:
        patch(model)
    except ValueError as nothing:
        assert "nothing to patch" in str(nothing)
        return
    calls.clear()
    with pytest.warns(UserWarning, match=r"attention_mask .*falling back to the original attention"):
        after = outputs(model, inputs)
    assert not calls and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
