# SPDX-License-Identifier: Apache-2.0
"""Train models that differ in their position encoding only and compare them, or score a CLIP-like model on published
spatial benchmarks."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from .._utils.console import first_line, progress
from .._utils.errors import UserError
from .._utils.files import check_writable, write_whole
from ..lab.captions import zero_shot
from ..lab.study import study
from ..lab.study.study import BUDGETS, STUDIES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="spatial_command", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="train models that differ in their position encoding only",
        description="Trains models that differ in their position encoding only, and evaluates their spatial accuracy. "
        "The file is written after each run: the same command resumes where it was stopped.",
        epilog="studies: " + "; ".join(f"{name}: {row.about}" for name, row in STUDIES.items()),
    )
    run.add_argument("--study", choices=STUDIES, default="encodings", help="which (default: encodings)")
    run.add_argument(
        "--budget", choices=BUDGETS, default="standard", help="smoke: seconds, and no result; standard (default); full"
    )
    run.add_argument("--seeds", type=int, default=5, metavar="N", help="runs of each kind (default: 5)")
    run.add_argument("--encodings", metavar="A,B,...", help="default: all of the study")
    run.add_argument("--model", metavar="M", help="pretrained: a folder or hub id (default: DINOv2-small)")
    run.add_argument(
        "--jobs", type=int, metavar="N", help="processes, of one thread each (default: one per core; GPU: 1)"
    )
    run.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    run.add_argument("--out", type=Path, metavar="FILE", help="default: spatial-STUDY-BUDGET.json")
    run.set_defaults(part=run_study)

    report = commands.add_parser("report", help="tables, charts and comparisons of studies as one HTML file")
    report.add_argument("files", nargs="+", type=Path, metavar="FILE", help="written by `spatial-pe spatial run`")
    report.add_argument("--out", type=Path, default=Path("spatial.html"), metavar="FILE", help="default: spatial.html")
    report.set_defaults(part=run_report)

    evaluate = commands.add_parser(
        "eval",
        help="a CLIP-like model on What'sUp, COCO-spatial, VG-spatial or VSR",
        description="Zero-shot choice of captions by a two-tower model, and what adding 2D RoPE does to it.",
    )
    zero_shot.add_arguments(evaluate)
    evaluate.set_defaults(part=zero_shot.run_eval)


def run(options: argparse.Namespace) -> int:
    """Run the chosen subcommand and return its exit code."""
    return options.part(options)


def run_study(options: argparse.Namespace) -> int:
    known = study.encodings_of(options.study, options.budget)
    names = options.encodings.split(",") if options.encodings is not None else known
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"--encodings: {unknown[0]!r} is not one of {', '.join(known)}")
    for name in ("seeds", "jobs"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(options, name)}")
    path = options.out or Path(f"spatial-{options.study}-{options.budget}.json")
    check_writable("--out", path)
    _usable(options.device)
    try:
        result = study.run(
            options.study,
            options.budget,
            path,
            encodings=names,
            seeds=options.seeds,
            model=options.model,
            jobs=options.jobs,
            device=options.device,
            command=options.command_line,
            progress=progress(),
        )
    except KeyboardInterrupt:
        print(f"\nStopped. The same command resumes from the runs in {path}.", file=sys.stderr)
        raise
    from ..lab.study import report

    print(report.text(result))
    print(f"Wrote {path}; `spatial-pe spatial report {path}` makes a page of it.")
    return 0


def run_report(options: argparse.Namespace) -> int:
    from ..lab.study import report

    check_writable("--out", options.out)
    studies = [study.load(path) for path in options.files]
    empty = [str(path) for path, it in zip(options.files, studies, strict=True) if not it["runs"]]
    if empty:
        raise UserError(f"{empty[0]!r} holds no finished run yet: `spatial-pe spatial run` resumes it")
    write_whole(options.out, report.html(studies))
    print(f"Wrote {options.out}")
    return 0


def _usable(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {first_line(error)}") from None
