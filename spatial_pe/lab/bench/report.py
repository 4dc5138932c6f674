# SPDX-License-Identifier: Apache-2.0
"""Report of a run: tables for the terminal, and one HTML page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..report import page
from ..report.page import Chart, Section, Table
from . import charts, tower_peers
from . import result as results
from .variants import PEERS, VARIANTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict
NOTHING = "–"  # in a cell
LEAD = (
    "Attention with 2D RoPE in this package's kernels against alternatives: all variants run interleaved in one "
    "process on the same data; medians. x is the speed-up; below 1 is slower. Rates count the two matrix products of "
    "attention; the peers' times include their own rotation."
)


def html(result: dict) -> str:
    """Return the page for the content of a run's file."""
    from matplotlib import rc_context

    with rc_context(page.style()):
        sections = [make(result) for suite, make in SECTIONS.items() if any(results.rows(result, suite))]
        return page.render("Speed on this machine", LEAD, sections, footer(result))


def text(result: dict) -> str:
    """Return the tables for a terminal."""
    suites = [suite for suite in TABLES if any(results.rows(result, suite))]
    return "\n".join(page.plain(table) for suite in suites for table in tables(suite, result))


def tables(suite: str, result: dict) -> list[Table]:
    """Return the tables of a suite, without the columns that no case has a value for."""
    return [page.without_empty(table, NOTHING) for table in TABLES[suite](result)]


def headline(result: dict) -> str:
    """Return one sentence: the range of each ratio."""
    said = []
    for suite, of, against, what in (
        ("towers", "after", "before", "whole towers, patched against unpatched"),
        ("attention", "ours", "eager", "attention against eager rotation and SDPA"),
    ):
        ratios = [r for row in results.rows(result, suite) if (r := results.speedup(row, against, of=of)) is not None]
        if ratios:
            said.append(f"{what} {min(ratios):.2f} to {max(ratios):.2f}x")
    return f"As fast: {'; '.join(said)}." if said else ""


# ------------------------------------------------------------------------------------------------------------- tables


def attention_table(result: dict) -> Table:
    rows = []
    for row in results.rows(result, "attention"):
        peer = results.best(row, PEERS)
        cells = [_rate(row, "ours"), _times(row, "eager"), _times(row, "compiled"), _times(row, "separate")]
        cells += [f"{_times(row, peer)} {VARIANTS[peer].label}" if peer else NOTHING, _cost(row)]
        rows.append([charts.case(row), *cells])
    header = [
        "",
        "GFLOP/s",
        "against eager",
        "compiled",
        "separate rotation",
        "as fast as the best peer",
        "rotation costs",
    ]
    return Table("Attention. Eager: rotate-half, then torch's SDPA, as transformers' towers do.", header, rows)


def layers_table(result: dict) -> Table:
    rows = [
        [charts.case(row), _times(row, "eager"), _times(row, "compiled"), _cost(row)]
        for row in results.rows(result, "layers")
    ]
    header = ["", "against eager", "compiled", "rotation costs"]
    return Table("RoPE2DAttention, with its projections, against the same around eager attention.", header, rows)


def cross_table(result: dict) -> Table:
    rows = [
        [charts.case(row), _rate(row, "ours"), _times(row, "eager"), _times(row, "compiled"), _cost(row)]
        for row in results.rows(result, "cross")
    ]
    header = ["", "GFLOP/s", "against eager", "compiled", "rotation costs"]
    return Table("Attention to other tokens: keys with a table of their own.", header, rows)


def growth_table(result: dict) -> Table:
    rows = [
        [charts.AXES[row["axis"]], row["name"], _rate(row, "ours"), _times(row, "eager"), _cost(row)]
        for row in results.rows(result, "growth")
    ]
    return Table("How speed changes.", ["what grows", "", "GFLOP/s", "against eager", "rotation costs"], rows)


def memory_table(result: dict) -> Table:
    found = list(results.rows(result, "memory"))
    names = list(dict.fromkeys(name for row in found for name in row["bytes"]))
    rows = [
        [
            str(row["shape"]["tokens"]),
            *(f"{row['bytes'][n] / 2**20:.1f}" if n in row["bytes"] else NOTHING for n in names),
        ]
        for row in found
    ]
    return Table("Peak memory, MiB beside inputs and output.", ["tokens", *(VARIANTS[n].label for n in names)], rows)


