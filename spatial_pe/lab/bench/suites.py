# SPDX-License-Identifier: Apache-2.0
"""Suites of the benchmark: tables of cases, each measured into a row of plain data.

A row has its ``suite``, its case, ``seconds`` (all samples of each variant) or ``bytes``, and ``refused``: the
variants that were left out, with the reason.
"""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ...backends import cpu
from . import memory, space, timing, towers
from .cases import CROSS, DIRECTIONS, DTYPES, SPEED, Inputs, Shape
from .variants import PEERS, VARIANTS, RefusedError, build

Row = dict
# FLOP of a direction relative to the forward
FLOPS = {"forward": 1.0, "backward": 2.5}
# Two bfloat16 results of the same attention differ by 0.01 at most; without the rotation by 0.3 and more.
SAME = 0.05


@dataclass(frozen=True)
class Attention:
    """One call of some variants. ``axis``: for the suite "growth", the growing dimension."""

    suite: str
    name: str
    shape: Shape
    dtype: str
    direction: str
    threads: int
    variants: tuple[str, ...]
    rounds: int
    axis: str = ""
    level: str = "kernel"

    def __str__(self) -> str:
        of = "layer, " if self.level == "layer" else ""
        return f"{of}{self.shape}, {self.dtype}, {self.direction}, {_threads(self.threads)}"

    def run(self, device: str) -> Row:
        torch.set_num_threads(self.threads)
        inputs = Inputs(self.shape, DTYPES[self.dtype], device)
        calls, refused, deviation = {}, {}, {}
        reference: list[np.ndarray] | None = None
        for name in self.variants:
            try:
                call = build(name, inputs, self.direction, self.threads, self.level)
                found = _plain(call())
            except RefusedError as error:
                refused[name] = str(error)
                continue
            reference = reference or found  # the reference for all others
            if VARIANTS[name].rotates and name not in PEERS:
                deviation[name] = max(map(_difference, found, reference))
                if not deviation[name] < SAME:
                    refused[name] = f"differs from {self.variants[0]} by {deviation[name]:.2g}"
                    continue
            calls[name] = call
        settle = timing.SETTLE_SECONDS if calls.keys() & PEERS else 0.0
        samples = timing.interleaved(calls, self.rounds, settle, device)
        row: Row = {"suite": self.suite, "name": self.name, "axis": self.axis, "shape": asdict(self.shape)}
        row |= {"dtype": self.dtype, "direction": self.direction, "threads": self.threads}
        row |= {"flops": self.shape.flops * FLOPS[self.direction], "deviation": deviation}
        return row | {"seconds": samples, "refused": refused}


@dataclass(frozen=True)
class Memory:
    shape: Shape
    dtype: str
    variants: tuple[str, ...]

    suite: ClassVar[str] = "memory"

    def __str__(self) -> str:
        return f"memory of {self.shape}, {self.dtype}"

    def run(self, device: str) -> Row:
        found, refused = {}, {}
        for name in self.variants:
            try:
                found[name] = memory.measure(name, self.shape, self.dtype, device)
            except RefusedError as error:
                refused[name] = str(error)
        row = {"suite": "memory", "shape": asdict(self.shape), "dtype": self.dtype}
        return row | {"bytes": found, "refused": refused}


@dataclass(frozen=True)
class Tower:
    """``name``: one of ``towers.TOWERS``, or a checkpoint."""

    name: str
    dtype: str
    threads: int
    rounds: int
    peers: bool = False  # also in the engines of tower_peers

    suite: ClassVar[str] = "towers"

    def __str__(self) -> str:
        return f"{self.name}, {self.dtype}, {_threads(self.threads)}"

    def run(self, device: str) -> Row:
        torch.set_num_threads(self.threads)
        row = {"suite": "towers", "name": self.name, "dtype": self.dtype, "threads": self.threads}
        return row | towers.measure(self.name, DTYPES[self.dtype], self.rounds, device, self.peers)


@dataclass(frozen=True)
class Space:
    """``name``: one of ``space.MODELS``."""

    name: str
    dtype: str
    threads: int
    rounds: int

    suite: ClassVar[str] = "space"

    def __str__(self) -> str:
        return f"{self.name}, {self.dtype}, {_threads(self.threads)}"

    def run(self, device: str) -> Row:
        torch.set_num_threads(self.threads)
        row = {"suite": "space", "name": self.name, "dtype": self.dtype, "threads": self.threads}
        return row | space.measure(self.name, DTYPES[self.dtype], self.rounds)


@dataclass(frozen=True)
class Start:
    """One-time costs of a process: the import, and the first call of a shape."""

    rounds: int

    suite: ClassVar[str] = "start"

    def __str__(self) -> str:
        return "the first call"

    def run(self, device: str) -> Row:
        steps = {
            "import torch": "import torch",
            "import spatial_pe": "import torch; begin = now(); import spatial_pe",
            "first call": f"{FIRST_CALL.format(device=device)}; begin = now(); out = call()",
            "second call": f"{FIRST_CALL.format(device=device)}; call(); begin = now(); out = call()",
        }
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(self.rounds):
            for name, step in steps.items():
                code = f"from time import perf_counter as now; begin = now(); {step}; print(now() - begin)"
                done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
                seconds[name].append(float(done.stdout))
        return {"suite": "start", "seconds": seconds, "refused": {}}


