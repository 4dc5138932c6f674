# SPDX-License-Identifier: Apache-2.0
"""Towers that rotate, before and after ``spatial_pe.patch``: error, pairs of runs, kernels and memory of a layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..._utils.console import progress
from ..._utils.errors import UserError
from .. import random_towers
from ..checkpoints.checkpoint import first_tensor
from ..random_towers import Built, Size
from . import measure

if TYPE_CHECKING:
    from ...towers.report import PatchReport


class ResultError(RuntimeError):
    """A result that must not be passed over in silence."""


@dataclass(frozen=True)
class Case:
    """A tower with a few of its layers, and the images that it gets."""

    name: str
    what: str
    build: Callable[[int, tuple[Size, ...]], Built]
    layers: int
    sizes: tuple[Size, ...]


# A second or less for each forward on two cores.
CASES = (
    Case("Qwen2.5-VL", "windows of 112 px, one full layer", random_towers.qwen2_5_vl, 3, ((448, 448),)),
    Case(
        "Pixtral",
        "4 images of 3 shapes in one sequence",
        random_towers.pixtral,
        2,
        ((320, 320), (320, 240), (240, 320), (160, 160)),
    ),
    Case("DINOv3-L", "class and register tokens", random_towers.dinov3_large, 2, ((512, 512),)),
)


def compare(seconds: float) -> list[measure.TowerRow]:
    """Patch a copy of each tower in float32 and run both, for about ``seconds`` each."""
    return [_compare(case, seconds) for case in CASES]


def _compare(case: Case, seconds: float) -> measure.TowerRow:
    show = progress(f"Building {case.name}")
    show(0, 3)
    before, forward = case.build(case.layers, case.sizes)
    before.eval()
    show(1, 3)
    after = copy.deepcopy(before, {id(x): x for x in (*before.parameters(), *before.buffers())})
    report = patch(case.name, after)
    show(2, 3)
    with torch.inference_mode():
        old, new = (first_tensor(forward(m, torch.float32), prefer="pooler_output") for m in (before, after))
        show(3, 3)
        timing = measure.interleaved(
            lambda: forward(before, torch.float32),
            lambda: forward(after, torch.float32),
            seconds,
            progress(f"Timing   {case.name} fp32"),
        )
    return measure.TowerRow(
        name=case.name,
        what=case.what,
        layers=case.layers,
        images=len(case.sizes),
        tokens=random_towers.tokens(before, case.sizes),
        error=measure.error(new, old),
        timing=timing,
        layer=measure.Layer.of(report),
    )


def patch(name: str, module: nn.Module) -> PatchReport:
    """Patch a tower in place, and return what ``inspect`` says of it: that knows kernels and memory, too.

    Raises:
        UserError: there is nothing in it that patch knows.
        ResultError: a layer computes something else when it is patched.
    """
    from ... import towers

    try:
        report = towers.inspect(module)
        towers.patch(module)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    except RuntimeError as error:
        raise ResultError(f"{name}: {error}") from error
    return report
