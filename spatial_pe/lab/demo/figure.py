# SPDX-License-Identifier: Apache-2.0
"""The picture of the demo: photographs, a tower's features of them before and after, throughput of all towers, and the
effect of 2D RoPE on a score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import scores
from .measure import AnyRow, Row, TowerRow, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEFORE, AFTER, INK, MUTED, FRAME = "#a9b0b8", "#1f6fd6", "#1d2329", "#5d6771", "#d5dae0"
# Where the colours of the difference map start and end: float32 rounding is near white, what could matter is dark.
DIFFERENCE = (1e-7, 1e-1)

SHOWN = 3  # photographs


@dataclass(frozen=True, eq=False)
class Pictures:
    """Features to draw, all at one size and dtype."""

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


WIDTH = 12.0  # inches; a README shows them at 830 pixels, where a text of size 10 has 10 pixels
HEAT = 2.55  # side of a heat map


def draw(
    path: Path, title: str, subtitle: str, pictures: Pictures, rows: list[Row], towers: Sequence[TowerRow] = ()
) -> None:
    """Write the PNG. No pyplot: no global state, no display."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

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
    header = 1.3 + 0.2 * subtitle.count("\n")
    middle = header + 1.56 * count + 1.45  # where the heat maps begin
    height = middle + HEAT + 0.95
    with rc_context(style):
        figure = Figure(figsize=(WIDTH, height), facecolor="white")
        FigureCanvasAgg(figure)

        def grid(lines: int, columns: int, left: float, right: float, top: float, bottom: float, **space: float) -> Any:
            """Return a grid of axes, placed in inches from the upper left corner."""
            at = {"left": left / WIDTH, "right": right / WIDTH, "top": 1 - top / height, "bottom": 1 - bottom / height}
            return figure.add_gridspec(lines, columns, **at, **space)

        def head(left: float, top: float, text: str, detail: str) -> None:
            figure.text(left / WIDTH, 1 - top / height, text, size=12.5, weight="bold", va="center")
            figure.text(left / WIDTH, 1 - (top + 0.22) / height, detail, size=10.5, color=MUTED, va="center")

        figure.text(0.2 / WIDTH, 1 - 0.36 / height, title, size=17, weight="bold", va="center")
        figure.text(0.2 / WIDTH, 1 - 0.58 / height, subtitle, size=10.5, color=MUTED, va="top", linespacing=1.35)
        images = grid(count, 4, 0.2, 6.44, header, header + 1.56 * count, wspace=0.04, hspace=0.04)
        _draw_features([[figure.add_subplot(images[i, j]) for j in range(4)] for i in range(count)], pictures)
        # at least two, so that a single size does not become a tower of its own
        ends = header + 1.56 * count + 0.1 if towers else height - 0.6
        bars = grid(max(2, len(sizes)), 1, 7.45, WIDTH - 0.15, header + 0.15, ends, hspace=0.36)
        for i, size in enumerate(sizes):
            _draw_bars(figure.add_subplot(bars[i]), [row for row in rows if row.size == size])
        figure.legend(
            [Patch(color=BEFORE), Patch(color=AFTER)],
            ["before", "after (patched)"],
            loc="center right",
            bbox_to_anchor=(1 - 0.1 / WIDTH, 1 - (header - 0.33) / height),
            ncols=2,
            frameon=False,
            fontsize=11,
            handlelength=1.2,
            columnspacing=1.2,
        )
        head(
            0.2,
            middle - 0.72,
            "What RoPE does to a score",
            "mean of R(q)·R(k) for q = k, by the offset of the key in the grid",
        )
        maps = grid(1, 2, 0.75, 0.75 + 2 * HEAT + 0.45, middle, middle + HEAT, wspace=0.45 / HEAT)
        _draw_scores([figure.add_subplot(maps[j]) for j in range(2)])
        if towers:
            head(
                7.0,
                middle - 0.72,
                "Towers that rotate",
                "images per second, fp32; real widths, random weights",
            )
            panel = grid(1, 1, 7.0, WIDTH - 0.15, middle - 0.35, height - 0.25)
            _draw_towers(figure.add_subplot(panel[0]), towers)
        figure.savefig(path, dpi=110, facecolor="white")


def _draw_features(axes: list[list[Axes]], pictures: Pictures) -> None:
    """One line per photograph: itself, features before, features after, and how far they lie apart."""
    from matplotlib.colors import LogNorm

    norms = pictures.before.double().norm(dim=-1)
    apart = (pictures.after.double() - pictures.before.double()).norm(dim=-1) / norms
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
            for axis, text, detail in (
                (a, "photograph", f"{pictures.size} px"),
                (b, "features before", "PCA as RGB"),
                (c, "features after", "the same PCA basis"),
                (d, "difference", f"relative, {pictures.dtype}"),
            ):
                axis.set_title(text, size=11.5, weight="bold", pad=19)
                axis.text(0.5, 1.04, detail, size=10, color=MUTED, ha="center", transform=axis.transAxes)
    column = axes[-1][-1]
    scale = column.inset_axes((0.0, -0.075, 1.0, 0.04))
    column.figure.colorbar(shown, cax=scale, orientation="horizontal", ticks=[1e-7, 1e-5, 1e-3, 1e-1])
    scale.tick_params(labelsize=10, pad=1, length=2)


