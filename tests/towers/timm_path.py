# SPDX-License-Identifier: Apache-2.0
"""Puts timm on the path, from ``.venv/timm`` (see the Makefile) where it is not installed.

timm imports torchvision, whose wheels are built for CUDA and do not import beside a torch for the CPU, because they
describe two operators that their own library would define. Defining them first is enough for models.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

BESIDE = Path(__file__).parents[2] / ".venv" / "timm"


def define_operators():
    """The operators that torchvision describes, unless they are there."""
    with contextlib.suppress(RuntimeError):
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def import_timm():
    """timm, or skip."""
    if importlib.util.find_spec("timm") is None:
        if not BESIDE.exists():
            pytest.skip("timm is not installed: make .venv/timm", allow_module_level=True)
        sys.path.append(str(BESIDE))
        define_operators()
    import timm

    if str(BESIDE) in sys.path:  # a process that a test starts would look there too, without the two operators
        sys.path.remove(str(BESIDE))
    return timm
