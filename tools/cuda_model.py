# SPDX-License-Identifier: Apache-2.0
"""MODEL of the CUDA kernels' time, from their instructions (cuda_budget.py), launches and the chip's issue rates.

    python -m tools.cuda_model --reports report.json [--chips H100 A100] [--measured attention.json]

It measures nothing and ignores latency: where warps wait for each other or for memory, a kernel takes longer. For each
unit it gives the time that the work of the busiest SM keeps it busy. A launch takes at least as long as the busiest
unit; without overlap with the tensor cores, as long as they and the busiest of the others, one after the other.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from tools.cuda_budget import ROOT, TARGETS, Gpu, Part, launches, load, planner

TRITON = ROOT / "docs/triton_budget.md"
SOURCES = ROOT / "csrc/cuda"


@dataclass(frozen=True)
class Chip:
    target: str
    multiprocessors: int
    gigahertz: float
    terabytes_per_second: float
    tensor: float  # clocks of a sub-partition for 16 x 8 x 16 products with float32 sums
    float: float  # the same for an instruction of a warp

    @property
    def gpu(self) -> Gpu:
        gpu = TARGETS[self.target]
        return Gpu(self.multiprocessors, gpu.shared_per_block, gpu.shared_per_multiprocessor)


# Tensor: from the peaks that NVIDIA publishes for float32 sums, which on GeForce are half of those of the same chips on
# other boards. H100's is for wgmma, of which mma.sync reaches 62 %; B200 is taken to be like it.
CHIPS = {
    "A100": Chip("sm_80", 108, 1.41, 2.0, 8, 2),
    "RTX 3090": Chip("sm_86", 82, 1.70, 0.94, 32, 1),
    "L40S": Chip("sm_89", 142, 2.52, 0.86, 16, 1),
    "RTX 4090": Chip("sm_89", 128, 2.52, 1.01, 32, 1),
    "H100": Chip("sm_90", 132, 1.755, 3.35, 6.4, 1),
    "H200": Chip("sm_90", 132, 1.755, 4.3, 6.4, 1),
    "B200": Chip("sm_100", 148, 1.85, 7.7, 6.4, 1),
    "RTX 5090": Chip("sm_120", 170, 2.41, 1.79, 32, 1),
}
EXP2 = 8  # clocks of a sub-partition for an instruction of a warp
SHARED = 128  # bytes a clock, of an SM

Shape = tuple[int, int, int]  # sequences, heads, tokens
SHAPES: list[tuple[Shape, int]] = [
    ((768, 16, 64), 80), ((64, 16, 196), 64), ((64, 16, 256), 64),
    ((64, 16, 576), 64), ((64, 16, 729), 72), ((64, 16, 1024), 64),
]  # fmt: skip
FLOPS = {"forward": 4.0, "backward": 10.0}  # of S H N^2 D


class Work:
    """Work of one item (or block) on an SM: clocks by unit, and instructions of warps."""

    def __init__(self, chip: Chip, parts: dict[str, Part]) -> None:
        self.chip, self.parts = chip, parts
        self.clocks = dict.fromkeys(("tensor", "exp2", "issue", "float", "shared"), 0.0)
        self.instructions = 0.0

    def add(self, name: str, runs: float, warps: int = 4) -> None:
        """Add runs of a part by so many warps, which share the sub-partitions evenly only if 4 divides them."""
        part = self.parts[name]
        each = runs / warps * math.ceil(warps / 4)
        self.clocks["tensor"] += each * part.tensor * self.chip.tensor
        self.clocks["exp2"] += each * part.mix.get("exp2", 0) * EXP2
        self.clocks["issue"] += each * part.mix["all"]
        self.clocks["float"] += each * part.mix.get("float", 0) * self.chip.float
        self.clocks["shared"] += runs * part.shared_bytes / SHARED
        self.instructions += runs * part.mix["all"]

    def add_rows(self, name: str, rows: float, dim: int, warps: int = 4) -> None:
        """Add runs of a part in which a lane does 8 channels: all channels of these rows."""
        self.add(name, rows * dim / 8 / 32 / self.parts[name].units, warps)


@dataclass
class Time:
    """Time of one launch, in microseconds."""

    kernel: str
    units: dict[str, float]
    instructions: float  # of all warps

    @property
    def least(self) -> float:
        return max(self.units.values())

    @property
    def most(self) -> float:
        others = max(self.units[name] for name in ("exp2", "issue", "float", "shared"))
        return max(self.units["memory"], self.units["tensor"] + others)


def time_of(launch: dict, parts: dict[str, Part], chip: Chip, shape: Shape, dim: int) -> Time:
    sequences, heads, tokens = shape
    rows, kernel, warps = sequences * heads, launch["kernel"], launch["threads"] // 32
    first = kernel.split("_")[0]
    work, items, numbers = Work(chip, parts), launch["blocks"], 4  # numbers: bytes of lse and delta for a row
    if first == "windows":
        windows(work, warps, tokens, dim, int(kernel.split("_")[1]))
        items, tensors = rows, 4
    elif first == "forward":
        items, tensors = rows * forward(work, launch, tokens, dim), 4
    elif first == "queries":
        queries(work, warps, tokens, dim)
        tensors, numbers = 5, 8
    elif first == "keys":
        blocks = int(kernel.split("_")[1])
        whole = launch["blocks"] == rows and 16 * blocks * warps >= tokens
        keys(work, warps, tokens, dim, blocks, whole)
        tensors, numbers = (8, 4) if whole else (6, 8)
    else:  # prepare: memory alone
        tensors = 6
    # items of the busiest SM; smaller grids are distributed over all SMs
    rounds = math.ceil(items / launch["blocks"]) * math.ceil(launch["blocks"] / chip.multiprocessors)
    units = {name: rounds * clocks / chip.gigahertz / 1e3 for name, clocks in work.clocks.items()}
    units["memory"] = rows * tokens * (2 * dim * tensors + numbers) / chip.terabytes_per_second / 1e6
    return Time(kernel, units, work.instructions * items)


def constant(header: str, name: str) -> int:
    """Return a constant that is in neither the kernels nor the launches."""
    found = re.search(rf"\b{name} = (\d+)", (SOURCES / header).read_text())
    assert found, f"{name} in {header}"
    return int(found[1])


def windows(work: Work, warps: int, tokens: int, dim: int, keys: int) -> None:
    work.add("main", warps * math.ceil(tokens / 16) * 16 / keys, warps)
    work.add_rows("rotate", 2 * tokens, dim, warps)
    work.add_rows("copy", 3 * tokens, dim, warps)


def forward(work: Work, launch: dict, tokens: int, dim: int) -> int:
    """Add the forward; return the items of a sequence. Consumers and producers share the SM."""
    tile, producers = constant("forward.h", "BN"), constant("forward.h", "PRODUCERS")
    consumers = launch["threads"] // 32 - producers
    blocks = round(2 * work.parts["main"].units / tile)  # of 16 queries, of a warp
    all_passes = math.ceil(tokens / (16 * blocks * consumers))
    items = math.ceil(all_passes / launch["passes"])
    passes = all_passes / items
    tiles = tokens // tile + math.ceil(tokens % tile / 16) * 16 / tile
    work.add("main", consumers * passes * tiles, consumers)
    work.add("once", consumers * passes, consumers)
    queries = passes * blocks * 16 * consumers
    work.add("produce", producers * (math.ceil(tokens / tile) + passes * blocks), producers)
    work.add_rows("rotate", tokens + queries, dim, producers)
    work.add_rows("copy", 2 * tokens + queries, dim, producers)
    return items


def queries(work: Work, warps: int, tokens: int, dim: int) -> None:
    tile = constant("backward_queries.h", "BN")
    work.add("main", warps * math.ceil(tokens / tile), warps)
    work.add("once", warps, warps)
    work.add_rows("copy", 2 * tokens + 2 * 16 * warps, dim, warps)
    work.add_rows("inverse", 16 * warps, dim, warps)


def keys(work: Work, warps: int, tokens: int, dim: int, blocks: int, whole: bool) -> None:
    main = "whole" if whole else "main"
    tile = round(2 * work.parts[main].units / blocks)  # queries
    tiles = math.ceil(tokens / tile)
    work.add(main, warps * tiles, warps)
    work.add("once", warps, warps)
    work.add_rows("copy", 2 * tokens + 2 * 16 * blocks * warps, dim, warps)
    work.add_rows("inverse", 16 * blocks * warps, dim, warps)
    if whole:
        pieces = tiles * tile / 16 * math.ceil(dim / 16)  # of dq, 16 x 16
        working = min(warps, round(pieces / tiles))
        work.add("dq", pieces * math.ceil(tokens / 16) / work.parts["dq"].units, working)
        work.add("dq once", pieces, working)
        work.add_rows("rotate", 2 * tokens, dim, warps)
        work.add_rows("inverse", tokens, dim, warps)
        work.add_rows("delta", tokens, dim, warps)


# ----------------------------------------------------------------------------------------------------------- reports


def parts_of(report: dict, target: str, dim: int) -> dict[str, dict[str, Part]]:
    """Return the parts of the bfloat16 kernels, by name."""
    return {
        row["kernel"]: {name: Part(**part) for name, part in row["parts"].items()}
        for row in report["rows"]
        if (row["target"], row["dim"], row["dtype"]) == (target, dim, "bf16")
    }


def predict(report: dict, plans: ModuleType, name: str, shape: Shape, dim: int, direction: str) -> list[Time]:
    """Return the times, empty if the report lacks the kernels."""
    chip = CHIPS[name]
    kernels = parts_of(report, chip.target, dim)
    rows = launches(plans, chip.gpu, shape, dim, direction)
    if not all(row["kernel"] in kernels for row in rows):
        return []
    return [time_of(row, kernels[row["kernel"]], chip, shape, dim) for row in rows]


def triton_per_score(target: str, shape: Shape, dim: int, direction: str) -> float | str:
    """Return the sum over the main loops of the Triton kernels for such calls; "" if one has no number."""
    section = TRITON.read_text().partition(f"\n## {target}:")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in section.splitlines() if row.startswith("| bf16")]
    tokens = shape[2]
    if tokens == 64:
        wanted = [("window_" + direction, "")]
    elif direction == "forward":
        wanted = [("forward", f"ROTATE_K={tokens <= 256}")]
    else:
        wanted = [("query", ""), ("key", "")]
    rows = [row for row in rows if row[0].startswith(f"bf16 D={dim} N=")]
    found = [next((row[-1] for row in rows if row[1] == name and option in row[2]), "") for name, option in wanted]
    return round(sum(map(float, found)), 1) if all(found) else ""


def table(report: dict, plans: ModuleType, names: list[str]) -> str:
    lines = []
    for name in names:
        rows = []
        for shape, dim in SHAPES:
            for direction in FLOPS:
                if times := predict(report, plans, name, shape, dim, direction):
                    rows.append(line(name, shape, dim, direction, times))
        if rows:
            lines += [
                f"## {name}: a model, not a measurement",
                "",
                "Microseconds that each unit of the busiest SM, or the memory, is busy. Per score: instructions of all",
                "warps, with copies and rotations; Triton's of the main loops alone (docs/triton_budget.md).",
                "",
                "| sequences | head_dim | direction | launches | tensor | exp2 | issue | float | shared | memory "
                "| predicted | TFLOP/s | per score | Triton |",
                "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
                *rows,
                "",
            ]
    return "\n".join(lines)


def line(name: str, shape: Shape, dim: int, direction: str, times: list[Time]) -> str:
    sequences, heads, tokens = shape
    least, most = sum(time.least for time in times), sum(time.most for time in times)
    scores = sequences * heads * tokens**2
    rates = [FLOPS[direction] * scores * dim / time / 1e6 for time in (most, least)]
    cells = [f"{sequences} x {tokens}", dim, direction, ", ".join(time.kernel for time in times)]
    cells += [f"{sum(time.units[unit] for time in times):.0f}" for unit in times[0].units]
    cells += [f"{least:.0f} to {most:.0f} µs", f"{rates[0]:.0f} to {rates[1]:.0f}"]
    cells.append(f"{32 * sum(time.instructions for time in times) / scores:.1f}")
    cells.append(triton_per_score(CHIPS[name].target, shape, dim, direction))
    return "| " + " | ".join(map(str, cells)) + " |"


def compare(report: dict, plans: ModuleType, measured: dict) -> str:
    """Compare with the times of backend="cuda" in benchmarks/throughput/gpu."""
    device = measured["device"]["name"]
    name = next((name for name in CHIPS if name in device), None)
    if name is None:
        return f"{device}: not in the model"
    lines = [
        f"{device}, as {name}",
        "",
        "| tokens | head_dim | direction | predicted | measured |",
        "|---|---|---|---|---|",
    ]
    for row in measured["rows"]:
        batch, heads, tokens, dim = row["size"]
        milliseconds = row["median_ms"].get("cuda")
        if milliseconds is None or row["direction"] not in FLOPS:
            continue
        if times := predict(report, plans, name, (batch, heads, tokens), dim, row["direction"]):
            least, most = sum(time.least for time in times), sum(time.most for time in times)
            lines.append(f"| {batch} x {tokens} | {dim} | {row['direction']} | {least:.0f} to {most:.0f} µs "
                         f"| {1000 * milliseconds:.0f} µs |")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=Path, nargs="+", required=True, help="JSON files of cuda_budget.py")
    parser.add_argument("--chips", nargs="+", default=list(CHIPS), choices=CHIPS)
    parser.add_argument("--extension", type=Path, help="whose launches; else those of the installed or emulated one")
    parser.add_argument("--measured", type=Path, help="JSON file of benchmarks/throughput/gpu")
    arguments = parser.parse_args()
    plans = load(arguments.extension) if arguments.extension else planner()
    if plans is None:
        raise SystemExit("nothing plans the launches: neither the extension nor build/emulator is built")
    report = {"rows": [row for path in arguments.reports for row in json.loads(path.read_text())["rows"]]}
    if arguments.measured:
        print(compare(report, plans, json.loads(arguments.measured.read_text())))
    else:
        print(table(report, plans, arguments.chips))


if __name__ == "__main__":
    main()
