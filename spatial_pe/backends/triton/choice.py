# SPDX-License-Identifier: Apache-2.0
"""Tiles, windows and their choice for a call, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Family = Literal["ampere", "ada", "hopper", "blackwell", "cdna"]


@dataclass(frozen=True)
class Tile:
    """BM queries by BN keys; warps of 32 lanes; stages of the load pipeline."""

    bm: int
    bn: int
    warps: int
    stages: int
    rotate_k: Literal["loop", "before"] = "before"  # forward: k is rotated in the loop, or before by pre_rotate.py
    split: bool = False  # backward: a separate loop for whole tiles, which takes registers
    # maximum of registers per thread: 128 lets two programs of 8 warps share an SM; None: the compiler decides
    maxnreg: int | None = None


@dataclass(frozen=True)
class Window:
    """Window kernel for sequences of at most `block` tokens. Forward: heads per program, in sequence; pipeline stages."""

    block: int
    warps: int
    per_program: int = 1
    stages: int = 1


@dataclass(frozen=True)
class Rotation:
    """Tokens and heads that a program of rotate.py or pre_rotate.py rotates."""

    block: int
    per_program: int
    warps: int


@dataclass(frozen=True)
class Choice:
    """Tiles of a call. A window, if not None, is used instead of the tiles."""

    family: Family
    forward: Tile
    query: Tile  # backward, for dq
    key: Tile  # backward, for dk and dv: two accumulators of BN x D
    window_forward: Window | None
    window_backward: Window | None
