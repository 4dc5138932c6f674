# SPDX-License-Identifier: Apache-2.0
"""Compare attention inside of a tower with attention alone: milliseconds of a layer, on the CPU, forward.

    python -m tools.in_tower [--towers clip_large_336 ...] [--rounds 7]

in the tower: its operands were just written by the projections. alone: the same call repeated. cold: the caches flushed
by 256 MB in between. sdpa: that of the unpatched tower. Medians; the towers of `spatial-pe bench`.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

import spatial_pe
from spatial_pe.lab.bench.cases import DTYPES
from spatial_pe.lab.bench.towers import TOWERS, run
from spatial_pe.towers import fused_attention


class Timed:
    """A function whose calls are timed; the last arguments are stored."""

    def __init__(self, function: Callable) -> None:
        self.function, self.seconds, self.call = function, [], None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = self.function(*args, **kwargs)
        self.seconds.append(time.perf_counter() - start)
        self.call = functools.partial(self.function, *args, **kwargs)
        return result


@torch.no_grad()
def measure(tower: str, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Return milliseconds by place of the call."""
    model, forward = TOWERS[tower]()
    before = model.eval().to(dtype)
    after = copy.deepcopy(before)
    spatial_pe.patch(after)
    ours, sdpa = Timed(fused_attention.rope_attention), Timed(torch.nn.functional.scaled_dot_product_attention)
    with (
        mock.patch.object(fused_attention, "rope_attention", ours),
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", sdpa),
    ):
        for _ in range(rounds + 1):
            run(forward, after, dtype)
            run(forward, before, dtype)
    assert ours.call is not None
    alone, cold, flush = Timed(ours.call), Timed(ours.call), torch.zeros(64 << 20)
    for _ in range(rounds):
        alone()
    for _ in range(rounds):
        flush.add_(1.0)
        cold()
    layers = len(ours.seconds) // (rounds + 1)
    seconds = {"in the tower": ours.seconds[layers:], "alone": alone.seconds, "cold": cold.seconds}
    seconds["sdpa"] = sdpa.seconds[len(sdpa.seconds) // (rounds + 1) :]
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--towers", nargs="+", default=["clip_large_336", "dinov3_large"], choices=TOWERS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for tower in options.towers:
        for name in ("bf16", "fp32"):
            found = measure(tower, DTYPES[name], options.rounds)
            print(f"{tower}, {name}: " + ", ".join(f"{where} {ms:.1f} ms" for where, ms in found.items()), flush=True)


if __name__ == "__main__":
    main()
