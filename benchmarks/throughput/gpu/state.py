# SPDX-License-Identifier: Apache-2.0
"""The JSON of a step, from which a restarted process also resumes.

``phases``: what ran, how long, how it ended. ``checks``: kernels against float64. ``rows``: measurements. ``layers``:
of real towers. ``not_run``: [size, direction] that were planned and not reached. ``broken``: calls that killed their
process or hung; they are not tried again.
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
    """Write atomically: the process may be killed at any time."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1))
    os.replace(partial, path)


def mark(now: Path, size: list[int] | None, direction: str | None, variant: str, error: str | None = None) -> None:
    """Record what is about to run, or what ended this process."""
    save(now, {"size": size, "direction": direction, "variant": variant, "error": error})


def why_not(broken: list[dict], size: list[int], direction: str, variant: str) -> str | None:
    """Return why a variant is skipped here, or None. What breaks in the forward is not tried in the backward either."""
    mine = [entry for entry in broken if entry["variant"] == variant]
    for entry in mine:
        if entry["size"] == size and (entry["direction"] in (direction, "forward") or direction == "forward+backward"):
            return entry["why"]
    if len(mine) >= BROKEN_FOR_GOOD:
        return f"left out after {len(mine)} shapes where it broke: {mine[-1]['why']}"
    return None
