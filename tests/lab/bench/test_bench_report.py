# SPDX-License-Identifier: Apache-2.0
"""The report of a benchmark, read in a real browser: the numbers of the page are those of the file."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median

import pytest

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[2]))
import browser

from spatial_pe._utils import environment
from spatial_pe.lab.bench import report
from spatial_pe.lab.bench.cases import SPEED, Shape


def row(suite: str, shape: Shape, ours: float, eager: float, **how) -> dict:
    seconds = {"eager": [eager, 2 * eager, eager], "ours": [ours, ours, 9 * ours], "off": [ours / 1.02] * 3}
    made = {"suite": suite, "name": str(shape.tokens), "axis": "", "shape": asdict(shape), "dtype": "bf16"}
    made |= {"direction": "forward", "threads": 1, "flops": shape.flops, "deviation": {}, "seconds": seconds}
    return made | {"refused": {"onnxruntime": "has no attention in this dtype on the CPU"}} | how


@pytest.fixture(scope="module")
def result() -> dict:
    """Of every suite some rows, whose samples are made up."""
    found = {"schema": 1, "kind": "spatial-bench", "command": "spatial-pe bench", **environment.describe()}
    found |= {"device": "cpu", "peaks": {"gflops": {"fp32": 100.0, "bf16": 200.0}, "copy_gigabytes_per_second": 20.0}}
    tower = {"suite": "towers", "name": "t", "what": "A <tower>.", "dtype": "bf16", "threads": 1}
    tower |= {"refused": {"openvino": "knows no <rotation>"}}
    space = {"suite": "space", "name": "s", "what": "A block.", "dtype": "fp32", "threads": 1, "refused": {}}
    space |= {"seconds": {"before": [3.0, 3.0], "after": [1.25, 1.25]}, "patched": 1, "difference": 1e-7}
    space |= {"peak": {"before": 1 << 30, "after": 3 << 20}, "kernels": {"before": 46, "after": 10}}
    tower |= {"seconds": {"before": [3.0, 3.0], "after": [2.0, 2.0]}, "sdpa_share": 0.42, "patched": 2}
    memory = {"suite": "memory", "dtype": "fp32", "refused": {}}
    rows = [
        row("attention", SPEED["196"], 0.002, 0.0041),
        row("attention", SPEED["windows"], 0.004, 0.021),
        *(row("growth", Shape(1, 8, n, 64), 1e-9 * n * n, 3e-9 * n * n, axis="tokens") for n in (64, 256)),
        row("layers", SPEED["729"], 0.5, 0.6),
        *(
            {**memory, "shape": asdict(Shape(1, 8, n, 64)), "bytes": {"ours": n << 12, "naive": n * n << 5}}
            for n in (256, 512)
        ),
        tower,
        space,
        {"suite": "start", "seconds": {"import torch": [1.25]}, "refused": {}},
    ]
    return found | {"rows": rows}


@pytest.fixture(scope="module")
def written(result, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(report.html(result), encoding="utf-8")
    return path


def test_the_numbers_are_those_of_the_file(result, written):
    """Worked out from the samples here, found in the cells there."""
    with browser.opened(written) as chrome:
        tables = chrome.execute_script(
            "return [...document.querySelectorAll('table')].map(t => [...t.rows].map(r => [...r.cells].map(c =>"
            " c.innerText)))"
        )
    lines = {line[0]: line for table in reversed(tables) for line in reversed(table)}  # the first of each name
    left_out = tables[2]
    for found in result["rows"][:2]:
        shape = found["shape"]
        time = {name: median(samples) for name, samples in found["seconds"].items()}
        flops = 4 * shape["batch"] * shape["heads"] * shape["tokens"] ** 2 * shape["head_dim"]
        kind = "windows of" if shape["packed"] else "×"
        line = lines[f"{shape['batch']} {kind} {shape['tokens']}, bf16, forward, 1 thread"]
        assert line[1] == f"{flops / time['ours'] / 1e9:.0f}"
        assert line[2] == f"{time['eager'] / time['ours']:.2f}x"
        assert line[-1] == "+2.0%"
    assert lines["A <tower>."][1:] == ["bf16", "42%", "1.50x"]
    assert lines["256"][1:] == ["1.0", "2.0"] and lines["512"][1:] == ["2.0", "8.0"]
    assert lines["import torch"] == ["import torch", "1.2"]
    assert lines["A block."][1:] == ["fp32", "2.40x", "1024.0", "3.0", "46 -> 10"]
    assert ["ONNX Runtime", "has no attention in this dtype on the CPU"] in [line[1:] for line in left_out]
    assert ["A <tower>.", "OpenVINO", "knows no <rotation>"] in left_out


def test_it_opens_offline_without_a_complaint(result, written):
    with browser.opened(written) as chrome:
        assert chrome.title == "Speed on this machine"
        assert [entry for entry in chrome.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
        assert browser.requests(chrome) == []
        headings = [element.text for element in chrome.find_elements("css selector", "h2")]
        kinds = ["Whole towers", "Attention", "Layers", "How it grows", "Memory", "Models that see space", "First call"]
        assert headings == kinds
        charts = chrome.execute_script(
            "return [...document.querySelectorAll('figure svg')].map(s => {const b = s.getBoundingClientRect();"
            "return [b.width, b.height, s.querySelectorAll('path').length]})"
        )
        assert len(charts) == 5 and all(width > 300 and height > 60 and paths > 2 for width, height, paths in charts)


def test_keyboard_and_screen_reader(written):
    """Every chart and table can be reached by Tab, to scroll it, and has a name; charts are images with a label."""
    with browser.opened(written) as chrome:
        regions = chrome.find_elements("css selector", ".wide")
        reached = []
        body = chrome.find_element("css selector", "body")
        for _ in range(2 * len(regions) + 20):
            body.send_keys("\ue004") if not reached else chrome.switch_to.active_element.send_keys("\ue004")
            reached.append(chrome.switch_to.active_element.get_attribute("outerHTML")[:200])
        for region in regions:
            assert region.get_attribute("outerHTML")[:200] in reached
            assert region.aria_role in ("image", "img", "group") and region.accessible_name
        images = chrome.find_elements("css selector", "figure [role=img]")
        assert len(images) == 5
        assert all(len(image.accessible_name.split()) > 5 for image in images)
        assert chrome.execute_script("return document.documentElement.lang") == "en"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_on_a_phone(written, dark):
    with browser.opened(written, 390, 800, dark) as chrome:
        wide, inner = chrome.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert wide <= inner <= 390
        ink, paper = chrome.execute_script(
            "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
        )
        bright = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in (ink, paper)]
        assert (bright[0] > bright[1]) == dark and abs(bright[0] - bright[1]) > 150


def test_without_peaks_there_is_no_roofline(result):
    page = report.html({**result, "peaks": None})
    assert "under what the machine can do" in report.html(result) and "under what the machine can do" not in page
