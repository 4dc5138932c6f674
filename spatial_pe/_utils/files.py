# SPDX-License-Identifier: Apache-2.0
"""Writing of result files."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import UserError


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all: a process that is killed meanwhile leaves it as it was. Makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_writable(option: str, path: Path) -> None:
    """Raise UserError if no file can be written there: before hours of work, not after. Makes its folder.

    By trying: permissions say too little, root has all of them, also on read-only mounts.
    """
    try:
        if path.is_dir():
            raise UserError(f"{option} {str(path)!r} is a folder: name a file")
        if not path.parent.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        path.open("a").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise UserError(f"{option} {str(path)!r} cannot be written: {error.strerror}") from error
