# SPDX-License-Identifier: Apache-2.0
"""Report of one or more studies: findings in words, tables, charts; one HTML file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..report import page
from ..report.page import Chart, Section, Table
from . import charts, findings
from .findings import Row
from .statistics import Comparison, Mean
from .study import LABELS
from .tasks import TASKS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAD = (
    "Vision transformers that differ in nothing but their position encoding: same initial weights, pictures, order and "
    "steps. Pictures are rendered shapes and real pixels (handwriting, photographs) with exact ground truth; "
    "the answers are balanced, so that neither the question nor what is in a picture tells them. ± is the 95 % "
    "interval of the mean over seeds."
)


def html(studies: Sequence[dict]) -> str:
    """Return the page for the content of the studies' files."""
    from matplotlib import rc_context

    with rc_context(page.style()):
        sections = [section for study in studies for section in _sections(study)]
        return page.render("Does it see space better?", LEAD, sections, _footer(studies))


def text(study: dict) -> str:
    """Return the tables and the findings for a terminal."""
    lines = []
    for part in findings.parts(study):
        lines += ["", f"{study['study']}, {part}: {study['about']}"]
        lines += [page.plain(table) for table in _tables(study, part)]
        lines += _notes(study, part)
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------- sections


def _sections(study: dict) -> list[Section]:
    names = findings.parts(study)
    sections = []
    if study["study"] == "data" and len(names) > 1:
        sized = sorted(names, key=lambda part: study["recipes"][part]["scenes"])
        chart = Chart(
            charts.by_scenes(study, sized),
            "Skill against the number of pictures in the training set, a line an encoding.",
        )
        sections.append(Section(f"{study['study']}: {study['about']}", (), (chart,)))
    for part in names:
        sections.append(_section(study, part))
    return sections


def _section(study: dict, part: str) -> Section:
    recipe = study["recipes"][part]
    runs = [run for run in study["runs"] if run["part"] == part]
    trained = (
        f"{recipe['steps']} steps of {recipe['batch']} pictures from {recipe['scenes']} "
        f"({', '.join(recipe['domains'])}), tested on {recipe['test_scenes']} others; "
        f"{_seeds(study, part)} seeds."
    )
    items: list[Table | Chart] = [*_tables(study, part)]
    items += [Chart(draw(study, part), label) for draw, needs, label in CHARTS if needs(runs[0])]
    if any(run.get("attention", {}).get("similarity") for run in runs):
        items.append(Chart(charts.similarity(study, part), SIMILARITY))
    paragraphs = (f"{_model(recipe)} {trained}", *_notes(study, part))
    return Section(f"{study['study']}, {part}: {study['about']}", paragraphs, tuple(items))


def _seeds(study: dict, part: str) -> int:
    return len({run["seed"] for run in study["runs"] if run["part"] == part})


def _model(recipe: dict) -> str:
    if "size" in recipe:
        size = recipe["size"]
        return (
            f"Tower: {size['depth']} layers, width {size['width']}, {size['heads']} heads, {size['image']} px in "
            f"patches of {size['patch']}; asked by a {recipe['model']}."
        )
    tuned = f", then {recipe['tuned_steps']} of {recipe['tuned_batch']} with the tower" if recipe["tuned_steps"] else ""
    return f"Tower: {recipe['checkpoint'] or 'DINOv2-small'}. A probe ({recipe['head']}) on its frozen features{tuned}:"


# (drawing function, whether a run has the data, label)
CHARTS: tuple[tuple[Callable[[dict, str], Figure], Callable[[dict], bool], str], ...] = (
    (
        charts.by_task,
        lambda run: True,
        "Accuracy of each encoding on each task with its 95 % interval over the seeds; dotted: chance. The numbers are "
        "in the table above.",
    ),
    (
        charts.by_scale,
        lambda run: len(run["accuracy"]) > 1,
        "Skill at 0.75, 1, 1.5 and 2 times the size of training, left with patches numbered on, right with stretched "
        "coordinates. The numbers are in the table above.",
    ),
    (
        charts.curves,
        lambda run: "curve" in run,
        "Skill on a part of the test set against the number of pictures seen in training.",
    ),
    (
        charts.attention,
        lambda run: "attention" in run,
        "What the middle patch attends to in a picture without content, by layer and encoding, mean over heads and "
        "seeds: bright is four times the even weight or more.",
    ),
    (
        charts.distance,
        lambda run: "attention" in run,
        "How far the heads of each layer look, in patches; layers from left to right within an encoding.",
    ),
    (
        charts.layers,
        lambda run: bool(run.get("layers")),
        "By layer: mean cosine of a patch with its neighbours less that with distant patches; mean cosine of its "
        "features with those of the same patch in the flipped or rotated picture: 1 means invariance.",
    ),
)
SIMILARITY = "Cosine of the position table at the middle patch with that of all others: red 1, blue -1."
BY_TASK = (
    "Accuracy by task at the training size, % (chance in brackets); twins: right on a picture and on its mirror image; "
    "skill: mean without chance."
)
BY_SCALE = "Skill by size, %: patches numbered on (index), or coordinates and tables stretched to the training grid."

