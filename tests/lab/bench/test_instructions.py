# SPDX-License-Identifier: Apache-2.0
"""The CPU kernel takes no more instructions than when tools/instructions.py counted them."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from spatial_pe.backends import cpu
from tools.instructions import Case, count

COUNTED = json.loads((Path(__file__).parents[3] / "benchmarks/results/cpu/instructions.json").read_text())
CASES = [
    Case("forward", "float32", 64, 80, True),
    Case("forward", "bfloat16", 196, 64, True),
    Case("backward", "float32", 196, 64, True),
]
TOLERANCE = 0.03


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="no valgrind")
@pytest.mark.skipif(cpu.FEATURES.get("compiler") != COUNTED["compiler"], reason=f"counted with {COUNTED['compiler']}")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_instructions_are_no_more_than_they_were(case):
    (before,) = (row["instructions"] for row in COUNTED["rows"] if asdict(case).items() <= row.items())
    assert count(case) <= before * (1 + TOLERANCE)
