# SPDX-License-Identifier: Apache-2.0
"""The demo's picture: photographs, what the tower sees in them before and after, and how fast it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .measure import Row, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEFORE, AFTER, INK, MUTED, FRAME = "#a9b0b8", "#1f6fd6", "#1d2329", "#5d6771", "#d5dae0"
# Where the colours of the difference map start and end: float32 rounding is near white, what could matter is dark.
DIFFERENCE = (1e-7, 1e-1)


@dataclass(frozen=True, eq=False)
class Pictures:
    """What is drawn of the features, all at one size and dtype."""

    photos: Tensor  # (P, 3, S, S) in 0..1
    before: Tensor  # (P, h, w, C) features of the patches
    after: Tensor
    size: int
    dtype: str


def principal_colours(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """One photograph's (h, w, C) -> (h, w, 3) in 0..1 each: three principal components as red, green, blue.

    The basis and the range of the colours come from ``before`` alone and serve both, so that equal features have
    equal colours and a difference cannot hide in a refitted basis.
    """
    flat = before.flatten(0, -2).double()
    mean = flat.mean(0)
    _, _, components = torch.linalg.svd(flat - mean, full_matrices=False)
    basis = components[:3].T  # (C, 3)
    low, high = torch.quantile((flat - mean) @ basis, torch.tensor([0.01, 0.99], dtype=flat.dtype), dim=0)

    def colours(features: Tensor) -> Tensor:
        return (((features.double() - mean) @ basis - low) / (high - low)).clamp(0, 1)

    return colours(before), colours(after)


def draw(path: Path, title: str, subtitle: str, pictures: Pictures, rows: list[Row]) -> None:
    """Write the PNG. No pyplot: no global state, no display."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {
        "font.size": 11,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": MUTED,
        "xtick.color": INK,
        "ytick.color": MUTED,
    }
    count = len(pictures.photos)
    sizes = sorted({row.size for row in rows})
    with rc_context(style):
        height = 2.35 * count + 1.8
        figure = Figure(figsize=(15.5, height), facecolor="white")
        FigureCanvasAgg(figure)
        figure.text(0.018, 1 - 0.34 / height, title, size=19, weight="bold", va="center")
        figure.text(0.018, 1 - 0.70 / height, subtitle, size=11.5, color=MUTED, va="center")
        top = 1 - 1.42 / height
        images = figure.add_gridspec(
            count, 4, left=0.018, right=0.625, top=top, bottom=0.42 / height, wspace=0.04, hspace=0.05
        )
        # at least two, so that a single size does not become a tower of its own
        bars = figure.add_gridspec(
            max(2, len(sizes)), 1, left=0.72, right=0.985, top=top, bottom=0.62 / height, hspace=0.32
        )
        _draw_features([[figure.add_subplot(images[i, j]) for j in range(4)] for i in range(count)], pictures)
        for i, size in enumerate(sizes):
            _draw_bars(figure.add_subplot(bars[i]), [row for row in rows if row.size == size], legend=i == 0)
        figure.savefig(path, dpi=110, facecolor="white")


def _draw_features(axes: list[list[Axes]], pictures: Pictures) -> None:
    """One line per photograph: itself, features before, features after, and how far they lie apart."""
    from matplotlib.colors import LogNorm

    norms = pictures.before.double().norm(dim=-1)
    apart = (pictures.after.double() - pictures.before.double()).norm(dim=-1) / norms
    kind = f"{pictures.dtype}, {pictures.size} px"
    for i, (a, b, c, d) in enumerate(axes):
        a.imshow(pictures.photos[i].permute(1, 2, 0).numpy())
        before, after = principal_colours(pictures.before[i], pictures.after[i])
        b.imshow(before.numpy(), interpolation="nearest")
        c.imshow(after.numpy(), interpolation="nearest")
        # white is agreement; zeros have no logarithm, so they start the scale
        shown = d.imshow(
            apart[i].clamp(min=DIFFERENCE[0]).numpy(), interpolation="nearest", cmap="OrRd", norm=LogNorm(*DIFFERENCE)
        )
        largest = f"largest {apart[i].max():.0e}" if apart[i].any() else "bit-identical"
        d.text(0.04, 0.045, largest, size=10, transform=d.transAxes, bbox={"color": "white", "alpha": 0.8, "pad": 2})
        for axis in (a, b, c, d):
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_color(FRAME)
        if i == 0:
            for axis, text in (
                (a, "photograph"),
                (b, "features before"),
                (c, "features after"),
                (d, "relative difference"),
            ):
                axis.set_title(text, size=12.5, weight="bold", pad=20)
            for axis, text in (
                (b, f"PCA as RGB, {kind}"),
                (c, "patched, same PCA basis"),
                (d, "of each patch, log scale"),
            ):
                axis.text(0.5, 1.03, text, size=9.5, color=MUTED, ha="center", transform=axis.transAxes)
    column = axes[-1][-1]
    scale = column.inset_axes((0.0, -0.075, 1.0, 0.04))
    column.figure.colorbar(shown, cax=scale, orientation="horizontal", ticks=[1e-7, 1e-5, 1e-3, 1e-1])
    scale.tick_params(labelsize=8.5, pad=1, length=2)


def _draw_bars(axis: Axes, rows: list[Row], legend: bool) -> None:
    """Images per second of one image size: a pair of bars for each dtype, above it the speed-up and its interval."""
    width, gap = 0.36, 0.02
    rates = [row.timing.images_per_second(row.batch) for row in rows]
    highest = max(max(pair) for pair in rates)
    for x, (row, pair) in enumerate(zip(rows, rates, strict=True)):
        for side, rate, colour, label in ((-1, pair[0], BEFORE, "before"), (1, pair[1], AFTER, "after (patched)")):
            at = x + side * (width + gap) / 2
            axis.bar(at, rate, width, color=colour, label=label if x == 0 else None)
            axis.text(at, rate + 0.015 * highest, significant(rate), ha="center", va="bottom", size=10.5)
        interval = row.timing.interval
        text, colour = (f"{row.timing.speed_up:.2f}x", AFTER) if not interval.too_wide else ("too noisy", MUTED)
        axis.text(x, max(pair) + 0.19 * highest, text, ha="center", size=15, weight="bold", color=colour)
        axis.text(x, max(pair) + 0.12 * highest, str(interval), ha="center", size=9.5, color=MUTED)
    axis.set_ylim(0, 1.42 * highest)
    axis.set_xlim(-0.6, len(rows) - 0.4)
    axis.set_xticks(range(len(rows)), [row.dtype for row in rows], size=12)
    axis.tick_params(axis="x", length=0)
    axis.tick_params(axis="y", labelsize=9.5)
    axis.set_ylabel("images per second", size=10.5, color=MUTED)
    axis.set_title(
        f"{rows[0].size} px, {rows[0].tokens} tokens, batch {rows[0].batch}",
        size=12.5,
        weight="bold",
        loc="left",
        pad=8,
    )
    for name in ("top", "right"):
        axis.spines[name].set_visible(False)
    if legend:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=10.5)
