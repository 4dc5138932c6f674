# SPDX-License-Identifier: Apache-2.0
"""Measure attention and vision towers on this machine, against alternatives; write JSON and a page."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from .._utils import environment
from .._utils.console import first_line, progress
from .._utils.errors import UserError
from .._utils.files import check_writable, write_whole
from ..backends import cpu
from ..lab.bench import machine, report, result, suites


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="two minutes on two cores, instead of an hour")
    parser.add_argument("--model", metavar="M", help="the tower of a checkpoint folder or hub id, and nothing else")
    parser.add_argument(
        "--suite", metavar="NAME", help="one of attention, layers, cross, growth, memory, towers, space, start"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="most threads of a case (default: OMP_NUM_THREADS, or one per core)"
    )
    parser.add_argument("--json", type=Path, default=Path("bench.json"), metavar="FILE", help="default: bench.json")
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html")


def run(options: argparse.Namespace) -> int:
    """Run the benchmark, or what an interrupted run of it left.

    Raises:
        UserError: a file that cannot be written, a device or a model that cannot be used.
    """
    threads = _threads(options.threads)
    for name in ("json", "out"):
        check_writable(f"--{name}", getattr(options, name))
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {options.device}: {first_line(error)}") from None
    if options.model:
        cases = list(suites.of_model(options.model, options.device, threads))
    else:
        cases = list(suites.PLANS["quick" if options.quick else "full"](options.device, threads))
        if options.suite:
            names = dict.fromkeys(case.suite for case in cases)
            if options.suite not in names:
                raise UserError(f"--suite: {options.suite!r} is not one of {', '.join(names)}")
            cases = [case for case in cases if case.suite == options.suite]
    found = {
        "schema": result.SCHEMA,
        "kind": "spatial-bench",
        "command": options.command_line,
        **environment.describe(),
    }
    found |= {"cpu_features": cpu.FEATURES, "device": options.device, "cases": [str(case) for case in cases]}
    print(report.machine(found))
    unfinished = result.unfinished(options.json, found)
    if unfinished is not None:
        found = unfinished
        print(f"{options.json} has {len(found['rows'])} of {len(cases)} cases of this command: the others follow")
    else:
        found |= {"peaks": machine.peaks(options.device), "rows": []}
    show = progress()
    try:
        for index, case in list(enumerate(cases))[len(found["rows"]) :]:
            show(index, len(cases), str(case))
            try:
                found["rows"].append(case.run(options.device))
            except UserError as error:
                raise UserError(f"--model: {error}") from error
            result.save(options.json, found)
    except KeyboardInterrupt:
        done = len(found["rows"])
        kept = f"{options.json} has {done} of {len(cases)} cases, and the same command resumes there"
        print(f"\nStopped. {kept if done else 'No case was finished'}.", file=sys.stderr)
        raise
    show(len(cases), len(cases), "")
    print(report.text(found))
    print(report.headline(found))
    write_whole(options.out, report.html(found))
    print(f"Wrote {options.json} and {options.out}")
    return 0


def _threads(asked: int | None) -> int:
    """Return the most threads of a case: as asked for, by OMP_NUM_THREADS, or the usable cores."""
    if asked is not None and asked < 1:
        raise UserError(f"--threads must be at least 1, got {asked}")
    first, _, _ = os.environ.get("OMP_NUM_THREADS", "").partition(",")  # a list is for nested regions
    return asked or (int(first) if first.isdigit() and int(first) > 0 else environment.usable_cores())
