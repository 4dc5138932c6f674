# SPDX-License-Identifier: Apache-2.0
"""Times of functions that launch kernels, on the device and on the host.

A sample on the device is that of `spatial-pe bench --device cuda` (spatial_pe/lab/bench/timing.py): CUDA events, behind
a sleep that hides the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from spatial_pe.lab.bench import timing as device
from spatial_pe.lab.bench.timing import MOST_REPEATS, SAMPLE_MS, Setting, sample

__all__ = ["MOST_REPEATS", "SAMPLE_MS", "Call", "Setting", "calibrate", "clocks", "host_microseconds", "sample"]

Call = Callable[[], Any]


def calibrate(call: Call) -> Setting:
    return device.calibrate(call, SAMPLE_MS)


def host_microseconds(call: Call, calls: int = 1000, chunk: int = 100) -> list[float]:
    """Return microseconds of the host per call, one sample for each chunk: the device is idle at the start of each, and
    its queue, of 1,024 kernels, does not fill up."""
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
