# SPDX-License-Identifier: Apache-2.0
"""One run of the study: train one model with one encoding and one seed, and evaluate it at every size.

All encodings of a seed share initial weights (except the encoding's), data and order. Besides the answers, the content
of each patch is predicted (``roles``): without that loss a model of this size spends most of its steps on finding the
things, before it can learn their positions.
"""

from __future__ import annotations

import functools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import attention_maps
from .models import Asked, Batch, Size, TinyLlava, Tower, probe
from .position_encodings import ENCODINGS
from .scenes import DOMAINS, KINDS, NAMES, ROLES, TRANSFORMS, Album
from .tasks import TASKS, Dataset, Question, make_dataset

SCALES = (0.75, 1.0, 1.5, 2.0)  # of the evaluated pictures, relative to training
MODELS: dict[str, Callable[[Tower], Asked]] = {"probe": probe, "llava": TinyLlava}


class Schedule(Protocol):
    @property
    def steps(self) -> int: ...
    @property
    def warmup(self) -> int: ...
    @property
    def cooldown(self) -> float: ...


@dataclass(frozen=True)
class Recipe:
    """All settings of a run besides its encoding and seed. ``scenes``: in the training set; ``batch``: scenes in a
    step; ``asked``: questions per scene in a step, at most; ``domains``: see ``scenes.DOMAINS``."""

    model: str
    family: str
    steps: int
    scenes: int
    test_scenes: int
    domains: tuple[str, ...]
    batch: int = 32
    asked: int = 5
    rate: float = 2e-3
    decay: float = 0.05
    warmup: int = 50
    cooldown: float = 0.3
    size: Size = field(default_factory=Size)

    def run(self, encoding: str, seed: int, device: str = "cpu") -> dict:
        return train_and_ask(self, encoding, seed, torch.device(device))


def train_and_ask(recipe: Recipe, encoding: str, seed: int, device: torch.device) -> dict:
    """Return accuracies by scale, coordinates and task; by domain; of mirrored twins; during training; and attention
    maps.

    Returns:
        A dict for JSON:
        "accuracy": {scale: {"index" | "stretched": {task: accuracy}}}, at scale 1 only "index", which is the same;
        "domains": {domain: {task: accuracy}} at scale 1; "twins": of scenes with a left/right question, both the
        picture and its mirror image answered right; "curve": [[step, {task: accuracy}]] on a part of the test set;
        "loss": of every 20th step; "seconds"; "attention": see ``attention_maps.attention``.
    """
    began = time.perf_counter()
    train, test = _datasets(recipe.family, recipe.scenes, recipe.test_scenes, seed, recipe.domains)
    torch.manual_seed(seed)
    tower = Tower(encoding, recipe.size)
    model = MODELS[recipe.model](tower).to(device)
    losses, curve = _train(model, train, test, recipe, seed)
    model.eval()
    accuracy: dict[str, dict[str, dict]] = {}
    for scale in SCALES:
        modes = _modes(encoding, scale)
        some = None if scale <= 1 else recipe.test_scenes // 2  # 4 to 16 times the cost
        asked = {mode: test.ask(model, scale, mode == "stretched", some) for mode in modes}
        accuracy[str(scale)] = {mode: by_task(hits) for mode, hits in asked.items()}
        if scale == 1.0:
            exact = asked["index"]
    return {
        "accuracy": accuracy,
        "domains": by_domain(exact, test),
        "twins": twins(model, test, exact),
        "curve": curve,
        "loss": losses,
        "attention": attention_maps.attention(tower, test.pictures(range(min(64, recipe.test_scenes)), 1.0).to(device)),
        "seconds": round(time.perf_counter() - began, 1),
    }


def _modes(encoding: str, scale: float) -> tuple[str, ...]:
    if scale == 1.0:
        return ("index",)
    if ENCODINGS[encoding].stretches:
        return ("index", "stretched")
    return ("index",) if encoding == "none" else ("stretched",)


# ------------------------------------------------------------------------------------------------------------ data


class Exam:
    """A dataset with its pictures, drawn on access, and its questions by scene."""

    def __init__(self, dataset: Dataset, image: int = Size().image) -> None:
        self.dataset, self.image, self.album = dataset, image, Album(dataset.scenes)
        self.by_scene: dict[int, list[Question]] = defaultdict(list)
        for question in dataset.questions:
            self.by_scene[question.scene].append(question)
        self.asked = np.array(sorted(self.by_scene))

    def pictures(self, which: Sequence[int] | np.ndarray, scale: float) -> Tensor:
        """Return (n, 3, S, S) float32, normalised."""
        pixels = torch.from_numpy(self.album.draw(which, round(self.image * scale)))
        return (pixels.float() - 80.0) / 60.0

    @staticmethod
    def undo(pictures: Tensor) -> Tensor:
        """Invert the normalisation of ``pictures``, to 0 .. 1."""
        return (pictures * 60.0 + 80.0) / 255.0

    def batch(self, which: Sequence[int] | np.ndarray, most: int = 99, rng: np.random.Generator | None = None) -> Batch:
        """Return the questions about these scenes, at most so many of each, chosen at random."""
        questions: list[Question] = []
        for scene in which:
            some = self.by_scene[int(scene)]
            questions += (
                some
                if len(some) <= most or rng is None
                else [some[i] for i in rng.choice(len(some), most, replace=False)]
            )
        return Batch.of(questions, {int(scene): index for index, scene in enumerate(which)})

    @torch.no_grad()
    def ask(
        self, model: nn.Module, scale: float, stretch: bool, scenes: int | None = None
    ) -> list[tuple[Question, bool]]:
        """Return every question, and whether the model answers it right."""
        hits = []
        device = next(model.parameters()).device
        chosen = self.asked[:scenes]
        for start in range(0, len(chosen), 64):
            which = chosen[start : start + 64]
            batch = self.batch(which).to(device)
            right = model(self.pictures(which, scale).to(device), batch, stretch=stretch).argmax(-1) == batch.answer
            questions = [question for scene in which for question in self.by_scene[int(scene)]]
            hits += list(zip(questions, right.tolist(), strict=True))
        return hits


