# SPDX-License-Identifier: Apache-2.0
"""Result file of a run, and values derived from its rows: ratios of medians, rates."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path

from ..._utils.errors import UserError
from ..._utils.files import write_whole

Row = dict
SCHEMA = 1  # format of the file; increased when a field changes its meaning


def load(path: Path) -> dict:
    """Read a result file.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{str(path)!r} cannot be read as the result of a benchmark: {error}") from error
    if not isinstance(result, dict) or result.get("kind") != "spatial-bench" or result.get("schema") != SCHEMA:
        raise UserError(f"{str(path)!r} is not a result of this version's `spatial-pe bench`")
    return result


def unfinished(path: Path, begun: dict) -> dict | None:
    """Return the content of a file that a run like ``begun`` left unfinished: the same command, machine, and versions.

    Raises:
        UserError: the file holds an unfinished run of another command, which would be lost.
    """
    if not path.exists() or not path.stat().st_size:
        return None
    try:
        found = load(path)
    except UserError:
        return None  # of another version, or no result: it is replaced, as a finished run is
    left = len(found.get("cases", ())) - len(found["rows"])
    if left <= 0:
        return None
    changed = [name for name in begun if found.get(name) != begun[name]]
    if changed:
        raise UserError(
            f"--json {str(path)!r} holds {len(found['rows'])} cases of an unfinished run that differs in "
            f"{', '.join(changed)} ({found['command']}): repeat that command, name another file, or delete this one"
        )
    return found


def save(path: Path, result: dict) -> None:
    write_whole(path, json.dumps(result, indent=1) + "\n")


def rows(result: dict, suite: str) -> Iterator[Row]:
    return (row for row in result["rows"] if row["suite"] == suite)


def seconds(row: Row, variant: str) -> float | None:
    """Return the median; None if the variant was left out."""
    samples = row["seconds"].get(variant)
    return statistics.median(samples) if samples else None


def speedup(row: Row, against: str, of: str = "ours") -> float | None:
    """Return the speed relative to another variant; below 1 it is slower."""
    ours, theirs = seconds(row, of), seconds(row, against)
    return theirs / ours if ours is not None and theirs is not None else None


def best(row: Row, variants: tuple[str, ...]) -> str | None:
    """Return the fastest of some variants that were measured."""
    found = {name: seconds(row, name) for name in variants if seconds(row, name) is not None}
    return min(found, key=lambda name: found[name] or 0.0, default=None)


def gflops(row: Row, variant: str) -> float | None:
    median = seconds(row, variant)
    return None if median is None else row["flops"] / median / 1e9


def rotation_cost(row: Row) -> float | None:
    """Return the relative cost of our rotation; 0.02 means 2 % slower than without it."""
    ratio = speedup(row, "ours", of="off")
    return None if ratio is None else ratio - 1


def intensity(row: Row) -> float:
    """Return FLOP per byte of q, k, v and the output, each read or written once."""
    shape = row["shape"]
    size = {"bf16": 2, "fp16": 2, "fp32": 4}[row["dtype"]]
    elements = shape["batch"] * shape["heads"] * shape["tokens"] * shape["head_dim"]
    return row["flops"] / (4 * elements * size * (1 if row["direction"] == "forward" else 2))
