# SPDX-License-Identifier: Apache-2.0
"""Times on the device, and on the host, of functions that launch kernels.

A sample is the time between two CUDA events around back-to-back calls. Before the first event the device sleeps for as
long as the host needs to launch them all, so that it never waits for the host: what is measured is the kernels, not
Python. (Where a call launches more than the 1,024 kernels that a queue holds, the device waits after all.)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

SAMPLE_MS = 2.0
# At 64 calls of a dozen kernels the queue is full.
MOST_REPEATS = 64
MOST_SLEEP_MS = 40.0
# Of torch.cuda._sleep: a little more than the clock of any GPU, so that the sleep is not too short.
CYCLES_PER_MS = 2_000_000

Call = Callable[[], Any]


@dataclass(frozen=True)
class Setting:
    """How to take a sample of a call."""

    repeats: int
    sleep_ms: float


def calibrate(call: Call) -> Setting:
    """Runs the call a few times: the first compiles, and later ones may pick an algorithm."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(2):
        call()
    host_ms = 1e3 * (time.perf_counter() - begin) / 2
    torch.cuda.synchronize()
    device_ms = sample(call, Setting(2, min(3 * host_ms, MOST_SLEEP_MS)))
    repeats = min(MOST_REPEATS, max(1, math.ceil(SAMPLE_MS / max(device_ms, 1e-4))))
    return Setting(repeats, min(1.2 * repeats * host_ms + 0.1, MOST_SLEEP_MS))


def sample(call: Call, setting: Setting) -> float:
    """Milliseconds per call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(setting.sleep_ms * CYCLES_PER_MS))
    begin.record()
    for _ in range(setting.repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / setting.repeats


def host_microseconds(call: Call, calls: int = 1000, chunk: int = 100) -> list[float]:
    """Microseconds of the host per call, one sample for each chunk: the device is idle at the start of each, and its
    queue, of 1,024 kernels, does not fill up."""
    for _ in range(chunk):
        call()
    samples = []
    for _ in range(calls // chunk):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(chunk):
            call()
        samples.append(1e6 * (time.perf_counter() - begin) / chunk)
    torch.cuda.synchronize()
    return samples


def clocks() -> dict[str, float | None]:
    """What the driver says now, None where it does not (no pynvml, a virtual machine that hides it)."""
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
