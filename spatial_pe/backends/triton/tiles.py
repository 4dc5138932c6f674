# SPDX-License-Identifier: Apache-2.0
"""Tile sizes as data: by kernel, GPU family and head_dim. Results of `spatial-pe tune` override them.

All rows are modelled, not measured yet: no GPU was at hand. Their constraints (no spills, shared memory within the chip,
tensor cores used) are checked by compiling for each GPU offline: tests/backends/triton/test_budget.py;
docs/triton_budget.md has the table. Among tiles that meet them, rows are chosen by instructions per score in the main
loop and by programs per SM: two are needed, so that one loads and exponentiates while the other multiplies.
"""

from __future__ import annotations

import functools
import os
from dataclasses import replace

import torch

from ..._utils.dispatcher import assume_constant
from ..base import AttentionCall
from . import tuning_store
from .choice import Choice, Family, Rotation, Tile, Window

# Triton's interpreter runs the kernels on the CPU, for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def family_of(device: torch.device) -> Family:
    """Return the GPU family; "hopper" for Triton's interpreter, so that tests run what most users run.

    "ampere" and "ada" multiply by mma.sync: sm_80 and sm_86; sm_89 and sm_120, consumer Blackwell, for which ptxas needs
    more registers, so that some tiles of sm_80 spill. Their rows use at most the 99 KB of shared memory of the smaller ones.
    """
    if device.type != "cuda":
        return "hopper"
    if torch.version.hip is not None:
        return "cdna"
    major, minor = capability(device.index)
    if major in (9, 10, 11):
        return "hopper" if major == 9 else "blackwell"
    return "ada" if (major, minor) >= (8, 9) else "ampere"


@assume_constant
def capability(index: int) -> tuple[int, int]:
    if index not in _CAPABILITIES:  # torch's function takes 2 us, in every call
        _CAPABILITIES[index] = torch.cuda.get_device_capability(index)
    return _CAPABILITIES[index]


_CAPABILITIES: dict[int, tuple[int, int]] = {}


# SMs of an H100 or H200; an A100 has 108, a B200 148.
SMS = 132
ROTATION = Rotation(block=32, per_program=4, warps=4)
OPERANDS = ROTATION
# Tokens per program of angle_gradient.py.
ANGLES_BLOCK = 32

# k is rotated in the loop for sequences up to this many tokens, and by a separate kernel above. In the loop, every block
# of BM queries reads the angles once more, 256 bytes of a token at D = 64 against 256 of its k and v, from L2 at about 25
# bytes a clock and SM; the extra kernel reads and writes k, 256 bytes, in main memory at about 18, and reads the angles
# once: equal at N = 2.4 BM (model).
ROTATE_IN_LOOP_UP_TO = 256

# ------------------------------------------------------------------------------------------------- rows: (head_dim <=, tile)

