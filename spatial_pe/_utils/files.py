# SPDX-License-Identifier: Apache-2.0
"""Writing of result files."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically: a process that is killed while it writes leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def refusal(path: Path) -> str | None:
    """Return why a file cannot be written, or None, so that long runs fail early."""
    if path.is_dir():
        return "is a folder: name a file"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        path.open("a").close()
        if not existed:
            path.unlink()
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    return None
