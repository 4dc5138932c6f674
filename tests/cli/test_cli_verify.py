# SPDX-License-Identifier: Apache-2.0
"""spatial-pe verify: what it takes, its exit codes, its errors."""

from __future__ import annotations

import json

import pytest

from spatial_pe import cli

CODE = """
import torch
from torch import nn
from spatial_pe import AxialRoPE, PatchGrid, Rotary

right = AxialRoPE(32)
table = AxialRoPE(32)(PatchGrid(16, 16))
small = AxialRoPE(32)(PatchGrid(4, 6, prefix=1))
pixels = lambda grid: AxialRoPE(32)(grid.coordinates() * 14)
zeros = Rotary.from_angles(torch.zeros(256, 16))


def make():
    return AxialRoPE(32)


class MyRoPE(AxialRoPE):
    pass


def rotate(x):
    angles = torch.arange(256)[:, None] * 0.1 ** torch.arange(x.shape[1] // 2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)


def fails(x):
    raise KeyError("freqs")
"""


@pytest.fixture
def verify(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_ropes.py").write_text(CODE)

    def run(*argv: str) -> tuple[int, str, str]:
        code = cli.main(["verify", *argv])
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("name", ["right", "table", "make", "MyRoPE"])
def test_what_is_right(verify, name):
    code, out, _ = verify(f"my_ropes:{name}", "--head-dim", "32")
    assert code == 0 and out.startswith(f"my_ropes:{name}: fine\nrotation: yes; relative: yes")


def test_what_is_wrong(verify, tmp_path):
    code, out, _ = verify("my_ropes.py:rotate", "--head-dim", "32", "--json", "report.json")
    assert code == 1 and out.startswith("my_ropes.py:rotate: wrong\n") and "one index over the flattened grid" in out
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["level"] == "wrong" and written["findings"][0]["cause"] == "flattened"
    assert written["axes"]["0 16"] == "both"
    assert verify("my_ropes:zeros")[0] == 1


def test_what_is_suspicious(verify):
    code, out, _ = verify("my_ropes:pixels")
    assert code == 0 and "my_ropes:pixels: suspicious" in out and "suspicious: aliasing" in out
    assert verify("my_ropes:pixels", "--strict")[0] == 1
    assert verify("my_ropes:right", "--strict")[0] == 0


def test_another_grid(verify):
    assert verify("my_ropes:small", "--grid", "4x6", "--prefix", "1")[0] == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["my_ropes"], "MODULE:NAME must be e.g. my_model.rope:rotate, got 'my_ropes'"),
        (["no_ropes:right"], "cannot import 'no_ropes': ModuleNotFoundError: No module named 'no_ropes'"),
        (["my_ropes:wrong"], "'my_ropes' has no 'wrong'"),
        (["my_ropes:right", "--grid", "16"], "--grid must be HxW, e.g. 16x16, got '16'"),
        (["my_ropes:right", "--grid", "0x16"], "--grid 0x16: height must be at least 1, got 0"),
        (["my_ropes:small"], "my_ropes:small: ValueError: rotary has 25 tokens, the grid 256"),
        (
            ["my_ropes:fails"],
            "my_ropes:fails: ValueError: fn fails on x (256, 64), the tokens of the grid and head_dim: "
            "KeyError: 'freqs'",
        ),
        (["my_ropes:CODE.x"], "'my_ropes' has no 'CODE'"),
    ],
)
def test_errors_name_the_argument(verify, argv, message):
    code, _, err = verify(*argv)
    assert code == 2 and err == f"spatial-pe verify: {message}\n"
