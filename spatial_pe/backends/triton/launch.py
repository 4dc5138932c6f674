# SPDX-License-Identifier: Apache-2.0
"""A kernel launch as data: it can be run, compiled for a GPU that is not there (tests/backends/triton), or kept for the next call
(replay.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton


@dataclass(frozen=True)
class Launch:
    """kernel[grid](*arguments, **constants, **options()). Tensors among the arguments are passed by address."""

    kernel: triton.JITFunction
    grid: tuple[int, int]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int  # of 32 lanes
    maxnreg: int | None = None  # most registers a thread; None: as many as the compiler likes

    def options(self, hip: bool | None = None) -> dict[str, Any]:
        """What the compiler is told. hip: for an AMD GPU; None: as torch is."""
        # contracted, scores * c - top is one instruction; Triton 3.10 no longer does it unless told
        told: dict[str, Any] = {"num_warps": self.num_warps, "enable_fp_fusion": True}
        if torch.version.hip is not None if hip is None else hip:
            told["num_warps"] = max(1, self.num_warps // 2)  # a wavefront of 64 lanes does the work of two warps
        elif self.maxnreg is not None:
            told["maxnreg"] = self.maxnreg
        return told

    def run(self) -> Any:
        """The compiled kernel; None in Triton's interpreter and for an empty grid."""
        if 0 in self.grid:
            return None
        return self.kernel[self.grid](*self.arguments, **self.constants, **self.options())

    def compile(self) -> Any:
        """The compiled kernel, for the current device, without running it."""
        return self.kernel.warmup(*self.arguments, **self.constants, **self.options(), grid=self.grid)

    def __str__(self) -> str:
        """The kernel, its dtype and what it was compiled for, as a name."""
        dtype = str(next(x.dtype for x in self.arguments if isinstance(x, torch.Tensor))).removeprefix("torch.")
        shown = {key: value for key, value in self.constants.items() if key not in ("CUT", "PAIRS")}
        options = " ".join(f"{key}={value}" for key, value in shown.items())
        most = "" if self.maxnreg is None else f" maxnreg={self.maxnreg}"
        return f"{self.kernel.fn.__name__} {dtype} {options} warps={self.num_warps}{most}"
