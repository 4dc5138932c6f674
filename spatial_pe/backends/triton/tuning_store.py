# SPDX-License-Identifier: Apache-2.0
"""Results of `spatial-pe tune` on this GPU with these versions: one JSON file for each, in the user's cache folder."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from ..._utils.cache import cache_folder
from ..._utils.dispatcher import assume_constant
from ..._utils.files import write_whole
from ..._version import __version__
from .choice import Choice, Tile, Window
from .installed import VERSION

# Increased when a row changes its meaning.
FORMAT = 3
# Measured fields of tiles.Choice, in the order of tuning: the backward needs a forward.
UNITS = ("forward", "window_forward", "query", "key", "window_backward")


def path(device: torch.device) -> Path:
    """Return the file for this GPU and compiler: the best tiles differ between them."""
    name = f"{torch.cuda.get_device_name(device)}-triton-{VERSION or 'none'}-spatial_pe-{__version__}"
    return cache_folder() / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}.json"


def regime(dtype: torch.dtype, dim: int, longest: int) -> str:
    """Return the key of a row. longest: a bucket of tiles.py."""
    return f"{str(dtype).removeprefix('torch.')} D={dim} N<={longest}"


@dataclass(frozen=True)
class Tuned:
    """Rows by regime: the tiles of each unit (None: no window; no units without Triton), milliseconds, and the fastest
    backend, "triton", "cuda" or "composed", for "inference" and "training"."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def over(self, choice: Choice, dtype: torch.dtype, dim: int, longest: int) -> Choice:
        """Return the choice, overridden by what was measured for its regime."""
        row = self.rows.get(regime(dtype, dim, longest), {})
        found: dict[str, Any] = {}
        for unit in UNITS:
            if unit in row:
                kind = Window if unit.startswith("window") else Tile
                found[unit] = None if row[unit] is None else kind(**row[unit])
        return replace(choice, **found)

    def faster(self, dtype: torch.dtype, dim: int, longest: int, training: bool) -> str | None:
        row = self.rows.get(regime(dtype, dim, longest), {})
        return row.get("faster", {}).get("training" if training else "inference")


# Called while a call is traced, too; torch.compile treats their results as constants.


@assume_constant
def any_rows(device: torch.device) -> bool:
    return bool(load(device).rows)


@assume_constant
def faster(device: torch.device, dtype: torch.dtype, dim: int, longest: int, training: bool) -> str | None:
    return load(device).faster(dtype, dim, longest, training)


@functools.cache
def load(device: torch.device) -> Tuned:
    """Read the rows of a device. An unreadable file is ignored with a warning: the shipped tiles are used."""
    file = path(device)
    try:
        return _checked(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return Tuned()
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{file} is not used ({error}): run `spatial-pe tune` again, or delete it", stacklevel=2)
        return Tuned()


def _checked(content: dict[str, Any]) -> Tuned:
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']}, not {FORMAT}")
    for name, row in content["rows"].items():
        for unit in UNITS:
            kind = Window if unit.startswith("window") else Tile
            if row.get(unit) is not None and set(row[unit]) != {f.name for f in fields(kind)}:
                raise ValueError(f"{name}: {unit} has {sorted(row[unit])}")
    return Tuned(content["rows"])


def save(rows: dict[str, dict[str, Any]], file: Path) -> None:
    """Over the rows that are there; whole or not at all, also with several processes at once."""
    before = {}
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # a broken file is replaced
        before = _checked(json.loads(file.read_text(encoding="utf-8"))).rows
    write_whole(file, json.dumps({"format": FORMAT, "rows": before | rows}, indent=1))


def plain(config: Any) -> dict[str, Any] | None:
    return None if config is None else asdict(config)
