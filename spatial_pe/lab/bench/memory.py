# SPDX-License-Identifier: Apache-2.0
"""Peak memory of one call, without inputs and output.

    python -m spatial_pe.lab.bench.memory VARIANT BATCH HEADS TOKENS HEAD_DIM DTYPE

On the CPU it is the high-water mark of a separate process, which Linux can reset; torch counts its own allocations, not
those of kernels. On a GPU it is that of torch's allocator.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

from .cases import DTYPES, Inputs, Shape
from .variants import RefusedError, build

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def unavailable(device: str) -> str | None:
    if device == "cpu" and not CLEAR.exists():
        return "needs Linux: /proc/self/clear_refs resets the high-water mark of a process"
    return None


def measure(variant: str, shape: Shape, dtype: str, device: str = "cpu") -> int:
    """Return bytes.

    Raises:
        RefusedError: the variant does not support this call, or the process died of it (says how).
    """
    if device != "cpu":
        return _on_gpu(variant, shape, dtype, device)
    size = [str(n) for n in (shape.batch, shape.heads, shape.tokens, shape.head_dim)]
    command = [sys.executable, "-m", "spatial_pe.lab.bench.memory", variant, *size, dtype]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RefusedError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return int(done.stdout)


def _on_gpu(variant: str, shape: Shape, dtype: str, device: str) -> int:
    call = build(variant, Inputs(shape, DTYPES[dtype], device), "forward", 1)
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - out.nbytes


def _here(variant: str, shape: Shape, dtype: str) -> int:
    small = Inputs(Shape(shape.batch, shape.heads, 16, shape.head_dim), DTYPES[dtype])
    build(variant, small, "forward", 1)()  # loads libraries and thread pools
    inputs = Inputs(shape, DTYPES[dtype])
    call = build(variant, inputs, "forward", 1)
    CLEAR.write_text("5")
    before = _kilobytes("VmHWM")
    out = call()
    peak = _kilobytes("VmHWM")
    return max(0, (peak - before) * 1024 - out.nbytes)


def _kilobytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


if __name__ == "__main__":
    name, batch, heads, tokens, dim, kind = sys.argv[1:]
    print(_here(name, Shape(int(batch), int(heads), int(tokens), int(dim)), kind))
