# SPDX-License-Identifier: Apache-2.0
"""How far two towers' features lie apart, and how fast each is."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

# Pairs of runs per configuration. Of ten, the interval leaves out the smallest and the largest ratio, so that one
# disturbed pair does not widen it. Ten may take three times the seconds that were asked for; where runs are slower,
# there are fewer, at least four. Of fewer than six the whole range is less sure than 95 % (four: 88 %).
FEWEST_PAIRS, ENOUGH_PAIRS, MAX_PAIRS = 4, 10, 60
STRETCH = 3
CONFIDENCE = 0.95
# The interval's high / low above which a run is too noisy. Measured: 1.02 to 1.07 on a quiet machine (60 pairs to 4),
# 1.11 (22 pairs) and 2 to 9 (4 to 10) beside other programs; and patching gains 1.04 to 1.5. With 1 inside, where the
# answer is "the same", it has to be narrower: what could as well be 5 % slower or 5 % faster is no answer.
WIDEST, WIDEST_AROUND_ONE = 1.25, 1.1
TOO_NOISY = "too noisy for a verdict"


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
class Interval:
    """Bounds of the speed-up, and the probability that it lies between them."""

    low: float
    high: float
    coverage: float

    def __str__(self) -> str:
        return f"{self.low:.2f} to {self.high:.2f}"

    @property
    def too_wide(self) -> bool:
        """Whether nothing can be said of the speed-up, not even that there is none."""
        around_one = self.low < 1 < self.high
        return not self.high / self.low <= (WIDEST_AROUND_ONE if around_one else WIDEST)


@dataclass(frozen=True)
class Timing:
    """Seconds of each run, in the order in which they ran: before[i] and after[i] are neighbours.

    All that is said of them is said of pairs, by medians of logarithms: of b / a, the speed-up, and of b * a, how fast
    both are. So after / before is the speed-up exactly, in images per second too, and what slows the machine down for a
    while slows both. Medians of each on its own contradict the ratio: 9.96 and 9.44 images per second, yet 1.03x.
    """

    before: list[float]
    after: list[float]

    @property
    def ratios(self) -> list[float]:
        """How many times as fast ``after`` was, in each pair."""
        return [b / a for b, a in zip(self.before, self.after, strict=True)]

    @property
    def speed_up(self) -> float:
        return geometric_median(self.ratios)

    def images_per_second(self, batch: int) -> tuple[float, float]:
        product = geometric_median([b * a for b, a in zip(self.before, self.after, strict=True)])
        return batch / math.sqrt(product * self.speed_up), batch / math.sqrt(product / self.speed_up)

    @property
    def interval(self) -> Interval:
        """Of the median of the ratios, whatever their distribution: the sign test's, about 95 %.

        The k-th smallest and the k-th largest of n ratios miss the median only if fewer than k lie on one of its sides,
        each of which is as likely as k heads in n throws. With few pairs it is their whole range, and less sure.
        """
        ratios = sorted(self.ratios)
        pairs = len(ratios)
        rank = max((k for k in range(1, pairs // 2 + 1) if coverage(pairs, k) >= CONFIDENCE), default=1)
        return Interval(ratios[rank - 1], ratios[-rank], coverage(pairs, rank))


def geometric_median(values: list[float]) -> float:
    """The median; of an even number the geometric mean of the middle two, so that 1 / values give 1 / median."""
    return math.exp(statistics.median(map(math.log, values)))


def coverage(pairs: int, rank: int) -> float:
    """The probability that the median lies between the rank-th smallest and the rank-th largest of ``pairs`` values."""
    return 1 - 2 * sum(math.comb(pairs, heads) for heads in range(rank)) / 2**pairs


def interleaved(
    before: Callable[[], object], after: Callable[[], object], seconds: float, progress: Callable[[int, int], None]
) -> Timing:
    """Time both in turn, for about ``seconds``. The first pair warms up, sets the number of pairs, and is dropped."""
    pairs = number_of_pairs(seconds, _seconds(before) + _seconds(after))
    timing = Timing([], [])
    for done in range(pairs):
        progress(done, pairs)
        runs = [(before, timing.before), (after, timing.after)]
        # who runs second finds warmer caches and a hotter core: take turns
        for run, into in runs if done % 2 == 0 else reversed(runs):
            into.append(_seconds(run))
    progress(pairs, pairs)
    return timing


def number_of_pairs(seconds: float, each: float) -> int:
    """An even one: as often as it goes first, each goes second, and the median lies between both kinds of pairs."""
    enough = min(ENOUGH_PAIRS, int(STRETCH * seconds / each))
    pairs = min(MAX_PAIRS, max(FEWEST_PAIRS, enough, int(seconds / each)))
    return pairs - pairs % 2


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
    def name(self) -> str:
        return f"{self.dtype} {self.size} px"

    @property
    def within_rounding(self) -> bool:
        """The error rule: a patched low-precision tower is at most 1.5 times as far from float32 as it was."""
        if self.rounding is None:
            return self.error.relative <= 1e-4
        return self.rounding[1] <= 1.5 * self.rounding[0] + 1e-6

    def as_json(self) -> dict:
        before, after = self.timing.images_per_second(self.batch)
        interval = self.timing.interval
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
            "speed_up_interval": asdict(interval),
            "too_noisy": interval.too_wide,
        }


def noise(rows: list[Row], advice: str) -> str:
    """The noisiest row, what was measured, and the advice; empty where each row has a verdict."""
    noisy = {row.name: row.timing.interval for row in rows if row.timing.interval.too_wide}
    if not noisy:
        return ""
    name, widest = max(noisy.items(), key=lambda item: item[1].high / item[1].low)
    return f"{name}: between {widest.low:.2f} and {widest.high:.2f} times as fast. {advice}."


def significant(rate: float) -> str:
    """Four digits, so that the ratio of two shown rates is the speed-up to its two decimals."""
    return f"{rate:.{max(0, 3 - math.floor(math.log10(rate)))}f}"


def table(rows: list[Row], advice: str) -> str:
    """Two plain-text tables: what changed, and how fast it is. ``advice``: what to do about noise."""
    accuracy: list[tuple[str, ...]] = [
        ("", "max error", "rel. error", "cosine", "smallest", "unpatched vs fp32", "patched vs fp32")
    ]
    speed: list[tuple[str, ...]] = [
        ("", "tokens", "batch", "pairs", "before, img/s", "after, img/s", "speed-up", "interval", "coverage")
    ]
    for row in rows:
        e = row.error
        rounding = ["", ""] if row.rounding is None else [f"{value:.2e}" for value in row.rounding]
        accuracy.append(
            (row.name, f"{e.max:.1e}", f"{e.relative:.1e}", f"{e.cosine_mean:.7f}", f"{e.cosine_min:.7f}", *rounding)
        )
        interval = row.timing.interval
        rates = map(significant, row.timing.images_per_second(row.batch))
        ratio = "too noisy" if interval.too_wide else f"{row.timing.speed_up:.2f}x"
        sizes = map(str, (row.tokens, row.batch, len(row.timing.ratios)))
        speed.append((row.name, *sizes, *rates, ratio, str(interval), f"{100 * interval.coverage:.0f} %"))
    why = noise(rows, advice)
    return (
        "Features, patched against unpatched (last columns: what bf16 itself costs)\n"
        + _columns(accuracy)
        + "\n\nThroughput, by pairs of neighbouring runs: the median ratio, and where it lies\n"
        + _columns(speed)
        + (f"\nTiming {TOO_NOISY}. {why}" if why else "")
    )


def _columns(lines: list[tuple[str, ...]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
