# SPDX-License-Identifier: Apache-2.0
"""Time a few tile sizes of each Triton kernel on the shapes of vision towers, and compare with the CUDA kernels and
torch's attention; without Triton, compare these two. Later processes on this GPU, with these versions, use the
fastest."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .._utils.console import first_line
from .._utils.errors import UserError
from .._utils.files import check_writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="seven shapes instead of twenty")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), metavar="N", help="start no shape after this long"
    )
    parser.add_argument("--device", default="cuda", metavar="DEVICE", help="which GPU (default: cuda)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the results here")


def run(options: argparse.Namespace) -> int:
    """Measure tiles and backends on the GPU, shape by shape; each result is saved at once."""
    if options.seconds <= 0:
        raise UserError(f"--seconds must be positive, got {options.seconds:g}")
    if options.out is not None:
        check_writable("--out", options.out)
    from ..backends import cuda
    from ..backends.triton import backend as triton

    reasons = {backend.unavailable() for backend in (triton, cuda)}
    if None not in reasons:
        raise UserError(f"nothing to tune: {'; '.join(sorted(map(str, reasons)))}")
    try:
        device = torch.device(options.device)
        device = torch.device(device.type, torch.cuda.current_device() if device.index is None else device.index)
        name = torch.cuda.get_device_name(device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"--device {options.device}: {first_line(error)}") from None
    from .. import tuning
    from ..backends.triton import tuning_store

    print(f"{name}, torch {torch.__version__}")
    problems = tuning.QUICK if options.quick else tuning.PROBLEMS
    rows = tuning.tune(problems, device, options.seconds, copy=options.out)
    print(f"{len(rows)} shapes measured: {tuning_store.path(device)}")
    return 0 if rows else 1
