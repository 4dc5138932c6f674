# SPDX-License-Identifier: Apache-2.0
"""Check whether a rotary encoding is 2D RoPE, and say what is wrong: verify_rotary for the CI of any project.

The target is an encoding (called with the grid, returns a Rotary), a Rotary, a function that rotates (N, D), the
tokens of the grid for one head, or a class (made with head_dim, if it takes that) or a function without arguments that
makes one of these. Exit code 1 if
something is wrong, and with --strict if something is suspicious."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from types import FunctionType
from typing import Any

from .._utils.console import first_line
from .._utils.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="MODULE:NAME", help="e.g. my_model.rope:rotate, or my_rope.py:rotate")
    parser.add_argument("--grid", default="16x16", metavar="HxW", help="patches per column and row (default: 16x16)")
    parser.add_argument("--prefix", type=int, default=0, metavar="N", help="tokens before the patches, as CLS")
    parser.add_argument("--suffix", type=int, default=0, metavar="N", help="tokens behind the patches")
    parser.add_argument("--head-dim", type=int, metavar="D", help="channels of a head (default: the table's, or 64)")
    parser.add_argument("--tolerance", type=float, default=1e-4, metavar="X", help="use 2e-2 for bfloat16")
    parser.add_argument("--strict", action="store_true", help="fail also if something is suspicious")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report here")


def run(options: argparse.Namespace) -> int:
    """Print the RotaryReport; fail if it holds what is wrong."""
    from .._utils.files import check_writable, write_whole
    from ..rotary_report import verify_rotary

    if options.json:
        check_writable("--json", options.json)
    grid = _grid(options)
    target = _load(options.target)
    try:
        encoding = _made(target, options.head_dim or 64)
        report = verify_rotary(encoding, grid, head_dim=options.head_dim, tolerance=options.tolerance)
    except Exception as error:  # the user's function may raise anything
        raise UserError(f"{options.target}: {type(error).__name__}: {first_line(error)}") from error
    print(f"{options.target}: {report.level}\n{report}")
    if options.json:
        found = {**asdict(report), "level": report.level}
        found["axes"] = {" ".join(map(str, pair)): axis for pair, axis in report.axes.items()}
        write_whole(options.json, json.dumps(found, indent=1) + "\n")
    return int(report.level == "wrong" or (options.strict and report.level == "suspicious"))


def _grid(options: argparse.Namespace) -> Any:
    from ..grid import PatchGrid

    if (size := re.fullmatch(r"(\d+)x(\d+)", options.grid)) is None:
        raise UserError(f"--grid must be HxW, e.g. 16x16, got {options.grid!r}")
    try:
        return PatchGrid(int(size[1]), int(size[2]), options.prefix, options.suffix)
    except ValueError as error:
        raise UserError(f"--grid {options.grid}: {error}") from None


def _load(target: str) -> Any:
    """Import MODULE:NAME, from the current folder too."""
    module_name, colon, path = target.rpartition(":")
    if not colon or not module_name or not path:
        raise UserError(f"MODULE:NAME must be e.g. my_model.rope:rotate, got {target!r}")
    if module_name.endswith(".py"):
        file = Path(module_name)
        sys.path.insert(0, str(file.resolve().parent))
        module_name = file.stem
    else:
        sys.path.insert(0, "")
    try:
        found = importlib.import_module(module_name)
    except Exception as error:  # whatever the module does when imported
        raise UserError(f"cannot import {module_name!r}: {type(error).__name__}: {first_line(error)}") from error
    finally:
        del sys.path[0]
    for name in path.split("."):
        if not hasattr(found, name):
            raise UserError(f"{getattr(found, '__name__', found)!r} has no {name!r}")
        found = getattr(found, name)
    return found


def _made(target: Any, head_dim: int) -> Any:
    """Return what a class makes, from head_dim if it takes one, or a function without arguments; else the target."""
    if not isinstance(target, type | FunctionType):
        return target
    parameters = signature(target).parameters.values()
    if isinstance(target, type):
        return target(head_dim=head_dim) if any(p.name == "head_dim" for p in parameters) else target()
    needs = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return target if needs else target()