# float32: no tensor cores, small tiles
_FLOAT32_FORWARD = ((64, Tile(32, 32, 8, 1)), (128, Tile(16, 16, 4, 1)))
_FLOAT32_QUERY = ((64, Tile(32, 32, 8, 1)), (128, Tile(16, 16, 8, 1)))
_FLOAT32_KEY = ((64, Tile(32, 32, 8, 1)), (128, Tile(16, 16, 4, 1)))
_FLOAT32_SMALL = ((64, Tile(16, 32, 8, 1)), (128, Tile(16, 16, 4, 1)))  # of the forward and for dk, dv: ada, blackwell
# Hopper: at D <= 64 at most 128 registers a thread, so that two programs fit an SM, and 5.7 instructions per score (Triton
# 3.9; 5.2 with 3.6).
_BEFORE: dict[Family, tuple[tuple[int, Tile], ...]] = {
    "ampere": ((80, Tile(128, 64, 8, 2)), (88, Tile(128, 32, 8, 2)), (128, Tile(128, 64, 8, 2))),
    "ada": (
        (32, Tile(128, 64, 8, 1)),
        (80, Tile(128, 64, 8, 2)),
        (88, Tile(128, 32, 8, 2)),
        (96, Tile(128, 64, 8, 2)),
        (112, Tile(128, 32, 8, 2)),
        (128, Tile(128, 64, 8, 2)),
    ),
    "hopper": ((32, Tile(128, 64, 8, 3, maxnreg=128)), (128, Tile(128, 64, 8, 3))),
    "blackwell": ((96, Tile(128, 64, 8, 3)), (104, Tile(128, 32, 8, 3)), (128, Tile(128, 64, 8, 3))),
    "cdna": ((128, Tile(64, 64, 8, 1)),),
}
_LOOP: dict[Family, tuple[tuple[int, Tile], ...]] = {
    "ampere": (
        (16, Tile(128, 64, 8, 2, "loop")),
        (32, Tile(128, 32, 8, 2, "loop")),
        (64, Tile(128, 64, 8, 2, "loop")),
        (128, Tile(128, 32, 8, 2, "loop")),
    ),
    "ada": (
        (16, Tile(128, 64, 8, 2, "loop")),
        (32, Tile(128, 32, 8, 2, "loop")),
        (64, Tile(128, 64, 8, 2, "loop")),
        (80, Tile(128, 32, 8, 1, "loop")),
        (112, Tile(128, 32, 8, 2, "loop")),
        (128, Tile(128, 16, 8, 2, "loop")),
    ),
    # 104 and 112, three blocks, have no registers for the rotation: 24 to 136 bytes of spills in the loop
    "hopper": ((96, Tile(128, 64, 8, 3, "loop")), (112, Tile(128, 64, 8, 3)), (128, Tile(128, 64, 8, 3, "loop"))),
    "blackwell": (
        (64, Tile(128, 64, 8, 3, "loop")),
        (72, Tile(64, 64, 4, 2, "loop")),
        (112, Tile(128, 64, 8, 3, "loop")),
        (128, Tile(128, 64, 8, 3)),  # in the loop 134 registers
    ),
    "cdna": ((128, Tile(64, 64, 8, 1, "loop")),),
}
# For calls where tiles of 128 queries would leave SMs without a program, e.g. one image.
_FEW: dict[Family, tuple[tuple[int, Tile], ...]] = {
    "ampere": ((80, Tile(64, 64, 4, 2)),),
    "ada": ((80, Tile(64, 64, 4, 2)),),
    "hopper": ((96, Tile(64, 64, 4, 3)),),
    "blackwell": ((80, Tile(64, 64, 4, 2)),),
    "cdna": (),
}
_QUERY: dict[Family, tuple[tuple[int, Tile], ...]] = {
    "ampere": ((32, Tile(64, 64, 4, 2)), (64, Tile(128, 64, 8, 2)), (80, Tile(128, 32, 8, 2)), (128, Tile(64, 32, 4, 2))),
    "ada": ((32, Tile(64, 64, 4, 2)), (64, Tile(128, 64, 8, 2)), (80, Tile(128, 32, 8, 2)), (128, Tile(64, 32, 8, 2))),
    "hopper": (
        (96, Tile(128, 64, 8, 2, split=True)), (112, Tile(64, 64, 8, 2, split=True)), (128, Tile(128, 64, 8, 2, split=True)),
    ),
    "blackwell": (
        (96, Tile(128, 64, 8, 2, split=True)), (112, Tile(64, 64, 8, 2, split=True)), (128, Tile(128, 64, 8, 2, split=True)),
    ),
    "cdna": ((128, Tile(64, 64, 8, 1)),),
}  # fmt: skip
_KEY: dict[Family, tuple[tuple[int, Tile], ...]] = {
    "ampere": ((96, Tile(32, 128, 8, 2)), (112, Tile(32, 32, 4, 2)), (128, Tile(32, 128, 8, 2))),
    "ada": (
        (64, Tile(32, 128, 8, 2)),
        (96, Tile(32, 64, 8, 2)),
        (112, Tile(16, 32, 4, 2)),
        (128, Tile(16, 64, 4, 2)),
    ),
    "hopper": ((64, Tile(64, 128, 8, 2, split=True)), (80, Tile(64, 128, 8, 2)), (128, Tile(32, 128, 8, 2))),
    "blackwell": (
        (80, Tile(64, 128, 8, 2)),
        (96, Tile(64, 64, 8, 2)),
        (112, Tile(64, 64, 4, 2)),
        (128, Tile(64, 64, 8, 2)),
    ),
    "cdna": ((128, Tile(64, 64, 8, 1)),),
}
# First match by head_dim and length. Missing entries would spill registers; those shapes use the tiled kernels.
# Four warps: 1,058 instructions each for a window of 64 tokens at D = 80, half of what its memory traffic takes on an H200.
_WINDOW_FORWARD: dict[Family, tuple[tuple[int, Window], ...]] = {
    "ampere": ((96, Window(64, 8, 4, 2)), (64, Window(128, 8, 2, 1))),
    "ada": ((64, Window(64, 8, 4, 2)), (80, Window(64, 8, 1, 1)), (64, Window(128, 8, 2, 1))),
    "hopper": ((104, Window(64, 4, 4, 2)), (128, Window(64, 8, 4, 2)), (96, Window(128, 8, 2, 2))),
    "blackwell": ((96, Window(64, 4, 4, 2)), (96, Window(128, 8, 2, 2))),
    "cdna": ((80, Window(64, 8, 4, 1)),),
}
_WINDOW_BACKWARD: dict[Family, tuple[tuple[int, Window], ...]] = {
    "ampere": (),
    "ada": (),
    "hopper": ((96, Window(64, 4)), (112, Window(64, 8))),
    "blackwell": ((96, Window(64, 4)),),
    "cdna": ((80, Window(64, 8)),),
}


