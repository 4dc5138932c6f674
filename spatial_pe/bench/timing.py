# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing: variants take turns in one process, and are compared by their medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Call = Callable[[], object]
# Of a sample: clock and scheduler noise stay small beside it.
SAMPLE_SECONDS = 0.02
# Between variants with thread pools of their own (ONNX Runtime's, OpenMP's): workers spin for a while after a call, and
# would take the next one's core; at 196 tokens ours ran at half its speed without it.
SETTLE_SECONDS = 0.1


def interleaved(
    variants: Mapping[str, Call], rounds: int, settle: float = 0.0, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds per call of each variant, one sample a round. Every second round runs in reverse order.

    Args:
        variants: what to call; the first two calls of each are not measured (allocation, code paths, primitive caches),
            or one that takes more than a second.
        rounds: samples of each.
        settle: seconds, and an untimed call, before each sample.
        device: on a GPU a sample ends when all of its calls have.
    """
    clock = Clock(device)
    repeats = {}
    for name, call in variants.items():
        took = clock.sample(call, 1)
        if took < 1:
            took = clock.sample(call, 1)
        repeats[name] = max(1, round(SAMPLE_SECONDS / max(took, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds):
        for name in list(variants) if turn % 2 == 0 else reversed(list(variants)):
            if settle:
                time.sleep(settle)
                variants[name]()
            samples[name].append(clock.sample(variants[name], repeats[name]))
    return samples


class Clock:
    """Seconds per call."""

    def __init__(self, device: str) -> None:
        self.finish = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def sample(self, call: Call, repeats: int) -> float:
        self.finish()
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        self.finish()
        return (time.perf_counter() - begin) / repeats


def medians(samples: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(times) for name, times in samples.items()}
