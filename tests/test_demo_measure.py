# SPDX-License-Identifier: Apache-2.0
"""The demo's measurements: errors, pairs of runs, intervals, what is too noisy."""

from __future__ import annotations

from statistics import median

import numpy as np
import pytest
import torch
from demo_parts import row

from spatial_pe.lab.demo import measure


def test_error_of_known_features():
    b = torch.tensor([[[3.0, 4.0], [0.0, 5.0]]])
    same = measure.error(b, b)
    assert (same.max, same.relative) == (0.0, 0.0)
    assert same.cosine_min == pytest.approx(1)
    apart = measure.error(torch.tensor([[[3.0, 4.0], [5.0, 0.0]]]), b)
    assert apart.max == 5
    assert apart.relative == pytest.approx(1)  # sqrt(50) of sqrt(50)
    assert (apart.cosine_mean, apart.cosine_min) == (pytest.approx(0.5), pytest.approx(0))


class Clock:
    """Time passes only when a tower runs: ``before`` takes 3 s, ``after`` 2 s, the very first run of each 10 s."""

    def __init__(self, monkeypatch) -> None:
        self.now, self.runs = 0.0, []
        monkeypatch.setattr(measure.clock.time, "perf_counter", lambda: self.now)

    def run(self, name: str, seconds: float) -> None:
        self.now += seconds if name in self.runs else 10
        self.runs.append(name)


