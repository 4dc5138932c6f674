# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing: variants take turns in one process, and are compared by their medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def interleaved(
    variants: dict[str, Callable[[], object]], rounds: int, min_seconds: float = 0.02, settle: float = 0.0
) -> dict[str, list[float]]:
    """Seconds per call of each variant, one sample a round. Every second round runs in reverse order.

    A sample repeats a fast call until ``min_seconds`` have passed, so that clock and scheduler noise stay small. Where
    variants have thread pools of their own, ``settle`` seconds and an untimed call come before each sample: workers of
    the variant before (ONNX Runtime's, OpenMP's) spin for a while and would take the next one's core.
    """
    repeats = {}
    for name, call in variants.items():
        call()  # first call: allocation, code paths, oneDNN's primitive caches
        begin = time.perf_counter()
        call()
        repeats[name] = max(1, round(min_seconds / max(time.perf_counter() - begin, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds):
        for name in list(variants) if turn % 2 == 0 else reversed(variants):
            if settle:
                time.sleep(settle)
                variants[name]()
            begin = time.perf_counter()
            for _ in range(repeats[name]):
                variants[name]()
            samples[name].append((time.perf_counter() - begin) / repeats[name])
    return samples


def medians(samples: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(times) for name, times in samples.items()}
