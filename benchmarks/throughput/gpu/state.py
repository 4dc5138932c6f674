# SPDX-License-Identifier: Apache-2.0
"""The JSON that a step leaves, which is also how a process that was started again goes on.

``phases``: what ran, how long, how it ended. ``checks``: kernels against float64. ``rows``: what was measured.
``layers``: of real towers. ``not_run``: [size, direction] of what was planned and was not reached. ``broken``: calls
that ended their process or never came back; they are not tried again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

# A variant that broke this many processes is not tried on any other shape.
BROKEN_FOR_GOOD = 2
LISTS = ("phases", "checks", "rows", "layers", "broken", "not_run")


def new(**content: Any) -> dict[str, Any]:
    return {**content, **{name: [] for name in LISTS}}


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def save(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: the process may be killed at any time."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1))
    os.replace(partial, path)


def mark(now: Path, size: list[int] | None, direction: str | None, variant: str, error: str | None = None) -> None:
    """Says what is about to run, or what ended this process."""
    save(now, {"size": size, "direction": direction, "variant": variant, "error": error})


def why_not(broken: list[dict], size: list[int], direction: str, variant: str) -> str | None:
    """Why a variant is left out here, or None. What breaks in the forward is not tried in the backward either."""
    mine = [entry for entry in broken if entry["variant"] == variant]
    for entry in mine:
        if entry["size"] == size and (entry["direction"] in (direction, "forward") or direction == "forward+backward"):
            return entry["why"]
    if len(mine) >= BROKEN_FOR_GOOD:
        return f"left out after {len(mine)} shapes where it broke: {mine[-1]['why']}"
    return None
