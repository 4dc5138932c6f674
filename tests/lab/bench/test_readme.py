# SPDX-License-Identifier: Apache-2.0
"""The tables of the README and the docs are those of the committed results."""

import re

import pytest

from tools import readme_tables as readme


@pytest.mark.parametrize("file", readme.BLOCKS)
def test_tables_are_up_to_date(file):
    text = (readme.ROOT / file).read_text()
    assert readme.written(file, text) == text, "run python -m tools.readme_tables"


@pytest.mark.parametrize("file", ["README.md", "docs/benchmarks.md"])
def test_a_changed_number_is_noticed(file):
    text = (readme.ROOT / file).read_text()
    changed = re.sub(r"(\d)\.(\d\d)x", r"9\1.\2x", text, count=1)
    assert changed != text
    assert readme.written(file, changed) == text


def test_the_readme_is_one_page():
    assert len((readme.ROOT / "README.md").read_bytes()) <= 8192


def test_towers_of_a_demo_have_their_table(monkeypatch):
    result = readme.load("demo")
    assert "Towers" not in readme.demo()
    speed = {"images_per_second": {"before": 0.1665, "after": 0.2113}, "speed_up": 1.269, "too_noisy": False}
    layer = {"kernels": {"before": 29, "after": 3}, "peak_bytes": {"before": 39321600, "after": 19713229}}
    about = {"name": "Qwen2.5-VL", "what": "windows", "tokens": 1024, "error": {"relative": 6.7e-7}, **speed}
    result |= {"schema": 3, "towers": [about | {"layer": layer}, about | {"too_noisy": True, "layer": None}]}
    monkeypatch.setattr(readme, "load", lambda name: result)
    new = readme.demo().splitlines()
    counted, noisy = [line for line in new if line.startswith("| Qwen2.5-VL")]
    assert counted == ("| Qwen2.5-VL, windows | 1,024 | 6.7e-07 | 0.1665 | 0.2113 | **1.27x** | 29 → 3 | 37.5 → 18.8 |")
    assert noisy.endswith("| too noisy |  |  |")


def test_a_demo_that_was_too_noisy_has_no_speed_up(monkeypatch):
    result = readme.load("demo")
    old = readme.demo()
    result["schema"] = 2
    result["rows"][0] |= {"too_noisy": True}
    result["rows"][1] |= {"too_noisy": False, "images_per_second": {"before": 1.23456, "after": 234.567}}
    monkeypatch.setattr(readme, "load", lambda name: result)
    new = readme.demo().splitlines()
    assert "**1.04x**" in old and new[2].endswith("| too noisy |")
    assert "| 1.235 | 234.6 | **1.18x** |" in new[3]