def test_runs_are_interleaved_in_turns_and_the_first_is_dropped(monkeypatch):
    clock, steps = Clock(monkeypatch), []
    timing = measure.interleaved(
        lambda: clock.run("before", 3), lambda: clock.run("after", 2), 240, lambda *step: steps.append(step)
    )
    pairs = 240 // 20
    assert clock.runs == ["before", "after"] + ["before", "after", "after", "before"] * (pairs // 2)
    assert (timing.before, timing.after) == ([3.0] * pairs, [2.0] * pairs)
    assert timing.speed_up == pytest.approx(1.5)
    assert timing.images_per_second(batch=6) == pytest.approx((2, 3))
    assert steps[-1] == (pairs, pairs)


@pytest.mark.parametrize(
    ("seconds", "each", "pairs"),
    [
        (20, 1e-3, measure.MAX_PAIRS),
        (20, 1.3, 14),  # 15 would fit: each side goes first as often as the other
        (20, 4.5, measure.ENOUGH_PAIRS),  # four would fit
        (20, 9, 6),  # ten would take more than three times as long
        (20, 60, measure.FEWEST_PAIRS),
        (5, 0.6, measure.ENOUGH_PAIRS),  # --quick
        (0, 1, measure.FEWEST_PAIRS),
    ],
)
def test_the_number_of_pairs(monkeypatch, seconds, each, pairs):
    clock = Clock(monkeypatch)
    clock.runs += ["before", "after"]  # no slow first runs
    timing = measure.interleaved(
        lambda: clock.run("before", each / 2), lambda: clock.run("after", each / 2), seconds, lambda *_: None
    )
    assert len(timing.before) == len(timing.after) == pairs


# Of its sides each on its own: before 2 s, after 3 s, so 0.67x. Two of three pairs say that after is faster.
CONTRADICTION = measure.Timing(before=[4, 1, 2], after=[3.6, 0.9, 3])


def test_before_after_and_speed_up_agree():
    assert median(CONTRADICTION.before) < median(CONTRADICTION.after)
    assert CONTRADICTION.speed_up == pytest.approx(1 / 0.9)
    random = np.random.default_rng(0)
    for pairs in (1, 2, 5, 10, 60):
        before, after = (list(random.lognormal(0, 1, pairs)) for _ in range(2))
        timing = measure.Timing(before, after)
        rates = timing.images_per_second(4)
        assert rates[1] / rates[0] == pytest.approx(timing.speed_up)
        assert min(before + after) <= 4 / rates[0] <= max(before + after)
        # and after patching is to before as before is to after
        swapped = measure.Timing(after, before)
        assert swapped.speed_up == pytest.approx(1 / timing.speed_up)
        assert swapped.images_per_second(4) == pytest.approx(rates[::-1])


@pytest.mark.parametrize("change", [1.05, 1 / 1.05, 1.3])
def test_speed_up_survives_a_machine_that_slows_down(monkeypatch, change):
    """Each run of either is 5 % slower than the run before it, so that the second of a pair always seems worse."""
    clock = Clock(monkeypatch)
    clock.runs += ["before", "after"]

    def run(name: str, seconds: float) -> None:
        clock.run(name, seconds * change ** len(clock.runs))

    timing = measure.interleaved(lambda: run("before", 3e-3), lambda: run("after", 2e-3), 0, lambda *_: None)
    assert timing.speed_up == pytest.approx(1.5)
    before, after = timing.images_per_second(1)
    assert after / before == pytest.approx(1.5)
    assert timing.interval.low < 1.5 < timing.interval.high


@pytest.mark.parametrize(
    ("pairs", "rank", "percent"),  # as in printed tables of the sign test; below 6 no rank has 95 %
    [
        (1, 1, 0),
        (4, 1, 87.5),
        (5, 1, 93.75),
        (6, 1, 96.88),
        (8, 1, 99.22),
        (10, 2, 97.85),
        (31, 10, 97.06),
        (60, 22, 97.27),
    ],
)
def test_interval_of_the_median(pairs, rank, percent):
    ratios = [float(i) for i in np.random.default_rng(0).permutation(pairs) + 1]
    interval = measure.Timing(ratios, [1.0] * pairs).interval
    assert (interval.low, interval.high) == (rank, pairs + 1 - rank)
    assert 100 * interval.coverage == pytest.approx(percent, abs=0.01)


QUIET = (1.30, 1.31, 1.32, 1.29, 1.30, 1.31, 1.30, 1.33, 1.31, 1.30)


@pytest.mark.parametrize(
    ("ratios", "noisy"),
    [
        (QUIET, False),
        ((*QUIET[:-1], 0.4), False),  # one pair was disturbed
        ((*QUIET[:-3], 0.4, 0.8, 2.2), True),
        ((1.41, 1.45, 1.5, 1.55, 1.6, 1.7), False),  # how much is uncertain, but it is faster
        ((1.2, 1.3, 1.4, 1.5, 1.6, 1.7), True),
        ((0.97, 0.99, 1.0, 1.01, 1.02, 1.03), False),  # the same within 3 %
        ((0.93, 0.96, 1.0, 1.01, 1.05, 1.07), True),  # 7 % slower, or 7 % faster
        ((0.79, 0.8, 0.81, 0.8), False),  # slower, and sure of it
        ((0.79, 0.8, 0.81, 1.6), True),  # of four pairs the range counts
    ],
)
def test_a_noisy_run_has_no_verdict(ratios, noisy):
    made = row(before=ratios, after=[1.0] * len(ratios))
    assert made.as_json()["too_noisy"] == noisy
    text = measure.table([row(), made], "DO THIS")
    speed_up = f"{made.timing.speed_up:.2f}x"
    assert (speed_up in text) != noisy
    assert ("too noisy for a verdict" in text) == ("DO THIS" in text) == noisy
    if noisy:
        low, high = made.timing.interval.low, made.timing.interval.high
        assert f"between {low:.2f} and {high:.2f} times as fast" in text


def test_the_noisiest_row_is_named():
    quiet, some, most = (
        row(),
        row("bf16", before=(1.0, 2.0), after=(1.0, 1.0)),
        row(size=518, before=(1, 9), after=(1, 1)),
    )
    assert measure.noise([quiet], "Advice") == ""
    assert measure.noise([quiet, some, most], "Advice") == "fp32 518 px: between 1.00 and 9.00 times as fast. Advice."


@pytest.mark.parametrize("seconds", [0.0123, 1.0, 170.0])
def test_shown_rates_have_the_shown_ratio(seconds):
    made = row(before=[1.377 * seconds] * 4, after=[seconds] * 4)
    (line,) = [line for line in measure.table([made], "").splitlines() if "1.38x" in line]
    before, after = map(float, line.split()[6:8])
    assert after / before == pytest.approx(1.377, abs=0.0015)


@pytest.mark.parametrize(
    ("made", "fine"),
    [
        (row(relative=1e-6), True),
        (row(relative=1e-3), False),
        (row(relative=float("nan")), False),
        (row("bf16", relative=8e-3, rounding=(9e-3, 1e-2)), True),
        (row("bf16", relative=8e-3, rounding=(9e-3, 2e-2)), False),
        (row("bf16", relative=8e-3, rounding=(9e-3, float("nan"))), False),
    ],
)
def test_error_rule(made, fine):
    assert made.within_rounding == fine
