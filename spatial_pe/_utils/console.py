# SPDX-License-Identifier: Apache-2.0
"""What commands show: progress while they work, errors in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable


def progress() -> Callable[[int, int, str], None]:
    """A function of (done, total, label): a bar on a terminal, a line elsewhere, on stderr."""
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
    """Return the first line of an error's message, or its class where it has none: KeyError(), a bare assert."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
