# SPDX-License-Identifier: Apache-2.0
"""Charts of a study's report. Encodings keep their colour and mark everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..report import page
from ..report.page import INK
from . import findings
from .findings import Row
from .position_encodings import ENCODINGS
from .pretrained import VARIANTS
from .study import LABELS
from .tasks import TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (
    "#8a8f98",
    "#d1495b",
    "#8c1c2c",
    "#e58fa0",
    "#edae49",
    "#00798c",
    "#4fb3bf",
    "#2e4fa5",
    "#7a5195",
    "#c0662c",
    "#5b8c3e",
)
MARKS = "o^<vDsPX*dh"
LOOKS = {name: (COLOURS[i], MARKS[i]) for names in (ENCODINGS, VARIANTS) for i, name in enumerate(names)}


def by_task(study: dict, part: str) -> Figure:
    """Plot the accuracy of each encoding on each task, with 95 % intervals over the seeds, and chance."""
    rows = findings.by_task(study, part)
    tasks = [column for column in rows[0].cells if column != "skill"]
    figure, axes = page.figure(1.7 * len(tasks) + 2.0, 0.24 * len(rows) + 1.1, 1, len(tasks), sharey=True)
    for ax, task in zip(axes, tasks, strict=True):
        for y, row in enumerate(reversed(rows)):
            colour, mark = LOOKS[row.encoding]
            cell = row.cells[task]
            half = 0 if cell.count < 2 else 100 * cell.half
            ax.errorbar(100 * cell.value, y, xerr=half, color=colour, marker=mark, capsize=2, markersize=5)
        ax.axvline(100 * _chance(task), color=INK, linestyle=":", linewidth=1)
        ax.set(title=task, xlim=(0, 103), yticks=range(len(rows)))
        ax.set_yticklabels([LABELS[row.encoding] for row in reversed(rows)])
    figure.supxlabel("accuracy, %", fontsize=9, color=INK)
    return figure


def by_scale(study: dict, part: str) -> Figure:
    """Plot skill against the size of the evaluated pictures: extrapolated, and stretched to the training grid."""
    rows = findings.by_scale(study, part)
    figure, axes = page.figure(9, 3.6, 1, 2, sharey=True)
    for ax, mode in zip(axes, ("index", "stretched"), strict=True):
        for row in rows:
            points = [
                (float(c.split()[0]), m) for c, m in row.cells.items() if c.split()[1] == mode or c == "1.0 index"
            ]
            if len(points) > 1:
                _line(ax, row, [p for p, _ in points], [m for _, m in points])
        title = {"index": "patches numbered on", "stretched": "coordinates or tables stretched"}[mode]
        ax.set(title=title, xlabel="size of the picture, 1 = training", ylim=(-0.08, 1.03))
    axes[0].set_ylabel("skill (0 guessing, 1 perfect)")
    page.legend(figure, axes)
    return figure


def curves(study: dict, part: str) -> Figure:
    """Plot skill during training, against examples seen."""
    batch = study["recipes"][part]["batch"]
    figure, (ax,) = page.figure(7, 3.6, 1, 1)
    for name, points in findings.curves(study, part).items():
        _line(ax, Row(name, {}), [batch * step for step, _ in points], [m for _, m in points])
    ax.set(xlabel="pictures seen", ylabel="skill (0 guessing, 1 perfect)", ylim=(-0.08, 1.03))
    page.legend(figure, [ax])
    return figure


def by_scenes(study: dict, parts: Sequence[str]) -> Figure:
    """Plot skill against the number of scenes in the training set, one part each."""
    figure, (ax,) = page.figure(7, 3.6, 1, 1)
    sizes = [study["recipes"][part]["scenes"] for part in parts]
    tables = [{row.encoding: row.cells["skill"] for row in findings.by_task(study, part)} for part in parts]
    for name in LABELS:
        if all(name in table for table in tables):
            _line(ax, Row(name, {}), sizes, [table[name] for table in tables])
    ax.set(xlabel="pictures in the training set", ylabel="skill (0 guessing, 1 perfect)", xscale="log")
    page.legend(figure, [ax])
    return figure


def layers(study: dict, part: str) -> Figure:
    """Plot the spatial information in each layer of a pretrained tower, see ``pretrained.layers``."""
    titles = {
        "coherence": "neighbours alike, distant patches not",
        "hflip": "left and right exchanged",
        "vflip": "upside down",
        "rot90": "rotated by 90°",
    }
    figure, axes = page.figure(11, 3.2, 1, len(titles))
    for ax, (what, title) in zip(axes, titles.items(), strict=True):
        for name, means in findings.by_layer(study, part, what).items():
            _line(ax, Row(name, {}), range(len(means)), means)
        ax.set_title(title, fontsize=8)
        ax.set(xlabel="layer")
    axes[0].set_ylabel("difference of cosines")
    axes[1].set_ylabel("cosine with the plain picture")
    page.legend(figure, axes)
    return figure


def attention(study: dict, part: str) -> Figure:
    """Plot for each encoding and layer the attention of the middle patch when all patches are alike, mean over
    seeds."""
    names = findings.encodings(study, part)
    runs = {
        name: [r["attention"]["position"] for r in study["runs"] if (r["part"], r["encoding"]) == (part, name)]
        for name in names
    }
    depth = len(runs[names[0]][0])
    figure, axes = page.figure(0.95 * len(names), 1.05 * depth + 0.5, depth, len(names))
    for column, name in enumerate(names):
        maps = np.mean(runs[name], axis=0)
        for layer in range(depth):
            ax = axes[layer * len(names) + column]
            ax.imshow(maps[layer], vmin=0, vmax=4, cmap="viridis")
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
            if layer == 0:
                ax.set_title(name, fontsize=7)
            if column == 0:
                ax.set_ylabel(f"layer {layer + 1}", fontsize=7)
    return figure


def similarity(study: dict, part: str) -> Figure:
    """Plot the cosine of the position table at the middle patch with all others, first seed of each encoding with
    one."""
    tables: dict[str, list] = {}
    for run in study["runs"]:
        if run["part"] == part and run["attention"]["similarity"] is not None:
            tables.setdefault(run["encoding"], run["attention"]["similarity"])
    figure, axes = page.figure(1.6 * max(1, len(tables)), 1.9, 1, max(1, len(tables)))
    for ax, (name, table) in zip(axes, tables.items(), strict=False):
        ax.imshow(table, vmin=-1, vmax=1, cmap="RdBu_r")
        ax.set(xticks=[], yticks=[])
        ax.set_title(name, fontsize=8)
        ax.grid(False)
    return figure


def distance(study: dict, part: str) -> Figure:
    """Plot the attention-weighted distance of each layer in patches, a dot for each head and seed."""
    names = findings.encodings(study, part)
    figure, (ax,) = page.figure(9, 3.2, 1, 1)
    for x, name in enumerate(names):
        heads = np.array(
            [r["attention"]["distance"] for r in study["runs"] if (r["part"], r["encoding"]) == (part, name)]
        )
        depth = heads.shape[1]  # (seeds, layers, heads)
        for layer in range(depth):
            dots = heads[:, layer].ravel()
            ax.scatter(
                np.full(len(dots), x + 0.15 * (layer - (depth - 1) / 2)), dots, s=9, color=LOOKS[name][0], alpha=0.7
            )
    ax.set(xticks=range(len(names)), ylabel="mean distance, patches")
    ax.set_xticklabels(names, rotation=20)
    return figure


# ------------------------------------------------------------------------------------------------------------ helpers


def _line(ax: Axes, row: Row, x: Sequence[float], means: Sequence[findings.Mean]) -> None:
    colour, mark = LOOKS[row.encoding]
    y = np.array([m.value for m in means])
    half = np.nan_to_num([m.half for m in means])
    ax.plot(x, y, color=colour, marker=mark, markersize=4, linewidth=1.3, label=LABELS[row.encoding])
    ax.fill_between(x, y - half, y + half, color=colour, alpha=0.13, linewidth=0)


def _chance(task: str) -> float:
    # twins: both of two answers among four have to be right
    return TASKS[task].chance if task in TASKS else TASKS["relation"].chance ** 2
