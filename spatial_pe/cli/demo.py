# SPDX-License-Identifier: Apache-2.0
"""Compare vision towers before and after spatial_pe.patch: features and throughput of a pretrained one on photographs,
and of three that rotate, with the kernels and memory of a layer. Prints tables and draws a PNG."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import require


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="PATH_OR_HUB_ID", help="another checkpoint (default: DINOv2-small)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--batch", type=int, default=2, metavar="N", help="images per run when timing (default: 2)")
    parser.add_argument(
        "--out", type=Path, default=Path("demo.png"), metavar="FILE", help="picture (default: demo.png)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here as well")
    parser.add_argument("--quick", action="store_true", help="224 px only and few repeats: seconds instead of minutes")


def run(options: argparse.Namespace) -> int:
    if options.model is None:
        require(("onnx", "onnxruntime"), extra="demo")
    from ..lab.demo import run as demo

    chosen = {name: getattr(options, name) for name in ("model", "out", "json", "batch", "threads", "quick")}
    chosen["command"] = options.command_line
    try:
        demo.run(demo.Options(**chosen))
    except demo.ResultError as error:
        print(f"spatial-pe demo: {error}", file=sys.stderr)
        return 1
    return 0
