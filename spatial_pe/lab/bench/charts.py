# SPDX-License-Identifier: Apache-2.0
"""Charts of a benchmark's report. Variants keep their colour and mark everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..report import page
from ..report.page import INK
from . import result as results
from .variants import VARIANTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#00798c", "#4fb3bf", "#d1495b", "#8c1c2c", "#edae49", "#2e4fa5", "#7a5195", "#5b8c3e")
MARKS = "os^v<D*X"
LOOKS = {name: (COLOURS[i], MARKS[i]) for i, name in enumerate(VARIANTS)}
AXES = {"tokens": "tokens", "batch": "batch", "heads": "heads", "windows": "windows of 64 tokens", "threads": "threads"}


def attention(result: dict) -> Figure:
    """Plot speed relative to eager rotation and SDPA, one group per shape."""
    rows = [row for row in results.rows(result, "attention") if results.seconds(row, "eager")]
    figure, (ax,) = page.figure(9, 0.75 + 0.34 * len(rows), 1, 1)
    for y, row in enumerate(reversed(rows)):
        for name in row["seconds"]:
            if name not in ("eager", "off"):
                colour, mark = LOOKS[name]
                ratio = results.speedup(row, "eager", of=name) or 0.0
                ax.plot(ratio, y, color=colour, marker=mark, linestyle="", markersize=6, label=VARIANTS[name].label)
    ax.axvline(1, color=INK, linestyle=":", linewidth=1)
    ax.set(yticks=range(len(rows)), xlabel="times as fast as eager rotation and SDPA (dotted: as fast)", xlim=(0, None))
    ax.set_yticklabels([case(row) for row in reversed(rows)])
    page.legend(figure, [ax])
    return figure


def growth(result: dict) -> Figure:
    """Plot speed against each growing dimension, one panel each."""
    rows = list(results.rows(result, "growth"))
    axes_found = [axis for axis in AXES if any(row["axis"] == axis for row in rows)]
    figure, axes = page.figure(3.1 * len(axes_found) + 1.5, 3.2, 1, len(axes_found), sharey=True)
    for ax, axis in zip(axes, axes_found, strict=True):
        its = [row for row in rows if row["axis"] == axis]
        for name in dict.fromkeys(name for row in its for name in row["seconds"]):
            points = [(int(row["name"]), rate) for row in its if (rate := results.gflops(row, name)) is not None]
            _line(ax, name, [x for x, _ in points], [rate for _, rate in points])
        ax.set(xlabel=AXES[axis], ylim=(0, None))
        if axis != "threads":
            ax.set_xscale("log", base=2)
    axes[0].set_ylabel("GFLOP/s, forward")
    page.legend(figure, axes)
    return figure


def roofline(result: dict) -> Figure | None:
    """Plot rates against the limits of the machine: arithmetic, or copying. None if those were not measured."""
    if result["peaks"] is None:
        return None
    rows = [row for row in results.rows(result, "attention") if row["direction"] == "forward"]
    peaks, cores = result["peaks"], result["device"] == "cpu"
    dtypes = [dtype for dtype in ("fp32", "bf16") if any(row["dtype"] == dtype for row in rows)]
    figure, axes = page.figure(4.2 * len(dtypes) + 1.5, 3.4, 1, len(dtypes), sharey=True)
    for ax, dtype in zip(axes, dtypes, strict=True):
        for threads in sorted({row["threads"] for row in rows}):
            top, copy = peaks["gflops"][dtype] * (threads if cores else 1), peaks["copy_gigabytes_per_second"]
            edges = [1, top / copy, 4096]
            ax.plot(edges, [min(top, copy * x) for x in edges], color=INK, linewidth=1)
        for row in rows:
            for name in ("eager", "openvino", "ours"):
                if (rate := results.gflops(row, name)) is not None and row["dtype"] == dtype:
                    colour, mark = LOOKS[name]
                    ax.plot(
                        results.intensity(row),
                        rate,
                        color=colour,
                        marker=mark,
                        linestyle="",
                        markersize=5,
                        label=VARIANTS[name].label,
                        fillstyle="full" if row["threads"] == 1 else "none",
                    )
        ax.set(title=dtype, xscale="log", yscale="log", xlabel="FLOP per byte of q, k, v and output")
    axes[0].set_ylabel("GFLOP/s")
    page.legend(figure, axes)
    return figure


def memory(result: dict) -> Figure:
    """Plot peak memory against tokens."""
    rows = list(results.rows(result, "memory"))
    figure, (ax,) = page.figure(7, 3.3, 1, 1)
    for name in dict.fromkeys(name for row in rows for name in row["bytes"]):
        points = [(row["shape"]["tokens"], row["bytes"][name] / 2**20) for row in rows if name in row["bytes"]]
        _line(ax, name, [x for x, _ in points], [y for _, y in points])
    ax.set(xlabel="tokens", ylabel="MiB beside inputs and output", xscale="log", yscale="log")
    page.legend(figure, [ax])
    return figure


def towers(result: dict) -> Figure:
    """Plot speed-ups of whole towers."""
    rows = list(results.rows(result, "towers"))
    figure, (ax,) = page.figure(8, 0.9 + 0.3 * len(rows), 1, 1)
    for y, row in enumerate(reversed(rows)):
        ratio = results.speedup(row, "before", of="after") or 0.0
        ax.barh(y, ratio, color=LOOKS["ours"][0], height=0.62)
        ax.text(ratio + 0.02, y, f"{ratio:.2f}x", va="center", fontsize=8)
    ax.axvline(1, color=INK, linestyle=":", linewidth=1)
    ax.set(yticks=range(len(rows)), xlabel="times as fast when patched (dotted: as fast)")
    ax.set_yticklabels([f"{row['name']}, {row['dtype']}" for row in reversed(rows)])
    return figure


def case(row: dict) -> str:
    shape, threads = row["shape"], row["threads"]
    what = (
        f"{shape['batch']} windows of {shape['tokens']}" if shape["packed"] else f"{shape['batch']} × {shape['tokens']}"
    )
    what += f" to {shape['keys']}" if shape.get("keys") else ""
    return f"{what}, {row['dtype']}, {row['direction']}, {threads} thread{'s' * (threads > 1)}"


# ------------------------------------------------------------------------------------------------------------- helpers


def _line(ax: Axes, name: str, x: Sequence[float], y: Sequence[float]) -> None:
    colour, mark = LOOKS[name]
    ax.plot(x, y, color=colour, marker=mark, markersize=4, linewidth=1.3, label=VARIANTS[name].label)
