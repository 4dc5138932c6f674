# SPDX-License-Identifier: Apache-2.0
"""Tuning: what is fastest is kept and used, and nothing that is wrong on disk breaks a call.

Times come from a clock of the test; that the candidates compute the same is what the interpreter checks.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from spatial_pe.backends.base import AttentionCall
from spatial_pe.backends.triton import backend as triton
from spatial_pe.ops import select

pytestmark = [
    pytest.mark.skipif(triton.unavailable() is not None, reason=f"triton: {triton.unavailable()}"),
    pytest.mark.skipif(not triton.INTERPRETED, reason="a GPU is here: tests/backends/gpu tunes on it"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
CPU = torch.device("cpu")


@pytest.fixture
def modules(monkeypatch):
    """Two candidates a unit, so that the interpreter is done soon."""
    from spatial_pe import tuning
    from spatial_pe.backends.triton import tiles, tuning_store

    few = {
        "forward": (tiles.Tile(64, 64, 4, 2), tiles.Tile(64, 64, 4, 2, "loop")),
        "query": (tiles.Tile(64, 64, 4, 2),),
        "key": (tiles.Tile(64, 64, 4, 2),),
        "window_forward": (None, tiles.Window(0, 4, 2, 1)),
        "window_backward": (None, tiles.Window(0, 8)),
    }
    monkeypatch.setattr(tuning, "CANDIDATES", few)
    return tiles, tuning, tuning_store


def clock_that_prefers(wanted: list):
    """Milliseconds: 1 for what is wanted, 2 for the rest; runs everything once."""

    def clock(runs):
        for run in runs.values():
            run()
        return {key: 1.0 if key in wanted else 2.0 for key in runs}

    return clock


def tuned_row(modules, tmp_path: Path, wanted: list, tokens: int = 40) -> tuple[dict, Path]:
    _, tuning, _ = modules
    problem = tuning.Problem(tokens, 16, heads=2, dtype="float16", budget=tokens)
    file = tmp_path / "tuned.json"
    said: list[str] = []
    copy, clock = tmp_path / "deep" / "copy.json", clock_that_prefers(wanted)
    rows = tuning.tune([problem], CPU, file=file, copy=copy, clock=clock, workers=0, say=said.append)
    assert copy.read_text() == file.read_text()
    assert len(said) == 1 and str(problem) in said[0]
    assert json.loads(file.read_text())["rows"] == json.loads(json.dumps(rows))
    ((name, row),) = rows.items()
    assert name == f"float16 D=16 N<={64 if tokens <= 64 else 256}"
    assert "failed" not in row
    return row, file


def test_the_fastest_is_kept_and_used(modules, tmp_path):
    tiles, _, tuning_store = modules
    window, tile = tiles.Window(64, 4, 2, 1), tiles.Tile(64, 64, 4, 2)
    row, file = tuned_row(modules, tmp_path, [window, tile, None, "composed, inference", "triton, training"])
    assert row["forward"] == asdict(tile) and row["key"] == asdict(tile)
    # None is as fast as the window here, and is asked first
    assert row["window_backward"] is None
    assert row["faster"] == {"inference": "composed", "training": "triton"}

    kept = tuning_store._checked(json.loads(file.read_text()))
    before = tiles.prebuilt("hopper", torch.float16, 16, 64)
    after = kept.over(before, torch.float16, 16, 64)
    assert after.query == tile and after.window_backward is None and after != before
    assert kept.over(before, torch.float16, 16, 128) == before, "another regime"
    assert kept.over(before, torch.bfloat16, 16, 64) == before, "another dtype"
    assert [kept.faster(torch.float16, 16, 64, training) for training in (False, True)] == ["composed", "triton"]
    assert kept.faster(torch.float16, 16, 128, False) is None


@pytest.mark.slow  # 20 s
def test_sequences_longer_than_a_window_are_given_tiles(modules, tmp_path):
    tiles, _, _ = modules
    row, _ = tuned_row(modules, tmp_path, [tiles.Tile(64, 64, 4, 2, "loop")], tokens=130)
    assert row["window_forward"] is None and row["window_backward"] is None
    assert row["forward"] == asdict(tiles.Tile(64, 64, 4, 2, "loop"))


def test_a_candidate_that_does_not_compile_is_noted(modules, tmp_path, monkeypatch):
    tiles, tuning, _ = modules
    broken = tiles.Tile(48, 64, 4, 2)  # not a power of two
    monkeypatch.setitem(tuning.CANDIDATES, "query", (broken,))
    problem = tuning.Problem(40, 16, heads=1, dtype="float16", budget=40)
    rows = tuning.tune(
        [problem], CPU, file=tmp_path / "t.json", clock=clock_that_prefers([]), workers=0, say=lambda _: None
    )
    (row,) = rows.values()
    assert any(str(broken) in line for line in row["failed"])
    assert row["query"] != asdict(broken)


@pytest.mark.parametrize("unit", ["forward", pytest.param("key", marks=pytest.mark.slow)])
def test_a_candidate_that_corrupts_one_row_of_one_image_is_left_out(unit, modules, tmp_path, monkeypatch):
    """Of 2 x 40 x 2 rows: 8 % of the norm of all."""
    tiles, tuning, _ = modules
    broken, real = tiles.Tile(64, 64, 8, 2), tuning.plan_of
    monkeypatch.setitem(tuning.CANDIDATES, unit, (broken,))

    class Corrupting:
        def __init__(self, plan):
            self.results, self.plan = plan.results, plan

        def run(self, device):
            self.plan.run(device)
            self.results[-1 if unit == "key" else 0][1, 7, 1] *= 1.1

    def plan_of(asked, call, choice, results):
        plan = real(asked, call, choice, results)
        return Corrupting(plan) if asked == unit and getattr(choice, unit) == broken else plan

    monkeypatch.setattr(tuning, "plan_of", plan_of)
    problem = tuning.Problem(40, 16, heads=2, dtype="float16", budget=80)
    clock = clock_that_prefers([broken])
    (row,) = tuning.tune([problem], CPU, file=tmp_path / "t.json", clock=clock, workers=0, say=lambda _: None).values()
    name = "dv" if unit == "key" else "out"
    assert row["failed"] == [f"{unit} {broken}: {name}: a row is off by 1.0e-01 of its norm"]
    assert row[unit] != asdict(broken)


def test_no_tile_is_kept_where_none_is_right(modules, tmp_path, monkeypatch):
    _, tuning, _ = modules
    monkeypatch.setattr(tuning, "_run", lambda plan, device: {"out": torch.zeros(1, 40, 1, 16)})
    problem = tuning.Problem(40, 16, heads=1, dtype="float16", budget=40)
    clock = clock_that_prefers([])
    (row,) = tuning.tune([problem], CPU, file=tmp_path / "t.json", clock=clock, workers=0, say=lambda _: None).values()
    assert not set(row) & {"forward", "query", "key"} and row["faster"] == dict.fromkeys(
        ("inference", "training"), "composed"
    )


def test_no_time_is_no_loss(modules, tmp_path):
    _, tuning, _ = modules
    said: list[str] = []
    rows = tuning.tune(
        tuning.QUICK,
        CPU,
        seconds=-1,
        file=tmp_path / "t.json",
        clock=clock_that_prefers([]),
        workers=0,
        say=said.append,
    )
    assert rows == {} and len(said) == len(tuning.QUICK) and not (tmp_path / "t.json").exists()


def test_saving_keeps_what_was_there(modules, tmp_path):
    _, _, tuning_store = modules
    file = tmp_path / "deep" / "tuned.json"
    tuning_store.save({"a": {"query": None}}, file)
    tuning_store.save({"b": {"query": None}}, file)
    assert json.loads(file.read_text())["rows"] == {"a": {"query": None}, "b": {"query": None}}
    file.write_text("{")
    tuning_store.save({"c": {}}, file)
    assert json.loads(file.read_text())["rows"] == {"c": {}}
    assert [path.name for path in file.parent.iterdir()] == ["tuned.json"], "a temporary file was left"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"format": 1, "rows": {}}', '{"format": 2, "rows": {"a": {"query": {"bm": 1}}}}', '{"format": 2}'],
)
def test_a_broken_file_warns_and_is_left_out(content, modules, tmp_path, monkeypatch):
    _, _, tuning_store = modules
    file = tmp_path / "tuned.json"
    file.write_text(content)
    monkeypatch.setattr(tuning_store, "path", lambda device: file)
    tuning_store.load.cache_clear()
    with pytest.warns(UserWarning, match="is not used .*spatial-pe tune"):
        assert tuning_store.load(CPU).rows == {}
    tuning_store.load.cache_clear()


def test_no_file_is_silent(modules, tmp_path, monkeypatch):
    _, _, tuning_store = modules
    monkeypatch.setattr(tuning_store, "path", lambda device: tmp_path / "none.json")
    tuning_store.load.cache_clear()
    assert tuning_store.load(CPU).rows == {}
    tuning_store.load.cache_clear()


def test_where_it_is_kept(modules, tmp_path, monkeypatch):
    _, _, tuning_store = modules
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200 / 141 GB")
    monkeypatch.setenv("SPATIAL_PE_CACHE", str(tmp_path))
    path = tuning_store.path(CPU)
    assert path.parent == tmp_path and path.name.startswith("NVIDIA-H200-141-GB-triton-") and "spatial-pe-" in path.name
    monkeypatch.delenv("SPATIAL_PE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuning_store.path(CPU).parent == tmp_path / "xdg" / "spatial_pe"


@pytest.mark.parametrize(
    ("faster", "reason"), [("triton", None), ("composed", "measured to be faster"), (None, "modelled")]
)
def test_auto_follows_what_was_measured(faster, reason, monkeypatch):
    q = torch.empty(1, 576, 2, 64, dtype=torch.float32, device="meta")
    monkeypatch.setattr(triton, "faster", lambda call: faster)
    why = select._slower("triton", AttentionCall(q, q, q, None, 1.0, None, None, None))
    assert why is None if reason is None else reason in why


def test_what_was_measured_is_asked_without_a_graph_break(modules, tmp_path, monkeypatch):
    """A file is read while a call is traced."""
    _, _, tuning_store = modules
    tuning_store.save({"bfloat16 D=64 N<=256": {"faster": {"inference": "composed"}}}, tmp_path / "t.json")
    monkeypatch.setattr(tuning_store, "path", lambda device: tmp_path / "t.json")
    tuning_store.load.cache_clear()

    def function(x):
        if (
            tuning_store.any_rows(x.device)
            and tuning_store.faster(x.device, torch.bfloat16, 64, 256, False) == "composed"
        ):
            return x + 1
        return x - 1

    assert torch.compile(function, fullgraph=True, backend="eager")(torch.zeros(2)).tolist() == [1, 1]
    tuning_store.load.cache_clear()


def test_problems_are_of_different_regimes(modules):
    _, tuning, _ = modules
    regimes = [problem.regime() for problem in tuning.PROBLEMS]
    assert len(set(regimes)) == len(regimes)
    assert set(tuning.QUICK) <= set(tuning.PROBLEMS)


def test_problem_makes_the_call(modules):
    _, tuning, _ = modules
    call = tuning.Problem(64, 80, windows=True, heads=2, budget=192).call(CPU)
    assert call.q.shape == (1, 192, 2, 80) and call.cu_seqlens.tolist() == [0, 64, 128, 192] and call.max_seqlen == 64
    call = replace(tuning.Problem(196, 64), budget=600, heads=1).call(CPU)
    assert call.q.shape == (3, 196, 1, 64) and call.q.dtype == torch.bfloat16 and call.cu_seqlens is None


WITHOUT_TRITON = """
import json, sys
sys.modules["triton"] = None  # an import of it raises
import torch
from torch._subclasses import FakeTensorMode
from spatial_pe import tuning
from spatial_pe.backends import cuda, reference
from spatial_pe.backends.triton import backend as triton
from spatial_pe.ops import select
from spatial_pe.backends.base import AttentionCall
from spatial_pe.backends.triton import tuning_store