MARKS = {"better": "▲", "worse": "▼", "perhaps better": "△", "perhaps worse": "▽", "no difference shown": ""}
MARKED = (
    "▲ better, ▼ worse: p < 0.05 after correction for all comparisons of a part of the study; △ ▽: only before. No "
    "mark: no difference shown."
)
COMPARED = f"Differences in percentage points, paired by seed. {MARKED}"
ONE_SEED = "One seed: nothing is compared. Differences need two seeds or more."
SMOKE = "A smoke run, of a few steps: it shows that everything works. Its numbers are no result."


def _notes(study: dict, part: str) -> list[str]:
    """Return what limits the numbers of a part."""
    notes = {SMOKE: study["budget"] == "smoke", ONE_SEED: _seeds(study, part) < 2}
    return [note for note, holds in notes.items() if holds]


TRANSFORMED = (
    "Relations answered right both about a picture and about the same picture flipped or rotated, %; chance 6."
)
MOVED = "Skill when the positions are moved, %: normal; each patch at another's position; all at one position."


def _tables(study: dict, part: str) -> list[Table]:
    chances = {task: f"{100 * TASKS[task].chance:.0f}" for task in TASKS}
    first = next(run for run in study["runs"] if run["part"] == part)
    tables = [_table(BY_TASK, findings.by_task(study, part), lambda c: f"{c} ({chances[c]})" if c in chances else c)]
    if len(first["accuracy"]) > 1:
        tables.append(_table(BY_SCALE, findings.by_scale(study, part), lambda c: c.replace(" ", "x ")))
    if "counterfactual" in first:
        tables.append(_table(MOVED, findings.by_counterfactual(study, part), str))
        tables.append(_table(TRANSFORMED, findings.by_transform(study, part), str))
    if _seeds(study, part) > 1:
        tables.insert(1, _compared(study, part))
    domains = findings.by_domain(study, part)
    if len(domains[0].cells) > 1:
        tables.append(_table("Skill by what the pictures are made of, %.", domains, str))
    return tables


def _compared(study: dict, part: str) -> Table:
    found = {(c.encoding, c.reference, c.column): c.result for c in findings.comparisons(study, part)}
    columns = list(dict.fromkeys(column for _, _, column in found))
    rows = []
    for pair in dict.fromkeys(key[:2] for key in found):
        results = (found.get((*pair, column)) for column in columns)
        rows.append(
            [" − ".join(LABELS[name] for name in pair), *("–" if r is None else difference(r) for r in results)]
        )
    return Table(COMPARED, ["difference of", *columns], rows)


def difference(result: Comparison) -> str:
    """Format mean, interval and mark, in percentage points."""
    value = result.difference
    return f"{100 * value.value:+.1f} ± {100 * value.half:.1f} {MARKS[result.verdict]}".rstrip()


def _table(caption: str, rows: Sequence[Row], title: Callable[[str], str]) -> Table:
    fullest = sorted(rows, key=lambda row: -len(row.cells))  # some encodings have no extrapolated coordinates
    columns = list(dict.fromkeys(column for row in fullest for column in row.cells))
    best = set()
    for index, column in enumerate(columns):
        values = {line: row.cells[column].value for line, row in enumerate(rows) if column in row.cells}
        best.add((max(values, key=lambda line: values[line]), index + 1))
    body = [[LABELS[row.encoding], *(_cell(row.cells.get(column)) for column in columns)] for row in rows]
    return Table(caption, ["encoding", *map(title, columns)], body, frozenset(best))


def _cell(value: Mean | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value.value:.1f} ± {100 * value.half:.1f}" if value.count > 1 else f"{100 * value.value:.1f}"


def _footer(studies: Sequence[dict]) -> str:
    commands = dict.fromkeys(command for study in studies for command in study["commands"])
    machines = dict.fromkeys(
        f"{e['cpu']}, torch {e['versions']['torch']}, spatial_pe {e['versions']['spatial_pe']}"
        for study in studies
        for e in study["environments"]
    )
    return (
        f"Made by: {'; '.join(commands)}. On: {'; '.join(machines)}. Comparisons: paired t tests over seeds, corrected "
        "by Holm within each section; better or worse: p below 0.05 after that; perhaps: only before."
    )
