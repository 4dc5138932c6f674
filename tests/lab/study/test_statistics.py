# SPDX-License-Identifier: Apache-2.0
"""Intervals and comparisons, against scipy, by hand, and by how often they are wrong."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from spatial_pe.lab.study.findings import skill
from spatial_pe.lab.study.statistics import compare, holm, mean


def test_the_interval_is_students():
    values = [0.4, 0.55, 0.5, 0.61, 0.47]
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    found = mean(values)
    assert (found.value - found.half, found.value + found.half) == pytest.approx((low, high))
    assert np.isnan(mean([0.5]).half)
    with pytest.raises(ValueError, match="at least one seed"):
        mean([])


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = [abs((m := mean(rng.normal(0.3, 0.1, 5))).value - 0.3) <= m.half for _ in range(4000)]
    assert np.mean(held) == pytest.approx(0.95, abs=0.012)


def test_comparisons_are_paired():
    """Seeds differ a lot, the encodings on one seed a little: unpaired, nothing would be shown."""
    rng = np.random.default_rng(1)
    seeds = rng.normal(0.5, 0.2, 5)
    ours, theirs = seeds + 0.03 + rng.normal(0, 0.004, 5), seeds
    found = compare({"a": (ours, theirs)})["a"]
    assert found.p == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)
    assert found.verdict == "better" and stats.ttest_ind(ours, theirs).pvalue > 0.5
    assert compare({"a": (theirs, ours)})["a"].verdict == "worse"


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.5]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_many_comparisons_of_nothing_are_rarely_called_a_difference():
    """Of 200 studies with 20 comparisons each, at most one in twenty says anything; uncorrected, most would."""
    rng = np.random.default_rng(2)
    wrong, raw = [], []
    for _ in range(200):
        pairs = {str(i): (rng.normal(0.5, 0.1, 5), rng.normal(0.5, 0.1, 5)) for i in range(20)}
        found = compare(pairs).values()
        wrong.append(any(c.verdict in ("better", "worse") for c in found))
        raw.append(any(c.verdict != "no difference shown" for c in found))
    assert np.mean(wrong) < 0.08
    assert np.mean(raw) > 0.5


def test_equal_and_always_equally_different_runs():
    same = compare({"a": ([0.5, 0.6], [0.5, 0.6]), "b": ([0.75, 0.5], [0.5, 0.25])})
    assert same["a"].verdict == "no difference shown"
    assert same["b"].verdict == "better"


@pytest.mark.parametrize("pair", [([0.1], [0.2]), ([0.1, 0.2], [0.1, 0.2, 0.3])])
def test_seeds_that_do_not_pair_are_refused(pair):
    with pytest.raises(ValueError, match="the same seeds on both sides"):
        compare({"a": pair})


def test_skill_takes_chance_out():
    assert skill({"relation": 0.25, "nearer": 0.5}) == pytest.approx(0)
    assert skill({"relation": 1.0, "nearer": 0.75}) == pytest.approx(0.75)