torch.cuda.get_device_name = lambda device: "NVIDIA H200"
cuda.unavailable = cuda.cannot_serve = lambda *call: None
cuda.forward, cuda.backward = reference.forward, reference.backward

def clock(runs):
    for run in runs.values():
        run()
    return {key: 1.0 if key.startswith("cuda") else 2.0 for key in runs}

def tuned_row():
    problem = tuning.Problem(20, 64, heads=1, dtype="float16", budget=20)
    (row,) = tuning.tune([problem], torch.device("cpu"), clock=clock, say=lambda line: None).values()
    return row

def selected_backend():
    tuning_store.load.cache_clear()
    with FakeTensorMode():
        q = torch.empty(132, 20, 1, 64, device="cuda:0", dtype=torch.float16)  # a program for each SM
        return select.select(AttentionCall(q, q, q, None, 0.125, None, None, None), "auto")

found = {"triton": triton.unavailable(), "before": selected_backend(), "row": tuned_row(), "after": selected_backend()}
found["file"] = tuning_store.path(torch.device("cuda", 0)).name
def corrupted(call):  # one row of 20: 11 % of the norm of all
    out, lse = reference.forward(call)
    out[-1, -1, -1] *= 0.5
    return out, lse

calls = iter(range(100))
cuda.forward = corrupted
found |= {"wrong": tuned_row(), "after wrong": selected_backend()}
cuda.forward = lambda call: [x * (1 + 5e-4 * next(calls)) for x in reference.forward(call)]
found |= {"unsteady": tuned_row()}
print(json.dumps(found))
"""


def test_the_cuda_kernels_are_measured_without_triton(tmp_path):
    """Against torch's own attention, whose results they must have."""
    environment = {**os.environ, "SPATIAL_PE_CACHE": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, env=environment, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout)
    assert found["triton"].startswith("triton is not installed")
    assert [found[when] for when in ("before", "after", "after wrong")] == ["composed", "cuda", "composed"]
    assert found["row"]["faster"] == {"inference": "cuda", "training": "cuda"}
    assert set(found["row"]["milliseconds"]) == {
        f"{name}, {use}" for name in ("cuda", "composed") for use in ("inference", "training")
    }
    assert found["wrong"]["faster"] == {"inference": "composed", "training": "composed"}
    assert found["wrong"]["failed"] == ["cuda: out: a row is off by 5.0e-01 of its norm"]
    assert found["unsteady"]["failed"] == ["cuda: out: two runs differ"]
    assert found["file"].startswith("NVIDIA-H200-triton-none-spatial-pe-")


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "triton is not installed"),
        ("3.4.0", "triton 3.4.0 is installed, the kernels need 3.5 or newer .*: pip install -U triton"),
        ("2.3.1+git", "triton 2.3.1.git is installed"),
        ("3.5.0", None),
        ("3.10.1", None),
        ("4.0.0rc1", None),
        ("of unknown version", None),
    ],
)
def test_a_triton_that_is_too_old_is_a_reason(version, reason, monkeypatch):
    monkeypatch.setattr(triton, "UNUSABLE", triton._unusable(version))
    found = triton.unavailable()
    assert found is None if reason is None else re.match(reason, found)

    def function(x):  # asked while a call is traced
        return x + 1 if triton.unavailable() is None else x - 1

    torch._dynamo.reset()
    expected = 1 if reason is None else -1
    assert torch.compile(function, fullgraph=True, backend="eager")(torch.zeros(2)).tolist() == [expected] * 2


def test_the_version_is_known_without_an_import():
    code = "import sys; from spatial_pe.backends.triton import backend; print(backend.VERSION, 'triton' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    import triton as installed

    assert ran.stdout == f"{installed.__version__} False\n", ran.stderr
