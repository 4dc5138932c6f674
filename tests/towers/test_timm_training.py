# SPDX-License-Identifier: Apache-2.0
"""Training of patched timm models: drop path, dropout, checkpointing, autocast; copies and compiling."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from families import randn, to
from test_families import assert_error_rule, run
from timm_path import import_timm
from torch import Tensor, nn

from spatial_pe.towers import patch, unpatch

timm = import_timm()
from timm_cases import CASES, DIM, OWN_ROPE, PLAIN, distance, images, shaken  # noqa: E402


def trained(model: nn.Module, x: Tensor, seed: int = 5) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    found = model(x)
    (found * randn(*found.shape, seed=6)).sum().backward()
    return found.detach(), {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


RATES: dict[str, Any] = {"drop_rate": 0.2, "pos_drop_rate": 0.2, "proj_drop_rate": 0.3, "drop_path_rate": 0.3}


AUGMENTED: dict[str, Any] = {"rope_shift_coords": 0.5, "rope_jitter_coords": 1.5, "rope_rescale_coords": 2.0}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit", {}),
        ("vit", {"patch_drop_rate": 0.4}),
        ("eva02_clip, scale norm", {"patch_drop_rate": 0.4}),
        ("dinov3", {"patch_drop_rate": 0.4, **AUGMENTED}),
        ("rope-vit axial", AUGMENTED),
        ("rope-vit mixed", {"patch_drop_rate": 0.4, **AUGMENTED}),
    ],
)
def test_training_drops_what_it_drops_unpatched(name, options, calls):
    """The same seed, the same dropout after the projection, the same patches, paths and coordinates."""
    case = CASES[name]
    model = case.build(**RATES, **options).train()
    x = images()["x"]
    expected, other = trained(model, x), trained(model, x, seed=6)
    assert distance(other[0], expected[0]) > 1e-2
    patch(model)
    assert model.training
    calls.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = trained(model, x)
    assert len(calls) == case.layers
    assert distance(found[0], expected[0]) <= 1e-5
    everything = torch.stack([g.norm() for g in expected[1].values()]).norm()
    for key, gradient in expected[1].items():
        assert (found[1][key] - gradient).norm() <= 1e-5 * everything, key


@pytest.mark.parametrize("name", ["vit", "eva02_tiny", "dinov3", "rope-vit mixed"])
def test_attention_dropout_in_training_is_timms_own(name, calls):
    case = CASES[name]
    model, x = case.build(attn_drop_rate=0.4).train(), images()["x"]
    expected = trained(model, x)
    patch(model)
    calls.clear()
    with pytest.warns(UserWarning, match="attention dropout is active"):
        found = trained(model, x)
    assert not calls and torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][key], gradient) for key, gradient in expected[1].items())
    with torch.no_grad():
        model.eval()(x)
    assert len(calls) == case.layers


def test_attention_dropout_keeps_an_added_rope():
    """The model's own forward would leave the rotation out; drop none of the weights and only the rotation is left."""
    case = PLAIN["vit"]
    model, x = case.build(attn_drop_rate=1e-9), images()["x"]
    patch(model, rope="mixed", start="full")
    with torch.no_grad():
        expected = model(x)
        with pytest.warns(UserWarning, match="attention dropout is active"):
            found = model.train()(x)
    assert distance(found, expected) <= 1e-5


@pytest.mark.parametrize(
    ("name", "rope"),
    [("dinov3", None), ("rope-vit mixed", None), ("vit", None), ("vit", "axial"), ("vit", "mixed")],
)
def test_gradient_checkpointing(name, rope, calls):
    case = CASES[name]
    model, x = case.build().train(), images()["x"]
    patch(model, rope=rope, start="full")
    if rope:
        shaken(model, case)
    expected = trained(model, x)
    model.set_grad_checkpointing()
    calls.clear()
    found = trained(model, x)
    assert len(calls) == 2 * case.layers  # once more in backward
    assert torch.equal(found[0], expected[0]) and found[1].keys() == expected[1].keys()
    assert all(torch.equal(found[1][key], gradient) for key, gradient in expected[1].items())


