# SPDX-License-Identifier: Apache-2.0
"""Pretrained towers in the study: what the variants change, what is moved and put back, what layers tell."""

from __future__ import annotations

import json

import pytest
import torch

from spatial_pe import cli
from spatial_pe.lab.study import pretrained
from spatial_pe.lab.study.pretrained import GRID, VARIANTS, PretrainedRecipe
from spatial_pe.towers.fused_attention import FusedAttention

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A DINOv2 of random weights, whose positions matter as much as its patches do."""
    path = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=112,
        patch_size=14,
        layerscale_value=1.0,
        initializer_range=0.3,  # attention that is not even, so that rotating it shows
    )
    model = transformers.Dinov2Model(config)
    torch.nn.init.normal_(model.embeddings.position_embeddings, std=0.5)
    model.save_pretrained(path)
    return str(path)


@pytest.fixture
def pictures():
    """Of patches of one colour each: what a patch looks like does not change when a picture is transformed."""
    colours = torch.rand(2, 3, GRID, GRID, generator=torch.Generator().manual_seed(0)) * 4 - 1
    return colours.repeat_interleave(14, -1).repeat_interleave(14, -2)


def features(folder, variant, pictures):
    with torch.no_grad():
        return pretrained._tower(folder, variant, CPU)(pictures)


def test_what_each_variant_changes_before_training(folder, pictures):
    found = {name: features(folder, name, pictures) for name in VARIANTS}
    scale = found["as-is"].norm()
    away = {name: ((value - found["as-is"]).norm() / scale).item() for name, value in found.items()}
    assert found["as-is"].shape == (2, GRID * GRID, 32)
    assert away["identity"] < 1e-5
    assert all(away[name] > 0.01 for name in ("full", "replaced", "authors"))
    assert ((found["full"] - found["replaced"]).norm() / scale) > 0.01


@pytest.mark.parametrize("variant", VARIANTS)
def test_at_one_position_a_tower_is_blind_to_order_and_then_is_as_before(folder, pictures, variant):
    tower = pretrained._tower(folder, variant, CPU)
    for module in tower.modules():  # an encoding that starts as the identity must rotate, to be seen
        strength = getattr(getattr(module, "rope", None), "strength", None)
        if isinstance(module, FusedAttention) and strength is not None:
            torch.nn.init.ones_(strength)
    order = torch.randperm(GRID * GRID, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = tower(pictures)
        seen = tower(pretrained.moved(pictures, order))
        with pretrained.constant(tower):
            plain, shuffled = tower(pictures), tower(pretrained.moved(pictures, order))
        after = tower(pictures)
    torch.testing.assert_close(shuffled, plain[:, order], atol=1e-4, rtol=1e-4)
    assert (seen - before[:, order]).norm() > 0.01 * before.norm()
    assert torch.equal(before, after)


def test_shuffled_patches_are_elsewhere(folder, pictures):
    order = torch.randperm(GRID * GRID)
    patches = lambda x: x.unfold(2, 14, 14).unfold(3, 14, 14).flatten(2, 3).transpose(1, 2)  # noqa: E731
    assert torch.equal(patches(pretrained.moved(pictures, order)), patches(pictures)[:, order])
    tower = pretrained._tower(folder, "as-is", CPU)
    with torch.no_grad():
        plain = tower(pictures)
        with pretrained.shuffled(tower, 0):
            assert not torch.allclose(tower(pictures), plain, atol=1e-3)
        assert torch.equal(tower(pictures), plain)


def test_layers_tell_positions(folder, pictures):
    """Turning the picture changes nothing where a tower has no positions; and has, where it has some."""
    tower = pretrained._tower(folder, "as-is", CPU)
    found = pretrained.layers(tower, pictures)
    assert {len(row) for row in found.values()} == {4}
    assert all(max(found[transform]) < 0.999 for transform in pretrained.TRANSFORMS)
    with pretrained.constant(tower):
        blind = pretrained.layers(tower, pictures)
    for transform in pretrained.TRANSFORMS:
        # the patch at the same place shows another colour: only the inverse transform makes them equal
        assert min(blind[transform]) > 0.999, transform
    with torch.no_grad(), pretrained.constant(tower):
        assert pretrained._hidden(tower, pictures)[-1].shape == (2, GRID, GRID, 32)


def test_neighbours_alike_are_coherent(folder):
    """A picture that changes slowly from place to place, in a tower without positions."""
    ramp = torch.linspace(-1, 3, GRID)
    smooth = torch.stack([ramp[:, None].expand(GRID, GRID), ramp[None].expand(GRID, GRID), 0 * ramp.outer(ramp)])
    noisy = smooth.flatten(1)[:, torch.randperm(GRID * GRID, generator=torch.Generator().manual_seed(2))]
    tower = pretrained._tower(folder, "as-is", CPU)
    with pretrained.constant(tower):
        rows = [
            pretrained.layers(tower, x.reshape(1, 3, GRID, GRID).repeat_interleave(14, -1).repeat_interleave(14, -2))
            for x in (smooth, noisy)
        ]
    assert rows[0]["coherence"][-1] > rows[1]["coherence"][-1] + 0.05


@pytest.mark.parametrize("tuned", [0, 2])
def test_a_run(folder, tuned):
    recipe = PretrainedRecipe("attentive", 3, 40, 40, tuned, checkpoint=folder)
    pretrained._features.cache_clear()
    found = recipe.run("identity", 0)
    assert set(found["counterfactual"]) == {"shuffled", "constant"}
    assert len(found["loss"]) == (2 if tuned else 1)
    assert set(found["consistency"]) == {"hflip", "vflip", "rot90"}
    assert {*found["domains"]} == {"digits", "photographs"}
    again = recipe.run("identity", 0)
    assert {**again, "seconds": 0} == {**found, "seconds": 0}


def test_a_frozen_tower_with_identity_start_answers_as_it_did(folder):
    """The claim of the identity start, through the whole run: not one answer differs."""
    recipe = PretrainedRecipe("linear", 3, 40, 40, checkpoint=folder)
    plain, added = recipe.run("as-is", 0), recipe.run("identity", 0)
    assert plain["accuracy"] == added["accuracy"]
    assert plain["loss"] == pytest.approx(added["loss"], rel=1e-3)


def test_a_probe_learns_from_features(folder):
    """That training does something: on the training scenes themselves, loss goes down."""
    recipe = PretrainedRecipe("attentive", 61, 40, 40, checkpoint=folder, warmup=5)
    losses = recipe.run("as-is", 0)["loss"]
    assert losses[-1] < 0.8 * losses[0]


def test_the_study_of_ones_own_tower(folder, tmp_path, capsys):
    out = tmp_path / "own.json"
    command = ["spatial", "run", "--study", "pretrained", "--budget", "smoke", "--model", folder, "--seeds", "2"]
    assert cli.main([*command, "--encodings", "as-is,full", "--jobs", "1", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "as it is" in said and "shuffled" in said
    assert json.loads(out.read_text())["recipes"]["fine-tuned"]["checkpoint"] == folder
    assert cli.main(["spatial", "report", str(out), "--out", str(tmp_path / "own.html")]) == 0
    html = (tmp_path / "own.html").read_text(encoding="utf-8")
    assert "By layer" in html and "at one position" in html


def test_a_tower_of_another_size_is_refused(tmp_path, capsys):
    path = tmp_path / "vit"
    config = transformers.ViTMAEConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    transformers.ViTMAEModel(config).save_pretrained(path)
    command = ["spatial", "run", "--study", "pretrained", "--model", str(path), "--out", str(tmp_path / "a.json")]
    assert cli.main(command) == 2
    assert "does not take pictures of 128 px" in capsys.readouterr().err
