# SPDX-License-Identifier: Apache-2.0
"""Tile sizes: rows of data, by kernel, kind of GPU, width of the dtype and head_dim.

All rows are modelled, none is measured: no GPU was at hand. What each of them must satisfy (no spills, shared memory
within the chip, tensor cores used) is checked by compiling it for its GPU offline: tests/triton/test_budget.py, and
docs/triton_budget.md holds the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Family = Literal["ampere", "hopper", "blackwell", "cdna"]


def family_of(device: torch.device) -> Family:
    """The kind of GPU; "hopper" for Triton's interpreter, so that tests run what most users run."""
    if device.type != "cuda":
        return "hopper"
    if torch.version.hip is not None:
        return "cdna"
    major, _ = torch.cuda.get_device_capability(device)
    return "ampere" if major == 8 else "hopper" if major == 9 else "blackwell"


@dataclass(frozen=True)
class Tile:
    """BM queries by BN keys; how many loads ahead."""

    bm: int
    bn: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Window:
    """Sequences per program, one after another; how many loads ahead."""

    per_program: int
    warps: int
    stages: int


# Tokens that a program of rotate.py turns.
ROTATE_BLOCK = 64

# K is turned in the loop for sequences up to this long, and by a kernel of its own above. Turning a tile for every block
# of queries costs 18 / BM of the attention whatever N is; the extra kernel reads and writes K, which falls with 1 / N
# (model: equal at N = 1,200 for BM = 128). Never on Ampere, where the turned tile stays in registers as an operand of
# mma.sync: every warp turns all of it, and spills.
ROTATE_K_UP_TO: dict[Family, int] = {"ampere": 0, "hopper": 1200, "blackwell": 1200, "cdna": 1200}

# Rows: head_dim up to which a tile serves. float32 multiplies on the ordinary units, in small tiles.
_FLOAT32_FORWARD = ((64, Tile(32, 32, 8, 1)), (128, Tile(16, 16, 4, 1)))
_FLOAT32 = ((64, Tile(32, 32, 8, 1)), (128, Tile(16, 16, 8, 1)))
_FORWARD: dict[Family, tuple[tuple[int, Tile], ...]] = {
    "ampere": ((64, Tile(128, 64, 8, 2)), (128, Tile(128, 32, 8, 2))),
    "hopper": ((88, Tile(128, 64, 8, 3)), (96, Tile(128, 64, 8, 2)), (128, Tile(128, 32, 8, 2))),
    "blackwell": ((64, Tile(128, 64, 8, 3)), (88, Tile(128, 32, 8, 3)), (128, Tile(128, 64, 8, 2))),
    "cdna": ((128, Tile(64, 64, 8, 1)),),
}
_QUERY: dict[Family, tuple[tuple[int, Tile], ...]] = {
    "ampere": ((64, Tile(128, 64, 8, 2)), (128, Tile(64, 32, 4, 2))),
    "hopper": ((80, Tile(128, 64, 8, 2)), (128, Tile(64, 64, 8, 2))),
    "blackwell": (
        (64, Tile(64, 64, 4, 2)),
        (80, Tile(128, 64, 8, 2)),
        (96, Tile(64, 64, 4, 2)),
        (128, Tile(64, 64, 8, 2)),
    ),
    "cdna": ((128, Tile(64, 64, 8, 1)),),
}
_KEY: dict[Family, tuple[tuple[int, Tile], ...]] = {
    "ampere": ((128, Tile(32, 32, 4, 2)),),
    "hopper": ((80, Tile(64, 128, 8, 2)), (128, Tile(64, 64, 8, 2))),
    "blackwell": ((80, Tile(64, 128, 8, 2)), (128, Tile(64, 64, 8, 2))),
    "cdna": ((128, Tile(64, 64, 8, 1)),),
}
# Rows: (longest sequence, head_dim) up to which windows.py serves. What is missing spills, and goes to attention.py.
_WINDOW_FORWARD: dict[Family, tuple[tuple[int, int, Window], ...]] = {
    "ampere": (),
    "hopper": (
        (64, 64, Window(4, 4, 2)), (64, 96, Window(4, 8, 2)), (128, 64, Window(2, 8, 2)), (128, 80, Window(2, 8, 1)),
    ),
    "blackwell": (
        (64, 64, Window(4, 4, 2)), (64, 96, Window(4, 8, 2)), (128, 64, Window(2, 8, 2)), (128, 80, Window(2, 8, 1)),
    ),
    "cdna": ((64, 64, Window(4, 8, 1)),),
}  # fmt: skip
_WINDOW_BACKWARD: dict[Family, tuple[tuple[int, int, Window], ...]] = {
    "ampere": (),
    "hopper": ((64, 80, Window(1, 8, 1)),),
    "blackwell": ((64, 80, Window(1, 8, 1)),),
    "cdna": ((64, 64, Window(1, 8, 1)),),
}


def forward_tile(family: Family, dtype: torch.dtype, dim: int) -> Tile:
    return _first(_FLOAT32_FORWARD if dtype == torch.float32 else _FORWARD[family], dim)


def query_tile(family: Family, dtype: torch.dtype, dim: int) -> Tile:
    """Of the backward, for dq."""
    return _first(_FLOAT32 if dtype == torch.float32 else _QUERY[family], dim)


def key_tile(family: Family, dtype: torch.dtype, dim: int) -> Tile:
    """Of the backward, for dk and dv: two accumulators of BN x D."""
    return _first(_FLOAT32 if dtype == torch.float32 else _KEY[family], dim)


def window(family: Family, dtype: torch.dtype, longest: int, dim: int, backward: bool) -> Window | None:
    """How windows.py serves sequences of at most `longest` tokens, or None if it does not."""
    if dtype == torch.float32:  # a whole tile in registers, and no tensor cores: attention.py's small tiles serve it
        return None
    rows = (_WINDOW_BACKWARD if backward else _WINDOW_FORWARD)[family]
    return next((row for length, width, row in rows if longest <= length and dim <= width), None)


def _first(rows: tuple[tuple[int, Tile], ...], dim: int) -> Tile:
    return next(tile for width, tile in rows if dim <= width)
