# SPDX-License-Identifier: Apache-2.0
"""Count instructions of the CPU kernel by valgrind: a figure that is the same on every run.

    python -m tools.instructions --out benchmarks/results/cpu/instructions.json

valgrind emulates a CPU without AVX-512: the AVX2 kernel is counted, on one thread. One head, rotation on and off. A
call is the difference between processes that make more and fewer. Five minutes; other load does not matter.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Case:
    direction: str
    dtype: str  # float32, bfloat16
    tokens: int
    head_dim: int
    rotated: bool

    @property
    def flops(self) -> float:
        return (4 if self.direction == "forward" else 10) * self.tokens**2 * self.head_dim


CASES = [
    Case(direction, dtype, tokens, head_dim, rotated)
    for direction in ("forward", "backward")
    for dtype in ("float32", "bfloat16")
    for tokens, head_dim in ((64, 80), (196, 64))
    for rotated in (False, True)
]


# Calls to average over: the rest of the process varies by some thousand instructions, which is little beside them.
COUNTED_FLOPS = 2e7


class CountError(Exception):
    """valgrind failed to count; the message says why."""


def count(case: Case) -> int:
    """Return the instructions of one call.

    Raises:
        CountError: valgrind is missing, or failed.
    """
    calls = max(1, round(COUNTED_FLOPS / case.flops))
    return (_run(case, 1 + calls) - _run(case, 1)) // calls


def _run(case: Case, calls: int) -> int:
    if shutil.which("valgrind") is None:
        raise CountError("no valgrind on PATH (Debian: apt install valgrind)")
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", sys.executable, "-S", __file__]
    command += ["--call", json.dumps(asdict(case)), str(calls)]
    # string hashes determine the layout of dictionaries: 100,000 instructions
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": "0"})
    found = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or found is None:
        raise CountError((done.stderr.strip().splitlines() or ["valgrind said nothing"])[-1])
    return int(found[1])


# ------------------------------------------------------------------------------------------ inside valgrind: no torch


def call(case: Case, calls: int) -> None:
    """Call the extension alone: Python starts in 30 million instructions, torch in thousands of millions."""
    extension = _extension()
    n, dim = case.tokens, case.head_dim
    problem = {"dtype": case.dtype, "batch": 1, "tokens": n, "heads": 1, "kv_heads": 1, "head_dim": dim}
    problem |= {"scale": dim**-0.5, "threads": 1, "sequences": [(0, 0, n, 0, n)]}
    kept = []

    def view(values: array, width: int = dim) -> tuple[int, int, int, int]:
        kept.append(values)
        return values.buffer_info()[0], n * width, width, width

    if case.rotated:
        problem |= {"cos": view(_floats(n * dim // 2), dim // 2), "sin": view(_floats(n * dim // 2), dim // 2)}
        problem |= {"pairing": "half", "rotary_dim": dim}
    q, k, v, out, dout, dq, dk, dv = (view(_elements(n * dim, case.dtype)) for _ in range(8))
    lse = view(_floats(n), 1)[0]
    for index in range(calls):
        if case.direction == "forward" or index == 0:
            extension.forward(problem, q=q, k=k, v=v, out=out, lse=lse)
        if case.direction == "backward":
            extension.backward(problem, q=q, k=k, v=v, out=out, lse=lse, dout=dout, dq=dq, dk=dk, dv=dv)


def _extension():
    (path,) = (ROOT / "spatial_pe").glob("_C.*so")
    ctypes.CDLL("libgomp.so.1", ctypes.RTLD_GLOBAL)
    spec = importlib.util.spec_from_file_location("spatial_pe._C", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _floats(count: int) -> array:
    rng = random.Random(0)
    block = array("f", [rng.uniform(-1, 1) for _ in range(1009)])
    return (block * (count // 1009 + 1))[:count]


def _elements(count: int, dtype: str) -> array:
    values = _floats(count)
    return values if dtype == "float32" else array("H", memoryview(values).cast("B").cast("H")[1::2])


# ---------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--call", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.call:
        call(Case(**json.loads(options.call[0])), int(options.call[1]))
        return
    compiler = _extension().cpu_features()["compiler"]
    rows = []
    for case in CASES:
        instructions = count(case)
        rows.append(asdict(case) | {"instructions": instructions})
        print(f"{case}: {instructions:,}, {1000 * instructions / case.flops:.1f} a thousand FLOP", flush=True)
    if options.out:
        command = "python -m " + " ".join(["tools.instructions", *sys.argv[1:]])
        options.out.write_text(json.dumps({"command": command, "compiler": compiler, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
