# SPDX-License-Identifier: Apache-2.0
"""How far two towers' features lie apart, and how fast each is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

# Pairs of runs per configuration: enough for a median, and few enough for the slowest one.
MIN_PAIRS, MAX_PAIRS = 3, 60


@dataclass(frozen=True)
class Error:
    """Features against other features, computed in float64: ``relative`` is ‖a - b‖ / ‖b‖ over all of them."""

    max: float
    relative: float
    cosine_mean: float
    cosine_min: float  # over tokens


def error(features: Tensor, against: Tensor) -> Error:
    """Both (B, N, C)."""
    a, b = features.double(), against.double()
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1)
    return Error(
        max=(a - b).abs().max().item(),
        relative=((a - b).norm() / b.norm()).item(),
        cosine_mean=cosine.mean().item(),
        cosine_min=cosine.min().item(),
    )


@dataclass(frozen=True)
class Timing:
    """Seconds of each run, in the order in which they ran: before[i] and after[i] are neighbours."""

    before: list[float]
    after: list[float]

    @property
    def speed_up(self) -> float:
        """The median of the ratios of neighbours: what slows the machine down for a while slows both."""
        return statistics.median(b / a for b, a in zip(self.before, self.after, strict=True))

    def images_per_second(self, batch: int) -> tuple[float, float]:
        return batch / statistics.median(self.before), batch / statistics.median(self.after)


def interleaved(
    before: Callable[[], object], after: Callable[[], object], seconds: float, progress: Callable[[int, int], None]
) -> Timing:
    """Time both in turn, for about ``seconds``. The first pair warms up, sets the number of pairs, and is dropped."""
    pairs = min(MAX_PAIRS, max(MIN_PAIRS, int(seconds / (_seconds(before) + _seconds(after)))))
    timing = Timing([], [])
    for done in range(pairs):
        progress(done, pairs)
        runs = [(before, timing.before), (after, timing.after)]
        # who runs second finds warmer caches and a hotter core: take turns
        for run, into in runs if done % 2 == 0 else reversed(runs):
            into.append(_seconds(run))
    progress(pairs, pairs)
    return timing


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Row:
    """One configuration: a dtype and an image size."""

    dtype: str
    size: int
    tokens: int
    batch: int
    error: Error  # patched against unpatched, both in this dtype
    rounding: tuple[float, float] | None  # relative error against float32 of (unpatched, patched); None for float32
    timing: Timing

    @property
    def within_rounding(self) -> bool:
        """The error rule: a patched low-precision tower is at most 1.5 times as far from float32 as it was."""
        if self.rounding is None:
            return self.error.relative <= 1e-4
        return self.rounding[1] <= 1.5 * self.rounding[0] + 1e-6

    def as_json(self) -> dict:
        before, after = self.timing.images_per_second(self.batch)
        return {
            "dtype": self.dtype,
            "size": self.size,
            "tokens": self.tokens,
            "batch": self.batch,
            "error": asdict(self.error),
            "relative_error_to_float32": (
                None if self.rounding is None else {"before": self.rounding[0], "after": self.rounding[1]}
            ),
            "within_rounding": self.within_rounding,
            "seconds": {"before": self.timing.before, "after": self.timing.after},
            "images_per_second": {"before": before, "after": after},
            "speed_up": self.timing.speed_up,
        }


def table(rows: list[Row]) -> str:
    """Two plain-text tables: what changed, and how fast it is."""
    accuracy: list[tuple[str, ...]] = [
        ("", "max error", "rel. error", "cosine", "smallest", "unpatched vs fp32", "patched vs fp32")
    ]
    speed: list[tuple[str, ...]] = [("", "tokens", "batch", "before, img/s", "after, img/s", "speed-up")]
    for row in rows:
        name = f"{row.dtype} {row.size} px"
        e = row.error
        rounding = ["", ""] if row.rounding is None else [f"{value:.2e}" for value in row.rounding]
        accuracy.append(
            (name, f"{e.max:.1e}", f"{e.relative:.1e}", f"{e.cosine_mean:.7f}", f"{e.cosine_min:.7f}", *rounding)
        )
        before, after = row.timing.images_per_second(row.batch)
        speed.append(
            (name, str(row.tokens), str(row.batch), f"{before:.2f}", f"{after:.2f}", f"{row.timing.speed_up:.2f}x")
        )
    return (
        "Features, patched against unpatched (last columns: what bf16 itself costs)\n"
        + _columns(accuracy)
        + "\n\nThroughput, medians of interleaved runs\n"
        + _columns(speed)
    )


def _columns(lines: list[tuple[str, ...]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
