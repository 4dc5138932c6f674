# SPDX-License-Identifier: Apache-2.0
"""Zero-shot caption choice by two-tower models (CLIP, SigLIP, AltCLIP, ...) on What'sUp, COCO-, VG-spatial and VSR.

Each benchmark is scored by its authors' rule, on cosines of image and caption:

- What'sUp's six: the caption with the highest score is the answer. Controlled_Images also has pairs (both images of an
  opposite pair, e.g. left/right, answered rightly) and sets (all four images of two objects). One difference: the
  authors' argmax gives a tie to the first caption, which is the right one; here a tie is wrong, and ties are counted.
- VSR asks whether one caption is true. Its paper's rule for CLIP ("w/ prompting"): true if the caption scores higher
  than the same caption with the relation negated or replaced by its opposite. That is ``accuracy``. The paper shows two
  examples of its negations and the release has none, so they are ours (``loading.py``): compare with the paper's 56.0
  (random split) and 54.5 (zero-shot) with care. ``threshold`` is a second rule without such choices: true if the score
  of the caption alone is above a threshold, the one with the highest accuracy on the release's dev split.

spatial-pe spatial eval openai/clip-vit-base-patch32 --benchmark whatsup_a --data DIR --rope axial --start full
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..._utils import environment
from ..._utils.console import first_line, progress
from ..._utils.files import check_writable, write_whole
from ...towers import from_pretrained, patch, unpatch
from ...towers.config_entry import noted
from ...towers.fused_attention import FusedAttention
from ...towers.legacy import LEGACY
from .benchmarks import BENCHMARKS
from .loading import Item, Task, load
from .proportions import interval, paired_difference
from .two_tower import ModelError, Scorer

Progress = Callable[[int, int], None]  # images done, images in all


def evaluate(
    model: nn.Module,
    processor: Callable[..., Any],
    benchmark: str,
    data: str | Path,
    *,
    batch_size: int = 64,
    limit: int | None = None,
    progress: Progress | None = None,
) -> dict:
    """Measure a model's accuracy on a benchmark, as it is (patched or not).

    Args:
        model: with ``get_image_features`` and ``get_text_features``, or one that takes pixel_values and input_ids and
            returns logits_per_image. It runs where it is, in its dtype, in eval mode.
        processor: transformers' processor of the model, or any callable that takes ``images=`` or ``text=`` the same.
        benchmark: a key of ``captions.BENCHMARKS``.
        data, limit: see ``captions.load``.
        batch_size: images, and captions, a forward. Each distinct image and caption is computed once.
        progress: called with the number of images done and of all.

    Returns:
        JSON-able: benchmark, about, n, accuracy, interval (95 %, see ``proportions.py``), chance (of a guess), ties,
        relations {name: n, accuracy, interval}; for Controlled_Images pairs and sets, each {n, accuracy, interval,
        chance}; for VSR threshold {n, accuracy, interval, chance, value, dev_n, dev_accuracy} and majority, the
        accuracy of always giving the more frequent label.

    Raises:
        ValueError: a wrong argument. ModelError: not a two-tower model, or its scores are not finite.
        UserError: missing or unreadable data.
    """
    return _evaluate(Scorer(model, processor, batch_size), load(benchmark, data, limit=limit), progress)


def compare(
    model: nn.Module,
    processor: Callable[..., Any],
    benchmark: str,
    data: str | Path,
    *,
    rope: str | nn.Module | None = "axial",
    start: str = "identity",
    legacy: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    limit: int | None = None,
    progress: Progress | None = None,
) -> dict:
    """Measure the same model on the same items before and after ``spatial_pe.patch(model, rope=..., start=...)``.

    The model is as it was afterwards. Captions are computed once: patching does not touch text towers.

    Args:
        rope, start, legacy: see ``patch``; with legacy, rope is left out. seed: of an encoding with a random start.
        The others as in ``evaluate``.

    Returns:
        JSON-able: patch {rope, start, legacy, seed, modules: how many were patched}, before and after (as ``evaluate``
        returns them), and difference {accuracy, pairs, sets or threshold: {difference, interval, p, gained, lost}},
        after minus before, paired.

    Raises:
        ValueError: as ``evaluate`` and ``patch``; also if the model is patched already.
    """
    if any(isinstance(module, FusedAttention) for module in model.modules()):
        raise ValueError("model is patched already: unpatch(model) first, or evaluate() it as it is")
    scorer = Scorer(model, processor, batch_size)
    return _compare(scorer, load(benchmark, data, limit=limit), None if legacy else rope, start, legacy, seed, progress)


# ------------------------------------------------------------------------------------------------------------- scoring


def _evaluate(scorer: Scorer, task: Task, progress: Progress | None) -> dict:
    return _summary(task, _measure(scorer, task, progress))


def _compare(
    scorer: Scorer,
    task: Task,
    rope: str | nn.Module | None,
    start: str,
    legacy: str | None,
    seed: int,
    progress: Progress | None,
) -> dict:
    try:  # patch first: it raises before anything is computed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            report = patch(scorer.model, rope=rope, start=start, legacy=legacy)
        after = _measure(scorer, task, progress)
    finally:
        unpatch(scorer.model)
    scorer.forget_images()
    before = _measure(scorer, task, progress)
    name = type(rope).__name__ if isinstance(rope, nn.Module) else rope
    return {
        "benchmark": task.name,
        "patch": {"rope": name, "start": start, "legacy": legacy, "seed": seed, "modules": len(report.patched)},
        "before": _summary(task, before),
        "after": _summary(task, after),
        "difference": {
            key: paired_difference(before[key].correct, after[key].correct, before[key].groups) for key in before
        },
    }


@dataclass
class _Answers:
    """Result of one rule for its units (items, pairs or sets): right or wrong, and their groups."""

    correct: list[bool]
    groups: list[str]
    chance: float
    more: dict = field(default_factory=dict)

    def summary(self) -> dict:
        accuracy = sum(self.correct) / len(self.correct)
        ends = interval(self.correct, self.groups)
        return {"n": len(self.correct), "accuracy": accuracy, "interval": ends, "chance": self.chance, **self.more}


def _measure(scorer: Scorer, task: Task, progress: Progress | None) -> dict[str, _Answers]:
    """Apply the rules of a benchmark: "accuracy", and where it has them "pairs", "sets", "threshold"."""
    scores = scorer.scores(task.items + task.dev, progress)
    scores, dev = scores[: len(task.items)], scores[len(task.items) :]
    if task.dev:
        return _true_or_false(task, scores, dev)
    groups = [item.group for item in task.items]
    correct = [s[0] > max(s[1:]) for s in scores]
    ties = sum(s[0] == max(s[1:]) for s in scores)
    found = {"accuracy": _Answers(correct, groups, task.benchmark.chance, {"ties": ties})}
    if task.benchmark.opposites:
        found |= _pairs_and_sets(task, correct)
    return found


def _pairs_and_sets(task: Task, correct: list[bool]) -> dict[str, _Answers]:
    sets: dict[str, dict[str, bool]] = defaultdict(dict)
    for item, right in zip(task.items, correct, strict=True):
        sets[item.group][item.relation] = right
    pairs = [(group, all(s[r] for r in pair)) for group, s in sets.items() for pair in task.benchmark.opposites]
    chance = task.benchmark.chance
    return {
        "pairs": _Answers([right for _, right in pairs], [group for group, _ in pairs], chance**2),
        "sets": _Answers([all(s.values()) for s in sets.values()], list(sets), chance**4),
    }


def _true_or_false(task: Task, scores: list[list[float]], dev: list[list[float]]) -> dict[str, _Answers]:
    labels, groups = [item.label for item in task.items], [item.group for item in task.items]
    majority = max(sum(labels), len(labels) - sum(labels)) / len(labels)
    more = {"ties": sum(a == b for a, b in scores), "majority": majority}
    value, dev_accuracy = best_threshold([s[0] for s in dev], [item.label for item in task.dev])
    above = {"value": value, "dev_n": len(dev), "dev_accuracy": dev_accuracy}
    return {
        "accuracy": _Answers(
            [(a > b) == label for (a, b), label in zip(scores, labels, strict=True)], groups, 0.5, more
        ),
        "threshold": _Answers([(s[0] > value) == t for s, t in zip(scores, labels, strict=True)], groups, 0.5, above),
    }


def best_threshold(scores: Sequence[float], labels: Sequence[bool]) -> tuple[float, float]:
    """Return the t for which "score > t" agrees best with the labels, and how often it does; of equals, the middle one.

    Candidates lie half way between neighbouring scores, and beyond both ends (always true, always false).
    """
    order = sorted(set(scores))
    candidates = [order[0] - 1, *((a + b) / 2 for a, b in itertools.pairwise(order)), order[-1] + 1]
    # right answers at each candidate: all true at first; each score below it makes its items false
    gain: dict[float, int] = defaultdict(int)
    for score, label in zip(scores, labels, strict=True):
        gain[score] += -1 if label else 1
    right = [sum(labels)]
    for score in order:
        right.append(right[-1] + gain[score])
    best = [t for t, r in zip(candidates, right, strict=True) if r == max(right)]
    return best[len(best) // 2], max(right) / len(scores)


def _summary(task: Task, found: dict[str, _Answers]) -> dict:
    rest = {key: answers.summary() for key, answers in found.items()}
    return {
        "benchmark": task.name,
        "about": task.benchmark.about,
        **rest.pop("accuracy"),
        **rest,
        "relations": _relations(task.items, found["accuracy"].correct),
    }


def _relations(items: list[Item], correct: list[bool]) -> dict[str, dict]:
    """Return the relations, the most frequent first."""
    parts: dict[str, tuple[list[bool], list[str]]] = defaultdict(lambda: ([], []))
    for item, right in zip(items, correct, strict=True):
        parts[item.relation][0].append(right)
        parts[item.relation][1].append(item.group)
    ordered = sorted(parts.items(), key=lambda part: (-len(part[1][0]), part[0]))
    return {
        relation: {"n": len(right), "accuracy": sum(right) / len(right), "interval": interval(right, groups)}
        for relation, (right, groups) in ordered
    }


# -------------------------------------------------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``spatial-pe spatial eval``."""
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder or a hub id of a two-tower model")
    parser.add_argument("--benchmark", required=True, choices=BENCHMARKS, help="which: " + ", ".join(BENCHMARKS))
    parser.add_argument("--data", required=True, metavar="DIR", help="its files, or ServiceNow/whatsup_all")
    parser.add_argument("--rope", choices=("axial", "mixed"), help="also measure with this 2D RoPE added, and compare")
    parser.add_argument("--start", choices=("identity", "full"), default="identity", help="how the added RoPE starts")
    parser.add_argument("--legacy", action="store_true", help=f"instead of --rope: what the code of {LEGACY[0]} adds")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of a RoPE that starts at random (default: 0)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N items")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="images a forward (default: 64)")
    parser.add_argument("--device", metavar="DEVICE", help="default: the GPU where there is one")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers here as JSON")


