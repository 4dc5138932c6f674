# SPDX-License-Identifier: Apache-2.0
"""Check every kernel of a backend, bfloat16 and float16, at the measured shapes, against float64 on the device.

    python -m benchmarks.throughput.gpu.check --backend triton --out step1.json --until SECONDS --now FILE

The worst row of each result, and two runs bit for bit. The backward comes first, with the forward's results from
float64, so that a wrong forward does not affect it: the window backward, the key and the query kernel are where
compilers for this GPU have had bugs (triton#11781, flash-linear-attention#640). It is restarted after what hung.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spatial_pe.backends import cuda, guard, reference
from spatial_pe.backends.base import AttentionCall
from spatial_pe.backends.triton import backend as triton
from spatial_pe.lab.bench.cases import Inputs, Shape
from spatial_pe.rotary import rotated

from . import state
from .cases import TARGETS, large

DEVICE = "cuda"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
BACKENDS = {"triton": triton, "cuda": cuda}
DEVICE_LOST = 70
Results = dict[str, Tensor]
Unit = tuple[str, Callable[[], Results], Results]  # name, function, expected results


def units(backend: str, call: AttentionCall, dout: Tensor) -> Iterator[Unit]:
    """Yield the kernels of a call, most suspicious first; the rotation and the angles are Triton's alone."""
    module = BACKENDS[backend]
    expected = guard.exact(call, dout)
    out, lse = expected["out"].to(call.q.dtype), expected["lse"]

    def backward() -> Results:
        return dict(zip(("dq", "dk", "dv"), module.backward(call, out, lse, dout), strict=True))

    yield "backward", backward, {name: expected[name] for name in ("dq", "dk", "dv")}
    yield "forward", lambda: {"out": module.forward(call)[0]}, {"out": expected["out"]}
    if backend != "triton" or call.rotary is None:
        return
    rotary, q, k = call.rotary, call.q, call.k
    both = {name: rotated(x.double(), rotary) for name, x in (("q", q), ("k", k))}
    yield "rotate", lambda: dict(zip("qk", triton.rotation((q, k), rotary), strict=True)), both
    grads = [expected[name].to(q.dtype) for name in ("dq", "dk")]
    angles = (rotary.pairing, None)
    dphi = {"dphi": reference.angle_gradient(q, k, *grads, rotary.cos.double(), *angles)}
    yield "angles", lambda: {"dphi": triton.angle_gradient(q, k, *grads, rotary.cos, *angles)}, dphi


def kernels(backend: str, unit: str, call: AttentionCall) -> dict[str, str]:
    """Return result -> the kernel that computes it, according to the plan."""
    if backend == "triton" and unit in ("forward", "backward"):
        from spatial_pe.backends.triton import tiles

        choice = tiles.choice_of(call)
        if getattr(choice, f"window_{unit}") is not None:
            return dict.fromkeys(guard.RESULTS, f"window_{unit}")
        return {"out": "forward", "dq": "query", "dk": "key", "dv": "key"}
    return dict.fromkeys((*guard.RESULTS, "q", "k", "dphi"), unit)


def name_of(backend: str, unit: str, dtype: str) -> str:
    """Return the name as in measure.py, which skips what hung here."""
    if dtype == "bf16" and unit in ("forward", "backward"):
        return {"triton": "ours", "cuda": "cuda"}[backend]
    return f"{backend} {unit} {dtype}"


class Run:
    """Part of the checks that one process runs."""

    def __init__(self, backend: str, out: Path, until: float, now: Path, shapes: list[Shape]) -> None:
        self.backend, self.out, self.until, self.now = backend, out, until, now
        self.shapes = shapes
        self.state = state.load(out)

    def all(self) -> None:
        for shape in self.shapes:
            for dtype in DTYPES:
                if time.time() < self.until:
                    self.shape(shape, dtype)
        self.save()

    def save(self) -> None:
        state.save(self.out, self.state)

    def shape(self, shape: Shape, dtype: str) -> None:
        inputs = Inputs(shape, DTYPES[dtype], DEVICE)
        call = inputs.call()
        if (why := BACKENDS[self.backend].cannot_serve(call)) is not None:
            self.add(shape, dtype, "all", {"refused": why})
            return
        for unit, run, expected in units(self.backend, call, inputs.batched_grad):
            variant = name_of(self.backend, unit, dtype)
            if self.done(shape, dtype, unit) or time.time() > self.until:
                continue
            if why := state.why_not(self.state["broken"], shape.size, unit, variant):
                self.add(shape, dtype, unit, {"wrong": why})
                continue
            state.mark(self.now, shape.size, unit, variant)
            try:
                self.add(shape, dtype, unit, checked(run, expected, DTYPES[dtype], kernels(self.backend, unit, call)))
            except Exception as error:
                message = f"{type(error).__name__}: {error}"[:200]
                try:
                    torch.cuda.synchronize()
                except Exception:
                    state.mark(self.now, shape.size, unit, variant, message)
                    raise
                self.add(shape, dtype, unit, {"wrong": message})

    def done(self, shape: Shape, dtype: str, unit: str) -> bool:
        mine = {"backend": self.backend, "size": shape.size, "dtype": dtype, "unit": unit}
        return any(mine.items() <= row.items() for row in self.state["checks"])

    def add(self, shape: Shape, dtype: str, unit: str, found: dict[str, Any]) -> None:
        row = {"backend": self.backend, "size": shape.size, "dtype": dtype, "unit": unit, **found}
        self.state["checks"].append(row)
        self.save()
        rows = ", ".join(f"{name} {error:.1e}" for name, error in found.get("worst_row", {}).items())
        verdict = found.get("wrong") or found.get("refused") or "right"
        print(f"{self.backend:<6} {shape!s:<34} {dtype} {unit:<9} {rows}  {verdict}", flush=True)


def checked(run: Callable[[], Results], expected: Results, dtype: torch.dtype, names: dict[str, str]) -> dict[str, Any]:
    """Return {"worst_row": {result: error}, "kernels": ..., "wrong": why or None}."""
    first = {name: x.clone() for name, x in run().items()}
    errors = {name: guard.worst_row(x, expected[name]) for name, x in first.items()}
    return {
        "worst_row": errors,
        "kernels": {name: names[name] for name in first},
        "wrong": guard.wrong(run, expected, dtype),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=BACKENDS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("--now", type=Path, required=True)
    options = parser.parse_args(argv)
    if (why := BACKENDS[options.backend].unavailable()) is not None:
        print(f"{options.backend}: {why}", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    run = Run(options.backend, options.out, options.until, options.now, [large(*pair) for pair in TARGETS])
    try:
        run.all()
    except Exception as error:
        print(f"the device is lost: {error}", file=sys.stderr, flush=True)
        return DEVICE_LOST
    wrong = [row for row in run.state["checks"] if row["backend"] == options.backend and row.get("wrong")]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
