# SPDX-License-Identifier: Apache-2.0
"""Distance between the features of two towers, speed of each, and cost of an attention layer of each."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..._utils import clock

if TYPE_CHECKING:
    from ...towers.report import PatchReport

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
    """Compare features, both (B, N, C) or (N, C)."""
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
        """True if nothing can be said of the speed-up, not even that there is none."""
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
        """Speed of ``after`` relative to ``before`` in each pair."""
        return [b / a for b, a in zip(self.before, self.after, strict=True)]

    @property
    def speed_up(self) -> float:
        return geometric_median(self.ratios)

    def images_per_second(self, batch: int) -> tuple[float, float]:
        product = geometric_median([b * a for b, a in zip(self.before, self.after, strict=True)])
        return batch / math.sqrt(product * self.speed_up), batch / math.sqrt(product / self.speed_up)

    def as_json(self, batch: int) -> dict:
        before, after = self.images_per_second(batch)
        return {
            "seconds": {"before": self.before, "after": self.after},
            "images_per_second": {"before": before, "after": after},
            "speed_up": self.speed_up,
            "speed_up_interval": asdict(self.interval),
            "too_noisy": self.interval.too_wide,
        }

    @property
    def interval(self) -> Interval:
        """Return the sign test's interval of the median ratio, about 95 % for any distribution.

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
    pairs = number_of_pairs(seconds, clock.host_seconds(before) + clock.host_seconds(after))
    timing = Timing([], [])
    for done in range(pairs):
        progress(done, pairs)
        for run, into in clock.in_turn([(before, timing.before), (after, timing.after)], done):
            into.append(clock.host_seconds(run))
    progress(pairs, pairs)
    return timing


def number_of_pairs(seconds: float, each: float) -> int:
    """An even one: as often as it goes first, each goes second, and the median lies between both kinds of pairs."""
    enough = min(ENOUGH_PAIRS, int(STRETCH * seconds / each))
    pairs = min(MAX_PAIRS, max(FEWEST_PAIRS, enough, int(seconds / each)))
    return pairs - pairs % 2


@dataclass(frozen=True)
class Layer:
    """An attention layer as ``inspect`` counts it on 960 tokens, before and after."""

    kernels: tuple[int, int]
    peak: tuple[int, int]  # bytes

    @classmethod
    def of(cls, report: PatchReport) -> Layer | None:
        """Return the counts of the first layer that was counted."""
        for row in report.patched:
            if row.own_cost is not None and row.cost is not None:
                return cls((row.own_cost.kernels, row.cost.kernels), (row.own_cost.peak, row.cost.peak))
        return None

    def __str__(self) -> str:
        before, after = (f"{peak / 2**20:.1f}" for peak in self.peak)
        return f"{self.kernels[0]} -> {self.kernels[1]} kernels, {before} -> {after} MiB"

    def as_json(self) -> dict:
        names = ("before", "after")
        return {
            "kernels": dict(zip(names, self.kernels, strict=True)),
            "peak_bytes": dict(zip(names, self.peak, strict=True)),
        }


# Of two float32 towers that compute the same: their features lie 1e-6 apart.
SAME = 1e-4


@dataclass(frozen=True)
class Row:
    """One configuration of the tower with real weights: a dtype and an image size."""

    dtype: str
    size: int
    tokens: int
    batch: int
    error: Error  # patched against unpatched, both in this dtype
    rounding: tuple[float, float] | None  # relative error against float32 of (unpatched, patched); None for float32
    timing: Timing
    layer: Layer | None = None

    @property
    def name(self) -> str:
        return f"{self.dtype} {self.size} px"

    @property
    def within_rounding(self) -> bool:
        """The error rule: a patched low-precision tower is at most 1.5 times as far from float32 as it was."""
        if self.rounding is None:
            return self.error.relative <= SAME
        return self.rounding[1] <= 1.5 * self.rounding[0] + 1e-6

    def as_json(self) -> dict:
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
            "layer": self.layer and self.layer.as_json(),
            **self.timing.as_json(self.batch),
        }


