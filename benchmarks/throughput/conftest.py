# SPDX-License-Identifier: Apache-2.0
"""pytest-benchmark over the cases of `spatial-pe bench`: its tables, JSON files and comparisons of runs.

pytest-benchmark times one function after another, so a slow minute of the machine falls on one variant. Here the
variants of a case take turns (``spatial_pe.lab.bench.timing``); each test then plays the samples of its variant back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from benchmarks.throughput.replay import CLOCK
from spatial_pe.lab.bench import suites


@functools.cache
def measured(case: suites.Case) -> dict:
    return case.run("cpu")


@pytest.fixture
def play(benchmark) -> Callable[[suites.Case, str], None]:
    """Puts what a variant of a case took into pytest-benchmark's tables; skips, with the reason, what did not run."""

    def run(case: suites.Case, variant: str) -> None:
        row = measured(case)
        if variant in row["refused"]:
            pytest.skip(row["refused"][variant])
        samples = row["seconds"][variant]
        benchmark.group = str(case)
        benchmark.extra_info |= {key: value for key, value in row.items() if key not in ("seconds", "refused")}
        CLOCK.load(samples)
        benchmark.pedantic(lambda: None, rounds=len(samples), iterations=1)

    return run
