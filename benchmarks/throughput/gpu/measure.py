# SPDX-License-Identifier: Apache-2.0
"""Measure until the time is up. This process is restarted if a variant has taken the device down.

    python -m benchmarks.throughput.gpu.measure --plan table --out step1.json --until SECONDS --now FILE

--until: a time of time.time(). --now: a file that always names the running call, to find out what broke. Exit status
70: the device does not respond any more.

Wrong results are not timed: every row of every result, ours and others', is compared with float64 on the device, and
our kernels are run twice and compared bit for bit (spatial_pe/backends/guard.py).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spatial_pe._utils import clock
from spatial_pe._utils.clock import Call, Sampling
from spatial_pe.backends import guard
from spatial_pe.lab.bench.cases import Inputs, Shape

from . import cases, state, variants
from .cases import ATTENTION, PLANS, Work, plan
from .variants import rotations

Row = dict[str, Any]
DEVICE, DTYPE = "cuda", torch.bfloat16
DEVICE_LOST = 70
# FLOP of a direction relative to the forward.
FLOPS = {"forward": 1.0, "backward": 2.5, "forward+backward": 3.5}
# Device time while the clocks are read.
LOAD_MS = 20.0
# A shape is not started with less time left.
BEGIN_SECONDS = 4.0


class DeviceLostError(RuntimeError):
    """An illegal access, or the like: nothing more can be computed in this process."""


class Run:
    """Part of a run that one process does."""

    def __init__(self, out: Path, until: float, now: Path, name: str) -> None:
        self.out, self.until, self.now = out, until, now
        self.state = state.load(out)
        self.name, self.plan = name, plan(name)

    def left(self) -> float:
        return self.until - time.time()

    def mark(self, size: list[int] | None, direction: str | None, variant: str, error: str | None = None) -> None:
        state.mark(self.now, size, direction, variant, error)

    def all(self) -> None:
        self.mark(None, None, "start")
        self.state["device"] = device()
        self.save()
        if self.name == "small" and "host_microseconds" not in self.state:
            self.state["host_microseconds"] = self.host()
            self.save()
        for work in self.plan:
            if self.left() < BEGIN_SECONDS:
                break
            try:
                self.shape(work)
            except DeviceLostError:
                raise
            except Exception as error:  # not a variant's error, e.g. no memory for the inputs
                why = self.survived(error)
                entry = {"size": work.shape.size, "direction": "inputs", "variant": "inputs", "why": why}
                self.state["broken"].append(entry)
            torch._dynamo.reset()  # compiled code is cached by function, and only 8 shapes of it
            gc.collect()
            torch.cuda.empty_cache()
        self.save()

    def save(self) -> None:
        done = {(tuple(row["size"]), row["direction"]) for row in self.state["rows"]}
        self.state["not_run"] = [
            [work.shape.size, direction]
            for work in self.plan
            for direction in work.directions
            if (tuple(work.shape.size), direction) not in done
        ]
        state.save(self.out, self.state)

    # ---------------------------------------------------------------------------------------------------- one shape

    def shape(self, work: Work) -> None:
        done = [row["direction"] for row in self.state["rows"] if row["size"] == work.shape.size]
        todo = [direction for direction in work.directions if direction not in done]
        if not todo:
            return
        if any(entry["variant"] == "inputs" and entry["size"] == work.shape.size for entry in self.state["broken"]):
            return
        self.mark(work.shape.size, "inputs", "inputs")
        inputs = Inputs(work.shape, DTYPE, DEVICE)
        expected = Expected(inputs)
        built: dict[str, variants.Attention] = {}  # for all directions: some are compiled
        for direction in todo:
            if self.left() < BEGIN_SECONDS:
                return
            if direction == "rotary":
                row = self.rotary(work, inputs)
            else:
                row = self.attention(work, inputs, expected, direction, built)
            self.state["rows"].append(row)
            self.save()
            print(line(work.shape, row), flush=True)

    def attention(
        self, work: Work, inputs: Inputs, expected: Expected, direction: str, built: dict[str, variants.Attention]
    ) -> Row:
        def maker(name: str) -> Callable[[], Call]:
            def make() -> Call:
                if name not in built:
                    built[name] = variants.build(name, inputs)
                return variants.call(built[name], inputs, direction)

            return make

        row = self.row(work, direction, {name: maker(name) for name in work.variants}, expected)
        flops = work.shape.flops * FLOPS[direction]
        row["tflops"] = {name: flops / ms / 1e9 for name, ms in row["median_ms"].items()}
        return row

    def rotary(self, work: Work, inputs: Inputs) -> Row:
        row = self.row(work, "rotary", {name: lambda call=call: call for name, call in rotations(inputs).items()})
        row["bytes"] = variants.rotation_bytes(inputs)
        row["gigabytes_per_second"] = {name: row["bytes"] / ms / 1e6 for name, ms in row["median_ms"].items()}
        return row

    def row(
        self,
        work: Work,
        direction: str,
        makers: dict[str, Callable[[], Call]],
        expected: Expected | None = None,
    ) -> Row:
        size = work.shape.size
        before = clocks()
        calls: dict[str, Call] = {}
        samplings: dict[str, Sampling] = {}
        refused: dict[str, str] = {}
        worst: dict[str, float] = {}
        for name, make in makers.items():
            if why := state.why_not(self.state["broken"], size, direction, name):
                refused[name] = why
                continue
            if self.left() < 1:
                refused[name] = "no time was left"
                continue
            self.mark(size, direction, name)
            try:
                call = make()
                if expected is not None:
                    worst[name] = expected.checked(name, call)
                samplings[name] = clock.calibrate(call)
                calls[name] = call
            except Exception as error:  # refused by torch, out of memory, does not compile, ...
                refused[name] = self.survived(error)
            call = None  # frees the graph of a variant that is left out
        samples = self.samples(work, direction, calls, samplings, refused)
        return {
            "size": size,
            "packed": work.shape.packed,
            "direction": direction,
            "median_ms": {name: statistics.median(times) for name, times in samples.items()},
            "refused": refused,
            "worst_row": worst,
            "repeats": {name: samplings[name].repeats for name in samples},
            "clocks": {"before": before, "under_load": under_load(calls, samples)},
            "milliseconds": {name: [round(ms, 6) for ms in times] for name, times in samples.items()},
        }

    def samples(
        self, work: Work, direction: str, calls: dict, samplings: dict, refused: dict
    ) -> dict[str, list[float]]:
        """Return milliseconds per call, interleaved, every other round in reverse order. Variants that fail now are
        refused."""
        found: dict[str, list[float]] = {name: [] for name in calls}
        for index in range(work.rounds):
            for name in clock.in_turn(found, index):
                self.mark(work.shape.size, direction, name)
                try:
                    found[name].append(clock.gpu_milliseconds(calls[name], samplings[name]))
                except Exception as error:
                    refused[name] = self.survived(error)
                    del found[name]
            if self.left() < 0 and index >= 2:
                break
        return found

    def survived(self, error: Exception) -> str:
        """Return the error in one line, if the device still responds."""
        line = (str(error).strip().splitlines() or [""])[0][:300]
        message = f"{type(error).__name__}: {line}"
        try:
            torch.cuda.synchronize()
        except Exception as lost:
            entry = json.loads(self.now.read_text())
            self.mark(entry["size"], entry["direction"], entry["variant"], message)
            raise DeviceLostError(message) from lost
        if isinstance(error, torch.cuda.OutOfMemoryError):
            gc.collect()
            torch.cuda.empty_cache()
        return message

    # ------------------------------------------------------------------------------------------------------- the host

    def host(self) -> dict[str, Any]:
        """Return microseconds of the host per forward of one image of 196 tokens, which the device computes faster."""
        shape = cases.shape(1, 196, 64)
        inputs = Inputs(shape, DTYPE, DEVICE)
        found: dict[str, Any] = {}
        makers: dict[str, Callable[[], Call]] = {
            name: lambda name=name: variants.call(variants.build(name, inputs), inputs, "forward")
            for name in ("ours", "off", "auto", "eager-default")
        }
        makers["SDPA alone"] = lambda: variants.call(variants.sdpa(inputs), inputs, "forward")
        makers["rotary kernel alone"] = lambda: rotations(inputs)["kernel"]
        for name, make in makers.items():
            if state.why_not(self.state["broken"], shape.size, "host", name):
                continue
            self.mark(shape.size, "host", name)
            try:
                samples = host_microseconds(make())
                found[name] = {"median": statistics.median(samples), "samples": [round(us, 2) for us in samples]}
            except Exception as error:
                found[name] = {"refused": self.survived(error)}
        return found


class Expected:
    """Expected results of the variants, in float64, with and without the rotation."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.found = inputs, dict[bool, dict[str, Tensor]]()

    def of(self, name: str) -> dict[str, Tensor]:
        rotated = name not in variants.PLAIN
        if rotated not in self.found:
            exact = guard.exact(self.inputs.call(rotated), self.inputs.batched_grad)
            packed = self.inputs.shape.packed
            self.found[rotated] = {key: x[0] if packed and key != "lse" else x for key, x in exact.items()}
        return self.found[rotated]

    def checked(self, name: str, call: Call) -> float:
        """Return the error of the worst row. Raise ArithmeticError if it is too large, or two runs of ours differ."""
        expected = self.of(name)

        def results() -> dict[str, Tensor]:
            found = call()
            if isinstance(found, Tensor):
                return {"out": found}
            return dict(zip(("dq", "dk", "dv"), found, strict=True))

        why = guard.wrong(results, expected, self.inputs.qkv[0].dtype, twice=name in variants.OUR_KERNELS)
        if why is not None:
            raise ArithmeticError(why)
        return max(guard.worst_row(x, expected[key]) for key, x in results().items())


