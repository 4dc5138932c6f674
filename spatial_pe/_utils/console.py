# SPDX-License-Identifier: Apache-2.0
"""Console output of commands: progress bar and one-line errors."""

from __future__ import annotations

import sys
from collections.abc import Callable


def progress() -> Callable[[int, int, str], None]:
    """Return a function of (done, total, label) that reports on stderr: a bar on a terminal, a line elsewhere."""
    terminal = sys.stderr.isatty()

    def show(done: int, total: int, label: str) -> None:
        if terminal:
            bar = "█" * (30 * done // max(1, total))
            print(f"\r\033[K{bar:░<30} {done}/{total} {label}", end="", file=sys.stderr, flush=True)
            if done == total:
                print(file=sys.stderr)
        else:
            print(f"{done}/{total} {label}", file=sys.stderr, flush=True)

    return show


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class if the message is empty: KeyError(), a bare assert."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
