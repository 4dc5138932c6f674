# SPDX-License-Identifier: Apache-2.0
"""A kernel launch as data: it can be run, compiled for a GPU that is not there (tests/triton), or kept for the next call
(replay.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton


@dataclass(frozen=True)
class Launch:
    """kernel[grid](*arguments, **constants, num_warps=...). Tensors among the arguments are passed by address."""

    kernel: triton.JITFunction
    grid: tuple[int, int]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int

    def run(self) -> Any:
        """The compiled kernel; None in Triton's interpreter and for an empty grid."""
        if 0 in self.grid:
            return None
        return self.kernel[self.grid](*self.arguments, **self.constants, num_warps=self.num_warps)

    def compile(self) -> Any:
        """The compiled kernel, for the current device, without running it."""
        return self.kernel.warmup(*self.arguments, **self.constants, num_warps=self.num_warps, grid=self.grid)

    def __str__(self) -> str:
        """The kernel, its dtype and what it was compiled for, as a name."""
        dtype = str(next(x.dtype for x in self.arguments if isinstance(x, torch.Tensor))).removeprefix("torch.")
        shown = {key: value for key, value in self.constants.items() if key not in ("CUT", "PAIRS")}
        options = " ".join(f"{key}={value}" for key, value in shown.items())
        return f"{self.kernel.fn.__name__} {dtype} {options} warps={self.num_warps}"