def run_eval(options: argparse.Namespace) -> int:
    """Print the results. Return 0, 1 if the model cannot be scored, 2 for errors that the user can fix."""
    try:
        result = _result(options)
    except ModelError as error:
        print(f"spatial-pe spatial eval: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"spatial-pe spatial eval: {error}", file=sys.stderr)
        return 2
    print("\n".join(_lines(result)))
    if options.out:
        command = getattr(options, "command", None)
        result = {"model": options.model, "command": command, **result, "environment": environment.describe()}
        write_whole(options.out, json.dumps(result, indent=1) + "\n")
        print(f"written to {options.out}")
    return 0


def _result(options: argparse.Namespace) -> dict:
    if options.legacy and options.rope:
        raise ValueError("--legacy is an encoding itself: leave --rope out")
    if options.start == "full" and not options.rope:
        raise ValueError("--start full is for an added RoPE: pass --rope axial or --rope mixed")
    if options.out:
        check_writable("--out", options.out)
    task = load(options.benchmark, options.data, limit=options.limit)  # first: says what is missing
    model, processor = _load_model(options.model, options.device)
    scorer, bar = Scorer(model, processor, options.batch), progress(f"{options.benchmark}, images")
    if not (options.rope or options.legacy):
        return _evaluate(scorer, task, bar)
    if noted(model):
        raise ValueError(f"{options.model} is a patched model: measure it as it is, without --rope and --legacy")
    return _compare(scorer, task, options.rope, options.start, LEGACY[0] if options.legacy else None, options.seed, bar)


def _load_model(name: str, device: str | None) -> tuple[nn.Module, Callable[..., Any]]:
    """Load the model, with the RoPE that it was saved with, if any."""
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        model = transformers.AutoModel.from_pretrained(name)
        if noted(model):
            model = from_pretrained(transformers.AutoModel, name)
        processor = transformers.AutoProcessor.from_pretrained(name)
        return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), processor
    except Exception as error:  # transformers and torch raise OSError, ValueError, KeyError, RuntimeError, ...
        raise ValueError(f"no model and processor could be loaded from {name!r}: {first_line(error)}") from error


