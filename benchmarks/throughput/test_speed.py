# SPDX-License-Identifier: Apache-2.0
"""pytest-benchmark over the cases of `spatial-pe bench`: its tables, JSON files and comparisons of runs.

    python -m pytest benchmarks/throughput/test_speed.py --benchmark-autosave [-k "729 and bf16"]
    pytest-benchmark compare --group-by=fullname

pytest-benchmark times one variant after another, so a slow minute of the machine falls on one of them: for ratios,
`spatial-pe bench` interleaves the variants. This is for comparing one variant between two commits.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from spatial_pe import patch
from spatial_pe.lab.bench import towers
from spatial_pe.lab.bench.cases import DTYPES, Inputs
from spatial_pe.lab.bench.suites import Attention, Tower, full
from spatial_pe.lab.bench.variants import RefusedError, build

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


@pytest.mark.parametrize(("case", "variant"), PAIRS, ids=[f"{name(case)}-{variant}" for case, variant in PAIRS])
def test_attention(benchmark, case, variant):
    torch.set_num_threads(case.threads)
    try:
        call = build(variant, Inputs(case.shape, DTYPES[case.dtype], "cpu"), case.direction, case.threads, case.level)
    except RefusedError as error:
        pytest.skip(str(error))
    benchmark.group = str(case)
    benchmark(call)


@pytest.mark.parametrize("variant", ["before", "after"])
@pytest.mark.parametrize("case", TOWERS, ids=name)
def test_tower(benchmark, case, variant):
    torch.set_num_threads(case.threads)
    dtype = DTYPES[case.dtype]
    module, forward = towers.TOWERS[case.name]()
    module = copy.deepcopy(module).eval().to(dtype)
    if variant == "after":
        patch(module)
    benchmark.group = str(case)
    benchmark(functools.partial(towers.run, forward, module, dtype))
