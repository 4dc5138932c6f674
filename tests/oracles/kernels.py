# SPDX-License-Identifier: Apache-2.0
"""The kernels of this machine: a backend, and for the CPU the instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from spatial_pe.backends import cpu


@dataclass(frozen=True)
class Kernel:
    backend: str
    isa: str | None = None

    def __str__(self) -> str:
        return self.backend if self.isa is None else self.isa

    @contextmanager
    def selected(self) -> Iterator[str]:
        """The backend's name, while its kernels are those of the instruction set."""
        if self.isa is None:
            yield self.backend
            return
        extension: Any = cpu.EXTENSION
        before = extension.cpu_features()["isa"]
        extension.use_isa(self.isa)
        try:
            yield self.backend
        finally:
            extension.use_isa(before)


CPU_KERNELS = [Kernel("cpu", isa) for isa in cpu.FEATURES.get("usable_isas", [])]
KERNELS = [*CPU_KERNELS, Kernel("reference"), Kernel("composed")]


def distinct_kernels(dtype: torch.dtype) -> list[Kernel]:
    """CPU kernels that differ for a dtype: avx512_bf16 has only bfloat16, avx512 serves it the rest."""
    names = {str(kernel) for kernel in CPU_KERNELS}
    doubled = dtype != torch.bfloat16 and "avx512" in names
    return [kernel for kernel in CPU_KERNELS if not (doubled and kernel.isa == "avx512_bf16")]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
