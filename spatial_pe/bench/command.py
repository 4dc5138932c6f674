# SPDX-License-Identifier: Apache-2.0
"""``spatial-pe bench``."""

from __future__ import annotations

import argparse

import torch

from .. import environment
from ..backends import cpu
from ..demo.checkpoint import CheckpointError
from ..files import refusal, write_whole
from ..terminal import first_line, progress
from . import machine, report, result, suites


class BenchError(Exception):
    """What the user can put right; the message says how."""


def run(options: argparse.Namespace, command: str) -> int:
    """
    Raises:
        BenchError: a file that cannot be written, a device or a model that cannot be used.
    """
    for name in ("json", "out"):
        if (why := refusal(getattr(options, name))) is not None:
            raise BenchError(f"--{name} {str(getattr(options, name))!r} {why}")
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise BenchError(f"--device {options.device}: {first_line(error)}") from None
    if options.model:
        cases = list(suites.of_model(options.model, options.device))
    else:
        cases = list(suites.PLANS["quick" if options.quick else "full"](options.device))
    found = {"schema": result.SCHEMA, "kind": "spatial-bench", "command": command, **environment.describe()}
    found |= {"cpu_features": cpu.FEATURES, "device": options.device, "peaks": machine.peaks(options.device)}
    found["rows"] = []
    show = progress()
    for index, case in enumerate(cases):
        show(index, len(cases), str(case))
        try:
            found["rows"].append(case.run(options.device))
        except CheckpointError as error:
            raise BenchError(f"--model: {error}") from error
        result.save(options.json, found)
    show(len(cases), len(cases), "")
    print(report.text(found))
    print(report.headline(found))
    write_whole(options.out, report.html(found))
    print(f"Wrote {options.json} and {options.out}")
    return 0
