# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing: the variants run alternately in one process, and are compared by their medians.

On a CPU a sample is wall-clock time; on a GPU, the time between two CUDA events around back-to-back calls, without the
host's (_utils/clock.py).
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from ..._utils import clock
from ..._utils.clock import Call

# Length of a sample on a CPU: clock and scheduler noise are small relative to it.
SAMPLE_SECONDS = 0.02
# Pause between variants with separate thread pools (ONNX Runtime's, OpenMP's): workers spin for a while after a call,
# and would occupy the next one's core; at 196 tokens ours ran at half its speed without it.
SETTLE_SECONDS = 0.1


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
            for name in clock.in_turn(variants, index):
                if settle:
                    time.sleep(settle)
                    variants[name]()
                samples[name].append(take[name]())
    return samples


def medians(samples: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(times) for name, times in samples.items()}


# ------------------------------------------------------------------------------------------------------------ samplers


def cpu_sampler(call: Call) -> Callable[[], float]:
    """Warm up; return a function that takes one sample, in seconds per call."""
    took = clock.host_seconds(call)
    if took < 1:
        took = clock.host_seconds(call)
    repeats = max(1, round(SAMPLE_SECONDS / max(took, 1e-7)))
    return lambda: clock.host_seconds(call, repeats)


def gpu_sampler(call: Call) -> Callable[[], float]:
    """Warm up; return a function that takes one sample, in seconds per call."""
    sampling = clock.calibrate(call)
    return lambda: clock.gpu_milliseconds(call, sampling) / 1e3
