# SPDX-License-Identifier: Apache-2.0
"""Measure the host overhead of a call of the Triton backend, up to the launch itself, on a machine without a GPU.

    python -m tools.host_overhead

Kernels are compiled for an H100; a driver that launches nothing replaces the real one, whose launch time has to be
added. Microseconds of this process's CPU time, so that load on the machine matters little. benchmarks/throughput/gpu
measures the whole on a GPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Triton's target: backend, architecture, lanes of a warp.
HOPPER = ("cuda", 90, 32)


@dataclass(frozen=True)
class Launched:
    """Arguments of a launch: the kernel's name, its grid and all of its arguments."""

    name: str
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]


class FakeGPU:
    """A Triton driver that compiles for an H100, takes CPU memory for the GPU's, and records launches."""

    binary_ext = "cubin"

    def __init__(self, keep: bool = False) -> None:
        self.launches: list[Launched] = []
        gpu = self

        class Launcher:
            def __init__(self, source: Any, metadata: Any) -> None:
                self.name = source.fn.fn.__name__

            def __call__(self, x: int, y: int, z: int, *arguments: Any) -> None:
                if keep:  # stream, function, two of metadata, two hooks come first
                    gpu.launches.append(Launched(self.name, (x, y, z), arguments[6:]))

        self.launcher_cls = Launcher
        self.utils = self

    def install(self) -> FakeGPU:
        """Replace Triton's driver, and the properties that the backend reads from torch. Use in a separate process."""
        if os.environ.get("TRITON_INTERPRET", "0") == "1":
            raise RuntimeError("TRITON_INTERPRET is set: kernels would be interpreted, not compiled")
        from triton.runtime import driver

        from spatial_pe.backends.triton import backend as triton
        from spatial_pe.ops import select

        driver.set_active(self)
        triton.unavailable = lambda: None
        triton.cannot_serve = lambda call: None
        select.AUTO = ("triton",)
        select._slower = lambda name, call: None
        return self

    # ------------------------------------------------------------------------------------ what Triton asks a driver

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*HOPPER)

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 2, 128, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}

    def unload_module(self, *_: Any) -> None:
        pass


def microseconds(call: Callable[[], object], calls: int = 2000) -> float:
    for _ in range(100):
        call()
    samples = []
    for _ in range(9):
        begin = time.process_time()
        for _ in range(calls // 9):
            call()
        samples.append((time.process_time() - begin) / (calls // 9) * 1e6)
    return statistics.median(samples)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    import triton

    import spatial_pe
    from spatial_pe import rope_attention
    from spatial_pe.backends import cuda
    from spatial_pe.backends.base import AttentionCall
    from spatial_pe.backends.triton import plan
    from spatial_pe.backends.triton.backend import forward, rotation

    FakeGPU().install()
    cuda.EMULATED, cuda.EXTENSION = True, types.SimpleNamespace(forward=lambda *args, **options: None)
    torch.set_num_threads(1)
    q, k, v = torch.randn(1, 196, 3, 16, 64, dtype=torch.bfloat16).unbind(2)
    rotary = spatial_pe.AxialRoPE(64)(spatial_pe.PatchGrid(14, 14))
    rotary = spatial_pe.Rotary(rotary.cos.detach(), rotary.sin.detach(), rotary.pairing)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    call = AttentionCall(q, k, v, rotary, 0.125, None, None, None)
    op, settings = torch.ops.spatial_pe.rope_attention, ("half", 0.125, None, None, None, "triton")
    rows = {
        "forward, inference": lambda: rope_attention(q, k, v, rotary),
        "forward, training": lambda: rope_attention(*leaves, rotary),
        "the backend's forward alone": lambda: forward(call),
        "the torch op, inference": lambda: op(q, k, v, rotary.cos, rotary.sin, *settings),
        "the torch op, training": lambda: op(*leaves, rotary.cos, rotary.sin, *settings),
        "forward, CUDA, before its extension": lambda: rope_attention(q, k, v, rotary, backend="cuda"),
        "rotation of q and k": lambda: rotation([q, k], rotary),
        "planning, for a new shape": lambda: plan.plan_forward(call),
        "Triton's own dispatch of one launch": plan.plan_forward(call).launches[0].run,
    }
    print(f"torch {torch.__version__}, triton {triton.__version__}: host time before the launch")
    for name, function in rows.items():
        print(f"{name:<36} {microseconds(function):6.1f} us")


if __name__ == "__main__":
    main()
