# SPDX-License-Identifier: Apache-2.0
"""Run a command with a time limit, its output here and in a log; kill it if it hangs, and restart it without what hung.

A kernel that never ends, or takes the device down, ends its process. That process records what it is about to run
(`mark` of state.py), and reads in the step's JSON what broke before (`why_not`): it resumes with the rest.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from . import state

# A call without result by then has hung; a compilation by inductor may take longer.
STALL_SECONDS = 30.0
MOST_RESTARTS = 6
# Start-up time of a process: it is not restarted with less time left.
START_SECONDS = 15.0
# An interrupted pytest prints its summary.
GRACE_SECONDS = 8.0


@dataclass(frozen=True)
class Ended:
    status: int | None  # None: killed at its limit, or because of no progress
    seconds: float
    stalled: float | None = None  # seconds without progress, if that ended it

    @property
    def why(self) -> str | None:
        """Return what was wrong with it, or None if it ended well or its time was up."""
        if self.stalled is not None:
            return f"did not come back within {self.stalled:.0f} s"
        return f"ended with status {self.status}" if self.status else None


class Running:
    """A command in its own process group."""

    def __init__(self, command: list[str], log: Path, **variables: str) -> None:
        self.begin = time.monotonic()
        self.file = log.open("a")
        print(head := f"$ {' '.join(command)}", file=self.file, flush=True)
        print(head, flush=True)
        self.process = subprocess.Popen(
            command, env=environment() | variables, start_new_session=True, text=True, errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.copier = threading.Thread(target=_copy, args=(self.process.stdout, self.file), daemon=True)
        self.copier.start()

    def wait(self, seconds: float, alive: Path | None = None, stall: float = STALL_SECONDS) -> Ended:
        """Wait. alive: a file that the command touches on progress; it is killed after `stall` seconds without."""
        status, stalled = None, None
        until = time.monotonic() + seconds
        try:
            while (status := self.process.poll()) is None:
                time.sleep(0.05)
                if alive is not None and time.time() - alive.stat().st_mtime > stall:
                    stalled = stall
                    break
                if time.monotonic() > until:
                    self.process.send_signal(signal.SIGINT)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        self.process.wait(GRACE_SECONDS)
                    break
        finally:  # also on termination of this process
            self.kill()
        return Ended(status, time.monotonic() - self.begin, stalled)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # and its own processes
        self.process.wait()
        self.copier.join(5)
        self.file.close()


def _copy(source, file) -> None:
    for line in source:
        print(line, end="", flush=True)
        with contextlib.suppress(ValueError):  # closed: a process that outlived its group still writes
            print(line, end="", file=file, flush=True)


def run(command: list[str], log: Path, seconds: float, **variables: str) -> Ended:
    return Running(command, log, **variables).wait(seconds)


def supervise(command: list[str], out: Path, log: Path, seconds: float, stall: float = STALL_SECONDS) -> Ended:
    """Run a command that marks its calls, until it is done, its time is up, or it has broken too often.

    The command gets --out, --until (of time.time()) and --now; what broke is appended to "broken" of out. It ends with
    status 1 if it is done and something was wrong; with another, or not at all, if it broke.
    """
    begin = time.monotonic()
    until = time.time() + seconds
    with tempfile.TemporaryDirectory() as folder:
        now = Path(folder) / "now.json"
        broke: list[str] = []
        for _ in range(1 + MOST_RESTARTS):
            state.mark(now, None, None, "start")
            arguments = ("--out", str(out), "--until", str(until), "--now", str(now))
            ended = Running([*command, *arguments], log).wait(until + 2 - time.time(), now, stall)
            if ended.stalled is None and ended.status in (0, 1, None):
                break
            entry = state.load(now)
            entry["why"] = entry.pop("error") or ended.why
            content = state.load(out)
            content["broken"].append(entry)
            state.save(out, content)
            print(f"broken: {entry}", flush=True)
            broke.append(entry["variant"])
            if until - time.time() < START_SECONDS or broke.count("start") > 1:
                break
    status = 1 if broke else ended.status
    return Ended(status, time.monotonic() - begin)


def environment() -> dict[str, str]:
    """Return the environment, with one Triton cache for all: inductor would move it for its compile workers."""
    cache = os.environ.get("TRITON_CACHE_DIR") or str(Path.home() / ".triton" / "cache")
    path = os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
    # inductor's pool of compilers for each of many processes would be far more than there are cores
    ours = {
        "TRITON_CACHE_DIR": cache,
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": path,
    }
    return os.environ | ours


def python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]