def _draw_bars(axis: Axes, rows: list[Row]) -> None:
    """Images per second of one image size: a pair of bars for each dtype, above it the speed-up and its interval."""
    width, gap = 0.36, 0.02
    rates = [row.timing.images_per_second(row.batch) for row in rows]
    highest = max(max(pair) for pair in rates)
    for x, (row, pair) in enumerate(zip(rows, rates, strict=True)):
        for side, rate, colour in ((-1, pair[0], BEFORE), (1, pair[1], AFTER)):
            at = x + side * (width + gap) / 2
            axis.bar(at, rate, width, color=colour)
            axis.text(at, rate + 0.015 * highest, significant(rate), ha="center", va="bottom", size=10.5)
        interval, (text, colour) = row.timing.interval, _verdict(row)
        middle: Any = {"ha": "center", "textcoords": "offset points", "xy": (x, max(pair))}
        axis.annotate(text, xytext=(0, 34), size=15, weight="bold", color=colour, **middle)
        axis.annotate(str(interval), xytext=(0, 20), size=10, color=MUTED, **middle)
    axis.set_ylim(0, 1.6 * highest)
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


def _draw_scores(axes: list[Axes]) -> None:
    """The mean score of a patch with the one in the centre, by 2D RoPE and by 1D RoPE over the list of patches."""
    half, middle = scores.SIDE / 2, scores.SIDE // 2
    found = (("2D RoPE, axial", scores.axial()), ("1D RoPE over the flattened list", scores.flattened()))
    for axis, (name, values) in zip(axes, found, strict=True):
        shown = axis.imshow(
            values.numpy(),
            cmap="viridis",
            vmin=-0.35,
            vmax=1.0,
            interpolation="nearest",
            extent=(-half, half, half, -half),
        )
        axis.set_title(name, size=11.5, weight="bold", pad=6)
        axis.set_xticks([-15, 0, 15])
        axis.set_yticks([-15, 0, 15])
        axis.tick_params(labelsize=10, length=2)
        axis.set_xlabel("columns to the right", size=10.5, labelpad=2)
        right, below = values[middle, middle + 1], values[middle + 1, middle]
        axis.text(
            0.5,
            -0.25,
            f"one to the right {right:.2f}, one below {below:.2f}",
            size=10.5,
            color=MUTED,
            ha="center",
            transform=axis.transAxes,
        )
    axes[0].set_ylabel("rows below", size=10.5, labelpad=0)
    scale = axes[1].inset_axes((1.04, 0.0, 0.045, 1.0))
    axes[1].figure.colorbar(shown, cax=scale, ticks=[0, 0.5, 1])
    scale.tick_params(labelsize=10, length=2, pad=2)


def _draw_towers(axis: Axes, rows: Sequence[TowerRow]) -> None:
    """Draw a pair of bars for each tower, images per second with those before as 1, and the cost of a layer."""
    widest = max(max(1.0, row.timing.speed_up) for row in rows)
    for i, row in enumerate(rows):
        rates = row.timing.images_per_second(row.images)
        name = axis.text(0, i - 0.31, row.name, size=12, weight="bold", va="bottom")
        beside: Any = {"xycoords": name, "textcoords": "offset points", "va": "bottom"}
        axis.annotate(row.what, (1, 0), xytext=(6, 1), size=10, color=MUTED, **beside)
        axis.text(0, i + 0.36, _facts(row), size=10, color=MUTED, va="center")
        for side, rate, colour in ((-1, rates[0], BEFORE), (1, rates[1], AFTER)):
            axis.barh(i - 0.06 + 0.11 * side, rate / rates[0], 0.2, color=colour)
            axis.text(rate / rates[0] + 0.02, i - 0.06 + 0.11 * side, significant(rate), size=10.5, va="center")
        interval = row.timing.interval
        text, colour = _verdict(row)
        axis.text(1.5 * widest, i - 0.12, text, size=15, weight="bold", color=colour, ha="right", va="center")
        axis.text(1.5 * widest, i + 0.12, str(interval), size=9.5, color=MUTED, ha="right", va="center")
    axis.set_xlim(0, 1.5 * widest)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_axis_off()


def _verdict(row: AnyRow) -> tuple[str, str]:
    """Return the text for the speed, and its colour."""
    return ("too noisy", MUTED) if row.timing.interval.too_wide else (f"{row.timing.speed_up:.2f}x", AFTER)


def _facts(row: TowerRow) -> str:
    error = f"error {row.error.relative:.0e}"
    return error if row.layer is None else f"{error}; a layer: {row.layer}".replace("->", "→")
