# SPDX-License-Identifier: Apache-2.0
"""Every configuration compiles for every GPU, and within its budget: no spills, shared memory that the chip has, tensor
cores in use. Prints the table of docs/triton_budget.md (`make triton-budget` writes it)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spatial_pe.backends import triton

pytestmark = pytest.mark.skipif(triton.unavailable() is not None, reason=f"triton: {triton.unavailable()}")
ROOT = Path(__file__).parents[2]
# bytes of shared memory that one block can have
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


def compiled(tmp_path: Path, *arguments: str, path: str = "") -> dict:
    """The report of offline.py, in a process without the interpreter; `path` holds another Triton."""
    out = tmp_path / "budget.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, [path, str(ROOT)])), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(ROOT / "tests/triton/offline.py"), "--out", str(out), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text())


def check(report: dict) -> None:
    failures = []
    for row in report["rows"]:
        kernel, dtype = row["launch"].split()[:2]
        products = kernel != "rotate_kernel" and dtype != "float32"
        print(*row.values(), sep="  ")
        if row["spills"]:
            failures.append(f"{row['target']} {row['launch']}: {row['spills']} bytes of spills")
        if row["shared"] > SHARED[row["target"]]:
            failures.append(f"{row['target']} {row['launch']}: {row['shared']} bytes of shared memory")
        if products and not row["tensor_core"]:
            failures.append(f"{row['target']} {row['launch']}: no tensor core instruction")
    assert report["rows"] and not failures, "\n".join(failures)


# What users run most, on every GPU; the whole matrix takes 12 minutes of one core.
@pytest.mark.parametrize("target", SHARED)
@pytest.mark.parametrize("regime", ["bf16 D=64 N=", "bf16 D=80 windows", "bf16 D=72 N=576"])
def test_budget(regime, target, tmp_path):
    check(compiled(tmp_path, "--targets", target, "--only", regime))


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED)
def test_budget_of_every_configuration(target, tmp_path):
    check(compiled(tmp_path, "--targets", target))


OLDER = ROOT / ".venv/triton-3.6"


@pytest.mark.skipif(not OLDER.exists(), reason="no second Triton: make test installs it")
@pytest.mark.parametrize("regime", ["bf16 D=64 N=576", "bf16 D=80 windows", "bf16 D=72 N=576"])
def test_the_oldest_triton_compiles_them_too(regime, tmp_path):
    """3.6, that of torch 2.11: compiles and uses tensor cores. What it spills, newer ones may not."""
    report = compiled(tmp_path, "--targets", "sm_90", "--only", regime, path=str(OLDER))
    assert report["triton"].startswith("3.6")
    assert report["rows"] and all(row["tensor_core"] for row in report["rows"] if "rotate" not in row["launch"])