def joins(family: Family, dtype: torch.dtype) -> bool:
    """Return whether the forward has one operand of q and k per head_dim block, not two. With wgmma and tcgen05 every
    operand costs a wait for the tensor cores. mma.sync and mfma need no waits, and joined operands cost addresses (215
    instructions a tile become 288: sm_80, D = 64, Triton 3.6); without tensor cores they cost registers."""
    return family in ("hopper", "blackwell") and dtype != torch.float32


def ones(family: Family, dtype: torch.dtype) -> int:
    """Return the number of columns of 1 in the product that sums the forward's rounded weights: the smallest size of the
    tensor cores; 0, no product, where weights are not rounded or never above 1."""
    return 0 if dtype != torch.bfloat16 else 16 if family == "cdna" else 8


def prebuilt(family: Family, dtype: torch.dtype, dim: int, longest: int, few: bool = False) -> Choice:
    """Return the shipped tiles. longest: tokens of the longest sequence, as far as known; few: see few_programs."""
    if dtype == torch.float32:  # a window is a whole tile in registers: it has no rows for float32
        small = family in ("ada", "blackwell")
        rows, key_rows = (_FLOAT32_SMALL,) * 2 if small else (_FLOAT32_FORWARD, _FLOAT32_KEY)
        forward = replace(_tile(rows, dim), rotate_k="loop" if longest <= ROTATE_IN_LOOP_UP_TO else "before")
        return Choice(family, forward, _tile(_FLOAT32_QUERY, dim), _tile(key_rows, dim), None, None)
    in_loop = longest <= ROTATE_IN_LOOP_UP_TO
    forward = _tile((_LOOP if in_loop else _BEFORE)[family], dim)
    if few and any(dim <= width for width, _ in _FEW[family]):
        forward = replace(_tile(_FEW[family], dim), rotate_k=forward.rotate_k)
    return Choice(
        family,
        forward,
        _tile(_QUERY[family], dim),
        _tile(_KEY[family], dim),
        _window(_WINDOW_FORWARD[family], dim, longest),
        _window(_WINDOW_BACKWARD[family], dim, longest),
    )


def _tile(rows: tuple[tuple[int, Tile], ...], dim: int) -> Tile:
    return next(tile for width, tile in rows if dim <= width)


def _window(rows: tuple[tuple[int, Window], ...], dim: int, longest: int) -> Window | None:
    fits = (window for width, window in rows if dim <= width and longest <= window.block)
    if (found := next(fits, None)) is None:
        return None
    return replace(found, block=next(size for size in (16, 32, 64, 128) if longest <= size))


# ---------------------------------------------------------------------------------------------------------------- a call


def few_programs(call: AttentionCall) -> bool:
    """Return whether blocks of 128 queries are fewer than the SMs of a large GPU."""
    batch, tokens, heads, _ = call.q.shape
    blocks = batch * -(-tokens // 128) if call.cu_seqlens is None else tokens // 128 + call.cu_seqlens.shape[0] - 1
    return blocks * heads < SMS


def heads_per_program(config: Window | Rotation, blocks: int, heads: int) -> int:
    """Return heads per program, fewer if SMs would get less than two programs. blocks: of tokens."""
    count = config.per_program
    while count > 1 and blocks * -(-heads // count) < 2 * SMS:
        count //= 2
    return count


def choice_of(call: AttentionCall) -> Choice:
    q = call.q
    # keys of their own are rotated before, and are no windows: the tiles of long sequences
    longest = bucket(call.longest) if call.keys is None else LONG
    return _choice(q.device, q.dtype, q.shape[-1], longest, few_programs(call))


# Lengths in the same bucket share their tiles.
BUCKETS = (16, 32, 64, 128, 256, 640, 1280, 2560)
LONG = 1 << 31


def bucket(tokens: int) -> int:
    return next((size for size in BUCKETS if tokens <= size), LONG)


@functools.lru_cache(1024)
def _choice(device: torch.device, dtype: torch.dtype, dim: int, longest: int, few: bool) -> Choice:
    """Return the tiles of a regime. Tuning used large grids; its result is ignored for small ones."""
    choice = prebuilt(family_of(device), dtype, dim, longest, few)
    return choice if few or device.type != "cuda" else tuning_store.load(device).over(choice, dtype, dim, longest)


def clear_cache() -> None:
    """Clear the cache, so that tuned tiles are read again."""
    _choice.cache_clear()
    tuning_store.load.cache_clear()
