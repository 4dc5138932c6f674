# SPDX-License-Identifier: Apache-2.0
"""PatchReport: the patched modules, and the skipped ones with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._utils.console import wrap
from ..encodings import AxialRoPE, MixedRoPE
from .cost import Cost

# Of Adam, whose steps are as long as the learning rate: 100 steps move a strength from 0 to at most 1, at the 5e-5 of a
# Trainer to at most 0.005. The study "rates" compares rates.
ROPE_LR = 1e-2


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
        embeddings: one row for each patch embedding that is computed as a matrix product.
        skipped: one row for each attention module that is not patched, with the reason.
        notes: what else there is to know, e.g. that the model was saved with a RoPE and loaded without it.
    """

    patched: list[PatchedRow] = field(default_factory=list)
    embeddings: list[PatchedRow] = field(default_factory=list)
    skipped: list[SkippedRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _attention: dict[str, nn.Module] = field(default_factory=dict, repr=False)  # to which this call added an encoding

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters of the encodings that this call added, e.g. for an optimizer group."""
        encodings = map(encoding_of, self._attention.values())
        return iter({id(p): p for encoding in encodings for p in encoding.parameters()}.values())

    def parameter_groups(self, model: nn.Module, *, rope_lr: float = ROPE_LR) -> list[dict[str, Any]]:
        """Return the groups for an optimizer: the other trainable parameters of ``model`` with its own learning rate,
        and those of the added encodings with ``rope_lr`` and without weight decay, which would pull them back to the
        identity.

            torch.optim.AdamW(report.parameter_groups(model), lr=2e-5)
        """
        here = {id(p) for p in model.parameters()}
        rope = [p for p in self.parameters() if p.requires_grad]
        if any(id(p) not in here for p in rope):
            raise ValueError("model does not hold the encodings that this report's patch added: pass that model")
        chosen = {id(p) for p in rope}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
        return [{"params": others}, {"params": rope, "lr": rope_lr, "weight_decay": 0.0}]

    def strength(self) -> dict[str, float]:
        """Return how far the added encoding of each attention module is on, by the module's name, now.

        0 is the identity, and 1 as far as ``start="full"``: of "axial" the root mean square of the learned strengths,
        of "mixed" that of the frequencies relative to random ones. Other encodings are left out.
        """
        found = {name: strength_of(encoding_of(attention)) for name, attention in self._attention.items()}
        return {name: strength for name, strength in found.items() if strength is not None}

    def __str__(self) -> str:
        lines = self._patched_lines() if self.patched else ["nothing patched"]
        if self.skipped:
            lines += ["", "skipped", *self._skipped_lines()]
        added = sum(p.numel() for p in self.parameters())
        if added:
            lines += ["", f"{added} parameters added: report.parameters()"]
        for note in self.notes:
            lines += ["", *wrap(note)]
        return "\n".join(lines)

    def _patched_lines(self) -> list[str]:
        """Return a table for each tower, with a row for each kind of module, and lines of what belongs to it."""
        towers: dict[str, dict[tuple, list[PatchedRow]]] = {}
        for row in [*self.patched, *self.embeddings]:
            kinds = towers.setdefault(row.tower, {})
            kinds.setdefault((row.attention, row.convention, row.backend, row.note), []).append(row)
        cells: list[tuple[str, ...]] = [("attention", "layers", "convention", "backend", "error", "original")]
        below: list[list[str]] = [[]]
        for kinds in towers.values():
            for (attention, convention, backend, note), rows in kinds.items():
                errors = [max((e for e in column if e is not None), default=None) for column in _columns(rows)]
                shown = ["-" if error is None else f"{error:.1e}" for error in errors]
                cells.append((attention, str(len(rows)), convention.replace("start=", ""), backend, *shown))
                verified = f"not verified: {note}" if note else "not verified"
                below.append([*([verified] if errors[0] is None else []), *_costs(rows[0])])
        table = iter(zip(_table(cells), below, strict=True))
        lines = ["  " + next(table)[0]]
        for name, kinds in towers.items():
            lines.append(name)
            for _ in kinds:
                row_of_table, more = next(table)
                lines += [f"  {row_of_table}", *(line for text in more for line in wrap(text, "    ", "      "))]
        lines.insert(1, "-" * max(map(len, lines)))
        return lines

    def _skipped_lines(self) -> list[str]:
        groups: dict[tuple, list[SkippedRow]] = {}
        for row in self.skipped:
            groups.setdefault((row.attention, row.reason), []).append(row)
        return [
            line
            for (attention, reason), rows in groups.items()
            for line in wrap(
                f"{len(rows)} {attention} ({rows[0].name}{', ...' if len(rows) > 1 else ''}): {reason}", "  ", "    "
            )
        ]


def encoding_of(attention: nn.Module) -> nn.Module:
    """Return the added encoding of an attention module: the trained copy, where PEFT has made one."""
    rope = attention.rope
    assert isinstance(rope, nn.Module)
    copies = getattr(rope, "modules_to_save", None)
    return list(copies.values())[-1] if copies else rope


def strength_of(encoding: nn.Module) -> float | None:
    """Return how far an encoding is on, or None if that is not known."""
    if isinstance(encoding, AxialRoPE):
        return 1.0 if encoding.strength is None else _rms(encoding.strength)
    if isinstance(encoding, MixedRoPE):
        exponents = torch.arange(0, encoding.rotary_dim, 4, dtype=torch.float32) / encoding.rotary_dim
        magnitude = encoding.theta**-exponents  # of a random start: of (row, column), so sqrt(2) times each
        return _rms(encoding.frequencies) / _rms(magnitude) * 2**0.5
    return None


def _rms(x: Tensor) -> float:
    return float(x.detach().float().square().mean().sqrt())


def _costs(row: PatchedRow) -> list[str]:
    """Return the line of kernels and peak memory of a layer, before and after, if they were counted."""
    if row.own_cost is None or row.cost is None:
        return []
    memory = (f"{cost.peak / 2**20:.1f}" for cost in (row.own_cost, row.cost))
    kernels = f"{row.own_cost.kernels} -> {row.cost.kernels} kernels"
    return [f"a layer on 960 tokens: {kernels}, {' -> '.join(memory)} MiB"]


def _columns(rows: list[PatchedRow]) -> tuple[list[float | None], list[float | None]]:
    return [row.error for row in rows], [row.own_error for row in rows]


def _table(cells: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
