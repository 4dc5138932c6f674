# SPDX-License-Identifier: Apache-2.0
"""All that is done on a machine with a GPU, in a bounded time: build, test, sanitize, tune, measure. `make gpu`.

    python -m benchmarks.gpu_session --out DIR [--quick]

Ends within 9 minutes, with --quick within 3. No step keeps the next from running; the exit status says whether all went
well. What it leaves in DIR:

    session.txt    what ran, how long and how it ended; the output of building, tuning and measuring
    tests.txt      pytest -m gpu
    sanitizer.txt  compute-sanitizer, or why there is none
    tune.json      the tile sizes that were chosen
    attention.json, table.md, attention.png   benchmarks.throughput.attention_gpu
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

PYTHON = sys.executable
TESTS = [PYTHON, "-m", "pytest", "-p", "no:cacheprovider", "-v", "--durations=10", "-m", "gpu", "tests/gpu"]
MEMCHECK = [
    *("compute-sanitizer", "--tool", "memcheck", "--report-api-errors", "no", "--target-processes", "application-only"),
    *("--error-exitcode", "99", PYTHON, "-m", "benchmarks.gpu_memcheck"),
]
# The tool's own words for a machine that it cannot work on.
NOT_SUPPORTED = re.compile(r"device not supported|not supported on|failed to initialize|error 999", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """Seconds: of the whole, and the most that a step may take. Measuring gets what is left."""

    total: float
    install: float
    tests: float
    sanitizer: float
    tune: float


FULL = Budget(total=525, install=120, tests=150, sanitizer=90, tune=90)
QUICK = Budget(total=170, install=60, tests=40, sanitizer=40, tune=15)
# What is kept for measuring whatever the steps before it take, and what measuring may take over its time.
MEASURE_AT_LEAST, MEASURE_OVER = 30.0, 25.0


@dataclass(frozen=True)
class Step:
    name: str
    status: int | None  # None: ended at its limit
    seconds: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.status == 0

    def __str__(self) -> str:
        how = "at its limit" if self.status is None else f"status {self.status}"
        return f"{self.name:<10} {self.seconds:6.0f} s  {how}  {self.note}".rstrip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(argv)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    budget = QUICK if options.quick else FULL
    begin = time.monotonic()
    log = out / "session.txt"
    log.write_text("")

    def left() -> float:
        return budget.total - (time.monotonic() - begin)

    steps = [install(log, budget.install)]
    # neither measures anything, so they may share the machine
    with ThreadPoolExecutor(2) as pool:
        checks = [pool.submit(test, out / "tests.txt", budget.tests, options.quick)]
        checks += [pool.submit(sanitize, out / "sanitizer.txt", budget.sanitizer)]
        steps += [check.result() for check in checks]
    steps.append(tune(log, out / "tune.json", min(budget.tune, left() - MEASURE_OVER - MEASURE_AT_LEAST)))
    steps.append(measure(log, out / "attention.json", left() - MEASURE_OVER, options.quick))

    summary = "\n".join(map(str, steps)) + f"\nall        {time.monotonic() - begin:6.0f} s"
    log.write_text(f"{summary}\n\n{log.read_text()}")
    print(summary, flush=True)
    return 0 if all(step.ok for step in steps) else 1


# --------------------------------------------------------------------------------------------------------------- steps


def install(log: Path, limit: float) -> Step:
    """The C++ extension and the package. The Triton kernels need neither: the checkout is on the path anyway."""
    return run("install", [PYTHON, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."], log, limit)


def test(log: Path, limit: float, quick: bool) -> Step:
    """Most of the time of a test is compiling its kernels, so several run at once where pytest-xdist is there."""
    workers = max(1, min(8, len(os.sched_getaffinity(0)) // 2 - 1))
    options = ["-n", str(workers), "--dist", "worksteal"] if importlib.util.find_spec("xdist") else []
    if options and importlib.util.find_spec("pytest_timeout"):  # a kernel that never ends costs a worker, not the run
        options += ["--timeout", "60", "--timeout-method", "thread"]
    step = run("tests", [*TESTS, *options], log, limit, OMP_NUM_THREADS="2")
    text = log.read_text(errors="replace")
    passed = len(set(re.findall(r"PASSED (tests/\S+)|(tests/\S+) PASSED", text)))
    failed = len(set(re.findall(r"(?:FAILED|ERROR) (tests/\S+)", text)))
    note = f"{passed} passed, {failed} failed"
    if step.status is not None:
        return replace(step, note=note)
    # the short run has no time for all of them
    return replace(step, status=0 if quick and passed and not failed else None, note=f"{note}, not all were run")


def sanitize(log: Path, limit: float) -> Step:
    if shutil.which(MEMCHECK[0]) is None:
        log.write_text(f"{MEMCHECK[0]} is not available: it is not on the PATH\n")
        return Step("sanitizer", 0, 0, "not available")
    step = run("sanitizer", MEMCHECK, log, limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    text = log.read_text(errors="replace")
    if not step.ok and NOT_SUPPORTED.search(text):
        return replace(step, status=0, note="not supported on this machine")
    errors = re.findall(r"ERROR SUMMARY: (\d+) error", text)
    note = f"{len(re.findall('done$', text, re.MULTILINE))} shapes, {errors[-1] if errors else 'unknown'} errors"
    if step.status is None and not re.search("Invalid|Misaligned|out-of-range", text):
        return replace(step, status=0, note=f"{note}, nothing found before its limit")
    return replace(step, note=note)


def tune(log: Path, out: Path, limit: float) -> Step:
    command = [PYTHON, "-m", "spatial_pe.cli", "tune", "--quick", "--seconds", f"{max(limit - 10, 1):.0f}"]
    return run("tune", [*command, "--out", str(out)], log, limit)


def measure(log: Path, out: Path, seconds: float, quick: bool) -> Step:
    command = [PYTHON, "-m", "benchmarks.throughput.attention_gpu", "--out", str(out), "--seconds", f"{seconds:.0f}"]
    step = run("measure", [*command, *(["--quick"] if quick else [])], log, seconds + 15)
    if step.status is None and out.exists() and not out.with_name("table.md").exists():
        run("report", [PYTHON, "-m", "benchmarks.throughput.gpu.report", str(out)], log, 10)
    return step


# ---------------------------------------------------------------------------------------------------- running a command


def run(name: str, command: list[str], log: Path, limit: float, **variables: str) -> Step:
    """Runs a command, its output here and at the end of the log. At its limit it is interrupted, then killed."""
    begin = time.monotonic()
    if limit < 1:
        return Step(name, None, 0, "no time was left")
    path = os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path} | variables
    with log.open("a") as file:
        head = f"$ {' '.join(command)}"
        print(head, file=file, flush=True)
        print(head, flush=True)
        process = subprocess.Popen(
            command, env=environment, start_new_session=True, text=True, errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        copier = threading.Thread(target=_copy, args=(process.stdout, file), daemon=True)
        copier.start()
        status: int | None
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
            process.send_signal(signal.SIGINT)  # pytest sums up what it has
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(8)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        copier.join(5)
    return Step(name, status, time.monotonic() - begin)


def _copy(source, file) -> None:
    for line in source:
        print(line, end="", flush=True)
        with contextlib.suppress(ValueError):  # closed: a process that outlived its group still writes
            print(line, end="", file=file, flush=True)


if __name__ == "__main__":
    sys.exit(main())
