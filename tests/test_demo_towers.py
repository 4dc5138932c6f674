# SPDX-License-Identifier: Apache-2.0
"""The demo's towers that rotate: what they are, what is measured of them, and what a rotation does to a score."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from demo_parts import row, small_cases

import spatial_pe
from spatial_pe._utils.errors import UserError
from spatial_pe.lab import random_towers
from spatial_pe.lab.demo import measure, scores, towers

# hidden size, heads, MLP of the published checkpoints
WIDTHS = {"Qwen2.5-VL": (1280, 16, 3420), "Pixtral": (1024, 16, 4096), "DINOv3-L": (1024, 16, 4096)}


@pytest.mark.parametrize("case", towers.CASES, ids=lambda case: case.name)
def test_towers_have_their_real_widths_and_the_tokens_that_are_said(case):
    block = 28 if case.name == "Qwen2.5-VL" else 16
    small = tuple((height // 4 // block * block, width // 3 // block * block) for height, width in case.sizes)
    module, forward = case.build(1, small)
    config = module.config
    heads = getattr(config, "num_heads", None) or config.num_attention_heads
    assert (config.hidden_size, heads, config.intermediate_size) == WIDTHS[case.name]
    seen = []
    (attention,) = [m for m in module.modules() if type(m).__name__.endswith("Attention")]
    attention.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).shape), with_kwargs=True
    )
    with torch.inference_mode():
        forward(module, torch.float32)
    assert np.prod(seen[0][:-1]) == random_towers.tokens(module, small) > 10


def test_what_is_measured_of_towers(monkeypatch):
    monkeypatch.setattr(towers, "CASES", small_cases())
    rows = towers.compare(0.0)
    assert [row.name for row in rows] == ["Qwen", "Pixtral", "DINOv3"]
    for made in rows:
        assert made.within_rounding and made.error.relative < 1e-5 and made.error.cosine_min > 0.9999
        assert len(made.timing.before) == len(made.timing.after) == measure.FEWEST_PAIRS
        assert made.layer.kernels[1] < made.layer.kernels[0] and made.layer.peak[1] < made.layer.peak[0]


def test_a_patch_that_changes_a_tower_is_seen(monkeypatch):
    """Wrong angles in one layer of two, where scores are as large as they are after a training."""
    patch, (case,) = spatial_pe.towers.patch, small_cases()[1:2]

    def loud(layers, sizes):
        module, forward = case.build(layers, sizes)
        for name, weight in module.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.data *= 10
        return module, forward

    def wrong(module):
        report = patch(module)
        attention = next(m for m in module.modules() if type(m).__name__.endswith("PixtralAttention"))

        def turn(module, args, kwargs):
            return args, kwargs | {"position_embeddings": tuple(x.flip(-2) for x in kwargs["position_embeddings"])}

        attention.register_forward_pre_hook(turn, with_kwargs=True)
        return report

    monkeypatch.setattr(spatial_pe.towers, "patch", wrong)
    monkeypatch.setattr(towers, "CASES", [replace(case, build=loud)])
    (made,) = towers.compare(0.0)
    assert not made.within_rounding
    monkeypatch.setattr(spatial_pe.towers, "patch", patch)
    (made,) = towers.compare(0.0)
    assert made.within_rounding


@pytest.mark.parametrize(("raised", "expected"), [(ValueError, UserError), (RuntimeError, towers.ResultError)])
def test_a_tower_that_cannot_be_patched_is_named(raised, expected, monkeypatch):
    def fails(module):
        raise raised("no")

    monkeypatch.setattr(spatial_pe.towers, "patch", fails)
    monkeypatch.setattr(towers, "CASES", small_cases()[2:])
    with pytest.raises(expected, match="DINOv3: no"):
        towers.compare(0.0)


def test_a_noisy_tower_has_no_verdict():
    timing = measure.Timing([0.5, 1.0, 1.6, 2.0], [1.0] * 4)
    noisy = measure.TowerRow(
        "Pixtral", "images", 2, 4, 1100, row().error, timing, measure.Layer((15, 5), (2**21, 2**20))
    )
    quiet = replace(noisy, name="Qwen", timing=measure.Timing([1.3] * 4, [1.0] * 4))
    assert noisy.as_json()["too_noisy"] and not quiet.as_json()["too_noisy"]
    text = measure.table([row()], "DO THIS", [noisy, quiet])
    assert "Pixtral: between 0.50 and 2.00 times as fast. DO THIS." in text and "1.30x" in text
    assert text.count("15 -> 5 kernels, 2.0 -> 1.0 MiB") == 2
    assert "nois" not in measure.table([row()], "DO THIS", [quiet])


# -------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("name", ["axial", "flattened"])
def test_scores_are_the_mean_over_directions(name, monkeypatch):
    rotaries = []
    original = scores.score_by_offset
    monkeypatch.setattr(
        scores, "score_by_offset", lambda rotary, side: rotaries.append(rotary) or original(rotary, side)
    )
    found = getattr(scores, name)(7)
    q = torch.randn(20000, scores.HEAD_DIM, generator=torch.Generator().manual_seed(0))
    q = (q / q.norm(dim=-1, keepdim=True))[:, None, None].expand(-1, 49, 1, -1)
    turned = spatial_pe.apply_rotary(q, rotaries[0])[:, :, 0]
    mean = torch.einsum("bnd,bd->bn", turned, turned[:, 24]).mean(0).view(7, 7)
    torch.testing.assert_close(found, mean, atol=0.005, rtol=0)
    assert found[3, 3] == pytest.approx(1)


def test_two_dimensions_fall_alike_and_one_sees_rows_as_stripes():
    two, one = scores.axial(), scores.flattened()
    middle = scores.SIDE // 2
    torch.testing.assert_close(two, two.T)
    torch.testing.assert_close(two, two.flip(0))
    assert two[middle + 1, middle] == pytest.approx(two[middle, middle + 1].item()) and two[middle + 1, middle] > 0.9
    assert one[middle, middle + 1] > 0.9 and one[middle + 1, middle] < 0.2
    # of the list only the distance in it counts, 17 to the begin of the next row as to the end of the one before
    assert one[middle + 1, 0] == pytest.approx(one[middle - 1, -1].item())