def towers_table(result: dict) -> Table:
    found = list(results.rows(result, "towers"))
    peers = [name for name in tower_peers.PEERS if any(name in row["seconds"] for row in found)]
    rows = [
        [
            row["what"],
            row["dtype"],
            f"{row['sdpa_share']:.0%}",
            *(_ratio(results.speedup(row, name, of="after")) for name in ("before", *peers)),
        ]
        for row in found
    ]
    header = ["tower", "dtype", "SDPA's share before", "unpatched", *(tower_peers.PEERS[name][0] for name in peers)]
    return Table(
        "Whole towers: how many times as fast the patched one is, run eagerly, as each of these.", header, rows
    )


def space_table(result: dict) -> Table:
    rows = [
        [
            row["what"],
            row["dtype"],
            _ratio(results.speedup(row, "before", of="after")),
            *(f"{row['peak'][key] / 2**20:.1f}" for key in ("before", "after")),
            "{before} -> {after}".format(**row["kernels"]),
        ]
        for row in results.rows(result, "space")
    ]
    header = ["", "dtype", "patched", "peak before, MiB", "peak after, MiB", "operators"]
    return Table("Public code: how many times as fast it is patched, and what it allocates at once.", header, rows)


def start_table(result: dict) -> Table:
    (row,) = results.rows(result, "start")
    rows = [[name, f"{results.seconds(row, name):.2g}"] for name in row["seconds"]]
    return Table("What a process pays once, seconds.", ["", "s"], rows)


def refused_table(result: dict) -> Table | None:
    rows = [
        [charts.case(row) if "direction" in row else row.get("what", row["suite"]), _label(name), why]
        for row in result["rows"]
        for name, why in row["refused"].items()
    ]
    reasons = {(name, why): case for case, name, why in reversed(rows)}
    shown = [[case, name, why] for (name, why), case in reversed(reasons.items())]
    return Table("Left out, the first case of each reason.", ["case", "variant", "why"], shown) if shown else None


def _label(name: str) -> str:
    """Return the label of a variant of attention, or of a whole tower."""
    return VARIANTS[name].label if name in VARIANTS else tower_peers.PEERS[name][0]


def _rate(row: Row, variant: str) -> str:
    rate = results.gflops(row, variant)
    return NOTHING if rate is None else f"{rate:.0f}"


def _times(row: Row, against: str) -> str:
    return _ratio(results.speedup(row, against))


def _ratio(ratio: float | None) -> str:
    return NOTHING if ratio is None else f"{ratio:.2f}x"


def _cost(row: Row) -> str:
    cost = results.rotation_cost(row)
    return NOTHING if cost is None else f"{cost:+.1%}"


TABLES: dict[str, Callable[[dict], Sequence[Table]]] = {
    "towers": lambda result: [towers_table(result)],
    "attention": lambda result: [attention_table(result)],
    "layers": lambda result: [layers_table(result)],
    "cross": lambda result: [cross_table(result)],
    "space": lambda result: [space_table(result)],
    "growth": lambda result: [growth_table(result)],
    "memory": lambda result: [memory_table(result)],
    "start": lambda result: [start_table(result)],
}


# ----------------------------------------------------------------------------------------------------------- sections


def _section(title: str, suite: str, *drawn: tuple[Callable[[dict], Figure | None], str]) -> Callable[[dict], Section]:
    def make(result: dict) -> Section:
        figures = [
            Chart(figure, f"{label} The numbers are in the table below.")
            for draw, label in drawn
            if (figure := draw(result)) is not None
        ]
        left_out = [table for table in (refused_table(result),) if table and suite == "attention"]
        return Section(title, (), (*figures, *tables(suite, result), *left_out))

    return make


SECTIONS = {
    "towers": _section("Whole towers", "towers", (charts.towers, "How many times as fast each tower is, patched.")),
    "attention": _section(
        "Attention",
        "attention",
        (charts.attention, "How many times as fast each variant is as eager rotation and SDPA."),
        (charts.roofline, "Rates reached, under what the machine can do (line; filled: one thread)."),
    ),
    "layers": _section("Layers", "layers"),
    "cross": _section("Attention to other tokens", "cross"),
    "growth": _section(
        "How it grows", "growth", (charts.growth, "Rates against tokens, batch, heads, windows, threads.")
    ),
    "memory": _section("Memory", "memory", (charts.memory, "Peak memory against tokens.")),
    "space": _section("Models that see space", "space"),
    "start": _section("First call", "start"),
}


def footer(result: dict) -> str:
    versions = result["versions"]
    names = ("spatial_pe", "torch", "transformers", "onnxruntime", "openvino")
    what = ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
    return f"Made by: {result['command']}. On: {machine(result)}. {what}."


def machine(result: dict) -> str:
    """Return the machine of a run in words."""
    return result["gpu"] or f"{result['cpu']}, {result['cores']} cores"
