# SPDX-License-Identifier: Apache-2.0
"""Statistics of a few seeds: intervals of a mean, paired comparisons, correction for their number.

The unit is the run, not the test image: all images of a run share one training, so more of them do not make up for few
seeds. Two encodings are compared seed by seed, because they share initial weights, data and order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Mean:
    """``half``: half of the width of the 95 % interval, by Student's t over the seeds; nan for a single seed."""

    value: float
    half: float
    count: int

    def __str__(self) -> str:
        return (
            f"{100 * self.value:.1f} ± {100 * self.half:.1f}"
            if self.count > 1
            else f"{100 * self.value:.1f} (one seed)"
        )


def mean(values: Sequence[float], level: float = 0.95) -> Mean:
    """Return mean and t interval of one value per seed.

    Raises:
        ValueError: no values.
    """
    if not len(values):
        raise ValueError("values is empty: a mean needs at least one seed")
    x = np.asarray(values, float)
    if len(x) == 1:
        return Mean(float(x[0]), float("nan"), 1)
    half = stats.t.ppf((1 + level) / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
    return Mean(float(x.mean()), float(half), len(x))


@dataclass(frozen=True)
class Comparison:
    """Comparison of two encodings on shared seeds: the mean difference, its raw p (two-sided paired t test), and p
    corrected for the number of comparisons of its family (Holm)."""

    difference: Mean
    p: float
    corrected: float

    @property
    def verdict(self) -> str:
        """Return "better" or "worse" if the corrected p is below 0.05; if only the raw one is, "perhaps better" or
        "perhaps worse": too many comparisons to decide; else "no difference shown"."""
        if not self.p < 0.05:
            return "no difference shown"
        way = "better" if self.difference.value > 0 else "worse"
        return way if self.corrected < 0.05 else f"perhaps {way}"


def compare(pairs: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> dict[str, Comparison]:
    """Test each of a family of comparisons, (values, values of the reference) by seed, corrected together.

    Raises:
        ValueError: a pair whose sides have different lengths, or fewer than two seeds.
    """
    differences, raw = {}, {}
    for name, (ours, reference) in pairs.items():
        if len(ours) != len(reference) or len(ours) < 2:
            raise ValueError(
                f"{name}: a paired test needs the same seeds on both sides, two or more; "
                f"got {len(ours)} and {len(reference)}"
            )
        difference = np.asarray(ours, float) - np.asarray(reference, float)
        differences[name] = mean(difference)
        # equal differences have no variance to test against: if all are 0 there is no difference, else it is certain
        spread = difference.std() > 1e-12
        raw[name] = float(stats.ttest_1samp(difference, 0).pvalue) if spread else float(abs(difference[0]) < 1e-12)
    corrected = dict(zip(raw, holm(list(raw.values())), strict=True))
    return {name: Comparison(differences[name], raw[name], corrected[name]) for name in raw}


def holm(p: Sequence[float]) -> list[float]:
    """Apply Holm's step-down correction: the family-wise error stays below the level whatever the dependence.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    order = np.argsort(p, kind="stable")
    scaled = [(len(p) - rank) * p[index] for rank, index in enumerate(order)]
    corrected = np.minimum(1, np.maximum.accumulate(scaled)) if len(p) else np.array([])
    out = np.empty(len(p))
    out[order] = corrected
    return out.tolist()
