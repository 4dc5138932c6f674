# SPDX-License-Identifier: Apache-2.0
"""Console output of commands: progress bar and one-line errors."""

from __future__ import annotations

import re
import sys
import textwrap
from typing import Protocol

WIDTH = 100  # columns of what commands and reports print
COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # that some messages have


class Show(Protocol):
    """Show that ``done`` of ``total`` steps are done; ``step`` names the one that begins or has ended."""

    def __call__(self, done: int, total: int, step: str = "", /) -> None: ...


def progress(label: str = "") -> Show:
    """Return a function that shows progress on stderr: a bar of tqdm on a terminal, lines elsewhere.

    The lines are the steps; where a label says what all steps are, one line at their end: a log stays readable.
    """
    return _bar(label) if sys.stderr.isatty() else _lines(label)


def _bar(label: str) -> Show:
    from tqdm import tqdm  # comes with transformers, which all that takes long needs

    class Bar(tqdm):
        monitor_interval = 0  # no thread beside what is measured

    bar: Bar | None = None

    def show(done: int, total: int, step: str = "", /) -> None:
        nonlocal bar
        if bar is None:
            bar = Bar(total=total, desc=f"{label:<28}" if label else None, bar_format=BAR, dynamic_ncols=True)
        bar.n = done
        bar.set_postfix_str(step)  # draws it
        if done == total:
            bar.close()
            bar = None  # the next call begins another

    return show


BAR = "{desc}{bar:24} {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


def _lines(label: str) -> Show:
    def show(done: int, total: int, step: str = "", /) -> None:
        if not label or done == total:
            print(label or f"{done}/{total} {step}", file=sys.stderr, flush=True)

    return show


def wrap(line: str, first: str = "", others: str = "") -> list[str]:
    """Break a line into lines of at most WIDTH columns that begin with ``first`` and ``others``. Names and paths stay
    whole."""
    return textwrap.wrap(
        line, WIDTH, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class if the message is empty: KeyError(), a bare assert."""
    return (COLOUR.sub("", str(error)).strip().splitlines() or [type(error).__name__])[0]