def under_load(calls: dict[str, Call], samples: dict[str, list[float]]) -> dict[str, float | None] | None:
    """Read the clocks under load: they change a moment after the last kernel."""
    name = "ours" if "ours" in samples else next(iter(samples), None)
    if name is None:
        return None
    for _ in range(min(clock.MOST_REPEATS, math.ceil(LOAD_MS / samples[name][-1]))):
        calls[name]()
    found = clocks()
    torch.cuda.synchronize()
    return found


def host_microseconds(call: Call, calls: int = 1000, chunk: int = 100) -> list[float]:
    """Return microseconds of the host per call, one sample for each chunk: the device is idle at the start of each, and
    its queue, of 1,024 kernels, does not fill up."""
    for _ in range(chunk):
        call()
    samples = []
    for _ in range(calls // chunk):
        torch.cuda.synchronize()
        samples.append(1e6 * clock.host_seconds(call, chunk))
    torch.cuda.synchronize()
    return samples


def clocks() -> dict[str, float | None]:
    """Return the driver's clocks, None if it does not report them (no pynvml, a virtual machine that hides them)."""
    found: dict[str, float | None] = {}
    for name, read, unit in (
        ("sm_mhz", torch.cuda.clock_rate, 1),
        ("celsius", torch.cuda.temperature, 1),
        ("watts", torch.cuda.power_draw, 1000),
    ):
        try:
            found[name] = read() / unit
        except Exception:  # ImportError, NVMLError, RuntimeError: none of them may end a measurement
            found[name] = None
    return found


def device() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "clocks_at_start": clocks(),
    }


def line(shape: Shape, row: dict[str, Any]) -> str:
    rates, unit = row.get("tflops"), "TFLOP/s"
    if row["direction"] not in ATTENTION:
        rates, unit = row["gigabytes_per_second"], "GB/s"
    numbers = "  ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
    return f"{shape!s:<32} {row['direction']:<17} {unit}  {numbers}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("--now", type=Path, required=True)
    parser.add_argument("--plan", choices=PLANS, required=True)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no GPU that torch can use", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    run = Run(options.out, options.until, options.now, options.plan)
    try:
        run.all()
    except DeviceLostError as error:
        print(f"the device is lost: {error}", file=sys.stderr, flush=True)
        return DEVICE_LOST
    return 1 if any(wrong(row) for row in run.state["rows"]) else 0


def wrong(row: Row) -> list[str]:
    """Return variants of ours with wrong results."""
    return [n for n, why in row["refused"].items() if n in variants.OURS and why.startswith("ArithmeticError")]


if __name__ == "__main__":
    sys.exit(main())