@pytest.mark.parametrize("name", ["naflex, axial, tokens", "naflex, mixed"])
def test_gradient_checkpointing_of_padded_batches(name, calls):
    case = CASES[name]
    model = case.build()
    patch(model)
    expected = run(model, case, case.inputs(), torch.float32)
    model.set_grad_checkpointing()
    calls.clear()
    found = run(model, case, case.inputs(), torch.float32)
    assert len(calls) == 2 * case.layers
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))
    assert all(torch.equal(found[1][key], gradient) for key, gradient in expected[1].items())


@pytest.mark.parametrize(
    "name",
    ["vit", "vit, norms", "eva02_tiny", "eva02, qkv_bias_separate", "eva, qk_norm", "pe_core", "rope-vit mixed"],
)
def test_autocast(name, calls):
    """Attention runs in bfloat16, as timm's does: no tensor of its own precision is made on the way."""
    case = CASES[name]
    inputs = case.inputs()
    with torch.no_grad():
        exact = case.outputs(case.build().double(), to(inputs, torch.float64))
        model = case.build()
        with torch.autocast("cpu", torch.bfloat16):
            theirs = case.outputs(model, inputs)
            patch(model)
            calls.clear()
            ours = case.outputs(model, inputs)
    assert len(calls) == case.layers
    assert {args[2].dtype for args, _ in calls} == {torch.bfloat16}  # v, as it comes from the projection
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        assert_error_rule(a.double(), b.double(), c, torch.bfloat16, "output")


COPIED = [
    ("eva02_tiny", None),
    ("rope-vit mixed", None),
    ("naflex, axial, tokens", None),
    ("vit", "axial"),
    ("vit", "mixed"),
]


@pytest.mark.parametrize(("name", "rope"), COPIED)
@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_compute_the_same_and_share_nothing(name, rope, way, calls):
    case = CASES[name]
    model, inputs = case.build(), case.inputs()
    patch(model, rope=rope, start="full")
    with torch.no_grad():
        expected = case.outputs(model, inputs)
        again = way(model)
        for parameter in model.parameters():
            parameter.zero_()
        calls.clear()
        found = case.outputs(again, inputs)
    assert len(calls) == case.layers
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    unpatch(again)
    with torch.no_grad():
        plain = case.outputs(case.build(), inputs)
        assert all(torch.equal(a, b) for a, b in zip(case.outputs(again, inputs), plain, strict=True))


@pytest.mark.parametrize(
    ("name", "rope"), [("eva02_tiny", None), ("rope-vit mixed", None), ("vit, norms", None), ("vit", "mixed")]
)
def test_compiles_without_a_graph_break(name, rope):
    case = CASES[name]
    model, x = case.build(), images()["x"]
    patch(model, rope=rope, start="full")
    expected = trained(model, x)
    torch._dynamo.reset()
    found = trained(torch.compile(model, backend="eager", fullgraph=True), x)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    for key, gradient in expected[1].items():
        torch.testing.assert_close(found[1][f"_orig_mod.{key}"], gradient, rtol=1e-4, atol=1e-4 * float(gradient.max()))


def test_inference_mode_and_a_table_that_changes_in_place(calls):
    """The table of a fixed size is one buffer for all forwards: a Rotary made from it is made again when it changes."""
    case = OWN_ROPE["rope-vit axial"]
    models, x = [case.build(), case.build()], images()["x"]
    patch(models[1])
    for factor in (1.0, -1.0, 1.0):
        for model in models:
            model.rope.pos_embed[:, :DIM].mul_(factor)  # its sines
        for context in (torch.inference_mode, torch.no_grad):
            with context():
                expected, found = (model(x) for model in models)
            assert distance(found, expected) <= 1e-5
