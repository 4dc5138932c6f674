# SPDX-License-Identifier: Apache-2.0
"""What surrounds the GPU's figures: that the three steps fit their time and run in their order, what a phase that hangs
or fails leaves behind, the report. No GPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_session
from benchmarks.throughput.gpu import cases, dry, machine, report, state, variants, watch

ROOT = Path(__file__).parents[2]

# --------------------------------------------------------------------------------------------------------------- plans


def test_the_shapes_with_targets_are_measured_first():
    plan = cases.plan("table")
    pairs = [(work.shape.tokens, work.shape.head_dim) for work in plan]
    assert sorted(pairs) == sorted((target.tokens, target.dim) for target in report.TARGETS)
    assert {(target.tokens, target.dim) for target in report.CUDA_TARGETS} <= set(pairs)
    assert all(work.directions == ("forward", "backward", "rotary") for work in plan)
    assert {(work.shape.tokens, work.shape.head_dim) for work in cases.plan("compiled")} <= set(pairs)
    assert all(work.shape.batch < 200 for work in cases.plan("small"))


def test_the_report_knows_every_variant():
    known = {name for names in report.GROUPS.values() for name in names} | {*variants.OURS, report.LOOP}
    assert {name for plan in cases.PLANS for work in cases.plan(plan) for name in work.variants} <= known
    assert report.WINDOW == cases.WINDOW and dry.model.LARGE == cases.LARGE


# -------------------------------------------------------------------------------------------------- time of the steps

ENOUGH = {
    (1, "build"): 40, (1, "compile"): 30, (1, "check triton"): 35, (1, "check cuda"): 25, (1, "table"): 75,
    (1, "layers"): 25, (2, "tests"): 90, (2, "tune"): 60, (2, "small"): 40, (3, "sanitizer"): 40, (3, "compile"): 40,
    (3, "compiled"): 38, (3, "profile"): 20,
}  # fmt: skip


@pytest.fixture
def planned(monkeypatch, tmp_path, capsys):
    """`make gpu DRY=1` without compiling anything: its exit status, and what it printed, if phases take so long."""
    here = {name: dry.Compiled({"forward_kernel": 10}, {"forward_kernel": [2.0]}) for name in ("measured", "tested")}
    monkeypatch.setattr(dry, "compiled_here", lambda: here)
    monkeypatch.setattr(dry, "nvcc_seconds", lambda: 10.0)
    monkeypatch.setattr(dry, "agree", lambda shape, compiled: ["ours"])

    def run(**times: float) -> tuple[int, str]:
        found = ENOUGH | {key: times[name] for key in ENOUGH if (name := key[1].replace(" ", "_")) in times}
        monkeypatch.setattr(dry, "estimates", lambda *_: {key: (x, "modelled") for key, x in found.items()})
        status = gpu_session.main(["--dry", "--out", str(tmp_path)])
        return status, capsys.readouterr().out

    return run


def test_the_steps_fit_fifteen_minutes(planned, tmp_path):
    assert {number: step.seconds for number, step in gpu_session.STEPS.items()} == {1: 285, 2: 300, 3: 120}
    status, text = planned()
    assert status == 0 and "DOES NOT FIT" not in text and text.count("   fits") == 3
    rows = state.load(tmp_path / "plan.json")["modelled"]
    assert {(row["step"], row["name"]) for row in rows} == set(ENOUGH)


@pytest.mark.parametrize(
    ("phase", "seconds"), [("table", 130), ("compile", 90), ("tests", 170), ("build", 200), ("profile", 40)]
)
def test_a_plan_that_does_not_fit_fails(phase, seconds, planned):
    status, text = planned(**{phase: seconds})
    assert status == 1 and "DOES NOT FIT" in text


def test_a_step_whose_sum_is_too_long_fails(planned):
    status, text = planned(compile=65, check_triton=58, check_cuda=58, table=80, layers=50)
    assert status == 1 and "DOES NOT FIT" in text


def test_what_is_not_compiled_or_measured_here_is_modelled(monkeypatch):
    here = {
        name: dry.Compiled({"forward_kernel": 100, "key_kernel": 20}, {"forward_kernel": [2.0, 4.0], "key_kernel": []})
        for name in ("measured", "tested", "tuned")
    }
    assert here["measured"].total == 100 * 3 + 20 * 3 and str(here["measured"]) == "2 of 120 kernels compiled here"
    monkeypatch.setattr(dry, "collected", lambda: 480)
    found = dry.estimates(here, nvcc=None)
    assert set(found) == {(n, phase.name) for n, step in gpu_session.STEPS.items() for phase in step.phases}
    seconds, how = found[1, "compile"]
    assert seconds == pytest.approx(dry.COLD_START + 1.5 * 360 / 14) and "compiled here" in how
    assert all("compiled here" in how or "modelled" in how for _, how in found.values())
    # the model of all that is measured fits as it is: the figure of `make gpu DRY=1` without its compilers
    assert found[1, "table"][0] < 100 and found[2, "small"][0] < 50 and found[3, "compiled"][0] < 50


@pytest.mark.parametrize("number", gpu_session.STEPS)
def test_every_phase_keeps_time_for_those_behind_it(number):
    """If each took all that it may, the last would still have what it keeps."""
    step = gpu_session.STEPS[number]
    left = step.seconds - gpu_session.CLOSING_SECONDS
    for index, phase in enumerate(step.phases):
        kept = sum(later.keeps for later in step.phases[index + 1 :])
        seconds = gpu_session.limit(phase, left, kept)
        assert seconds >= phase.keeps
        left -= 0 if phase.beside else seconds
    assert left >= 0


# ---------------------------------------------------------------------------------------------------------- a session


@pytest.fixture
def session(monkeypatch, tmp_path):
    """A session whose phases are recorded, not run; returns (name, command, seconds) in their order."""
    ran: list[tuple[str, list[str], float]] = []
    ends: dict[str, watch.Ended] = {}

    class Running:
        def __init__(self, command, log, **variables):
            self.command, self.variables, self.begin = command, variables, time.monotonic()
            ran.append(("starts", command, 0.0))

        def wait(self, seconds, *_):
            ran.append(("ends", self.command, seconds))
            return ends.get("build", watch.Ended(0, 1.0))

        def kill(self):
            pass

    def run(command, log, seconds, **variables):
        ran.append(("runs", command, seconds))
        return next((end for name, end in ends.items() if name in " ".join(command)), watch.Ended(0, 1.0))

    def begin(number: int) -> tuple[int, dict, list]:
        ran.clear()
        status = gpu_session.main(["--step", str(number), "--out", str(tmp_path)])
        return status, state.load(tmp_path / f"step{number}.json"), ran

    monkeypatch.setattr(gpu_session, "Running", Running)
    monkeypatch.setattr(watch, "run", run)
    monkeypatch.setattr(watch, "supervise", lambda command, out, log, seconds, stall: run(command, log, seconds))
    monkeypatch.setattr(gpu_session.signal, "signal", lambda *_: None)
    found = {"gpu": {"name": "NVIDIA H200", "compute_cap": "9.0"}, "cores": 16, "nvcc": "13.0", "versions": {}}
    found["tools"] = dict.fromkeys(machine.TOOLS, "there")
    monkeypatch.setattr(machine, "describe", lambda: found)
    begin.ends = ends
    return begin


def last_words(ran: list) -> list[str]:
    return [f"{what} {' '.join(command[2:])}" for what, command, _ in ran]


def test_the_first_step_checks_before_it_measures(session, tmp_path):
    status, content, ran = session(1)
    assert status == 0
    names = [entry["name"] for entry in content["phases"]]
    assert names == ["compile", "check triton", "build", "check cuda", "table", "layers"]  # in the order of their ends
    assert content["phases"][1]["note"] == "done; 0 right, 0 wrong"
    words = last_words(ran)
    assert words[0].startswith("starts pip install --no-build-isolation")
    assert "warm" in words[1] and "--backend triton" in words[2]
    assert words[3].startswith("ends pip") and "--backend cuda" in words[4]  # needs what was built
    assert "--plan table" in words[5] and "layers" in words[6]
    assert [round(seconds) for _, _, seconds in ran] == [0, 70, 60, 100, 60, 125, 60]  # nothing took any time
    assert (tmp_path / "report.md").exists()


def test_builds_for_this_gpu_alone(session, monkeypatch):
    seen = {}
    real = gpu_session.Running

    class Running(real):
        def __init__(self, command, log, **variables):
            super().__init__(command, log, **variables)
            seen.update(variables)

    monkeypatch.setattr(gpu_session, "Running", Running)
    session(1)
    assert seen == {"SPATIAL_PE_CUDA_ARCHS": "90"}


def test_the_second_step_tests_with_all_workers_and_a_long_timeout(session):
    _, content, ran = session(2)
    assert [entry["name"] for entry in content["phases"]] == ["tests", "tune", "small"]
    tests = " ".join(ran[0][1])
    assert "-m gpu tests/backends/gpu" in tests and "-n 15" in tests
    assert "thread" not in " ".join(gpu_session.test_options(16))


def test_what_was_tuned_is_in_the_report(session, tmp_path):
    row = {"faster": {"inference": "cuda", "training": "triton"}, "failed": ["key Tile(1): dk: two runs differ"]}
    state.save(tmp_path / "tune.json", {"format": 2, "rows": {"bfloat16 D=64 N<=256": row}})
    _, content, ran = session(2)
    assert content["phases"][1]["note"] == "done; 1 shapes, 1 candidates left out"
    assert "| bfloat16 D=64 N<=256 | cuda | triton | key Tile(1): dk: two" in (tmp_path / "report.md").read_text()
    tune = ran[1][1]
    assert float(tune[tune.index("--seconds") + 1]) <= 105 - 20  # ends on its own: what it saves is whole


def test_the_third_step_says_which_tools_are_not_there(session, monkeypatch):
    found = machine.describe() | {"tools": {}}
    monkeypatch.setattr(machine, "describe", lambda: found)
    status, content, _ = session(3)
    notes = {entry["name"]: entry["note"] for entry in content["phases"]}
    assert status == 0 and list(notes) == ["sanitizer", "compile", "compiled", "profile"]
    assert notes["sanitizer"] == "not run: compute-sanitizer is not on the PATH" and "ncu" in notes["profile"]


def test_what_fails_does_not_keep_the_next_from_running(session):
    session.ends["warm"] = watch.Ended(1, 2.0)
    session.ends["triton"] = watch.Ended(1, 30.0)
    status, content, _ = session(1)
    assert status == 1 and len(content["phases"]) == 6
    assert [entry["name"] for entry in content["phases"] if not entry["ok"]] == ["compile", "check triton"]


@pytest.mark.parametrize(
    ("name", "ended", "text", "ok", "note"),
    [
        (
            "tests",
            watch.Ended(None, 150.0),
            "[gw1] PASSED tests/backends/gpu/a.py::b\n",
            True,
            "1 passed, 0 failed; its time",
        ),
        (
            "tests",
            watch.Ended(1, 90.0),
            "PASSED tests/a::b\nFAILED tests/a::c\n",
            False,
            "1 passed, 1 failed; tests/a::c",
        ),
        ("sanitizer", watch.Ended(99, 9.0), "x: done\nERROR SUMMARY: 3 errors", False, "1 shapes, 3 errors"),
        ("sanitizer", watch.Ended(1, 9.0), "Device not supported", True, "not run: not supported"),
        ("profile", watch.Ended(1, 9.0), "ERR_NVGPUCTRPERM", True, "not run: not supported"),
        ("table", watch.Ended(None, 125.0), "", False, "at its limit"),
        ("table", watch.Ended(0, 70.0), "", True, "done"),
    ],
)
def test_how_a_phase_ended(name, ended, text, ok, note):
    found = gpu_session.verdict(name, ended, text)
    assert found[0] is ok and found[1].startswith(note)


def test_a_killed_session_leaves_its_json_and_nothing_running(tmp_path):
    """A phase that hangs, the session is asked to end: what it had is there, and its process group is gone."""
    phase = f"import pathlib, time; pathlib.Path({str(tmp_path / 'begun')!r}).write_text(''); time.sleep(60)"
    code = f"""
