# SPDX-License-Identifier: Apache-2.0
"""Measure tiles and backends on this GPU: `spatial-pe tune`, or `python -m spatial_pe.cli tune`.

A few candidates for each unit (forward, query, key, windows) are timed on the shapes of vision towers, and the fastest
is stored on disk for this GPU and these versions (backends/triton/tuning_store.py). Only correct candidates are timed:
every row of every result is compared with float64, and two runs must agree bit for bit (backends/guard.py). Candidates
are compiled beforehand by as many processes as there are cores, into Triton's own cache. Without Triton there are no
tiles, and only backends are compared.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._utils.clock import calibrate, gpu_milliseconds, in_turn
from .backends import cuda, guard
from .backends.base import AttentionCall
from .backends.triton import backend as triton
from .backends.triton import tiles, tuning_store
from .backends.triton.tiles import Choice, Tile, Window
from .ops import composed
from .rotary import Rotary

if TYPE_CHECKING:
    from .backends.triton.plan import Plan


# Milliseconds of a sample: dozens of candidates are timed, and differ by more than its noise.
SAMPLE_MS = 0.5


@dataclass(frozen=True)
class Problem:
    """Shape to tune for. Its result applies to all calls of its regime: dtype, head_dim, bucket of lengths."""

    tokens: int
    dim: int
    windows: bool = False  # packed sequences of `tokens` tokens, as Qwen2.5-VL has
    heads: int = 16
    dtype: str = "bfloat16"
    budget: int = 36_864  # total tokens of the batch

    def call(self, device: torch.device) -> AttentionCall:
        """Build the call on random data: constant data draws less power, so clocks would be higher than in use."""
        samples = max(1, self.budget // self.tokens)
        shape = (1, samples * self.tokens) if self.windows else (samples, self.tokens)
        dtype = getattr(torch, self.dtype)
        q, k, v = torch.randn(*shape, 3, self.heads, self.dim, device=device, dtype=dtype).unbind(2)
        angles = torch.randn(shape[1], self.dim // 2, device=device)
        bounds = None
        if self.windows:
            bounds = torch.arange(0, shape[1] + 1, self.tokens, device=device, dtype=torch.int32)
        rotary = Rotary.from_angles(angles)
        return AttentionCall(q, k, v, rotary, self.dim**-0.5, bounds, self.tokens if self.windows else None, None)

    def regime(self) -> tuple[torch.dtype, int, int]:
        return getattr(torch, self.dtype), self.dim, tiles.bucket(self.tokens)


# Shapes of vision towers: Qwen2.5-VL, DINOv2/v3 and CLIP at 224, SigLIP at 256 and 384, CLIP at 336, Qwen2-VL, ...
PROBLEMS = (
    Problem(64, 80, windows=True), Problem(196, 64), Problem(576, 64), Problem(729, 72), Problem(1024, 64),
    Problem(1024, 80), Problem(4096, 64), Problem(64, 64), Problem(256, 72), Problem(2304, 64), Problem(256, 80),
    Problem(576, 80), Problem(196, 96), Problem(576, 96), Problem(1024, 88), Problem(1024, 128), Problem(256, 128),
    Problem(2304, 80), Problem(4096, 80), Problem(4096, 128),
)  # fmt: skip
QUICK = PROBLEMS[:7]

# Tiles that compile without spills and with the fewest instructions per score (offline budgets).
CANDIDATES: dict[str, tuple[Any, ...]] = {
    "forward": (
        *(Tile(*tile, "loop") for tile in ((128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2))),
        # two programs per SM, for some bytes of spills outside the loop
        *(Tile(128, 64, 8, 3, rotate_k, maxnreg=128) for rotate_k in ("loop", "before")),
        *(Tile(*tile) for tile in ((128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3))),
        Tile(128, 64, 4, 3),  # 99 KB of shared memory: a second tile in flight
    ),
    "query": tuple(
        Tile(*tile, split=split)
        for tile in ((128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3))
        for split in (False, True)
    ),
    "key": tuple(
        Tile(*tile, split=split)
        for tile in ((64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 4, 2))
        for split in (False, True)
    ),
    "window_forward": (
        None,
        *(Window(0, warps, heads, stages) for warps in (4, 8) for heads in (2, 4, 8) for stages in (1, 2)),
    ),
    "window_backward": (None, Window(0, 4), Window(0, 8)),
}
# In the loop k is rotated once for every block of queries: too often for many blocks.
LOOP_UP_TO = 1280


def candidates(unit: str, problem: Problem, base: Choice) -> list[Any]:
    """Return the configurations to time: the default first, and windows only where a sequence is one tile."""
    dtype, _, longest = problem.regime()
    found = [getattr(base, unit)]
    if unit.startswith("window"):
        if longest > 128 or dtype == torch.float32:
            return found
        others = (None if window is None else replace(window, block=longest) for window in CANDIDATES[unit])
    else:
        others = (
            tile
            for tile in CANDIDATES[unit]
            if dtype != torch.float32 and (tile.rotate_k == "before" or longest <= LOOP_UP_TO)
        )
    return found + [config for config in others if config not in found]


def plan_of(unit: str, call: AttentionCall, choice: Choice, results: tuple) -> Plan:
    from .backends.triton.plan import plan_backward, plan_forward

    if unit in ("forward", "window_forward"):
        return plan_forward(call, choice)
    out, lse, dout = results
    return plan_backward(call, out, lse, dout, choice)


def tune(
    problems: Iterable[Problem],
    device: torch.device,
    seconds: float = math.inf,
    file: Path | None = None,
    copy: Path | None = None,
    say: Callable[[str], None] = print,
    clock: Callable[[dict[Any, Callable[[], None]]], dict[Any, float]] | None = None,
    workers: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Time the candidates of each problem and store the fastest, problem by problem.

    Args:
        seconds: no new problem is started after this long.
        file: where to save; None is the cache folder, where later processes find it.
        copy: a second file to save to.
        clock: maps named functions to their milliseconds; None is CUDA events.
        workers: processes that compile beforehand; None is one per core, 0 none.

    Returns:
        The measured rows of tuning_store.py.
    """
    file = file or tuning_store.path(device)
    clock = clock or milliseconds
    begun = time.monotonic()
    problems = list(problems)
    has_tiles = triton.unavailable() is None
    if has_tiles and workers != 0:
        _compile_all(problems, device, workers or min(16, os.cpu_count() or 1), seconds / 2)
    rows: dict[str, dict[str, Any]] = {}
    for problem in problems:
        if time.monotonic() - begun > seconds:
            say(f"{problem}: no time left, keeps the tiles of the package")
            continue
        row = _tune_one(problem, device, clock)
        rows[tuning_store.regime(*problem.regime())] = row
        say(f"{problem}: {row}")
        for place in (file, copy):
            if place is not None:
                tuning_store.save(rows, place)
    tiles.clear_cache()
    if has_tiles:
        from .backends.triton import launch_cache

        launch_cache.clear_cache()
    return rows


