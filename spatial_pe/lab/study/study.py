# SPDX-License-Identifier: Apache-2.0
"""Studies: their runs, running them on all cores, and the one file of a study.

A study is a table of runs: (part, encoding, seed). Its file is written atomically after each run, so that a study that
was stopped resumes there: nothing is repeated or lost.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.pool
import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ..._utils import environment
from ..._utils.errors import UserError
from ..._utils.files import write_whole
from . import pretrained
from .position_encodings import ENCODINGS
from .pretrained import VARIANTS, PretrainedRecipe, RateRecipe
from .scenes import DOMAINS
from .train import Recipe

SCHEMA = 1  # format of the file; increased when a field changes its meaning
SHAPES = ("shapes",)
ALL = tuple(DOMAINS)


@dataclass(frozen=True)
class Part:
    """Runs that share a recipe. ``encodings``: which of ENCODINGS or VARIANTS."""

    recipe: Recipe | PretrainedRecipe
    encodings: tuple[str, ...] = tuple(ENCODINGS)


@dataclass(frozen=True)
class Study:
    about: str
    parts: dict[str, dict[str, Part]]  # budget -> name of the part -> part


@dataclass(frozen=True, order=True)
class Run:
    seed: int
    part: str
    encoding: str


# ------------------------------------------------------------------------------------------------------------- tables


LABELS = {name: row.label for name, row in (ENCODINGS | VARIANTS).items()}  # in the order of tables


def _probe(family: str, steps: int, scenes: int = 16000, domains: tuple[str, ...] = SHAPES, **how: object) -> Recipe:
    return Recipe("probe", family, steps, scenes, 600, domains, **how)  # type: ignore[arg-type]


FEW = ("none", "learned-1d", "learned-large", "sincos-2d", "axial", "mixed", "mismatched")
LATE = FEW[1:]
SMOKE = Recipe("probe", "objects", 6, 64, 100, SHAPES, batch=8)

STUDIES = {
    "encodings": Study(
        "every encoding on every task, with the same number of steps",
        {
            "smoke": {"objects": Part(SMOKE)},
            "standard": {
                "objects": Part(_probe("objects", 350)),
                "photographs": Part(_probe("objects", 500, 16000, ("photographs",)), FEW),
                "odd": Part(_probe("odd", 200, 8000), FEW),
                "map": Part(_probe("map", 300, 8000), FEW),
            },
            "full": {
                "objects": Part(_probe("objects", 1500, 48000, ALL)),
                "odd": Part(_probe("odd", 1500, 24000, ALL)),
                "map": Part(_probe("map", 1000, 32000)),
            },
        },
    ),
    "convergence": Study(
        "do the slow ones catch up: four times the steps",
        {
            "smoke": {"steps6": Part(SMOKE), "steps12": Part(replace(SMOKE, steps=12))},
            "standard": {"objects": Part(_probe("objects", 1400, 32000), LATE)},
            "full": {"objects": Part(_probe("objects", 6000, 96000, ALL))},
        },
    ),
    "data": Study(
        "how many pictures it takes: training sets of several sizes, the same number of steps",
        {
            "smoke": {"scenes32": Part(replace(SMOKE, scenes=32)), "scenes64": Part(SMOKE)},
            "standard": {f"scenes{n}": Part(_probe("objects", 350, n), LATE) for n in (1000, 4000, 16000)},
            "full": {f"scenes{n}": Part(_probe("objects", 1500, n, ALL)) for n in (1000, 3000, 10000, 30000)},
        },
    ),
    "llava": Study(
        "a projector and a small language model on top, asked in words",
        {
            "smoke": {"objects": Part(replace(SMOKE, model="llava"))},
            "standard": {
                "objects": Part(Recipe("llava", "objects", 400, 16000, 600, SHAPES, asked=2), LATE),
            },
            "full": {
                "objects": Part(Recipe("llava", "objects", 2000, 48000, 1000, ALL, asked=2)),
                "map": Part(Recipe("llava", "map", 1000, 32000, 1000, SHAPES)),
            },
        },
    ),
    "pretrained": Study(
        "a pretrained tower before and after 2D RoPE is added, frozen and fine-tuned, on real pixels",
        {
            "smoke": {"fine-tuned": Part(PretrainedRecipe("attentive", 3, 40, 100, 2), tuple(VARIANTS))},
            "standard": {
                "frozen, linear": Part(PretrainedRecipe("linear", 600, 2400, 300), tuple(VARIANTS)),
                "frozen, attentive": Part(PretrainedRecipe("attentive", 600, 2400, 300), tuple(VARIANTS)),
                "fine-tuned": Part(PretrainedRecipe("attentive", 600, 2400, 300, 150), tuple(VARIANTS)),
            },
            "full": {
                "frozen, linear": Part(PretrainedRecipe("linear", 4000, 16000, 1000), tuple(VARIANTS)),
                "frozen, attentive": Part(PretrainedRecipe("attentive", 4000, 16000, 1000), tuple(VARIANTS)),
                "fine-tuned": Part(PretrainedRecipe("attentive", 4000, 16000, 1000, 3000), tuple(VARIANTS)),
            },
        },
    ),
    "rates": Study(
        "the learning rate of an added encoding that starts as the identity, in fine-tuning",
        {
            "smoke": {"rate 1e-2": Part(RateRecipe("attentive", 3, 40, 100, 2, rope_rate=1e-2), ("identity",))},
            "standard": {
                f"rate {rate}": Part(
                    RateRecipe("attentive", 300, 1200, 300, 150, rope_rate=float(rate)), ("identity",)
                )
                for rate in ("5e-5", "1e-3", "1e-2", "3e-2", "1e-1")
            },
            "full": {
                f"rate {rate}": Part(
                    RateRecipe("attentive", 4000, 16000, 1000, 3000, rope_rate=float(rate)), ("identity",)
                )
                for rate in ("5e-5", "3e-4", "1e-3", "3e-3", "1e-2", "3e-2")
            },
        },
    ),
}  # fmt: skip
BUDGETS = ("smoke", "standard", "full")


def encodings_of(study: str, budget: str) -> list[str]:
    found = {name for part in STUDIES[study].parts[budget].values() for name in part.encodings}
    return [name for name in LABELS if name in found]


def _parts(study: str, budget: str, model: str | None) -> dict[str, Part]:
    parts = STUDIES[study].parts[budget]
    if model is None:
        return parts
    named = {}
    for name, part in parts.items():
        if not isinstance(part.recipe, PretrainedRecipe):
            raise UserError(f'--model: the study "{study}" trains its own models; --study pretrained takes one')
        named[name] = replace(part, recipe=replace(part.recipe, checkpoint=model))
    return named


def runs_of(study: str, budget: str, encodings: Sequence[str] | None, seeds: int) -> list[Run]:
    """Return all runs of a study, ordered by seed and part, so that the runs of a worker share their data."""
    return sorted(
        Run(seed, name, encoding)
        for name, part in STUDIES[study].parts[budget].items()
        for encoding in part.encodings
        if encodings is None or encoding in encodings
        for seed in range(seeds)
    )


# ------------------------------------------------------------------------------------------------------------ running


def run(
    study: str,
    budget: str,
    path: Path,
    *,
    encodings: Sequence[str] | None = None,
    seeds: int = 5,
    model: str | None = None,
    jobs: int | None = None,
    device: str = "cpu",
    command: str = "",
    progress: Callable[[int, int, str], None] = lambda done, total, label: None,
) -> dict:
    """Run the runs of the study that the file lacks, and return the file's content.

    Args:
        study, budget: a row of STUDIES and a budget of it.
        path: the JSON file; a new one, or that of the same study and budget.
        encodings, seeds: which (default: all of the study), and how many from 0 on. A file may be extended.
        model: a folder or hub id for the study "pretrained" (default: DINOv2-small).
        jobs: processes of one thread each (default: one per usable core on the CPU, else one).
        device: where the models are.
        progress: called with the runs done, all of them, and the last one's name.

    Raises:
        UserError: the file is not one of this study and budget, or was made by another version of it.
    """
    parts = _parts(study, budget, model)
    recipes = {name: json.loads(json.dumps(asdict(part.recipe))) for name, part in parts.items()}
    result = load(path) if path.exists() else None
    if result is None:
        result = {"schema": SCHEMA, "kind": "spatial-study", "study": study, "about": STUDIES[study].about}
        result |= {"budget": budget, "recipes": recipes, "commands": [], "environments": [], "runs": []}
    if (result["study"], result["budget"]) != (study, budget):
        raise UserError(
            f'{str(path)!r} holds the study "{result["study"]}" with the budget "{result["budget"]}": name another file'
        )
    if result["recipes"] != recipes:
        raise UserError(
            f"{str(path)!r} was made with other settings ({_changed(result['recipes'], recipes)}): name another file"
        )
    _note(result["commands"], command)
    _note(result["environments"], environment.describe())
    done = {Run(r["seed"], r["part"], r["encoding"]) for r in result["runs"]}
    wanted = runs_of(study, budget, encodings, seeds)
    todo = [it for it in wanted if it not in done]
    if todo and any(isinstance(part.recipe, PretrainedRecipe) for part in parts.values()):
        try:
            pretrained.check(model)
        except (ValueError, RuntimeError) as error:
            raise UserError(str(error)) from error
    count = len(wanted) - len(todo)
    progress(count, len(wanted), "")
    for it, outcome in _work([(it, parts[it.part].recipe, device) for it in todo], jobs or default_jobs(device)):
        result["runs"].append({"part": it.part, "encoding": it.encoding, "seed": it.seed, **outcome})
        result["runs"].sort(key=lambda r: (r["part"], list(LABELS).index(r["encoding"]), r["seed"]))
        save(path, result)
        count += 1
        progress(count, len(wanted), f"{it.part}, {it.encoding}, seed {it.seed}: {outcome['seconds']:.0f} s")
    return result


Task = tuple[Run, Recipe | PretrainedRecipe, str]


def default_jobs(device: str) -> int:
    return environment.usable_cores() if device == "cpu" else 1


def _work(todo: Sequence[Task], jobs: int) -> Iterator[tuple[Run, dict]]:
    groups: dict[object, list[Task]] = defaultdict(list)  # tasks of a group share expensive data: one worker has them
    for task in todo:
        it, recipe, _ = task
        groups[(it.seed, it.encoding) if isinstance(recipe, PretrainedRecipe) else it].append(task)
    if jobs == 1:
        yield from (_one(task) for group in groups.values() for task in group)
        return
    # processes, not threads: a step is a hundred small operations, too small for a second thread
    with pool_of(min(jobs, max(1, len(groups)))) as pool:
        for outcomes in pool.imap_unordered(_group, groups.values()):
            yield from outcomes


def pool_of(workers: int) -> multiprocessing.pool.Pool:
    """Return a pool of processes that end with this one, even if it is killed, and say nothing then."""
    before = os.environ.get("PYTHONWARNINGS")
    # what the process that cleans up behind the pool would print
    os.environ["PYTHONWARNINGS"] = ",".join([*([before] if before else []), "ignore:resource_tracker"])
    try:
        return multiprocessing.get_context("spawn").Pool(workers, _worker, (os.getpid(),))
    finally:
        if before is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = before


def _worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted, and ends its workers
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process, without a word, soon after its parent was killed: it would train on for hours."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _group(tasks: Sequence[Task]) -> list[tuple[Run, dict]]:
    return [_one(task) for task in tasks]


def _one(task: Task) -> tuple[Run, dict]:
    it, recipe, device = task
    torch.set_num_threads(1)
    return it, recipe.run(it.encoding, it.seed, device)


# ------------------------------------------------------------------------------------------------------------ the file


def load(path: Path) -> dict:
    """Read a study's file.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{str(path)!r} cannot be read as a study: {error}") from error
    if not isinstance(result, dict) or result.get("kind") != "spatial-study":
        raise UserError(f"{str(path)!r} is not the file of a study: `spatial-pe spatial run` writes one")
    if result["schema"] != SCHEMA:
        raise UserError(
            f"{str(path)!r} has schema {result['schema']}, this version reads {SCHEMA}: run the study again"
        )
    return result


def save(path: Path, result: dict) -> None:
    write_whole(path, json.dumps(result, separators=(",", ":")) + "\n")


def _note(entries: list, entry: object) -> None:
    if entry and entry not in entries:
        entries.append(entry)


def _changed(old: dict, new: dict) -> str:
    for name in sorted({*old, *new}):
        mine, its = old.get(name), new.get(name)
        if mine is None or its is None:
            return f'part "{name}" is {"new" if mine is None else "gone"}'
        for key in its:
            if mine.get(key) != its[key]:
                return f"{name}.{key} was {mine.get(key)}, is {its[key]}"
    return "?"