import sys
from benchmarks import gpu_session
from benchmarks.gpu_session import Phase, Step
quick = Phase("quick", [sys.executable, "-c", "print('hello')"], 20, 1)
slow = Phase("slow", [sys.executable, "-c", {phase!r}], 60, 1)
gpu_session.STEPS[1] = Step(90, (quick, slow))
sys.exit(gpu_session.main(["--step", "1", "--out", {str(tmp_path)!r}]))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 1
    content = state.load(tmp_path / "step1.json")
    assert [(entry["name"], entry["note"]) for entry in content["phases"]] == [("quick", "done")]
    assert "hello" in (tmp_path / "step1.txt").read_text()
    assert "not run" in (tmp_path / "report.md").read_text()


# --------------------------------------------------------------------------------------------- the process that watches


def marking(tmp_path: Path, body: str) -> list[str]:
    """A command as supervise() starts it: `now` is its file, `broken` what broke before, `out` the JSON."""
    head = "import json, os, sys, time; from pathlib import Path; from benchmarks.throughput.gpu import state\n"
    head += "get = lambda name: Path(sys.argv[sys.argv.index(name) + 1])\nout, now = get('--out'), get('--now')\n"
    head += "content = state.load(out); broken = [entry['variant'] for entry in content['broken']]\n"
    (tmp_path / "command.py").write_text(head + body)
    return [sys.executable, str(tmp_path / "command.py")]


