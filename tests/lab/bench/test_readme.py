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
