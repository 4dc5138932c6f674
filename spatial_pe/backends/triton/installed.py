# SPDX-License-Identifier: Apache-2.0
"""The version of the installed Triton, without importing it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path


def _installed_version() -> str | None:
    """Return the version that `import triton` would report, or None. The import takes 0.3 s, also without a GPU; the
    distribution has another name in each build of torch (pytorch-triton, triton-rocm, triton-windows)."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    found = re.search(r"""^__version__ = ['"](.+)['"]""", Path(spec.origin).read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else "of unknown version"


def numbers(version: str | None) -> tuple[int, int] | None:
    found = re.match(r"(\d+)\.(\d+)", version or "")
    return (int(found[1]), int(found[2])) if found else None


VERSION = _installed_version()
