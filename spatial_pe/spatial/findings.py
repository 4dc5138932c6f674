# SPDX-License-Identifier: Apache-2.0
"""What a study found: means with intervals, paired comparisons, in tables of plain values.

Every number here is over runs (seeds). Accuracies of tasks with different numbers of answers are averaged after chance
is taken out, (accuracy - chance) / (1 - chance): 0 is guessing, 1 is perfect; this is called skill.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .encodings import ENCODINGS
from .statistics import Comparison, Mean, compare, mean
from .tasks import TASKS

Run = dict
Value = Callable[[Run], float]
# (encoding, reference): what each comparison of a study is about
USUAL = "learned-1d"  # what CLIP, SigLIP, DINOv2 and ViT have
PAIRS = [(name, USUAL) for name in ENCODINGS if name != USUAL] + [("mismatched", "axial-10000")]


def skill(accuracies: dict[str, float]) -> float:
    """Mean over tasks of accuracy without chance."""
    parts = [(value - TASKS[task].chance) / (1 - TASKS[task].chance) for task, value in accuracies.items()]
    return sum(parts) / len(parts)


@dataclass(frozen=True)
class Row:
    """One encoding: ``cells`` by column."""

    encoding: str
    cells: dict[str, Mean]


def parts(study: dict) -> list[str]:
    return list(dict.fromkeys(run["part"] for run in study["runs"]))


def encodings(study: dict, part: str) -> list[str]:
    found = {run["encoding"] for run in study["runs"] if run["part"] == part}
    return [name for name in ENCODINGS if name in found]


def by_task(study: dict, part: str) -> list[Row]:
    """Accuracy at the training size, a column a task, then "twins" where there are any, then "skill"."""
    return _rows(study, part, dict(_columns(study, part)))


def by_scale(study: dict, part: str) -> list[Row]:
    """Skill at each size; columns "0.75 index", "0.75 stretched", "1.0 index", ..."""
    keys = [
        (s, m)
        for s in _first(study, part)["accuracy"]
        for m in ("index", "stretched")
        if (s, m) != ("1.0", "stretched")
    ]
    rows = []
    for name in encodings(study, part):
        runs = list(_runs(study, part, name))
        cells = {
            f"{s} {m}": mean([skill(r["accuracy"][s][m]) for r in runs]) for s, m in keys if m in runs[0]["accuracy"][s]
        }
        rows.append(Row(name, cells))
    return rows


def by_domain(study: dict, part: str) -> list[Row]:
    """Skill at the training size for each of the domains."""
    domains = list(_first(study, part)["domains"])
    return _rows(study, part, {domain: _of_domain(domain) for domain in domains})


def curves(study: dict, part: str) -> dict[str, list[tuple[int, Mean]]]:
    """Skill on a part of the test set while training: {encoding: [(step, mean)]}."""
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
    """Each of PAIRS, on each task and on skill at every size: all corrected together, as one family."""
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
    """(encoding, column, {seed: value}); at other sizes the better of both kinds of coordinates."""
    for name in encodings(study, part):
        runs = list(_runs(study, part, name))
        for column, value in _columns(study, part):
            yield name, column, {run["seed"]: value(run) for run in runs}
        for scale in runs[0]["accuracy"]:
            if scale != "1.0":
                modes = list(runs[0]["accuracy"][scale])
                best = max(modes, key=lambda m: sum(skill(run["accuracy"][scale][m]) for run in runs))
                yield name, f"skill at {scale}x", {run["seed"]: skill(run["accuracy"][scale][best]) for run in runs}


def _columns(study: dict, part: str) -> Iterator[tuple[str, Value]]:
    first = _first(study, part)
    for task in first["accuracy"]["1.0"]["index"]:
        yield task, _of_task(task)
    if first["twins"] is not None:
        yield "twins", lambda run: run["twins"]
    yield "skill", lambda run: skill(run["accuracy"]["1.0"]["index"])


def _of_task(task: str) -> Value:
    return lambda run: run["accuracy"]["1.0"]["index"][task]


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