def _tune_one(problem: Problem, device: torch.device, clock: Callable) -> dict[str, Any]:
    call = problem.call(device)
    dout = torch.randn(call.q.shape, device=device, dtype=call.q.dtype)
    expected = guard.exact(call, dout)
    row: dict[str, Any] = {"milliseconds": {}}
    backends = [_composed(call, dout)]
    if triton.unavailable() is None and (found := _tuned_tiles(problem, call, dout, expected, clock, row)) is not None:
        backends.insert(0, found)
    if cuda.unavailable() is None and cuda.cannot_serve(call) is None:
        found = Timed("cuda", lambda: cuda.forward(call)[:1], lambda: _cuda_gradients(call, dout))
        if (why := _wrong(found.results, expected, call)) is None:
            backends.append(found)
        else:
            row.setdefault("failed", []).append(f"cuda: {why}")
    row["faster"] = _fastest(backends, clock, row)
    return row


@dataclass(frozen=True)
class Timed:
    """A backend on one problem: inference() -> (out, ...), training() -> (dq, dk, dv), with its own forward."""

    name: str
    inference: Callable[[], tuple[Tensor, ...]]
    training: Callable[[], tuple[Tensor, ...]]

    def results(self) -> dict[str, Tensor]:
        return dict(zip(guard.RESULTS, (self.inference()[0], *self.training()), strict=True))


def _composed(call: AttentionCall, dout: Tensor) -> Timed:
    """Return the composed path: rotary kernel, then torch's attention."""
    leaves = [x.detach().requires_grad_() for x in (call.q, call.k, call.v)]
    wanted = replace(call, q=leaves[0], k=leaves[1], v=leaves[2])

    def inference() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (composed.attention(call),)

    return Timed("composed", inference, lambda: torch.autograd.grad(composed.attention(wanted), leaves, dout))


def _cuda_gradients(call: AttentionCall, dout: Tensor) -> tuple[Tensor, ...]:
    return cuda.backward(call, *cuda.forward(call), dout)


