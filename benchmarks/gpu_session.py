# SPDX-License-Identifier: Apache-2.0
"""Run checks and measurements on a machine with a GPU, in three steps of bounded time, each useful alone. `make gpu`.

    python -m benchmarks.gpu_session --step 1 --out DIR
    python -m benchmarks.gpu_session --dry [--out DIR]

1. 285 s: builds for this GPU, compiles the kernels of the ten shapes with targets, compares every kernel with float64,
   measures the ten shapes, and a layer of two real towers.
2. 300 s: the tests, tuning, small batches.
3. 120 s: torch.compile, FlexAttention, cuDNN's own rotation, compute-sanitizer, a profile of two kernels.

The steps are meant to run one after the other on one machine: they share the build and Triton's cache. A step prints
its progress, and leaves in DIR, complete after every row, whenever it ends:

    step1.json   phases, checks, rows; of steps 2 and 3 likewise
    step1.txt    the output of all phases
    report.md    of all steps so far: measurements, models, and which targets are met

No phase keeps the next from running; the exit status says whether all went well. ``--dry`` needs no GPU: it checks the
compared functions, times the phases on this machine or by a model, and fails if a step would exceed its limit.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.throughput.gpu import machine, report, state, watch
from benchmarks.throughput.gpu.watch import Ended, Running, python

# Time limit of a step, for the report and for killing processes.
CLOSING_SECONDS = 10.0
TESTS = python("pytest", "-p", "no:cacheprovider", "-v", "--durations=5", "-m", "gpu", "tests/backends/gpu")
INSTALL = python("pip", "install", "--no-build-isolation", "--no-deps", "-e", ".")
SANITIZE = [
    *("compute-sanitizer", "--tool", "memcheck", "--report-api-errors", "no", "--target-processes", "application-only"),
    *("--error-exitcode", "99", *python("benchmarks.gpu_memcheck")),
]
# clocks are not changed: they belong to the owner of the machine
PROFILE = [
    *("ncu", "--clock-control", "none", "--kernel-name", "regex:^(forward_kernel|key_kernel)$", "--launch-count", "2"),
    *("--section", "SpeedOfLight", "--section", "Occupancy", "--section", "WarpStateStats", "--section", "LaunchStats"),
    *python("benchmarks.gpu_memcheck", "--profile"),
]
# Messages of the tools for a machine that does not support them.
NOT_SUPPORTED = re.compile(
    r"device not supported|not supported on|failed to initialize|error 999|ERR_NVGPUCTRPERM|LibraryNotLoaded", re.I
)
GPU = "benchmarks.throughput.gpu."


@dataclass(frozen=True)
class Phase:
    """Part of a step.

    seconds: time limit; less if the later phases would not have theirs (`keeps`: what they leave it).
    beside: it starts, and the next phases run in parallel; `after`: phases that this one waits for.
    supervised: restarted after what breaks it, or after `stall` seconds without progress.
    tool: skipped, with the reason, if it is not on the PATH.
    """

    name: str
    command: list[str]
    seconds: float
    keeps: float
    beside: bool = False
    after: tuple[str, ...] = ()
    supervised: bool = False
    stall: float = watch.STALL_SECONDS
    tool: str | None = None
    variables: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Step:
    seconds: float
    phases: tuple[Phase, ...]


WARM = python(GPU + "warm", "--out", "{out}", "--seconds", "{seconds}", "--plan")
# {seconds}, {begin}, {out}, {folder} and {arch} are filled in when a phase starts; gpu/dry.py checks that all fits.
STEPS = {
    1: Step(
        285,
        (
            Phase("build", INSTALL, 100, 0, beside=True, variables=(("SPATIAL_PE_CUDA_ARCHS", "{arch}"),)),
            Phase("compile", [*WARM, "table"], 70, 40),
            Phase("check triton", python(GPU + "check", "--backend", "triton"), 60, 20, supervised=True),
            Phase("check cuda", python(GPU + "check", "--backend", "cuda"), 60, 15, after=("build",), supervised=True),
            Phase("table", python(GPU + "measure", "--plan", "table"), 125, 75, supervised=True),
            Phase("layers", python(GPU + "layers"), 60, 30, supervised=True, stall=45),
        ),
    ),
    2: Step(
        300,
        (
            Phase("tests", TESTS, 160, 60, variables=(("OMP_NUM_THREADS", "1"),)),
            Phase(
                "tune",
                python("spatial_pe.cli", "tune", "--quick", "--seconds", "{begin}", "--out", "{folder}/tune.json"),
                *(105, 40),
            ),
            Phase("small", python(GPU + "measure", "--plan", "small"), 50, 30, supervised=True),
        ),
    ),
    3: Step(
        120,
        (
            Phase(
                "sanitizer", SANITIZE, 60, 0, beside=True, tool="compute-sanitizer",
                variables=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
            ),
            Phase("compile", [*WARM, "compiled"], 50, 30),
            Phase(
                "compiled", python(GPU + "measure", "--plan", "compiled"), 50, 25,
                after=("sanitizer",), supervised=True, stall=45,
            ),
            Phase("profile", PROFILE, 35, 15, tool="ncu"),
        ),
    ),
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", type=int, choices=STEPS, help="1, 2 or 3")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder (default: gpu-results)")
    parser.add_argument("--dry", action="store_true", help="without a GPU: check and time all three")
    options = parser.parse_args(argv)
    if options.dry:
        from benchmarks.throughput.gpu import dry

        return dry.run(STEPS, options.out)
    if options.step is None:
        parser.error("--step is missing")
    for number in (signal.SIGTERM, signal.SIGHUP):  # whoever ends this process ends its children
        signal.signal(number, lambda *_: sys.exit(1))
    return Session(options.step, options.out).run()


class Session:
    """One step: its phases in order, and its JSON."""

    def __init__(self, number: int, folder: Path) -> None:
        self.number, self.step = number, STEPS[number]
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.out, self.log = folder, folder / f"step{number}.json", folder / f"step{number}.txt"
        self.begin = time.monotonic()
        self.machine = machine.describe()
        self.beside: dict[str, tuple[Phase, Running]] = {}
        self.log.write_text("")
        state.save(self.out, state.new(step=number, seconds=self.step.seconds, machine=self.machine))

    def left(self) -> float:
        return self.step.seconds - CLOSING_SECONDS - (time.monotonic() - self.begin)

    def run(self) -> int:
        print(*machine.lines(self.machine), sep="\n", flush=True)
        try:
            for index, phase in enumerate(self.step.phases):
                for name in phase.after:
                    self.join(name, kept=self.kept(index))
                self.phase(phase, limit(phase, self.left(), self.kept(index + 1)))
            for name in list(self.beside):
                self.join(name, kept=0)
        finally:
            for _, running in self.beside.values():
                running.kill()
            report.write(self.folder)
        phases = state.load(self.out)["phases"]
        summary = [f"step {self.number}: {time.monotonic() - self.begin:.0f} of {self.step.seconds:.0f} s"]
        summary += [f"  {entry['name']:<13} {entry['seconds']:6.1f} s  {entry['note']}" for entry in phases]
        print(*summary, sep="\n", flush=True)
        return 0 if all(entry["ok"] for entry in phases) else 1

    def kept(self, index: int) -> float:
        """Return the seconds that the phases from this one on are guaranteed."""
        return sum(phase.keeps for phase in self.step.phases[index:])

    def phase(self, phase: Phase, seconds: float) -> None:
        if phase.tool is not None and self.machine["tools"].get(phase.tool) is None:
            self.record(phase, None, f"not run: {phase.tool} is not on the PATH")
            return
        if seconds < 2:
            self.record(phase, None, "not run: no time was left", ok=False)
            return
        command, variables = self.filled(phase, seconds)
        if phase.beside:
            self.beside[phase.name] = phase, Running(command, self.log, **variables)
        elif phase.supervised:
            self.record(phase, watch.supervise(command, self.out, self.log, seconds, phase.stall))
        else:
            self.record(phase, watch.run(command, self.log, seconds, **variables))

    def join(self, name: str, kept: float) -> None:
        if name in self.beside:
            phase, running = self.beside.pop(name)
            started = time.monotonic() - running.begin
            self.record(phase, running.wait(max(0.0, min(phase.seconds - started, self.left() - kept))))

    def filled(self, phase: Phase, seconds: float) -> tuple[list[str], dict[str, str]]:
        values = {
            "seconds": f"{max(1.0, seconds - 5):.0f}",
            "begin": f"{max(1.0, seconds - 20):.0f}",  # no shape of the tuner after that: one takes 10 s
            "out": str(self.out),
            "folder": str(self.folder),
            "arch": machine.architecture(self.machine) or "",
        }
        command = [part.format_map(values) if "{" in part else part for part in phase.command]
        if phase.name == "tests":
            command += test_options(self.machine["cores"])
        return command, {name: value.format_map(values) for name, value in phase.variables}

    def record(self, phase: Phase, ended: Ended | None, why: str | None = None, ok: bool = True) -> None:
        """Write the phase into the JSON; its process is over."""
        text = self.log.read_text(errors="replace")
        content = state.load(self.out)
        if phase.name == "tune" and (tuned := self.folder / "tune.json").exists():
            content["tuned"] = state.load(tuned)["rows"]
        if ended is not None:
            ok, why = verdict(phase.name, ended, text)
            notes = counted(phase.name, content)
            if ended.status == 1 and not phase.beside and not notes:
                notes = text.strip().splitlines()[-1:]
            why = "; ".join([str(why), *notes])[:500]
        entry = {"name": phase.name, "seconds": round(ended.seconds, 1) if ended else 0.0, "ok": ok, "note": why}
        content["phases"].append(entry)
        state.save(self.out, content)


def limit(phase: Phase, left: float, kept: float) -> float:
    """Return the seconds for a phase, given the rest of the step, of which the later phases keep some."""
    return min(phase.seconds, left if phase.beside else left - kept)


def test_options(cores: int) -> list[str]:
    """Return pytest options: as many workers as cores, as most of the time of a test is compiling its kernels. A test
    that takes 180 s fails by a signal: killing its worker would move that worker's tests to others, and lose its
    reports."""
    import importlib.util

    options = []
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(max(1, cores - 1)), "--dist", "worksteal"]
    if importlib.util.find_spec("pytest_timeout"):
        options += ["--timeout", "180", "--timeout-method", "signal"]
    return options


def verdict(name: str, ended: Ended, text: str) -> tuple[bool, str]:
    """Return whether a phase went well, and a note; text: the step's log."""
    how = ended.why or ("at its limit" if ended.status is None else "done")
    found = VERDICTS.get(name, lambda *_: None)(ended, text)
    return found or (ended.status == 0, how)


