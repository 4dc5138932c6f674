# SPDX-License-Identifier: Apache-2.0
"""Results of a study: means with intervals, paired comparisons, in tables of plain values.

Every number here is over runs (seeds). Accuracies of tasks with different numbers of answers are averaged after
removing chance, (accuracy - chance) / (1 - chance): 0 is guessing, 1 is perfect; this is called skill.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .pretrained import VARIANTS
from .statistics import Comparison, Mean, compare, mean
from .study import LABELS
from .tasks import TASKS

Run = dict
Value = Callable[[Run], float]
LARGEST = "2.0"  # of the sizes
# Compared (encoding, reference); few, because all comparisons of a part are corrected together
PAIRS = (
    ("learned-large", "learned-1d"),  # does the scale of the initial table matter?
    ("axial", "learned-1d"),
    ("axial", "learned-large"),  # rotary against the better learned table
    ("axial", "sincos-2d"),  # rotary against a fixed table
    ("mixed", "axial"),
    ("axial", "axial-10000"),  # does the base matter?
    ("axial+learned", "axial"),  # does a table help rotary?
    ("mismatched", "axial"),
    ("mismatched", "axial-10000"),  # the same base: the cost of not being a rotation
    ("alibi-2d", "none"),
    *((name, "as-is") for name in VARIANTS if name != "as-is"),
    ("authors", "full"),
)


def skill(accuracies: dict[str, float]) -> float:
    """Return the mean over tasks of accuracy without chance."""
    parts = [(value - TASKS[task].chance) / (1 - TASKS[task].chance) for task, value in accuracies.items()]
    return sum(parts) / len(parts)


@dataclass(frozen=True)
class Row:
    """One encoding: ``cells`` by column."""

    encoding: str
    cells: dict[str, Mean]


def parts(study: dict) -> list[str]:
    found = {run["part"] for run in study["runs"]}
    return [name for name in study["recipes"] if name in found]


def encodings(study: dict, part: str) -> list[str]:
    found = {run["encoding"] for run in study["runs"] if run["part"] == part}
    return [name for name in LABELS if name in found]


def by_task(study: dict, part: str) -> list[Row]:
    """Return accuracy at the training size, one column per task, then "twins" if there are any, then "skill"."""
    return _rows(study, part, dict(_columns(study, part)))


def by_scale(study: dict, part: str) -> list[Row]:
    """Return skill at each size; columns "0.75 index", "0.75 stretched", "1.0 index", ..."""
    rows = []
    for name in encodings(study, part):
        runs = list(_runs(study, part, name))
        keys = [(scale, mode) for scale, modes in runs[0]["accuracy"].items() for mode in modes]
        cells = {f"{s} {m}": mean([skill(run["accuracy"][s][m]) for run in runs]) for s, m in keys}
        rows.append(Row(name, cells))
    return rows


def by_domain(study: dict, part: str) -> list[Row]:
    """Return skill at the training size for each of the domains."""
    domains = list(_first(study, part)["domains"])
    return _rows(study, part, {domain: _of_domain(domain) for domain in domains})


def by_counterfactual(study: dict, part: str) -> list[Row]:
    """Return skill with the true positions, shuffled ones, and constant ones."""
    moved: dict[str, Value] = {"normal": lambda run: skill(run["accuracy"]["1.0"]["index"])}
    return _rows(study, part, moved | {name: _of_moved(name) for name in _first(study, part)["counterfactual"]})


def by_transform(study: dict, part: str) -> list[Row]:
    """Return the share of relations answered right both on a picture and on its flipped or rotated version."""
    return _rows(study, part, {transform: _of_transform(transform) for transform in _first(study, part)["consistency"]})


def by_layer(study: dict, part: str, what: str) -> dict[str, list[Mean]]:
    """Return a row of "layers", {encoding: [a mean for each layer]}; without encodings whose tower has none."""
    found = {}
    for name in encodings(study, part):
        runs = [run["layers"][what] for run in _runs(study, part, name) if run["layers"]]
        if runs:
            found[name] = [mean(values) for values in zip(*runs, strict=True)]
    return found


def curves(study: dict, part: str) -> dict[str, list[tuple[int, Mean]]]:
    """Return skill on a part of the test set during training: {encoding: [(step, mean)]}."""
    found = {}
    for name in encodings(study, part):
        runs = list(_runs(study, part, name))
        steps = [step for step, _ in runs[0]["curve"]]
        found[name] = [(step, mean([skill(run["curve"][i][1]) for run in runs])) for i, step in enumerate(steps)]
    return found


@dataclass(frozen=True)
class Compared:
    encoding: str
    reference: str
    column: str
    result: Comparison


def comparisons(study: dict, part: str) -> list[Compared]:
    """Compare each of PAIRS, on each task and on skill, at training and at the largest size: corrected as one
    family."""
    values = {(name, column): value for name, column, value in _compared(study, part)}
    pairs, keys = {}, {}
    for encoding, reference in PAIRS:
        for (name, column), ours in values.items():
            theirs = values.get((reference, column))
            if name != encoding or theirs is None:
                continue
            shared = sorted({*ours} & {*theirs})  # seeds
            if len(shared) > 1:
                key = f"{encoding} against {reference}, {column}"
                pairs[key] = [ours[seed] for seed in shared], [theirs[seed] for seed in shared]
                keys[key] = encoding, reference, column
    return [Compared(*keys[key], result) for key, result in compare(pairs).items()]


def _compared(study: dict, part: str) -> Iterator[tuple[str, str, dict[int, float]]]:
    """Yield (encoding, column, {seed: value}); at twice the size the better of both kinds of coordinates."""
    for name in encodings(study, part):
        runs = list(_runs(study, part, name))
        for column, value in _columns(study, part):
            yield name, column, {run["seed"]: value(run) for run in runs}
        if LARGEST in runs[0]["accuracy"]:
            modes = list(runs[0]["accuracy"][LARGEST])
            best = max(modes, key=lambda m: sum(skill(run["accuracy"][LARGEST][m]) for run in runs))
            yield name, f"skill at {LARGEST}x", {run["seed"]: skill(run["accuracy"][LARGEST][best]) for run in runs}


def _columns(study: dict, part: str) -> Iterator[tuple[str, Value]]:
    first = _first(study, part)
    for task in first["accuracy"]["1.0"]["index"]:
        yield task, _of_task(task)
    if first["twins"] is not None:
        yield "twins", lambda run: run["twins"]
    if len(first["accuracy"]["1.0"]["index"]) > 1:  # else it is the same as the task's column
        yield "skill", lambda run: skill(run["accuracy"]["1.0"]["index"])


def _of_task(task: str) -> Value:
    return lambda run: run["accuracy"]["1.0"]["index"][task]


def _of_transform(transform: str) -> Value:
    return lambda run: run["consistency"][transform]


def _of_moved(name: str) -> Value:
    return lambda run: skill(run["counterfactual"][name])


def _of_domain(domain: str) -> Value:
    return lambda run: skill(run["domains"][domain])


def _rows(study: dict, part: str, columns: dict[str, Value]) -> list[Row]:
    return [
        Row(name, {column: mean([value(run) for run in _runs(study, part, name)]) for column, value in columns.items()})
        for name in encodings(study, part)
    ]


def _runs(study: dict, part: str, encoding: str) -> Iterator[Run]:
    return (run for run in study["runs"] if run["part"] == part and run["encoding"] == encoding)


def _first(study: dict, part: str) -> Run:
    return next(run for run in study["runs"] if run["part"] == part)