@functools.lru_cache(maxsize=4)
def _datasets(family: str, scenes: int, test_scenes: int, seed: int, domains: tuple[str, ...]) -> tuple[Exam, Exam]:
    """Return the cached datasets: the runs of a worker are ordered by seed; a study has at most four datasets."""
    return (
        Exam(make_dataset(scenes, family, "train", seed, domains)),
        Exam(make_dataset(test_scenes, family, "test", seed, domains)),
    )


# -------------------------------------------------------------------------------------------------------- training


def _train(model: Asked, train: Exam, test: Exam, recipe: Recipe, seed: int) -> tuple[list, list]:
    device = next(model.parameters()).device
    roles = torch.from_numpy(train.album.roles(recipe.size.grid)).to(device)
    namer = nn.Linear(recipe.size.width, 1 + ROLES + len(KINDS) - len(NAMES)).to(device)
    parameters = [*model.parameters(), *namer.parameters()]
    optimizer = torch.optim.AdamW(parameters, recipe.rate, (0.9, 0.98), weight_decay=recipe.decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, recipe))
    rng = np.random.default_rng([seed, 1])
    sequence = order(rng, train.asked, recipe.steps * recipe.batch)
    losses, curve = [], []
    for step in range(recipe.steps):
        which = sequence[step * recipe.batch : (step + 1) * recipe.batch]
        batch = train.batch(which, recipe.asked, rng).to(device)
        features = model.tower(train.pictures(which, 1.0).to(device))
        loss = task_loss(model.answer(features, batch), batch)
        named = F.cross_entropy(namer(features).flatten(0, 1), roles[which].flatten())
        optimizer.zero_grad()
        (loss + named).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            losses.append(round(loss.item(), 4))
        if (step + 1) % max(1, recipe.steps // 5) == 0:
            model.eval()
            curve.append([step + 1, by_task(test.ask(model, 1.0, False, scenes=200))])
            model.train()
    return losses, curve


def rate(step: int, recipe: Schedule) -> float:
    """Return the learning rate factor: warm-up, constant, down to 0 in the last part."""
    left = (recipe.steps - step) / (recipe.cooldown * recipe.steps)
    return min(1.0, (step + 1) / recipe.warmup, left)


def order(rng: np.random.Generator, scenes: np.ndarray, count: int) -> np.ndarray:
    """Return epochs of shuffled scenes, until there are enough."""
    epochs = math.ceil(count / len(scenes))
    return np.concatenate([rng.permutation(scenes) for _ in range(epochs)])[:count]


def task_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Return the cross-entropy among the answers of each question's task, each task with the same weight."""
    each = F.cross_entropy(logits, batch.answer, reduction="none")
    return torch.stack([each[batch.task == task].mean() for task in batch.task.unique()]).mean()


# ------------------------------------------------------------------------------------------------------ accuracies


def by_task(hits: Sequence[tuple[Question, bool]]) -> dict[str, float]:
    right: dict[str, list[bool]] = defaultdict(list)
    for question, hit in hits:
        right[question.task].append(hit)
    return {task: round(float(np.mean(right[task])), 4) for task in TASKS if task in right}


def by_domain(hits: Sequence[tuple[Question, bool]], test: Exam) -> dict[str, dict[str, float]]:
    scenes = test.dataset.scenes
    parts: dict[str, list] = defaultdict(list)
    for question, hit in hits:
        name = scenes[question.scene].sprites[0].name
        parts[next((domain for domain, names in DOMAINS.items() if name in names), "any")].append((question, hit))
    return {domain: by_task(parts[domain]) for domain in (*DOMAINS, "any") if domain in parts}


def consistency(model: nn.Module, test: Exam, hits: Sequence[tuple[Question, bool]]) -> dict[str, float]:
    """Return the share of questions on the relation of two things that are answered right both on the picture and on
    its flipped or rotated version, for each of ``scenes.TRANSFORMS``."""
    first = {question.scene: hit for question, hit in hits if question.task == "relation"}
    found = {}
    for transform in TRANSFORMS:
        transformed = Exam(test.dataset.transformed(transform), test.image)
        both = [hit and first[question.scene] for question, hit in transformed.ask(model, 1.0, False)]
        found[transform] = round(float(np.mean(both)), 4)
    return found


def twins(model: nn.Module, test: Exam, hits: Sequence[tuple[Question, bool]]) -> float | None:
    """Apply MMVP's pair rule: a question counts if it is answered right about the picture and its mirror image."""
    mirrored = Exam(test.dataset.mirrored(), test.image)
    if not mirrored.dataset.questions:
        return None
    first = {question.scene: hit for question, hit in hits if question.task == "relation"}
    both = [hit and first[question.scene] for question, hit in mirrored.ask(model, 1.0, False)]
    return round(float(np.mean(both)), 4)
