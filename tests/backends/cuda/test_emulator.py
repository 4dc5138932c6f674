# SPDX-License-Identifier: Apache-2.0
"""The host emulator of the CUDA kernels: the cases of emulator_test.cpp, in several orders of the threads."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROGRAM = ROOT / os.environ.get("SPATIAL_PE_EMULATOR_BUILD", "build/emulator") / "emulator_test"

if not PROGRAM.is_file():
    pytest.skip("emulator_test is not built: make build/emulator/built", allow_module_level=True)


def run(*words: str, seed: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SPATIAL_PE_EMULATOR_SEED": str(seed)}
    return subprocess.run([PROGRAM, *words], env=environment, capture_output=True, text=True, timeout=60)


NAMES = run("--list").stdout.split()


def test_the_list_is_complete():
    assert len(NAMES) >= 59
    assert len(set(NAMES)) == len(NAMES)


def test_an_unknown_name_fails():
    assert run("no_such_case").returncode == 1


@pytest.mark.parametrize("seed", [0, 1, 2])  # 0: the plain order
@pytest.mark.parametrize("name", NAMES)
def test_case(name: str, seed: int):
    result = run(name, seed=seed)
    assert (result.returncode, result.stdout) == (0, f"ok {name}\n"), result.stdout + result.stderr