FIRST_CALL = (
    "from spatial_pe.lab.bench import cases, variants; "
    "inputs = cases.Inputs(cases.SPEED['196'], cases.DTYPES['bf16'], '{device}'); "
    "call = variants.build('ours', inputs, 'forward', 1)"
)
Case = Attention | Memory | Tower | Space | Start


# -------------------------------------------------------------------------------------------------------------- tables

DIRECT = ("eager", "ours", "off", "separate")
LAYERS = ("196", "576", "729", "windows")
GROWTH = {
    "tokens": [Shape(1, 8, tokens, 64) for tokens in (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)],
    "batch": [Shape(batch, 12, 196, 64) for batch in (1, 2, 4, 8, 16, 32, 64)],
    "heads": [Shape(1, heads, 576, 64) for heads in (1, 2, 4, 8, 16, 32)],
    "windows": [Shape(count, 16, 64, 80, packed=True) for count in (1, 4, 16, 64, 256)],
}
MEMORY = [Shape(1, 8, tokens, 64) for tokens in (256, 1024, 2048, 4096, 8192)]


def quick(device: str, threads: int) -> Iterator[Case]:
    """Yield the cases of --quick: two minutes on two cores."""
    peers = PEERS if device == "cpu" else ()
    for dtype in ("bf16", "fp32"):
        for name in ("196", "729", "1024", "windows"):
            yield Attention("attention", name, SPEED[name], dtype, "forward", threads, (*DIRECT, *peers), 4)
        yield Attention("attention", "196", SPEED["196"], dtype, "backward", threads, DIRECT, 4)
    for shape in GROWTH["tokens"][:7]:
        yield Attention("growth", str(shape.tokens), shape, "bf16", "forward", threads, DIRECT[:3], 3, "tokens")
    yield from _memory(MEMORY[1::2], device)
    yield Tower("dinov2_small_518", dense_dtypes(device)[0], threads, 3)


def full(device: str, cores: int) -> Iterator[Case]:
    """Yield all cases, with one thread and with as many as ``cores``."""
    counts = sorted({1, cores}) if device == "cpu" else [cores]
    peers = PEERS if device == "cpu" else ()
    for threads in counts:
        for dtype in ("bf16", "fp32"):
            for name, shape in SPEED.items():
                long = shape.tokens >= 4096
                forward = (*DIRECT, "compiled", *peers)
                yield Attention("attention", name, shape, dtype, "forward", threads, forward, 5 if long else 7)
                # torch's bfloat16 backward takes 3 s for 576 tokens and half a minute for 4096 on a core without
                # bfloat16
                slow = long or dtype not in dense_dtypes(device)
                backward = DIRECT[:3] if slow else (*DIRECT, "compiled")
                yield Attention("attention", name, shape, dtype, "backward", threads, backward, 3 if slow else 7)
    for dtype in dense_dtypes(device):
        for name, direction in itertools.product(LAYERS, DIRECTIONS):
            variants = ("eager", "ours", "off", "compiled")
            yield Attention("layers", name, SPEED[name], dtype, direction, cores, variants, 7, level="layer")
    for dtype in dense_dtypes(device):
        for (name, shape), direction in itertools.product(CROSS.items(), DIRECTIONS):
            yield Attention("cross", name, shape, dtype, direction, cores, ("eager", "ours", "off", "compiled"), 5)
    for axis, shapes in GROWTH.items():
        for shape in shapes:
            rounds = 5 if shape.tokens < 8192 else 3
            size = str(getattr(shape, {"windows": "batch"}.get(axis, axis)))
            yield Attention("growth", size, shape, "bf16", "forward", cores, DIRECT[:3], rounds, axis)
    for threads in range(1, cores + 1):
        yield Attention("growth", str(threads), SPEED["1024"], "bf16", "forward", threads, DIRECT[:3], 5, "threads")
    yield from _memory(MEMORY, device)
    for name in towers.TOWERS:
        for dtype in dense_dtypes(device):
            yield Tower(name, dtype, cores, 7, peers=device == "cpu")
    if device == "cpu":
        for name, model in space.MODELS.items():
            for dtype in dense_dtypes(device) if importlib.util.find_spec(model.package) else ():
                yield Space(name, dtype, cores, 9)
    yield Start(5)


def of_model(path: str, device: str, threads: int) -> Iterator[Case]:
    for dtype in dense_dtypes(device):
        yield Tower(path, dtype, threads, 5)


def dense_dtypes(device: str) -> tuple[str, ...]:
    """Return the dtypes for whole layers and towers. No bfloat16 on a CPU without its instructions: there torch's
    products are 15 times as slow as in float32, so no tower would be run that way."""
    native = device != "cpu" or cpu.FEATURES.get("isa") == "avx512_bf16"
    return ("bf16", "fp32") if native else ("fp32",)


def _memory(shapes: list[Shape], device: str) -> Iterator[Case]:
    if memory.unavailable(device) is None:
        yield from (Memory(shape, "fp32", ("eager", "ours", "naive")) for shape in shapes)


PLANS: Mapping[str, Callable[[str, int], Iterator[Case]]] = {"quick": quick, "full": full}


# ------------------------------------------------------------------------------------------------------------- helpers


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def _plain(result: object) -> list[np.ndarray]:
    outs = [result] if isinstance(result, Tensor) else result
    assert isinstance(outs, list | tuple | np.ndarray)
    return [x.detach().float().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x) for x in outs]


def _difference(found: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(found - reference) / np.linalg.norm(reference))
