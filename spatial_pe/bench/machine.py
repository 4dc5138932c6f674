# SPDX-License-Identifier: Apache-2.0
"""What the machine can do at most: arithmetic, by matrix products that are large enough, and copying."""

from __future__ import annotations

import functools

import torch

from .. import environment
from . import timing
from .cases import DTYPES


def peaks(rounds: int = 5) -> dict:
    """ "gflops": {dtype: of one core}; "copy_gigabytes_per_second": of all cores, read and written bytes together."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {}
    for name in ("fp32", "bf16"):
        x = torch.randn(1024, 1024).to(DTYPES[name])
        seconds = min(timing.interleaved({"product": functools.partial(torch.mm, x, x)}, rounds)["product"])
        found[name] = round(2 * 1024**3 / seconds / 1e9, 1)
    torch.set_num_threads(environment.usable_cores())
    source = torch.randn(1 << 26)  # 256 MB: more than caches hold
    target = torch.empty_like(source)
    seconds = min(timing.interleaved({"copy": lambda: target.copy_(source)}, rounds)["copy"])
    torch.set_num_threads(before)
    return {"gflops": found, "copy_gigabytes_per_second": round(2 * source.nbytes / seconds / 1e9, 1)}
