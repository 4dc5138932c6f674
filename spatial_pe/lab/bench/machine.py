# SPDX-License-Identifier: Apache-2.0
"""Peak rates of the machine: multiply-adds and copying."""

from __future__ import annotations

import functools

import torch

from ..._utils import environment
from ...backends import cpu
from . import timing
from .cases import DTYPES


def peaks(device: str = "cpu", rounds: int = 5) -> dict | None:
    """Return "gflops": {dtype: of one core, or of the whole GPU}; "copy_gigabytes_per_second": of all cores or the GPU,
    read and written bytes together. None without the compiled extension.

    A core is measured by the kernels' multiply-adds on registers, a GPU by a large matrix product.
    """
    if device != "cpu":
        gflops = {name: _product(name, device, rounds) for name in ("fp32", "bf16")}
    elif isinstance(cpu.EXTENSION, str):
        return None
    else:
        gflops = {name: cpu.EXTENSION.peak_flops(cpu.DTYPES[DTYPES[name]]) / 1e9 for name in ("fp32", "bf16")}
    return {"gflops": {name: round(rate, 1) for name, rate in gflops.items()}} | _copy(device, rounds)


def _product(dtype: str, device: str, rounds: int) -> float:
    size = 8192
    x = torch.randn(size, size, device=device).to(DTYPES[dtype])
    samples = timing.interleaved({"product": functools.partial(torch.mm, x, x)}, rounds, device=device)
    return 2 * size**3 / min(samples["product"]) / 1e9


def _copy(device: str, rounds: int) -> dict:
    before = torch.get_num_threads()
    torch.set_num_threads(environment.usable_cores())
    try:
        source = torch.randn(1 << 26, device=device)  # 256 MB: larger than caches
        target = torch.empty_like(source)
        samples = timing.interleaved({"copy": lambda: target.copy_(source)}, rounds, device=device)
    finally:
        torch.set_num_threads(before)
    return {"copy_gigabytes_per_second": round(2 * source.nbytes / min(samples["copy"]) / 1e9, 1)}