def test_what_hangs_or_crashes_is_recorded_and_the_rest_goes_on(tmp_path):
    out, log = tmp_path / "step1.json", tmp_path / "step1.txt"
    state.save(out, state.new(step=1))
    body = """
for name in ("hangs", "crashes", "works"):
    if name in broken or any(row == name for row in content["rows"]):
        continue
    state.mark(now, [1, 1, 1, 1], "forward", name)
    if name == "hangs":
        time.sleep(60)
    if name == "crashes":
        os._exit(70)
    content["rows"].append(name)
    state.save(out, content)
"""
    begin = time.monotonic()
    ended = watch.supervise(marking(tmp_path, body), out, log, 60.0, stall=3.0)
    content = state.load(out)
    assert time.monotonic() - begin < 40
    assert content["rows"] == ["works"] and ended.status == 1
    assert [(entry["variant"], entry["why"]) for entry in content["broken"]] == [
        ("hangs", "did not come back within 3 s"),
        ("crashes", "ended with status 70"),
    ]


def test_a_command_that_ends_with_a_failure_is_not_started_again(tmp_path):
    out, log = tmp_path / "step1.json", tmp_path / "step1.txt"
    state.save(out, state.new(step=1))
    ended = watch.supervise(marking(tmp_path, "print('once'); sys.exit(1)"), out, log, 30.0)
    assert ended.status == 1 and state.load(out)["broken"] == [] and log.read_text().count("once\n") == 1


