# SPDX-License-Identifier: Apache-2.0
"""`spatial-pe demo`: its files, its errors, its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from statistics import geometric_mean

import numpy as np
import pytest
import torch
from demo_parts import SMALL, as_tower, cells, dinov3, panels, small_cases, weights
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from spatial_pe import cli
from spatial_pe.lab.checkpoints import assets, checkpoint
from spatial_pe.lab.demo import figure, measure, towers
from spatial_pe.lab.demo import run as demo

transformers = pytest.importorskip("transformers")


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
    for made in result["rows"] + result["towers"]:
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
        assert made["layer"]["kernels"]["after"] > 0 < made["layer"]["peak_bytes"]["after"]
    assert result["too_noisy"] == any(made["too_noisy"] for made in result["rows"] + result["towers"])
    assert all(made["error"]["relative"] < 1e-5 for made in result["towers"])
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
    for line in panels(imread(out)[..., :3], lines=figure.SHOWN):
        assert line[0].std() > 0.05 and cells(line[1], 6).std() > 0.05
        assert np.abs(cells(line[1], 6) - cells(line[2], 6)).max() < 0.01
    printed = capsys.readouterr().out
    for made in result["rows"]:
        assert ("too noisy" if made["too_noisy"] else f"{made['speed_up']:.2f}x") in printed
    assert "DINOv3ViTAttention" in printed
    assert result["towers"] == [] and "Towers that rotate" not in printed, "another model was asked for"


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


@pytest.fixture
def small_default(monkeypatch) -> list[float]:
    """A small model in place of the default one, and small towers that rotate. The list: by how much its graph is
    larger."""
    torch.manual_seed(0)
    config = transformers.Dinov2Config(**SMALL, image_size=224, patch_size=14)
    tower, factor = replace(as_tower(transformers.Dinov2Model(config)), name="DINOv2-small"), [1.0]
    monkeypatch.setattr(assets, "is_local", lambda: True)
    monkeypatch.setattr(assets, "onnx_file", lambda: b"")
    monkeypatch.setattr(checkpoint, "default_tower", lambda graph: tower)
    monkeypatch.setattr(
        assets, "onnx_features", lambda graph, pixels: factor[0] * tower.module(pixels).last_hidden_state.detach()
    )
    monkeypatch.setattr(towers, "CASES", small_cases())
    return factor


def test_the_default_model_stands_beside_towers_that_rotate(small_default, tmp_path, capsys, fast, texts):
    numbers = tmp_path / "d.json"
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "d.png"), "--json", str(numbers)]) == 0
    result, printed = json.loads(numbers.read_text()), capsys.readouterr().out
    check_result(result)
    assert [(made["name"], made["images"], made["tokens"]) for made in result["towers"]] == [
        ("Qwen", 1, 64),
        ("Pixtral", 2, 24),
        ("DINOv3", 1, 19),
    ]
    drawn = "\n".join(texts)
    for made in result["towers"]:
        kernels, speed_up = made["layer"]["kernels"], "too noisy" if made["too_noisy"] else f"{made['speed_up']:.2f}x"
        assert kernels["after"] < kernels["before"]
        for text in (printed, drawn.replace("→", "->")):
            for part in (made["name"], made["what"], speed_up, f"{kernels['before']} -> {kernels['after']} kernels"):
                assert part in text
    assert "4 vision towers, patched in place" in drawn and "DINOv2-small with its real weights" in drawn


def test_a_tower_that_changes_fails_the_demo(small_default, tmp_path, capsys, fast, monkeypatch):
    monkeypatch.setattr(towers, "CASES", small_cases()[1:2])
    compare = towers.compare
    wrong = measure.Error(max=1.0, relative=1e-3, cosine_mean=1.0, cosine_min=1.0)
    monkeypatch.setattr(towers, "compare", lambda seconds: [replace(compare(seconds)[0], error=wrong)])
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "d.png")]) == 1
    assert "differ by more than rounding: Pixtral" in capsys.readouterr().err


def test_another_model_than_the_graph_is_noticed(small_default, tmp_path, capsys):
    small_default[0] = 1.001
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
def test_the_default_model_end_to_end(tmp_path):
    weights()
    out, numbers = tmp_path / "d.png", tmp_path / "d.json"
    command = [sys.executable, "-m", "spatial_pe.cli", "demo", "--quick", "--out", str(out), "--json", str(numbers)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(numbers.read_text())
    check_result(result)
    assert result["model"]["onnx_relative_error"] < 1e-5
    assert [(r["dtype"], r["size"], r["tokens"]) for r in result["rows"]] == [("fp32", 224, 257), ("bf16", 224, 257)]
    assert all(r["error"]["cosine_min"] > 0.99 for r in result["rows"])
    assert [made["name"] for made in result["towers"]] == ["Qwen2.5-VL", "Pixtral", "DINOv3-L"]
    assert len(panels(imread(out)[..., :3], lines=figure.SHOWN)) == figure.SHOWN