def _lines(result: dict) -> list[str]:
    """Return the result as a table: one column per model."""
    columns = [result[key] for key in ("before", "after") if key in result] or [result]
    first, differences = columns[0], result.get("difference", {})
    lines = [f"{first['benchmark']}: {first['about']}"]
    if "patch" in result:
        how = result["patch"]
        what = f"legacy {how['legacy']}" if how["legacy"] else f"rope={how['rope']}, start={how['start']}"
        lines.append(f"before and after patch({what}), {how['modules']} attention modules")
    for key in ("accuracy", "pairs", "sets", "threshold"):
        if key != "accuracy" and key not in first:
            continue
        cells = [column if key == "accuracy" else column[key] for column in columns]
        line = f"  {key:<22} n {cells[0]['n']:<5} " + "  ".join(_cell(cell) for cell in cells)
        if key in differences:
            d = differences[key]
            low, high = (f"{100 * end:+.1f}" for end in d["interval"])
            line += f"  difference {100 * d['difference']:+.1f} [{low}, {high}], p = {d['p']:.2g}"
        lines.append(f"{line}  chance {100 * cells[0]['chance']:.1f}")
    for relation, part in first["relations"].items():
        cells = [column["relations"][relation] for column in columns]
        lines.append(f"    {relation:<20} n {part['n']:<5} " + "  ".join(_cell(cell) for cell in cells))
    if "majority" in first:
        lines.append(f"  always the more frequent label: {100 * first['majority']:.1f} %")
    return lines


def _cell(cell: dict) -> str:
    low, high = (100 * end for end in cell["interval"])
    return f"{100 * cell['accuracy']:5.1f} % [{low:.1f}, {high:.1f}]"
