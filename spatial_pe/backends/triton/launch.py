# SPDX-License-Identifier: Apache-2.0
"""A kernel launch as data: it can be run, compiled for a GPU that is not present (tests/backends/triton), or cached for
later calls (launch_cache.py)."""

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
    maxnreg: int | None = None  # maximum of registers per thread; None: the compiler decides

    def options(self, hip: bool | None = None) -> dict[str, Any]:
        """Return compiler options. hip: for an AMD GPU; None: as torch is built."""
        # contracted, scores * c - top is one instruction; Triton 3.10 does so only if told
        told: dict[str, Any] = {"num_warps": self.num_warps, "enable_fp_fusion": True}
        if torch.version.hip is not None if hip is None else hip:
            told["num_warps"] = max(1, self.num_warps // 2)  # a wavefront of 64 lanes equals two warps
        elif self.maxnreg is not None:
            told["maxnreg"] = self.maxnreg
        return told

    def run(self) -> Any:
        """Run, and return the compiled kernel; None in Triton's interpreter and for an empty grid."""
        if 0 in self.grid:
            return None
        return self.kernel[self.grid](*self.arguments, **self.constants, **self.options())

    def compile(self) -> Any:
        """Return the compiled kernel, for the current device, without running it."""
        return self.kernel.warmup(*self.arguments, **self.constants, **self.options(), grid=self.grid)

    def __str__(self) -> str:
        """Return the kernel, its dtype and constants, as a name."""
        dtype = str(next(x.dtype for x in self.arguments if isinstance(x, torch.Tensor))).removeprefix("torch.")
        shown = {key: value for key, value in self.constants.items() if key not in ("CUT", "PAIRS") and value != ""}
        options = " ".join(f"{key}={value}" for key, value in shown.items())
        most = "" if self.maxnreg is None else f" maxnreg={self.maxnreg}"
        return f"{self.kernel.fn.__name__} {dtype} {options} warps={self.num_warps}{most}"
