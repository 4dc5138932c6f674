# SPDX-License-Identifier: Apache-2.0
"""PatchReport: the patched modules, and the skipped ones with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from .cost import Cost


class PatchedRow(NamedTuple):
    """One attention module. ``error`` is relative to float64, as is ``own_error`` of its original forward."""

    name: str
    tower: str
    attention: str
    convention: str
    backend: str
    error: float | None
    own_error: float | None
    note: str = ""  # why there is no error
    own_cost: Cost | None = None  # of the original forward on 960 tokens, and of the patched one: counted by inspect()
    cost: Cost | None = None


class SkippedRow(NamedTuple):
    name: str
    reason: str
    attention: str = ""


@dataclass
class PatchReport:
    """The result of ``patch`` and ``inspect``; prints as a table, identical layers in one row.

    Attributes:
        patched: one row for each attention module.
        skipped: one row for each attention module that is not patched, with the reason.
        notes: what else there is to know, e.g. that the model was saved with a RoPE and loaded without it.
    """

    patched: list[PatchedRow] = field(default_factory=list)
    skipped: list[SkippedRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _added: list[nn.Parameter] = field(default_factory=list, repr=False)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters of the encodings that this call added, e.g. for an optimizer group."""
        return iter(self._added)

    def __str__(self) -> str:
        lines = _table(self._patched_cells()) if self.patched else ["nothing patched"]
        if self.skipped:
            lines += ["", *_table(self._skipped_cells())]
        added = sum(p.numel() for p in self._added)
        if added:
            lines += ["", f"{added} parameters added: report.parameters()"]
        if self.notes:
            lines += ["", *self.notes]
        return "\n".join(lines)

    def _patched_cells(self) -> list[tuple[str, ...]]:
        groups: dict[tuple, list[PatchedRow]] = {}
        for row in self.patched:
            groups.setdefault((row.tower, row.attention, row.convention, row.backend, row.note), []).append(row)
        counted = any(row.cost for row in self.patched)
        head = ("tower", "attention", "layers", "convention", "backend", "error", "original")
        cells: list[tuple[str, ...]] = [(*head, "kernels", "memory") if counted else head]
        for (tower, attention, convention, backend, note), rows in groups.items():
            errors = [max((e for e in column if e is not None), default=None) for column in _columns(rows)]
            shown = ["-" if error is None else f"{error:.1e}" for error in errors]
            if errors[0] is None:
                shown[0] = f"not verified: {note}" if note else "not verified"
            if counted:
                shown += _costs(rows[0])
            cells.append((tower, attention, str(len(rows)), convention, backend, *shown))
        return cells

    def _skipped_cells(self) -> list[tuple[str, ...]]:
        groups: dict[tuple, list[SkippedRow]] = {}
        for row in self.skipped:
            groups.setdefault((row.attention, row.reason), []).append(row)
        cells: list[tuple[str, ...]] = [("skipped", "attention", "count", "reason")]
        for (attention, reason), rows in groups.items():
            cells.append((rows[0].name, attention, str(len(rows)), reason))
        return cells


def _costs(row: PatchedRow) -> list[str]:
    """Format kernels and peak memory of a layer, before and after."""
    if row.own_cost is None or row.cost is None:
        return ["-", "-"]
    memory = (f"{cost.peak / 2**20:.1f}" for cost in (row.own_cost, row.cost))
    return [f"{row.own_cost.kernels} -> {row.cost.kernels}", f"{' -> '.join(memory)} MiB"]


def _columns(rows: list[PatchedRow]) -> tuple[list[float | None], list[float | None]]:
    return [row.error for row in rows], [row.own_error for row in rows]


def _table(cells: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
