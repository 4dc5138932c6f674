# SPDX-License-Identifier: Apache-2.0
"""Tile sizes: for each kernel, rows of data with a reason. All of them are modelled, not measured: no GPU was at hand.

What a row must satisfy on sm_80, sm_90 and sm_100 (no spills, shared memory within the chip) is checked by compiling
every one of them offline: tests/triton/test_budget.py prints the table that docs/triton_budget.md holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """BM queries by BN keys."""

    bm: int
    bn: int
    warps: int
    stages: int


# Sequences up to this long are one tile (windows.py).
LONGEST_WINDOW = 128
# K is turned in the loop up to here, by a kernel of its own above: turning a tile again for every block of queries costs
# 18 / BM of the attention whatever N is; the extra kernel costs a launch, and reading and writing K, which falls with 1 / N
# (model: equal at 1,200 tokens for BM = 128).
ROTATE_K_IN_LOOP = 1200
# Tokens that a program of rotate.py turns.
ROTATE_BLOCK = 64


def forward_tile(dtype: torch.dtype, dim: int) -> Tile:
    if dtype == torch.float32:  # products on the ordinary units: small tiles, or the accumulators spill
        return Tile(32, 32, 4, 1) if dim > 64 else Tile(64, 32, 4, 1)
    if dim > 64:
        return Tile(128, 64, 8, 2)
    return Tile(128, 64, 4, 3)


def query_tile(dtype: torch.dtype, dim: int) -> Tile:
    """Of the backward, for dq."""
    if dtype == torch.float32:
        return Tile(32, 32, 4, 1)
    return Tile(64, 64, 4, 2) if dim > 64 else Tile(128, 64, 8, 2)


def key_tile(dtype: torch.dtype, dim: int) -> Tile:
    """Of the backward, for dk and dv: two accumulators of BN x D."""
    if dtype == torch.float32:
        return Tile(32, 32, 4, 1)
    return Tile(64, 64, 4, 2) if dim > 64 else Tile(64, 128, 8, 2)


@dataclass(frozen=True)
class Window:
    """Sequences per program, one after another, and how many loads ahead."""

    per_program: int
    warps: int
    stages: int


def window(dtype: torch.dtype, block: int, backward: bool) -> Window:
    if dtype == torch.float32:
        return Window(1, 8 if block == 128 else 4, 1)
    if backward:
        return Window(2, 8 if block == 128 else 4, 1)
    return Window(4, 8 if block == 128 else 4, 2)
