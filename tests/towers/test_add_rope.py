# SPDX-License-Identifier: Apache-2.0
"""Adding a 2D RoPE to towers that have none."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from added_rope import POSITION, encodings, forward_on, hidden, shaken
from families import FAMILIES, GRIDS, TOKENS_AROUND, outputs, randn, to
from torch import nn

from spatial_pe import AxialRoPE, MixedRoPE
from spatial_pe.towers import patch, unpatch
from spatial_pe.towers.config_entry import MARK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["auto", "composed", "reference"])
@pytest.mark.parametrize("rope", ["axial", "mixed"])
@pytest.mark.parametrize("name", GRIDS)
def test_identity_start_is_exact_and_learns(name, rope, backend, dtype):
    """To the last bit what the backend computes without RoPE: cos = 1 and sin = 0 change neither value nor order."""
    family = FAMILIES[name]
    plain, model = family.make().to(dtype), family.make().to(dtype)
    inputs = to(family.inputs(), dtype)
    patch(plain, backend=backend)
    report = patch(model, rope=rope, backend=backend)
    assert len(report.patched) == family.layers and all(rope in row.convention for row in report.patched)
    expected, found = family.outputs(plain, inputs), family.outputs(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    learn(report, plain, model, expected, found)


def learn(report, plain, model, expected, found):
    """Each encoding gets a gradient, and the rest of the model the one that it had."""
    for result in (expected, found):
        sum(x.square().sum() for x in result).backward()
    added = list(report.parameters())
    assert len(added) == len(report.patched)  # one parameter per layer: strength, or frequencies
    for parameter in added:
        assert parameter.grad is not None and parameter.grad.abs().max() > 0
    everything = torch.stack([p.grad.norm() for p in plain.parameters() if p.grad is not None]).norm()
    for key, parameter in plain.named_parameters():
        if parameter.grad is not None:
            assert (parameter.grad - model.get_parameter(key).grad).norm() < 1e-5 * everything, key


@pytest.mark.parametrize("rope", ["axial", "mixed"])
def test_a_training_step_moves_the_encoding_and_the_output(rope):
    family = FAMILIES["dinov2"]
    model, inputs = family.make(), family.inputs()
    report = patch(model, rope=rope)
    target = randn(*hidden(model, inputs).shape, seed=9)
    optimizer = torch.optim.SGD(report.parameters(), lr=1e-3)
    before, start = [p.detach().clone() for p in report.parameters()], (hidden(model, inputs) - target).square().mean()
    for _ in range(5):
        optimizer.zero_grad()
        loss = (hidden(model, inputs) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, report.parameters(), strict=True))
    assert (hidden(model, inputs) - target).square().mean() < start
    named = dict(model.named_parameters())
    assert {id(p) for p in report.parameters()} <= {id(p) for p in named.values()}


def coordinates(name, inputs):
    """(B|1, N, 2): row and column of each token, and (B|1, N): which are rotated."""
    before, after = TOKENS_AROUND[name]
    if "spatial_shapes" in inputs:
        tokens = inputs["pixel_values"].shape[1]
        shapes = inputs["spatial_shapes"].tolist()
        places = [[(i // w, i % w) if i < h * w else (0, 0) for i in range(tokens)] for h, w in shapes]
        return torch.tensor(places), torch.ones(len(shapes), tokens, dtype=torch.bool)
    height, width = (side // 8 for side in inputs["pixel_values"].shape[2:])
    places = [(0, 0)] * before + [(i, j) for i in range(height) for j in range(width)] + [(0, 0)] * after
    rotated = torch.ones(1, len(places), dtype=torch.bool)
    rotated[:, :before] = False
    rotated[:, before + height * width :] = False
    return torch.tensor(places)[None], rotated


def by_hand(model, name, inputs):
    """The unpatched model, q and k of every layer rotated by a rotation written out here, between its own projections.

    Axial: channels j and j + D/2 are a pair; the first D/4 pairs rotate with the row, the others with the column, at
    10000^(-i / (D/4)) radians per patch.
    """
    family = FAMILIES[name]
    places, rotated = coordinates(name, inputs)
    dim = family.options["hidden_size"] // family.options["num_attention_heads"]
    ladder = 10000.0 ** (-torch.arange(dim // 4) / (dim // 4))
    angles = torch.cat([places[..., :1] * ladder, places[..., 1:] * ladder], dim=-1) * rotated[..., None]
    rotation = torch.polar(torch.ones_like(angles), angles)[:, :, None]  # (B|1, N, 1, D/2) complex

    def rotate(module, args, output):
        heads = output.unflatten(-1, (-1, dim))
        pairs = torch.complex(*heads.chunk(2, dim=-1)) * rotation
        return torch.cat([pairs.real, pairs.imag], dim=-1).flatten(-2)

    for module in model.modules():
        for names in (("q_proj", "k_proj"), ("query", "key")):
            if not all(isinstance(getattr(module, name, None), nn.Module) for name in names):
                continue  # a pooling head has keys, but no queries
            for name in names:
                norm = getattr(module, f"{name[0]}_norm", nn.Identity())  # which comes after its projection
                last = getattr(module, name) if isinstance(norm, nn.Identity) else norm
                last.register_forward_hook(rotate)
    return family.outputs(model, inputs)


@pytest.mark.parametrize("name", GRIDS)
def test_full_start_is_the_rotation_written_by_hand(name):
    family = FAMILIES[name]
    inputs = family.inputs()
    model = family.make()
    report = patch(model, rope="axial", start="full")
    assert list(report.parameters()) == [] and len(report.patched) == family.layers
    expected = by_hand(family.make(), name, inputs)
    plain = family.outputs(family.make(), inputs)
    for ours, theirs, without in zip(family.outputs(model, inputs), expected, plain, strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()
        assert (ours - without).norm() > 1e-2 * theirs.norm()  # the rotation does something


@pytest.mark.parametrize("sides", [(32, 32), (48, 16), (16, 48), (8, 64)])
def test_any_resolution(sides):
    family = FAMILIES["dinov2"]
    inputs = {"pixel_values": randn(1, 3, *sides)}
    model = family.make()
    patch(model, rope="axial", start="full")
    hidden(model, family.inputs())  # another resolution before
    expected = by_hand(family.make(), "dinov2", inputs)
    assert (hidden(model, inputs) - expected[0]).norm() < 1e-5 * expected[0].norm()


def test_mixed_full_start_is_random_and_differs_by_layer():
    model = FAMILIES["vit"].make()
    report = patch(model, rope="mixed", start="full")
    first, second = report.parameters()
    assert first.abs().max() > 0 and not torch.equal(first, second)


def test_a_module_is_copied_for_each_layer_and_left_alone():
    rope = MixedRoPE(24, 2)
    model = FAMILIES["clip"].make()
    report = patch(model, rope=rope, start="full")
    layers = encodings(model)
    assert len(layers) == 2 and rope not in layers and layers[0] is not layers[1]
    assert all(torch.equal(layer.frequencies, rope.frequencies) for layer in layers)
    assert {id(p) for p in report.parameters()} == {id(layer.frequencies) for layer in layers}
    patch(model, rope=rope, start="full")  # the same again: harmless
    with pytest.raises(ValueError, match="already patched with rope=MixedRoPE"):
        patch(model, rope=MixedRoPE(24, 2), start="full")


def test_an_encoding_without_parameters_is_shared_and_its_table_made_once(calls):
    model = FAMILIES["clip"].make()
    patch(model, rope=AxialRoPE(24, theta=100.0), start="full")
    first, second = encodings(model)
    assert first is second
    calls.clear()
    outputs(model, FAMILIES["clip"].inputs())
    assert calls[0][0][3] is calls[1][0][3]
    grids = next(m._spatial_pe.grids for m in model.modules() if getattr(m, "rope", None) is first)
    assert grids.kept is not None and copy.deepcopy(grids).kept is None
    assert [key.rpartition(".")[2] for key in model.state_dict() if "rope" in key] == [MARK] * 2


def test_identity_start_refuses_a_module_that_rotates():
    model = FAMILIES["clip"].make()
    with pytest.raises(ValueError, match='start="identity" needs an encoding that is the identity at initialisation'):
        patch(model, rope=AxialRoPE(24))
    patch(model, rope=AxialRoPE(24, strength=0.0))


@pytest.mark.parametrize("name", GRIDS)
def test_keep_absolute(name):
    family = FAMILIES[name]
    model, inputs = family.make(), family.inputs()
    before = outputs(model, inputs)
    keys = [k for k, _ in model.named_parameters() if k.endswith(POSITION)]
    if not keys:
        with pytest.raises(ValueError, match="has no absolute position embedding"):
            patch(model, rope="axial", keep_absolute=False)
        return
    parameters = [model.get_parameter(key) for key in keys]
    values = [parameter.detach().clone() for parameter in parameters]
    patch(model, rope="axial", start="full", keep_absolute=False)
    assert not any(parameter.any() or parameter.requires_grad for parameter in parameters)
    without = family.make()
    for key in keys:
        without.get_parameter(key).data.zero_()
    patch(without, rope="axial", start="full")
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, inputs), outputs(without, inputs), strict=True))
    unpatch(model)
    for parameter, value in zip(parameters, values, strict=True):
        assert torch.equal(parameter, value) and parameter.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(model, inputs), strict=True))


@pytest.mark.parametrize("rope", ["axial", "mixed"])
@pytest.mark.parametrize("name", ["clip", "dinov2_with_registers"])
def test_the_state_dict_carries_the_encoding(name, rope):
    family = FAMILIES[name]
    inputs = family.inputs()
    model = family.make()
    plain = set(model.state_dict())
    patch(model, rope=rope)
    shaken(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = family.make(seed=4)
    patch(again, rope=rope)
    again.load_state_dict(torch.load(file))
    assert len(set(model.state_dict()) - plain) == 2 * family.layers  # the parameter, and the mark
    expected = outputs(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(expected, outputs(again, inputs), strict=True))
    unpatched = outputs(family.make(), inputs)
    assert not torch.equal(expected[0], unpatched[0])
    unpatch(model)
    assert set(model.state_dict()) == plain
    assert all(torch.equal(a, b) for a, b in zip(unpatched, outputs(model, inputs), strict=True))


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("way", [copy.deepcopy, pickled])
def test_a_copy_has_its_own_encoding_and_grid(way):
    family = FAMILIES["dinov2"]
    model = family.make()
    patch(model, rope="mixed", keep_absolute=False)
    shaken(model)
    twin = way(model)
    wide, tall = {"pixel_values": randn(1, 3, 16, 32)}, {"pixel_values": randn(1, 3, 32, 16)}
    expected = hidden(model, wide)
    hidden(twin, tall)  # as many patches, another shape, in the other model
    assert torch.equal(hidden(twin, wide), expected)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    unpatch(twin)
    assert torch.equal(hidden(twin, wide), hidden(family.make(), wide))


@pytest.mark.parametrize("name", ["clip", "dinov2", "siglip"])
def test_attention_weights_are_those_of_the_rotated_attention(name, calls):
    family = FAMILIES[name]
    model, inputs = family.make(implementation="eager"), family.inputs()
    patch(model, rope="mixed")
    expected = hidden(shaken(model), inputs)
    calls.clear()
    found = model(**inputs, output_attentions=True)
    assert not calls and len(found.attentions) == family.layers
    assert (found.last_hidden_state - expected).norm() < 1e-5 * expected.norm()
    torch.testing.assert_close(found.attentions[0].sum(-1), torch.ones_like(found.attentions[0][..., 0]))


def test_masks_and_dropout_act_on_the_rotated_attention():
    family = FAMILIES["vit"]
    model = family.make(attention_probs_dropout_prob=0.5)
    patch(model, rope="mixed")
    shaken(model)
    inputs = family.inputs()
    hidden(model, inputs)
    module = next(m for m in model.modules() if getattr(m, "rope", None) is not None)
    x = randn(2, 17, 48)
    with forward_on(module, (4, 4)):
        expected = module(x)[0]
        module.train()
        assert not torch.equal(module(x)[0], module(x)[0])  # dropout acts
        samples = torch.stack([module(x)[0] for _ in range(300)]).mean(0)
        assert (samples - expected).norm() < 0.15 * expected.norm()  # and has the rotated attention as its mean
        if "attention_mask" in module.arguments:
            module.eval()
            mask = torch.zeros(1, 1, 17, 17)
            assert (module(x, mask)[0] - expected).norm() < 1e-5 * expected.norm()
            mask[..., 1:] = torch.finfo(torch.float32).min  # every token sees CLS alone
            alone = module(x, mask)[0]
            torch.testing.assert_close(alone, alone[:, :1].expand_as(alone))


@pytest.mark.parametrize(
    ("rope", "start", "expected"),
    [("axial", "identity", 0.0), ("axial", "full", 1.0), ("mixed", "identity", 0.0), ("mixed", "full", 1.0)],
)
def test_the_report_says_how_far_the_encoding_is_on(rope, start, expected):
    model = FAMILIES["clip"].make()
    report = patch(model, rope=rope, start=start)
    strength = report.strength()
    assert list(strength) == [row.name for row in report.patched]
    assert list(strength.values()) == pytest.approx([expected] * 2, abs=1e-6)
    with torch.no_grad():
        for parameter in list(report.parameters())[:1]:
            parameter.fill_(0.5)
    if rope == "axial" and start == "identity":
        assert list(report.strength().values()) == pytest.approx([0.5, 0.0])
    assert patch(FAMILIES["dinov3"].make()).strength() == {}


def test_parameter_groups():
    model, head = FAMILIES["clip"].make(), torch.nn.Linear(2, 2)
    report = patch(model, rope="axial")
    next(model.parameters()).requires_grad_(False)
    others, rope = report.parameter_groups(torch.nn.ModuleList([model, head]), rope_lr=0.1)
    assert rope["lr"] == 0.1 and rope["weight_decay"] == 0.0 and len(rope["params"]) == 2
    trained = [p for p in [*model.parameters(), *head.parameters()] if p.requires_grad]
    assert {id(p) for p in others["params"] + rope["params"]} == {id(p) for p in trained}
    assert len(others["params"]) + 2 == len(trained)
    with pytest.raises(ValueError, match="model does not hold the encodings"):
        report.parameter_groups(FAMILIES["clip"].make())
    optimizer = torch.optim.AdamW([others, rope], lr=1e-5)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-5, 0.1]