def test_run_ends_a_command_at_its_limit(tmp_path):
    log = tmp_path / "log.txt"
    code = "import time; print('begun'); time.sleep(60)"
    ended = watch.run([sys.executable, "-c", code], log, 1.5)
    assert (ended.status is None or ended.status < 0) and ended.seconds < 15
    assert "begun" in log.read_text()
    assert watch.run([sys.executable, "-c", "exit(4)"], log, 10).status == 4


# --------------------------------------------------------------------------------------------------------------- report


def row(tokens: int, dim: int, direction: str = "forward", **median_ms: float) -> dict:
    return {
        "size": [10, 16, tokens, dim],
        "packed": tokens == cases.WINDOW,
        "direction": direction,
        "median_ms": median_ms,
        "tflops": {name: 1 / ms for name, ms in median_ms.items()},
        "refused": {"fa3": "ModuleNotFoundError: No module named 'flash_attn_interface'"},
    }


CONTENT = state.new(
    device={"name": "NVIDIA H100", "cuda": "13.0", "cudnn": 91000},
    machine={"versions": {"torch": "2.11.0", "triton": "3.6.0"}},
    host_microseconds={"ours": {"median": 41.5, "samples": [41.5]}, "off": {"refused": "no"}},
) | {
    "rows": [
        row(576, 64, ours=1.0, off=0.98, **{"eager-cudnn": 2.6, "eager-flash": 3.0, "rotary-flash": 1.1, "flex": 1.3}),
        row(576, 64, "backward", ours=2.0, **{"eager-flash": 3.0}),
        row(4096, 64, ours=2.0, auto=1.7, off=1.5, **{"eager-flash": 2.0, "rotary-cudnn": 1.6}),
        row(64, 80, **{"eager-flash": 1.0}),  # ours was refused
    ],
    "broken": [{"size": [1, 16, 196, 64], "direction": "forward", "variant": "fa4", "why": "status -11"}],
    "not_run": [[[36, 16, 1024, 64], "forward"]],
    "phases": [{"step": 1, "name": "compile", "seconds": 27.2, "ok": True, "note": "done"}],
}


