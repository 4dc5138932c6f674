# SPDX-License-Identifier: Apache-2.0
"""Confidence intervals of an accuracy, and of the difference of two accuracies on the same items.

Items of a benchmark are not independent: four photographs show the same two objects, captions share an image. Dependent
items have the same group, and the intervals are those of groups.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from statistics import NormalDist

import torch
from torch import Tensor

RESAMPLES = 4000  # of a bootstrap: the ends of a 95 % interval move by 2 % of its width from seed to seed


def interval(correct: Sequence[bool], groups: Sequence[Hashable], level: float = 0.95) -> list[float]:
    """Return Wilson's interval of a proportion, with the effective number of items of these groups.

    The variance is that of sums of groups (the "cluster-robust" one), which gives the number of independent items with
    the same information, at most the number of items. If all answers are equal it is 0, and the groups are counted. If
    each item is its own group it is Wilson's interval of the items.

    Args:
        correct: one entry an item, at least one.
        groups: items with the same entry are not independent.
        level: confidence.

    Returns:
        [lower, upper], both in [0, 1].

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    n = len(correct)
    p = sum(correct) / n
    sums: dict[Hashable, float] = defaultdict(float)
    for c, group in zip(correct, groups, strict=True):
        sums[group] += c - p
    count = len(sums)
    variance = sum(e * e for e in sums.values()) / n**2 * count * (n - 1) / (max(count - 1, 1) * n)
    if p in (0, 1):
        effective = float(count)
    else:
        effective = min(n, p * (1 - p) / variance) if variance else float(n)
    z = NormalDist().inv_cdf((1 + level) / 2)
    scale = 1 + z * z / effective
    centre = (p + z * z / (2 * effective)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / effective + z * z / (4 * effective**2))
    return [max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))]  # p = 0 and 1 to the last bit


def paired_difference(
    before: Sequence[bool], after: Sequence[bool], groups: Sequence[Hashable], *, level: float = 0.95, seed: int = 0
) -> dict:
    """Return after's accuracy minus before's on the same items: its interval, and McNemar's exact test.

    Args:
        before, after: one entry an item, in the same order.
        groups: as in ``interval``; the percentile bootstrap draws groups, with replacement.
        level: confidence. seed: of the bootstrap.

    Returns:
        difference, interval [lower, upper], gained (wrong before, right after), lost (right before, wrong after), and
        p: the
            probability of so uneven a split of gained + lost if both are equally likely, for independent items.
    """
    gained = sum(a and not b for b, a in zip(before, after, strict=True))
    lost = sum(b and not a for b, a in zip(before, after, strict=True))
    sums: dict[Hashable, list[int]] = defaultdict(lambda: [0, 0])
    for b, a, group in zip(before, after, groups, strict=True):
        sums[group][0] += int(a) - int(b)
        sums[group][1] += 1
    means = _bootstrap(torch.tensor(list(sums.values()), dtype=torch.float64), seed)
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1))
    return {
        "difference": (gained - lost) / len(before),
        "interval": torch.quantile(means, ends).tolist(),
        "p": min(1.0, float(2 * tail / 2**n)),
        "gained": gained,
        "lost": lost,
    }


def _bootstrap(sums: Tensor, seed: int) -> Tensor:
    """Return (RESAMPLES,) means for sums (groups, 2): the sum and the number of items of each group."""
    generator = torch.Generator().manual_seed(seed)
    means = []
    for _ in range(RESAMPLES // 100):  # 100 at a time: (100, groups), whatever the number of groups
        drawn = torch.randint(len(sums), (100, len(sums)), generator=generator)
        total = sums[drawn].sum(1)
        means.append(total[:, 0] / total[:, 1])
    return torch.cat(means)