def _tuned_tiles(
    problem: Problem,
    call: AttentionCall,
    dout: Tensor,
    expected: dict[str, Tensor],
    clock: Callable,
    row: dict[str, Any],
) -> Timed | None:
    """Time the candidates of each unit, write the fastest into the row, and return Triton with them; return None, and
    write no tiles, if all candidates of a unit are wrong."""
    device = call.q.device
    dtype, dim, longest = problem.regime()
    choice = tiles.prebuilt(tiles.family_of(device), dtype, dim, longest)
    # every backward candidate gets the exact forward: a wrong forward must not fail the candidates of other units
    results = (expected["out"].to(dtype), expected["lse"], dout)
    units: dict[str, Any] = {}
    # windows before tiles: None among them means that the tiles are timed, which must be the best ones by then
    for unit in tuning_store.UNITS:
        base = replace(choice, window_forward=None) if unit == "forward" else choice
        base = replace(base, window_backward=None) if unit in ("query", "key") else base
        runs: dict[Any, Callable[[], None]] = {}
        for config in candidates(unit, problem, choice):
            plan = plan_of(unit, call, replace(base, **{unit: config}), results)
            if (why := _wrong(functools.partial(_run, plan, device), expected, call)) is None:
                runs[config] = functools.partial(plan.run, device)
            else:
                row.setdefault("failed", []).append(f"{unit} {config}: {why}")
        if not runs:
            return None
        times = clock(runs)
        best = min(times, key=lambda config: times[config])
        choice = replace(choice, **{unit: best})
        units[unit] = tuning_store.plain(best)
        row["milliseconds"][unit] = times[best]
    forward = plan_of("forward", call, choice, ())
    backward = plan_of("backward", call, choice, (*forward.results, dout))

    def inference() -> tuple[Tensor, ...]:
        forward.run(device)
        return forward.results

    def training() -> tuple[Tensor, ...]:
        forward.run(device)
        backward.run(device)
        return backward.results

    found = Timed("triton", inference, training)
    if (why := _wrong(found.results, expected, call)) is not None:
        row.setdefault("failed", []).append(f"triton: {why}")
        return None
    row |= units
    return found


def _run(plan: Plan, device: torch.device) -> dict[str, Tensor]:
    plan.run(device)
    names = ("out", "lse") if len(plan.results) == 2 else ("dq", "dk", "dv")
    return {name: x for name, x in zip(names, plan.results, strict=True) if name != "lse"}


def _fastest(backends: list[Timed], clock: Callable, row: dict[str, Any]) -> dict[str, str]:
    """Return the fastest backend: {"inference": name, "training": name}."""
    uses = ("inference", "training")
    times = clock({f"{found.name}, {use}": getattr(found, use) for use in uses for found in backends})
    row["milliseconds"] |= times
    return {use: min((found.name for found in backends), key=lambda name: times[f"{name}, {use}"]) for use in uses}


def _wrong(run: Callable[[], dict[str, Tensor]], expected: dict[str, Tensor], call: AttentionCall) -> str | None:
    """Return why a candidate is rejected, or None. The compiler's failures have no common class."""
    try:
        return guard.wrong(run, expected, call.q.dtype)
    except Exception as error:  # does not compile, does not fit, does not launch, or fails on the device
        return f"{type(error).__name__}: {error}"[:200]


def milliseconds(runs: dict[Any, Callable[[], None]], rounds: int = 5) -> dict[Any, float]:
    """Return medians of ``rounds`` interleaved samples of half a millisecond."""
    sampling = {key: calibrate(run, SAMPLE_MS) for key, run in runs.items()}
    samples: dict[Any, list[float]] = {key: [] for key in runs}
    for index in range(rounds):
        for key in in_turn(runs, index):
            samples[key].append(gpu_milliseconds(runs[key], sampling[key]))
    return {key: statistics.median(times) for key, times in samples.items()}


# ------------------------------------------------------------------------------------------------- compiling beforehand


def _compile_all(problems: list[Problem], device: torch.device, workers: int, seconds: float) -> None:
    jobs = [
        (problem, unit, index, str(device))
        for problem in problems
        for unit in CANDIDATES
        for index in range(len(candidates(unit, problem, _base(problem, device))))
    ]
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        waiting = [pool.submit(_compile, *job) for job in jobs]
        deadline = time.monotonic() + seconds
        for job in waiting:
            job.result(timeout=max(0.1, deadline - time.monotonic()) if math.isfinite(seconds) else None)
    except TimeoutError:
        pass  # the remaining candidates are compiled when they are timed
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _base(problem: Problem, device: torch.device) -> Choice:
    dtype, dim, longest = problem.regime()
    return tiles.prebuilt(tiles.family_of(device), dtype, dim, longest)


def _compile(problem: Problem, unit: str, index: int, device_name: str) -> None:
    """Compile a candidate into Triton's cache on disk, in a separate process. Failures are reported when timed."""
    device = torch.device(device_name)
    call = problem.call(device)  # of the real size: divisibility by 16 is compiled in
    base = _base(problem, device)
    config = candidates(unit, problem, base)[index]
    out = torch.empty(call.q.shape, dtype=call.q.dtype, device=device)
    lse = torch.empty((call.q.shape[0], call.q.shape[2], call.q.shape[1]), device=device)
    choice = replace(base, **{unit: config})
    if not unit.startswith("window"):
        choice = replace(choice, window_forward=None, window_backward=None)
    for launch in plan_of(unit, call, choice, (out, lse, out)).launches:
        try:
            _ = launch.compile().run  # also compiles the C launcher, a third of a second
        except Exception:  # see above
            return
