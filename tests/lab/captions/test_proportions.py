# SPDX-License-Identifier: Apache-2.0
"""Intervals against published values, against scipy, and by how often they hold the truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from spatial_pe.lab.captions.proportions import interval, paired_difference


@pytest.mark.parametrize(("right", "n"), [(0, 10), (1, 10), (5, 10), (81, 263), (400, 412), (412, 412)])
def test_independent_items_have_wilsons_interval(right, n):
    correct = [True] * right + [False] * (n - right)
    expected = binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert interval(correct, range(n)) == pytest.approx([expected.low, expected.high])


@pytest.mark.parametrize("right", [0, 3, 8, 10])
def test_items_that_always_agree_count_once(right):
    correct = [True] * right + [False] * (10 - right)
    thrice = [c for c in correct for _ in range(3)]
    tight = interval(thrice, range(30))
    grouped = interval(thrice, [i // 3 for i in range(30)])
    assert grouped == pytest.approx(interval(correct, range(10)), abs=0.015)  # G / (G - 1) instead of 1
    assert grouped[1] - grouped[0] > 1.3 * (tight[1] - tight[0])


def test_groups_that_cancel_do_not_narrow_it():
    """A model that always says "on" is right once in every set of four: no reason for an interval of width 0."""
    correct = [i % 4 == 0 for i in range(40)]
    assert interval(correct, [i // 4 for i in range(40)]) == interval(correct, range(40))


def test_intervals_of_clustered_answers_hold_the_truth():
    rng = np.random.default_rng(0)
    held = {"groups": 0, "items": 0}
    for _ in range(300):
        easy = rng.beta(2, 2, size=60).repeat(4)  # four items of a group are equally hard; mean 0.5
        correct = (rng.random(240) < easy).tolist()
        for key, groups in {"groups": [i // 4 for i in range(240)], "items": range(240)}.items():
            low, high = interval(correct, groups)
            held[key] += low <= 0.5 <= high
    assert 0.92 <= held["groups"] / 300 <= 0.98
    assert held["items"] < held["groups"]


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (3, 9), (30, 12), (200, 201)])
def test_mcnemar_is_the_binomial_test(gained, lost):
    before = [False] * gained + [True] * lost + [True] * 20
    after = [True] * gained + [False] * lost + [True] * 20
    found = paired_difference(before, after, range(len(before)))
    assert (found["gained"], found["lost"]) == (gained, lost)
    assert found["difference"] == pytest.approx((gained - lost) / len(before))
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert found["p"] == pytest.approx(expected)


def test_bootstrap_is_that_of_groups():
    rng = np.random.default_rng(1)
    before, after = (rng.random((2, 200)) < [[0.5], [0.6]]).tolist()
    d = np.subtract(after, before, dtype=float)
    low, high = paired_difference(before, after, range(200))["interval"]
    assert high - low == pytest.approx(2 * 1.96 * d.std() / 200**0.5, rel=0.05)
    assert (low + high) / 2 == pytest.approx(d.mean(), abs=0.01)
    four = [x for x in before for _ in range(4)], [x for x in after for _ in range(4)]
    grouped = paired_difference(*four, [i // 4 for i in range(800)])["interval"]
    assert grouped == pytest.approx([low, high], abs=0.01)
    assert np.ptp(paired_difference(*four, range(800))["interval"]) == pytest.approx((high - low) / 2, rel=0.1)


def test_same_answers_are_no_difference():
    found = paired_difference([True, False, True], [True, False, True], "aab")
    assert found == {"difference": 0, "interval": [0, 0], "p": 1, "gained": 0, "lost": 0}
