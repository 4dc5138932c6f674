# SPDX-License-Identifier: Apache-2.0
"""Public packages beyond transformers and timm, patched against unpatched. ``make models``."""

from __future__ import annotations

import collections
import warnings

import pytest
import torch
from packages import PACKAGES, on_the_path
from test_families import assert_error_rule

from spatial_pe.towers import fused_attention, patch, unpatch

on_the_path()


@pytest.fixture(autouse=True)
def one_thread():
    fused_attention._warned.clear()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(package, model, dtype):
    model.zero_grad(set_to_none=True)
    if not package.gradients:
        with torch.no_grad():
            return [x.double() for x in package.outputs(model, dtype)], {}
    found = package.outputs(model, dtype)
    generator = torch.Generator().manual_seed(7)
    loss = sum((x * torch.randn(x.shape, generator=generator).to(x.dtype)).sum() for x in found)
    loss.backward()
    grads = {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}
    return [x.detach().double() for x in found], grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", PACKAGES)
def test_outputs_and_gradients_follow_the_error_rule(name, dtype):
    package = PACKAGES[name]
    exact, exact_grads = run(package, package.make().double(), torch.float64)
    model = package.make().to(dtype)
    theirs, their_grads = run(package, model, dtype)
    keys = list(model.state_dict())
    report = patch(model)
    print(f"\n{package.name} {package.version}\n{report}")
    assert collections.Counter(row.attention for row in report.patched) == package.patched, report
    assert all(row.error is not None for row in report.patched)
    assert list(model.state_dict()) == keys
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*falling back.*")
        ours, our_grads = run(package, model, dtype)
    for i, triple in enumerate(zip(ours, theirs, exact, strict=True)):
        assert_error_rule(*triple, dtype, f"output {i}")
    assert our_grads.keys() == exact_grads.keys()
    floor = 0.05 * sum(g.norm() ** 2 for g in exact_grads.values()) ** 0.5
    for key, exact_grad in exact_grads.items():
        assert_error_rule(our_grads[key], their_grads[key], exact_grad, dtype, f"gradient of {key}", floor)


@pytest.mark.parametrize("name", PACKAGES)
def test_unpatched_is_what_it_was_bit_for_bit(name):
    package = PACKAGES[name]
    model = package.make()
    classes = [type(m) for m in model.modules()]
    with torch.no_grad():
        before = package.outputs(model, torch.float32)
        patch(model)
        package.outputs(model, torch.float32)
        unpatch(model)
        after = package.outputs(model, torch.float32)
    assert [type(m) for m in model.modules()] == classes
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", [name for name, package in PACKAGES.items() if package.added])
def test_rope_is_added(name):
    package = PACKAGES[name]
    model = package.make()
    with torch.no_grad():
        (before, *_) = package.outputs(model, torch.float32)
        report = patch(model, rope="axial")
        (identity, *_) = package.outputs(model, torch.float32)
        assert (identity - before).norm() < 1e-5 * before.norm()
        for parameter in report.parameters():
            parameter.fill_(0.5)
        (on, *_) = package.outputs(model, torch.float32)
    assert (on - before).norm() > 1e-3 * before.norm()
    assert set(report.strength().values()) == {0.5}