def test_the_report_says_what_was_met_and_what_was_missed():
    text = report.table(CONTENT)
    (line,) = [line for line in text.splitlines() if line.startswith("| 576, 64 ")]
    assert "2.60x (eager-cudnn), met: >= 2.5x" in line  # against the best of them
    assert "1.10x (rotary-flash), MISSED: >= 1.15x" in line
    assert "+2.0%, met: <= 5%" in line
    (line,) = [line for line in text.splitlines() if line.startswith("| 4096, 64 ")]
    assert "1.00x (eager-flash), MISSED: >= 1.3x" in line
    assert "0.94x, MISSED: >= 0.98x" in line  # auto took 1.7, the fastest path 1.6
    (line,) = [line for line in text.splitlines() if line.startswith("| windows of 64, 80 ")]
    assert line.count("not run") == 3
    assert "fa3, 4 times: ModuleNotFoundError" in text
    assert "fa4 at [1, 16, 196, 64], forward, broke: status -11" in text
    assert "no time for 1" in text and "36x16x1024x64 forward" in text
    assert "| ours | 41.5 |" in text and "refused: no" in text
    assert "| 1 | compile | 27 s |" in text and "torch 2.11.0, triton 3.6.0" in text


def test_the_report_marks_what_is_modelled():
    text = report.table(CONTENT)
    (line,) = [line for line in text.splitlines() if line.startswith("| 729, 72 ")]
    assert line.startswith("| 729, 72 | not run (modelled ") and line.count("modelled") == 2 and "met" not in line
    table = report.shapes(CONTENT["rows"])
    header, line = (table.splitlines()[i] for i in (4, 6))
    assert "| ours, us | modelled, us |" in header
    assert "| 10 x 576, 64 | forward | 1000 | 47 |" in line  # 10 of 64 images, 300 us for all
    assert "A figure without a mark was measured" in text


def test_the_cuda_kernels_have_targets_of_their_own():
    assert report.cuda_targets(CONTENT["rows"]) == ""
    rows = [
        row(196, 64, cuda=1.0, **{"cuda-off": 0.99, "rotary-flash": 1.5, "rotary-cudnn": 1.6}),
        row(196, 64, "backward", cuda=2.0, **{"rotary-flash": 2.4}),
        row(576, 64, cuda=1.0, **{"cuda-off": 0.9, "flex": 1.1}),
    ]
    lines = report.cuda_targets(rows).splitlines()
    assert (
        "| 196, 64 | 1.50x (rotary-flash), met: >= 1.4x | +1.0%, met: <= 3% | 1.20x (rotary-flash), MISSED: >= 1.3x |"
        in lines
    )
    assert "| 576, 64 | 1.10x (flex), MISSED: >= 1.2x | +11.1%, MISSED: <= 3% | – |" in lines
    assert "| windows of 64, 80 | not run | not run | not run |" in lines


def test_the_report_is_well_formed():
    for block in report.table(CONTENT).split("\n\n"):
        widths = {line.count("|") for line in block.splitlines() if line.startswith("|")}
        assert len(widths) <= 1, block


def test_the_report_of_several_steps(tmp_path):
    first = state.new(step=1, machine={"versions": {"torch": "2.11.0"}}) | {"rows": CONTENT["rows"][:1]}
    third = state.new(step=3, machine={"versions": {}}) | {"rows": [row(576, 64, ours=1.0, **{"compiled-cudnn": 1.9})]}
    state.save(tmp_path / "step1.json", first)
    state.save(tmp_path / "step3.json", third)
    report.write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "2.60x (eager-cudnn), met" in text and "1.90x compiled-cudnn" in text


def test_nothing_measured_is_a_report_too(tmp_path):
    state.save(tmp_path / "step1.json", state.new(step=1, machine={}))
    report.write(tmp_path)  # no error
    assert "not run (modelled" in (tmp_path / "report.md").read_text()
