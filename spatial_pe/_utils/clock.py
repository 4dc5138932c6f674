# SPDX-License-Identifier: Apache-2.0
"""One clock for each device: the wall-clock time of the host, and the time between two CUDA events.

Before the first event the GPU sleeps for as long as the host needs to launch all calls of a sample, so that it never
waits for the host and only kernels are measured, not Python, which takes longer than they do at 196 tokens. (If a
sample launches more than the 1,024 kernels that a queue holds, the GPU waits after all.)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch

Call = Callable[[], object]
Name = TypeVar("Name")
# Length of a sample on a GPU: events resolve 0.5 us, and 2 ms of a tower, a few calls of 200 kernels, fit into the
# queue.
SAMPLE_MS = 2.0
# At 64 calls of a dozen kernels the queue is full.
MOST_REPEATS = 64
MOST_SLEEP_MS = 40.0
# Clock of torch.cuda._sleep: a little above that of any GPU, so that the sleep is not too short.
CYCLES_PER_MS = 2_000_000


def host_seconds(call: Call, repeats: int = 1) -> float:
    """Return the seconds of the host per call."""
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


@dataclass(frozen=True)
class Sampling:
    """Calls in a sample on a GPU, and how long the host takes to launch them."""

    repeats: int
    sleep_ms: float


def gpu_milliseconds(call: Call, sampling: Sampling) -> float:
    """Return the milliseconds of the current GPU per call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(sampling.sleep_ms * CYCLES_PER_MS))
    begin.record()
    for _ in range(sampling.repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / sampling.repeats


def calibrate(call: Call, sample_ms: float | None = None) -> Sampling:
    """Return how many calls make a sample of about ``sample_ms`` (SAMPLE_MS), and how long the host takes to launch
    them.

    Runs the call six times: the first compiles, and the next may pick an algorithm.
    """
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    host_ms = 1e3 * host_seconds(call, 2)
    torch.cuda.synchronize()
    device_ms = gpu_milliseconds(call, Sampling(2, min(3 * host_ms, MOST_SLEEP_MS)))
    repeats = min(MOST_REPEATS, max(1, math.ceil((sample_ms or SAMPLE_MS) / max(device_ms, 1e-4))))
    return Sampling(repeats, min(1.2 * repeats * host_ms + 0.1, MOST_SLEEP_MS))


def in_turn(names: Iterable[Name], index: int) -> list[Name]:
    """Return the names in the order of a round: backwards in every second one, so that none always runs behind the
    same other one, whose caches and heat it finds."""
    return list(names) if index % 2 == 0 else list(names)[::-1]
