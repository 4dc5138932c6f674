# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of the CUDA kernels stays within its budget: no spills, shared memory that the chip has, tensor cores
in use, and no more registers and instructions per score than budget.json allows. Of the extension that is installed and
the GPUs that it is built for; and compiled for others. `make cuda-budget` writes the budget and docs/cuda_budget.md."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import pytest

from tools import cuda_budget as budget
from tools.cuda_budget import TARGETS, Part
from tools.sass import Flow, Instruction

LIMITS_FILE = Path(__file__).with_name("budget.json")
LIMITS = json.loads(LIMITS_FILE.read_text()) if LIMITS_FILE.exists() else {}
MEGABYTES = 30
EXTENSION = budget.extension()
NO_TOOL = None if find_spec("triton") else "cuobjdump is that of the triton package, which is not installed"
NO_EXTENSION = NO_TOOL or (None if EXTENSION else "the CUDA kernels are not built")
NO_NVCC = NO_TOOL or (None if shutil.which("nvcc") else "no nvcc")
built = pytest.mark.skipif(NO_EXTENSION is not None, reason=str(NO_EXTENSION))
compiles = pytest.mark.skipif(NO_NVCC is not None, reason=str(NO_NVCC))


def failures_of(report: dict) -> list[str]:
    assert report["rows"]
    return broken(report) + budget.exceeded(report, LIMITS)


def broken(report: dict) -> list[str]:
    """Rules for any compiler."""
    failures = []
    for row in report["rows"]:
        where = budget.unit(row)
        if row["spills"]:
            failures.append(f"{where}: {row['spills']} bytes of local memory")
        if row["registers"] > 65536 // row["threads"]:
            failures.append(f"{where}: {row['registers']} registers for each of {row['threads']} threads")
        if row["shared"] > TARGETS[row["target"]].shared_per_block:
            failures.append(f"{where}: {row['shared']} bytes of shared memory")
        if row["kernel"] != "prepare":
            main = row["parts"]["main"]
            # nothing but softmax takes exp2 in these loops: the way through them is whole
            of_softmax = main["mix"]["exp2"] >= main["units"]
            if "HMMA" not in row["tensor_core"] or main["units"] % 8 or not of_softmax:
                failures.append(f"{where}: {row['tensor_core']}, {main} for a tile")
    return failures


@built
@pytest.mark.parametrize("target", [t if t == "sm_90" else pytest.param(t, marks=pytest.mark.slow) for t in TARGETS])
def test_the_extension(target):
    assert EXTENSION is not None
    if target not in budget.architectures(EXTENSION):
        pytest.skip(f"the CUDA kernels are not built for {target}")
    report = budget.report_of(budget.read_extension(EXTENSION, [target], budget.head_dims()), budget.planner())
    failures = failures_of(report)
    assert not failures, "\n".join(failures)
    assert {budget.unit(row) for row in report["rows"]} == {name for name in LIMITS if name.startswith(target + " ")}


@built
def test_the_extension_is_not_too_large():
    assert EXTENSION is not None and EXTENSION.stat().st_size <= MEGABYTES << 20


@compiles
@pytest.mark.parametrize(("target", "dim"), [pytest.param("sm_86", 64, marks=pytest.mark.slow), ("sm_89", 80)])
def test_others_of_the_same_kind(target, dim):
    """GPUs that run code for sm_80, with less shared memory and other rates."""
    failures = failures_of(budget.report_of(budget.compile_for(target, dim), budget.planner()))
    assert not failures, "\n".join(failures)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel(target):
    rows = [row for dim in budget.head_dims() for row in budget.compile_for(target, dim)]
    report = budget.report_of(rows, budget.planner())
    failures = failures_of(report)
    assert not failures, "\n".join(failures)
    assert {budget.unit(row) for row in report["rows"]} == {name for name in LIMITS if name.startswith(target + " ")}


def test_a_budget_that_is_exceeded_is_noticed():
    main = asdict(Part({"all": 267, "exp2": 32}, 64.0, 8192, 32.0))
    row = {
        "target": "sm_90",
        "kernel": "forward",
        "dtype": "bf16",
        "dim": 64,
        "threads": 384,
        "tensor_core": {"HMMA": 128},
    }
    row |= {"registers": 150, "shared": 100000, "per_score": 8.3, "spills": 0, "parts": {"main": main}}
    limits = budget.budget({"rows": [row]})
    assert limits == {"sm_90 forward bf16 D=64": {"registers": 168, "shared": 100000, "per_score": 9.2}}
    assert budget.exceeded({"rows": [row]}, limits) == broken({"rows": [row]}) == []
    worse = [row | change for change in ({"registers": 169}, {"shared": 100001}, {"per_score": 9.3})]
    assert [len(budget.exceeded({"rows": [other]}, limits)) for other in worse] == [1, 1, 1]
    assert budget.exceeded({"rows": [row]}, {}) == ["sm_90 forward bf16 D=64: no budget (make cuda-budget)"]
    half = asdict(Part({"all": 150, "exp2": 16}, 64.0, 8192, 32.0))
    bad: list[dict] = [
        {"spills": 8},
        {"registers": 171},
        {"shared": 240000},
        {"tensor_core": {}},
        {"parts": {"main": half}},
    ]
    assert [len(broken({"rows": [row | change]})) for change in bad] == [1] * len(bad)


def flow(*lines: str) -> Flow:
    """Instructions at 0, 16, 32 and so on."""
    found = []
    for i, text in enumerate(lines):
        predicate, _, rest = text.partition(" ") if text.startswith("@") else ("", "", text)
        name, _, operands = rest.partition(" ")
        found.append(Instruction(16 * i, name, operands, predicate.lstrip("@")))
    return Flow(found)


def test_the_way_of_nearly_every_tile_is_found():
    """A loop with a retry in it, a rare block and a wait; sm_80 leaves a loop by a call with a predicate."""
    tiles = flow(
        "MOV R0, RZ",  # 0x00
        "IADD3 R2, R2, 0x1, RZ",  # 0x10  the loop
        "LDS R1, [R2]",  # 0x20  waits
        "@!P0 BRA 0x20",
        "HMMA.16816.F32.BF16 R4, R8, R12, R4",  # 0x40  again
        "@P1 BRA 0x80",
        "FMNMX R4, R4, R5, !PT",  # 0x60  rare
        "FMUL R6, R6, R4",
        "MUFU.EX2 R4, R4",  # 0x80
        "@!P2 BRA 0xd0",  # after a retry
        "VOTE.ANY P3, P3",
        "@!P3 CALL.REL.NOINC 0xd0",
        "BRA 0x40",
        "HMMA.16816.F32.BF16 R8, R8, R12, R4",  # 0xd0
        "@P4 BRA 0x10",
        "EXIT",
    )
    main = budget.main_loop(tiles)
    assert main is not None and [len(loop.blocks) for loop in tiles.loops] == [8, 5, 1]
    rare = {block for block in main.blocks if budget.count(tiles, block, "FMNMX")}
    way = budget.code(tiles, tiles.path(main, budget.worth_of(tiles, budget.WORTH), rare))
    assert [hex(one.address) for one in way] == [
        *("0x10", "0x20", "0x30", "0x40", "0x50", "0x80", "0x90", "0xa0", "0xb0", "0xd0", "0xe0")
    ]
    assert budget.tensor(way) == 2