def counted(name: str, content: dict[str, Any]) -> list[str]:
    """Return a summary of what a phase has left in the JSON."""
    kind, _, backend = name.partition(" ")
    if kind == "check":
        rows = [row for row in content["checks"] if row["backend"] == backend]
        wrong = [f"{row['unit']} {row['dtype']} {row['size']}: {row['wrong']}" for row in rows if row.get("wrong")]
        return [f"{len(rows) - len(wrong)} right, {len(wrong)} wrong", *wrong[:5]]
    if name == "tune":
        rows = content.get("tuned", {})
        return [f"{len(rows)} shapes, {sum(len(row.get('failed', [])) for row in rows.values())} candidates left out"]
    if name in ("table", "small", "compiled"):
        return [f"{len(content['rows'])} rows, {len(content['not_run'])} not run, {len(content['broken'])} broken"]
    return []


def _tests(ended: Ended, text: str) -> tuple[bool, str]:
    """Judge by the lines of the tests: there is no summary if the time was up."""
    passed = len(set(re.findall(r"PASSED (tests/\S+)|(tests/\S+) PASSED", text)))
    failed = sorted(set(re.findall(r"(?:FAILED|ERROR) (tests/\S+)", text)))
    note = f"{passed} passed, {len(failed)} failed" + "".join(f"; {name}" for name in failed[:10])
    if ended.status is None:
        return passed > 0 and not failed, f"{note}; its time was up before all were run"
    return ended.status == 0, note


def _sanitizer(ended: Ended, text: str) -> tuple[bool, str]:
    if ended.status and NOT_SUPPORTED.search(text):
        return True, "not run: not supported on this machine"
    errors = re.findall(r"ERROR SUMMARY: (\d+) error", text)
    note = f"{len(re.findall('done$', text, re.MULTILINE))} shapes, {errors[-1] if errors else 'unknown'} errors"
    if ended.status is None and not re.search("Invalid|Misaligned|out-of-range", text):
        return True, f"{note}, nothing found before its limit"
    return ended.status == 0, note


def _profile(ended: Ended, text: str) -> tuple[bool, str] | None:
    if ended.status and NOT_SUPPORTED.search(text):
        return True, "not run: not supported on this machine"
    return None


VERDICTS: dict[str, Callable[[Ended, str], Any]] = {"tests": _tests, "sanitizer": _sanitizer, "profile": _profile}


if __name__ == "__main__":
    sys.exit(main())
