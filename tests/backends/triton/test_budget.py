# SPDX-License-Identifier: Apache-2.0
"""Every configuration compiles for every GPU, and within its budget: no spills, shared memory that the chip has, tensor
cores in use, and no more registers and instructions per score than budget.json allows. Prints the table of
docs/triton_budget.md (`make triton-budget` writes both)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spatial_pe.backends.triton import backend as triton

pytestmark = pytest.mark.skipif(triton.unavailable() is not None, reason=f"triton: {triton.unavailable()}")
ROOT = Path(__file__).parents[3]
OLDER = ROOT / ".venv/triton-3.6"
LIMITS = json.loads(Path(__file__).with_name("budget.json").read_text())
# bytes of shared memory that one block can have; on sm_80, which has more, those of the smaller ones with its tiles
MMA_SYNC = ("sm_80", "sm_89", "sm_120")
SHARED = dict.fromkeys(MMA_SYNC, 99 * 1024) | {"sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
TENSOR_CORE = {target: {"HMMA"} for target in MMA_SYNC} | {
    "sm_90": {"HGMMA"},
    "sm_100": {"UTCHMMA"},
    "gfx942": {"v_mfma"},
}
# sm_90, bf16, D = 64, k rotated before, by the version of Triton: instructions of the main loop, and those of them that
# wait or synchronise (one wait for the tensor cores, not two). With 128 registers two programs of 8 warps share an SM.
FORWARD = {"3.6": {"all": 167, "sync": 8}, "3.9": {"all": 183, "sync": 14}}
# What users run most; the whole matrix takes ten minutes.
MAIN = ["bf16 D=64 N=256", "bf16 D=64 N=576", "bf16 D=80 windows of 64, packed"]  # 8 s each; the others are slow


def compiled(tmp_path: Path, *arguments: str, path: str = "") -> dict:
    """The report of offline.py, in a process without the interpreter; `path` holds another Triton."""
    out = tmp_path / "report.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, [path, str(ROOT)])), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tools.triton_budget", "--out", str(out), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text())


def broken(report: dict) -> list[str]:
    """Rules for any compiler."""
    failures = []
    for row in report["rows"]:
        kernel, dtype, *options = row["launch"].split()
        where = f"{row['target']} {row['launch']}"
        print(*row.values(), sep="  ")
        if row["spills"]:
            failures.append(f"{where}: {row['spills']} bytes of spills")
        if row["hazards"]:
            failures.append(f"{where}: {row['hazards']} hazards (tools/triton_hazards.py)")
        if "local" in row["loop"]:
            failures.append(f"{where}: local memory in the main loop")
        if row["shared"] > SHARED[row["target"]]:
            failures.append(f"{where}: {row['shared']} bytes of shared memory")
        multiplies = kernel not in ("rotate_kernel", "angles_kernel", "operands_kernel") and dtype != "float32"
        # tiles of 16 and 32 rows are too small for a warp group: mma.sync
        small = {"BLOCK=16", "BLOCK=32"} & set(options)
        wanted = TENSOR_CORE[row["target"]] | ({"HMMA"} if small else set())
        if multiplies and not wanted & set(row["tensor_core"]):
            failures.append(f"{where}: tensor cores are used by {row['tensor_core']}")
    assert report["rows"]
    return failures


def slower(report: dict) -> list[str]:
    """How the forward that is run most has more instructions than FORWARD allows."""
    (row,) = [
        row
        for row in report["rows"]
        if row["launch"].startswith("forward_kernel bfloat16 D=64")
        and "ROTATE_K=False" in row["launch"]
        and "OTHER=" not in row["launch"]
    ]
    limits = FORWARD.get(".".join(report["triton"].split(".")[:2]), {})
    found = {name: (row["loop"][name], most) for name, most in limits.items()} | {"registers": (row["registers"], 128)}
    return [f"{row['launch']}: {name} {got}, limit {most}" for name, (got, most) in found.items() if got > most]


@pytest.mark.parametrize("target", [pytest.param(t, marks=pytest.mark.slow) if t != "sm_90" else t for t in SHARED])
def test_main_configurations(target, tmp_path):
    from tools.triton_budget import exceeded

    report = compiled(tmp_path, "--targets", target, "--only", *MAIN)
    failures = broken(report) + exceeded(report, LIMITS) + (slower(report) if target == "sm_90" else [])
    assert not failures, "\n".join(failures)


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED)
def test_every_configuration(target, tmp_path):
    from tools.triton_budget import exceeded, unit

    report = compiled(tmp_path, "--targets", target)
    failures = broken(report) + exceeded(report, LIMITS)
    assert not failures, "\n".join(failures)
    assert {unit(row) for row in report["rows"]} == {name for name in LIMITS if name.startswith(target + " ")}


def with_the_older(target: str, tmp_path: Path, *only: str) -> None:
    report = compiled(tmp_path, "--targets", target, *(("--only", *only) if only else ()), path=str(OLDER))
    assert report["triton"].startswith("3.6")
    failures = broken(report) + (slower(report) if target == "sm_90" and only else [])
    assert not failures, "\n".join(failures)


@pytest.mark.skipif(not OLDER.exists(), reason="no second Triton: make test installs it")
@pytest.mark.parametrize("target", [pytest.param("sm_80", marks=pytest.mark.slow), "sm_90"])
def test_the_triton_of_torch_2_11(target, tmp_path):
    with_the_older(target, tmp_path, *MAIN[1:])


@pytest.mark.slow
@pytest.mark.skipif(not OLDER.exists(), reason="no second Triton: make test installs it")
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_the_triton_of_torch_2_11_in_every_configuration(target, tmp_path):
    with_the_older(target, tmp_path)


def test_a_budget_that_is_exceeded_is_noticed():
    from tools.triton_budget import budget, exceeded

    row = {"target": "sm_90", "launch": "forward_kernel bfloat16 D=64 ROTATE_K=False warps=8"}
    row |= {"registers": 128, "shared": 1000, "per_score": 7.0}
    limits = budget({"rows": [row]})
    assert limits == {"sm_90 forward_kernel bfloat16 D=64 ROTATE_K=False": {
        "registers": 128, "shared": 1000, "per_score": 7.7}}  # fmt: skip
    assert exceeded({"rows": [row]}, limits) == []
    small = budget({"rows": [row | {"registers": 43, "launch": row["launch"].replace("warps=8", "warps=4")}]})
    assert [limit["registers"] for limit in small.values()] == [48], "registers come in units of 8"
    worse = [row | change for change in ({"registers": 129}, {"shared": 1001}, {"per_score": 7.8})]
    assert [len(exceeded({"rows": [other]}, limits)) for other in worse] == [1, 1, 1]
    assert exceeded({"rows": [row]}, {}) == [
        "sm_90 forward_kernel bfloat16 D=64 ROTATE_K=False: no budget (make triton-budget)"
    ]
