# SPDX-License-Identifier: Apache-2.0
"""The JSON that a run leaves, which is also how one that was cut short goes on.

``rows``: what was measured. ``not_run``: [size, direction] of what was planned and was not reached. ``broken``: calls
that ended the process or never came back; they are not tried again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

# A variant that broke this many processes is not tried on any other shape.
BROKEN_FOR_GOOD = 2


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def save(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: the process may be killed at any time."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1))
    os.replace(partial, path)


def why_not(broken: list[dict], size: list[int], direction: str, variant: str) -> str | None:
    """Why a variant is left out here, or None. What breaks in the forward is not tried in the backward either."""
    mine = [entry for entry in broken if entry["variant"] == variant]
    for entry in mine:
        if entry["size"] == size and (entry["direction"] in (direction, "forward") or direction == "forward+backward"):
            return entry["why"]
    if len(mine) >= BROKEN_FOR_GOOD:
        return f"left out after {len(mine)} shapes where it broke: {mine[-1]['why']}"
    return None
