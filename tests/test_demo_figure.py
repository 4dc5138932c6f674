# SPDX-License-Identifier: Apache-2.0
"""The demo's picture, read back from its pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from demo_parts import cells, panels, row
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from spatial_pe.lab.checkpoints import assets
from spatial_pe.lab.demo import figure, measure, scores


def test_equal_features_have_equal_colours_and_others_do_not():
    before = torch.randn(8, 8, 12)
    a, b = figure.principal_colours(before, before.clone())
    assert torch.equal(a, b)
    assert a.shape == (8, 8, 3)
    assert 0 <= a.min() < 0.1 and 0.9 < a.max() <= 1
    # a scaled and shifted tower has the same principal components once they are refitted: here it must look different
    _, c = figure.principal_colours(before, 3 * before + 1)
    assert (a - c).abs().mean() > 0.1


def test_colours_are_the_principal_components():
    before = torch.zeros(1, 64, 5)
    before[..., 1] = torch.linspace(-5, 5, 64)
    before[..., 3] = torch.linspace(-5, 5, 64).roll(32) * 0.3
    red = figure.principal_colours(before, before)[0][0, :, 0]
    expected = torch.linspace(0, 1, 64).double()
    assert min((red - expected).abs().max(), (red - expected.flip(0)).abs().max()) < 0.05


def drawn(path: Path, pictures: figure.Pictures, rows: list[measure.Row], towers=()) -> np.ndarray:
    figure.draw(path, "A title", "a subtitle", pictures, rows, towers)
    return imread(path)[..., :3]


def test_picture_shows_photographs_features_and_differences(tmp_path):
    torch.manual_seed(0)
    photos = torch.stack([assets.photo(name, 128) for name in ("chelsea", "rocket")])
    before = torch.randn(2, 8, 8, 16)
    after = before.clone()
    after[1, 2, 3] *= -1  # one patch of the second photograph
    pictures = figure.Pictures(photos, before, after, 128, "fp32")
    image = drawn(tmp_path / "a.png", pictures, [row(), row("bf16")])
    first, second = panels(image, lines=2)
    for line, photo in ((first, photos[0]), (second, photos[1])):
        assert np.abs(line[0].mean((0, 1)) - photo.mean((1, 2)).numpy()).max() < 0.03, "the photograph"
        assert cells(line[1], 8).std() > 0.1, "features are not blank"
    assert np.array_equal(cells(first[1], 8), cells(first[2], 8))
    changed = np.abs(cells(second[1], 8) - cells(second[2], 8)).max(-1) > 0.02
    assert np.argwhere(changed).tolist() == [[2, 3]]
    # the map of differences is white where features agree and dark at that patch; its label hides the last lines
    white = [cells(line[3], 8)[:6].min(-1) for line in (first, second)]
    assert white[0].min() > 0.9
    assert np.argwhere(white[1] < 0.9).tolist() == [[2, 3]]
    assert white[1][2, 3] < 0.5


def test_bars_are_as_high_as_the_throughput(tmp_path):
    photos, features = torch.rand(3, 3, 32, 32), torch.randn(3, 4, 4, 8)
    pictures = figure.Pictures(photos, features, features, 32, "fp32")
    image = drawn(tmp_path / "a.png", pictures, [row(before=[3.0], after=[2.0])])
    heights = []
    for colour in (figure.BEFORE, figure.AFTER):
        area = np.all(np.abs(image - to_rgb(colour)) < 0.004, axis=-1)
        column = area.sum(0)
        heights.append(np.median(column[column > 0.6 * column.max()]))  # a bar; text has narrow columns
    assert heights[0] > 50
    assert heights[1] / heights[0] == pytest.approx(1.5, rel=0.03)


def test_bars_of_towers_are_as_long_as_they_are_fast(tmp_path):
    photos, features = torch.rand(3, 3, 32, 32), torch.randn(3, 4, 4, 8)
    pictures = figure.Pictures(photos, features, features, 32, "fp32")
    towers = [
        measure.TowerRow(name, "", 2, 1, 64, row().error, measure.Timing([ratio] * 4, [1.0] * 4), None)
        for name, ratio in (("a", 1.5), ("b", 0.75))
    ]
    image = drawn(tmp_path / "a.png", pictures, [row()], towers)
    lower = image[int(0.62 * len(image)) :, int(0.55 * image.shape[1]) :]
    lengths = []
    for colour in (figure.BEFORE, figure.AFTER):
        line = np.all(np.abs(lower - to_rgb(colour)) < 0.004, axis=-1).sum(1)
        bars = np.split(line, np.flatnonzero(line < 30))  # a bar's lines are longer than those of any text
        lengths.append([np.median(bar[1:]) for bar in bars if len(bar) > 5])
    before, after = lengths
    assert len(before) == len(after) == 2 and before[0] == pytest.approx(before[1], abs=2)
    assert [b / a for a, b in zip(before, after, strict=True)] == pytest.approx([1.5, 0.75], rel=0.03)


def test_heat_maps_are_the_scores_on_one_scale(tmp_path, monkeypatch):
    found = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: found.extend(self.axes) or save(self, *args, **kwargs)
    )
    photos, features = torch.rand(3, 3, 32, 32), torch.randn(3, 4, 4, 8)
    drawn(tmp_path / "a.png", figure.Pictures(photos, features, features, 32, "fp32"), [row()])
    maps = [image for axis in found for image in axis.images if image.get_array().shape == (scores.SIDE,) * 2]
    for image, values in zip(maps, (scores.axial(), scores.flattened()), strict=True):
        assert np.array_equal(image.get_array(), values.numpy())
        low, high = image.get_clim()
        assert low <= values.min() and values.max() <= high + 1e-6
    assert maps[0].get_clim() == maps[1].get_clim()
