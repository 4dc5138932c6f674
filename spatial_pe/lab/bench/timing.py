# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing: the variants run alternately in one process, and are compared by their medians.

On a CPU a sample is wall-clock time. On a GPU it is the time between two CUDA events around back-to-back calls. Before
the first event the GPU sleeps for as long as the host needs to launch them all, so that it never waits for the host and
only kernels are measured, not Python, which takes longer than they do at 196 tokens. (If the calls of a sample launch
more than the 1,024 kernels that a queue holds, the GPU waits after all.)
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Call = Callable[[], object]
# Length of a sample on a CPU: clock and scheduler noise are small relative to it.
SAMPLE_SECONDS = 0.02
# Pause between variants with separate thread pools (ONNX Runtime's, OpenMP's): workers spin for a while after a call,
# and would occupy the next one's core; at 196 tokens ours ran at half its speed without it.
SETTLE_SECONDS = 0.1
# Length of a sample on a GPU: events resolve 0.5 us, and 2 ms of a tower, a few calls of 200 kernels, fit into the
# queue.
SAMPLE_MS = 2.0
# At 64 calls of a dozen kernels the queue is full.
MOST_REPEATS = 64
MOST_SLEEP_MS = 40.0
# Clock of torch.cuda._sleep: a little above that of any GPU, so that the sleep is not too short.
CYCLES_PER_MS = 2_000_000


def interleaved(
    variants: Mapping[str, Call], rounds: int, settle: float = 0.0, device: str = "cpu"
) -> dict[str, list[float]]:
    """Return seconds per call of each variant, one sample per round. Every second round runs in reverse order.

    Args:
        variants: functions to call; the first two calls of each are not measured (allocation, code paths, primitive
            caches), or one that takes more than a second.
        rounds: samples of each.
        settle: seconds, and an untimed call, before each sample.
        device: "cuda" or "cuda:1": the time of this GPU is measured, not that of the host.
    """
    gpu = device.startswith("cuda")
    sampler = gpu_sampler if gpu else cpu_sampler
    with torch.cuda.device(device) if gpu else contextlib.nullcontext():  # events belong to the current GPU
        take = {name: sampler(call) for name, call in variants.items()}
        samples: dict[str, list[float]] = {name: [] for name in variants}
        for index in range(rounds):
            for name in list(variants) if index % 2 == 0 else reversed(list(variants)):
                if settle:
                    time.sleep(settle)
                    variants[name]()
                samples[name].append(take[name]())
    return samples


def medians(samples: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(times) for name, times in samples.items()}


# ----------------------------------------------------------------------------------------------------------------- CPU


def cpu_sampler(call: Call) -> Callable[[], float]:
    """Warm up; return a function that takes one sample, in seconds per call."""
    took = _wall(call, 1)
    if took < 1:
        took = _wall(call, 1)
    repeats = max(1, round(SAMPLE_SECONDS / max(took, 1e-7)))
    return lambda: _wall(call, repeats)


def _wall(call: Call, repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


# ----------------------------------------------------------------------------------------------------------------- GPU


@dataclass(frozen=True)
class Setting:
    """Number of calls and host time of a sample."""

    repeats: int
    sleep_ms: float


def gpu_sampler(call: Call) -> Callable[[], float]:
    """Warm up; return a function that takes one sample, in seconds per call."""
    setting = calibrate(call, SAMPLE_MS)
    return lambda: sample(call, setting) / 1e3


def calibrate(call: Call, sample_ms: float) -> Setting:
    """Return how many calls make a sample of about ``sample_ms``, and how long the host takes to launch them.

    Runs the call six times: the first compiles, and the next may pick an algorithm.
    """
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(2):
        call()
    host_ms = 1e3 * (time.perf_counter() - begin) / 2
    torch.cuda.synchronize()
    device_ms = sample(call, Setting(2, min(3 * host_ms, MOST_SLEEP_MS)))
    repeats = min(MOST_REPEATS, max(1, math.ceil(sample_ms / max(device_ms, 1e-4))))
    return Setting(repeats, min(1.2 * repeats * host_ms + 0.1, MOST_SLEEP_MS))


def sample(call: Call, setting: Setting) -> float:
    """Return milliseconds per call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(setting.sleep_ms * CYCLES_PER_MS))
    begin.record()
    for _ in range(setting.repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / setting.repeats