@dataclass(frozen=True)
class TowerRow:
    """A tower that rotates, with random weights."""

    name: str
    what: str  # is special in it
    layers: int
    images: int  # of one forward
    tokens: int  # of all of them
    error: Error  # patched against unpatched
    timing: Timing
    layer: Layer | None
    dtype: str = "fp32"

    @property
    def within_rounding(self) -> bool:
        return self.error.relative <= SAME

    def as_json(self) -> dict:
        return {
            "name": self.name,
            "what": self.what,
            "dtype": self.dtype,
            "layers": self.layers,
            "images": self.images,
            "tokens": self.tokens,
            "error": asdict(self.error),
            "within_rounding": self.within_rounding,
            "layer": self.layer and self.layer.as_json(),
            **self.timing.as_json(self.images),
        }


AnyRow = Row | TowerRow


def noise(rows: Sequence[AnyRow], advice: str) -> str:
    """The noisiest row, what was measured, and the advice; empty where each row has a verdict."""
    noisy = {row.name: row.timing.interval for row in rows if row.timing.interval.too_wide}
    if not noisy:
        return ""
    name, widest = max(noisy.items(), key=lambda item: item[1].high / item[1].low)
    return f"{name}: between {widest.low:.2f} and {widest.high:.2f} times as fast. {advice}."


def significant(rate: float) -> str:
    """Four digits, so that the ratio of two shown rates is the speed-up to its two decimals."""
    return f"{rate:.{max(0, 3 - math.floor(math.log10(rate)))}f}"


def table(rows: list[Row], advice: str, towers: Sequence[TowerRow] = ()) -> str:
    """Plain-text tables: what changed, how fast it is, what a layer costs. ``advice``: what to do about noise."""
    why = noise([*rows, *towers], advice)
    parts = [
        "Features, patched against unpatched (last columns: what bf16 itself costs)\n" + _columns(_accuracy(rows)),
        "Throughput, by pairs of neighbouring runs: the median ratio, and where it lies\n"
        + _columns(_throughput(rows)),
        _towers(towers),
        _layers(rows, towers),
        f"Timing {TOO_NOISY}. {why}" if why else "",
    ]
    return "\n\n".join(filter(None, parts))


def _accuracy(rows: list[Row]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [
        ("", "max error", "rel. error", "cosine", "smallest", "unpatched vs fp32", "patched vs fp32")
    ]
    for row in rows:
        e = row.error
        rounding = ["", ""] if row.rounding is None else [f"{value:.2e}" for value in row.rounding]
        lines.append(
            (row.name, f"{e.max:.1e}", f"{e.relative:.1e}", f"{e.cosine_mean:.7f}", f"{e.cosine_min:.7f}", *rounding)
        )
    return lines


SPEED = ("pairs", "before, img/s", "after, img/s", "speed-up", "interval", "coverage")


def _throughput(rows: list[Row]) -> list[tuple[str, ...]]:
    head = ("", "tokens", "batch", *SPEED)
    return [head, *((row.name, str(row.tokens), str(row.batch), *_speed(row.timing, row.batch)) for row in rows)]


def _speed(timing: Timing, batch: int) -> tuple[str, ...]:
    interval = timing.interval
    ratio = "too noisy" if interval.too_wide else f"{timing.speed_up:.2f}x"
    rates = map(significant, timing.images_per_second(batch))
    return (str(len(timing.ratios)), *rates, ratio, str(interval), f"{100 * interval.coverage:.0f} %")


def _towers(towers: Sequence[TowerRow]) -> str:
    if not towers:
        return ""
    speed: list[tuple[str, ...]] = [("", "layers", "images", "tokens", "rel. error", *SPEED)]
    for row in towers:
        sizes = (row.name, *map(str, (row.layers, row.images, row.tokens)))
        speed.append((*sizes, f"{row.error.relative:.1e}", *_speed(row.timing, row.images)))
    return "Towers that rotate, at their real widths, with random weights, fp32\n" + _columns(speed)


def _layers(rows: list[Row], towers: Sequence[TowerRow]) -> str:
    found = {row.dtype: row.layer for row in rows} | {f"{row.name}, {row.what}": row.layer for row in towers}
    lines = [(name, str(layer)) for name, layer in found.items() if layer is not None]
    head = "An attention layer, as `spatial-pe inspect` counts it on 960 tokens, before and after"
    return f"{head}\n{_columns(lines)}" if lines else ""


def _columns(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
