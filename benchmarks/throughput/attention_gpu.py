# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels against what a user has today: forward, backward, and both.

    python -m benchmarks.throughput.attention_gpu --out DIR/attention.json [--quick] [--seconds 480]
    python -m benchmarks.throughput.attention_gpu --dry

Writes attention.json (rewritten after every result), and from it table.md and attention.png beside it. What is compared
is in gpu/variants.py, how it is timed in gpu/timing.py, which shapes, in which order, in gpu/cases.py: shapes that no
time was left for are listed as not run.

This process only watches: the measuring is done by another one, which is started again, without the variant that broke
it, where a kernel takes the device down or never ends.

``--dry`` needs no GPU: it checks every variant that a CPU can run against the reference, forward and backward, and
plans every launch of every shape.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.throughput.gpu import report, state

SECONDS = {False: 480, True: 150}  # by --quick
REPORT_SECONDS = 12
# A call that has not come back by then never will: the slowest is a compilation by inductor.
STALL_SECONDS = 60
MOST_RESTARTS = 6
# What a process needs before it measures anything.
START_SECONDS = 20


def main(argv: list[str] | None = None) -> int:
    begin = time.time()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="six shapes")
    parser.add_argument("--seconds", type=float, help="end within so many (default: 480, with --quick 150)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--dry", action="store_true", help="without a GPU: check and plan")
    options = parser.parse_args(argv)
    if options.dry:
        from benchmarks.throughput.gpu import dry

        dry.run()
        return 0
    if options.out is None:
        parser.error("--out is missing")
    seconds = options.seconds or SECONDS[options.quick]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python -m benchmarks.throughput.attention_gpu", *(sys.argv[1:] if argv is None else argv)])
    state.save(options.out, {"command": command, "seconds": seconds, "rows": [], "broken": []})
    quick = ["--quick"] if options.quick else []

    ahead = warm_seconds(seconds)
    watch([sys.executable, "-m", "benchmarks.throughput.gpu.warm", "--seconds", str(ahead), *quick], begin + ahead + 8)
    measure(options.out, until=begin + seconds - REPORT_SECONDS, options=quick)
    report.write(options.out)
    return 0 if state.load(options.out)["rows"] else 1


def warm_seconds(seconds: float) -> float:
    """For compiling ahead, of which the first ten go into starting processes."""
    return min(75.0, 0.5 * seconds, max(30.0, 0.25 * seconds))


def measure(out: Path, until: float, options: list[str]) -> None:
    """Runs gpu/measure.py until it is done, its time is up, or it has broken too often."""
    with tempfile.TemporaryDirectory() as folder:
        now = Path(folder) / "now.json"
        module = [sys.executable, "-m", "benchmarks.throughput.gpu.measure"]
        for _ in range(1 + MOST_RESTARTS):
            now.write_text(json.dumps({"size": None, "direction": None, "variant": "start", "error": None}))
            command = [*module, "--out", str(out), "--until", str(until), "--now", str(now), *options]
            # a compilation may outlast the time that was left when it began
            why = watch(command, until=until + 8, alive=now)
            if why is None:
                return
            entry = json.loads(now.read_text())
            entry["why"] = entry.pop("error") or why
            content = state.load(out)
            content["broken"].append(entry)
            state.save(out, content)
            print(f"broken: {entry}", flush=True)
            if time.time() > until - START_SECONDS or [b["variant"] for b in content["broken"]].count("start") > 1:
                return


def watch(command: list[str], until: float, alive: Path | None = None) -> str | None:
    """Runs a command. Returns None where it ended well or its time was up, else what was wrong with it.

    alive: a file that the command touches as it gets ahead; it is ended where it has not for STALL_SECONDS.
    """
    process = subprocess.Popen(command, env=environment(), start_new_session=True)
    try:
        while process.poll() is None:
            time.sleep(0.1)
            if time.time() > until:
                return None
            if alive is not None and time.time() - alive.stat().st_mtime > STALL_SECONDS:
                return f"did not come back within {STALL_SECONDS} s"
        return None if process.returncode == 0 else f"the process ended with status {process.returncode}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and its own processes
        process.wait()


def environment() -> dict[str, str]:
    """One Triton cache for all: inductor would move it to a place of its own in the processes that it compiles in."""
    cache = os.environ.get("TRITON_CACHE_DIR") or str(Path.home() / ".triton" / "cache")
    # inductor's pool of compilers for each of many processes would be far more than there are cores
    return os.environ | {"TRITON_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1", "PYTHONUNBUFFERED": "1"}


if __name__ == "__main__":
    sys.exit(main())
