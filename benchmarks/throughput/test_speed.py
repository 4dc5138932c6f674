# SPDX-License-Identifier: Apache-2.0
"""Attention and whole towers, on the CPU.

python -m pytest benchmarks/throughput/test_speed.py --benchmark-autosave [-k "729 and bf16"]
pytest-benchmark compare --group-by=fullname
"""

from __future__ import annotations

import pytest

from benchmarks.throughput.replay import CLOCK
from spatial_pe.lab.bench.suites import Attention, Tower, full

CASES = list(full("cpu"))
PAIRS = [(case, variant) for case in CASES if isinstance(case, Attention) for variant in case.variants]
TOWERS = [case for case in CASES if isinstance(case, Tower)]


def name(case: Attention | Tower) -> str:
    parts = [
        getattr(case, "suite", "tower"),
        getattr(case, "axis", ""),
        case.name,
        case.dtype,
        getattr(case, "direction", ""),
        f"{case.threads}t",
    ]
    return "-".join(part for part in parts if part)


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(("case", "variant"), PAIRS, ids=[f"{name(case)}-{variant}" for case, variant in PAIRS])
def test_attention(play, case, variant):
    play(case, variant)


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("variant", ["before", "after"])
@pytest.mark.parametrize("case", TOWERS, ids=name)
def test_tower(play, case, variant):
    play(case, variant)
