# SPDX-License-Identifier: Apache-2.0
"""What is said of a study: the numbers of its file, in tables, words and one page, read in a real browser."""

from __future__ import annotations

import copy
import functools
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[2]))
import browser

from spatial_pe import cli
from spatial_pe.lab.report import page
from spatial_pe.lab.study import findings, report
from spatial_pe.lab.study.statistics import mean
from spatial_pe.lab.study.study import LABELS, STUDIES, load, runs_of

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "cpu" / "spatial"
FILES = sorted(RESULTS.glob("*.json"))


@pytest.fixture(scope="module")
def encodings():
    return load(RESULTS / "encodings.json")


# ----------------------------------------------------------------------------------------------------------- findings


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_committed_studies_are_whole(file):
    """The runs of today's recipes, all of them, with as many seeds each, and the command that made them."""
    found = load(file)
    seeds = 1 + max(run["seed"] for run in found["runs"])
    assert seeds >= (3 if found["study"] == "pretrained" else 5)
    wanted = {(r.part, r.encoding, r.seed) for r in runs_of(found["study"], found["budget"], None, seeds)}
    assert {(r["part"], r["encoding"], r["seed"]) for r in found["runs"]} == wanted
    recipes = {name: part.recipe for name, part in STUDIES[found["study"]].parts[found["budget"]].items()}
    assert found["recipes"] == json.loads(json.dumps({name: asdict(recipe) for name, recipe in recipes.items()}))
    assert found["commands"] and found["environments"]


def test_tables_are_means_over_seeds(encodings):
    rows = {row.encoding: row.cells for row in findings.by_task(encodings, "objects")}
    runs = [r for r in encodings["runs"] if (r["part"], r["encoding"]) == ("objects", "axial")]
    relation = mean([run["accuracy"]["1.0"]["index"]["relation"] for run in runs])
    assert rows["axial"]["relation"] == relation and relation.count == 5
    assert list(rows) == [name for name in LABELS if name in rows]
    sizes = {row.encoding: row.cells for row in findings.by_scale(encodings, "objects")}
    assert "1.0 index" in sizes["axial"] and "2.0 stretched" in sizes["axial"]
    assert "2.0 index" not in sizes["learned-1d"]  # a table cannot be numbered on


def test_comparisons_follow_the_numbers(encodings, monkeypatch):
    """Where one encoding is made better on every seed, that is what is said, and of the opposite the opposite."""
    changed = copy.deepcopy(encodings)
    for run in changed["runs"]:
        if (run["part"], run["encoding"]) == ("objects", "mixed"):
            twin = next(
                r for r in changed["runs"] if (r["part"], r["encoding"], r["seed"]) == ("objects", "axial", run["seed"])
            )
            run["accuracy"] = copy.deepcopy(twin["accuracy"])
            run["accuracy"]["1.0"]["index"]["relation"] = twin["accuracy"]["1.0"]["index"]["relation"] - 0.2
            run["accuracy"]["1.0"]["index"]["count"] = twin["accuracy"]["1.0"]["index"]["count"] + 0.2
    found = {
        c.column: c.result
        for c in findings.comparisons(changed, "objects")
        if (c.encoding, c.reference) == ("mixed", "axial")
    }
    assert found["relation"].verdict == "worse" and found["count"].verdict == "better"
    assert found["place"].verdict == "no difference shown"
    monkeypatch.setattr(page, "plain", functools.partial(page.plain, width=300))  # a row in one line
    said = report.text({**changed, "runs": [run for run in changed["runs"] if run["part"] == "objects"]})
    row = next(line for line in said.splitlines() if line.startswith(" − ".join((LABELS["mixed"], LABELS["axial"]))))
    assert "-20.0 ± 0.0 ▼" in row and "+20.0 ± 0.0 ▲" in row


def test_one_seed_compares_nothing(encodings):
    single = {**encodings, "runs": [run for run in encodings["runs"] if run["seed"] == 0]}
    said = report.text(single)
    assert "One seed: nothing is compared." in said
    assert "±" not in said and "▲" not in said


# --------------------------------------------------------------------------------------------------------------- page


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "spatial.html"
    assert cli.main(["spatial", "report", *map(str, FILES), "--out", str(path)]) == 0
    return path


@pytest.mark.slow
def test_the_page_needs_nothing_else(written):
    text = written.read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', text)
    assert "<script" not in text and "url(http" not in text and "@import" not in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', text)) <= {*ids}


def test_the_page_in_a_browser(written, encodings):
    with browser.opened(written) as chrome:
        assert chrome.title == "Does it see space better?"
        assert [entry for entry in chrome.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
        assert browser.requests(chrome) == []
        charts = chrome.execute_script(
            "return [...document.querySelectorAll('figure svg')].map(s => {const b = s.getBoundingClientRect();"
            "return [b.width, b.height, s.querySelectorAll('path').length, s.querySelectorAll('text').length]})"
        )
        assert len(charts) >= 6 * len(findings.parts(encodings))
        assert all(width > 300 and height > 60 and paths > 2 for width, height, paths, _ in charts)
        cells = chrome.execute_script(
            "return [...document.querySelectorAll('table')].map(t => [...t.rows].map(r => [...r.cells].map(c =>"
            " c.innerText)))"
        )
        axial = next(row for row in findings.by_task(encodings, "objects") if row.encoding == "axial")
        wanted = [LABELS["axial"], *(f"{100 * m.value:.1f} ± {100 * m.half:.1f}" for m in axial.cells.values())]
        assert wanted in [row for table in cells for row in table]
        widths = chrome.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert widths[0] <= widths[1]
        for link in chrome.find_elements("css selector", "nav a")[:3]:
            link.click()
            target = chrome.find_element("css selector", link.get_attribute("hash"))
            assert abs(chrome.execute_script("return arguments[0].getBoundingClientRect().top", target)) < 900


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_on_a_phone_nothing_but_charts_and_tables_scrolls_sideways(written, dark):
    with browser.opened(written, 390, 800, dark) as chrome:
        wide, inner = chrome.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert wide <= inner <= 390
        ink, paper = chrome.execute_script(
            "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
        )
        bright = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in (ink, paper)]
        assert (bright[0] > bright[1]) == dark and abs(bright[0] - bright[1]) > 150
        drawn = chrome.execute_script("return getComputedStyle(document.querySelector('figure svg text')).fill")
        assert drawn == ink  # the ink of the charts is that of the page


def test_text_of_a_page_is_escaped():
    html = page.render("<b>", "a & b", [page.Section("<i>", ("<script>",))], "")
    assert "<script>" not in html and "&lt;b&gt;" in html and "a &amp; b" in html
