# SPDX-License-Identifier: Apache-2.0
"""Pretrained towers: their spatial knowledge before and after 2D RoPE is added, frozen and fine-tuned.

The questions are those of the controlled study, about pictures of real pixels. A frozen tower is evaluated by probes on
its last features; a fine-tuned one is trained with an attentive probe. The effect of positions is also measured inside:
by layer, the similarity of neighbours, and the invariance to flips and rotations of the picture; and the share of
answers that stay right when the positions are shuffled or made constant.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...grid import PatchGrid
from ...towers import patch
from ...towers.fused_attention import FusedAttention
from ...towers.patch import ABSOLUTE
from ...towers.report import encoding_of, strength_of
from ..checkpoints import assets, checkpoint
from .models import Attentive, Batch, Linear, Probe
from .tasks import make_dataset
from .train import Exam, by_domain, by_task, consistency, order, rate, task_loss, twins

GRID = 8  # patches along a side, as in the controlled study


@dataclass(frozen=True)
class Variant:
    """``how``: the arguments of ``patch``; None leaves the tower unpatched."""

    label: str
    how: dict[str, Any] | None


VARIANTS = {
    "as-is": Variant("as it is", None),
    "identity": Variant("axial RoPE added, identity start", {"rope": "axial"}),
    "full": Variant("axial RoPE added, full start", {"rope": "axial", "start": "full"}),
    "replaced": Variant("embedding replaced by axial RoPE", {"rope": "axial", "start": "full", "keep_absolute": False}),
    "authors": Variant("2601.09954's code", {"legacy": "2601.09954"}),
}
USUAL = "as-is"


@dataclass(frozen=True)
class PretrainedRecipe:
    """``head``: "linear" or "attentive", trained for ``steps`` of ``batch`` scenes on the frozen features; then tower
    and head together for ``tuned_steps`` of ``tuned_batch``: a random head would first destroy the tower's features
    (arXiv 2202.10054). ``scenes``, ``test_scenes``: how many; ``checkpoint``: a folder or hub id, None for
    DINOv2-small."""

    head: str
    steps: int
    scenes: int
    test_scenes: int
    tuned_steps: int = 0
    checkpoint: str | None = None
    domains: tuple[str, ...] = ("digits", "photographs")
    family: str = "objects"
    batch: int = 32
    rate: float = 1e-3
    tuned_batch: int = 16
    tuned_rate: float = 1e-4
    tower_rate: float = 3e-5
    decay: float = 0.05
    warmup: int = 20
    cooldown: float = 0.3

    def run(self, variant: str, seed: int, device: str = "cpu") -> dict:
        return train_and_ask(self, variant, seed, torch.device(device))


@dataclass(frozen=True)
class RateRecipe(PretrainedRecipe):
    """``rope_rate``: the learning rate of the added encoding, which has no weight decay; else that of the tower."""

    rope_rate: float = 3e-5


def train_and_ask(recipe: PretrainedRecipe, variant: str, seed: int, device: torch.device) -> dict:
    """Train and evaluate as ``train.train_and_ask``, at scale 1, and also return:

    "consistency": {"hflip" | "vflip" | "rot90": share}, see ``train.consistency``;
    "counterfactual": {"shuffled" | "constant": {task: accuracy}}, the same answers when the positions are moved;
    "layers": {"coherence" | "hflip" | "vflip" | "rot90": [one a layer]}, of the tower after training, see ``layers``;
    "strength": [one a layer], how far an added encoding is on after training, see ``PatchReport.strength``.
    """
    began = time.perf_counter()
    train, test = _exams(recipe, seed)
    torch.manual_seed(seed)
    tower = _tower(recipe.checkpoint, variant, device)
    width = tower(test.pictures([0], 1.0).to(device)).shape[-1]
    head = Linear(width) if recipe.head == "linear" else Attentive(width, max(1, width // 64))
    model = Probe(tower, head.to(device))
    losses = _fit(model, train, recipe, variant, seed)
    if recipe.tuned_steps:
        losses += _tune(model, train, recipe, seed)
    model.eval()
    hits = test.ask(model, 1.0, False)
    counterfactual = {}
    with shuffled(tower, seed):
        counterfactual["shuffled"] = by_task(test.ask(model, 1.0, False))
    with constant(tower):
        counterfactual["constant"] = by_task(test.ask(model, 1.0, False))
    return {
        "accuracy": {"1.0": {"index": by_task(hits)}},
        "domains": by_domain(hits, test),
        "twins": twins(model, test, hits),
        "consistency": consistency(model, test, hits),
        "loss": losses,
        "counterfactual": counterfactual,
        "layers": layers(tower, test.pictures(range(min(32, recipe.test_scenes)), 1.0).to(device)),
        "strength": strengths(tower),
        "seconds": round(time.perf_counter() - began, 1),
    }


# ------------------------------------------------------------------------------------------------------------- towers


class PatchFeatures(nn.Module):
    """A pretrained tower with the interface of the study's: pictures -> features of the patches, (B, N, C)."""

    def __init__(self, tower: checkpoint.Tower) -> None:
        super().__init__()
        self.module, self._tower = tower.module, tower
        self.order: Tensor | None = None  # of the patches, if positions are shuffled

    @property
    def image(self) -> int:
        """Side of the pictures in pixels."""
        return GRID * self._tower.patch_size * self._tower.merge

    def forward(self, pixels: Tensor, stretch: bool = False) -> Tensor:
        del stretch
        if self.order is not None:
            pixels = moved(pixels, self.order)
        images = assets.normalised(Exam.undo(pixels), self._tower.mean, self._tower.std)
        return self._tower.patch_grid(self._tower.call(images), pixels.shape[-1]).flatten(1, 2)


def check(name: str | None) -> None:
    """Check the checkpoint before any work.

    Raises:
        ValueError, RuntimeError: the checkpoint is not available, or its tower does not take the study's pictures.
    """
    tower = _loaded(name)
    side = GRID * tower.patch_size * tower.merge
    refused = tower.accepts(side)
    if refused is not None:
        raise ValueError(f"{tower.name} does not take pictures of {side} px, {GRID} patches along a side: {refused}")


def _tower(name: str | None, variant: str, device: torch.device) -> PatchFeatures:
    tower = PatchFeatures(_loaded(name).copy(torch.float32))
    tower.to(device)
    how = VARIANTS[variant].how
    if how is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that legacy is no rotation, which is what is studied
            patch(tower.module, **how)
    return tower


@functools.cache
def _loaded(name: str | None) -> checkpoint.Tower:
    return checkpoint.default_tower(assets.onnx_file()) if name is None else checkpoint.load_tower(name)


def strengths(tower: nn.Module) -> list[float | None]:
    """Return how far the encoding that was added to each layer is on."""
    added = [m for m in tower.modules() if isinstance(m, FusedAttention) and m._spatial_pe.added]
    return [strength_of(encoding_of(module)) for module in added]


# ----------------------------------------------------------------------------------------------------------- training


@functools.lru_cache(maxsize=2)
def _exams_of(family: str, scenes: int, test_scenes: int, domains: tuple[str, ...], image: int, seed: int) -> tuple:
    return (
        Exam(make_dataset(scenes, family, "train", seed, domains), image),
        Exam(make_dataset(test_scenes, family, "test", seed, domains), image),
    )


def _exams(recipe: PretrainedRecipe, seed: int) -> tuple[Exam, Exam]:
    tower = _loaded(recipe.checkpoint)
    image = GRID * tower.patch_size * tower.merge
    return _exams_of(recipe.family, recipe.scenes, recipe.test_scenes, recipe.domains, image, seed)


def _fit(model: Probe, train: Exam, recipe: PretrainedRecipe, variant: str, seed: int) -> list[float]:
    """Train the head on features that are computed once."""
    device = next(model.parameters()).device
    features = _features(replace(recipe, **ANY_HEAD), variant, seed, device)
    place = {int(scene): index for index, scene in enumerate(train.asked)}
    optimizer = torch.optim.AdamW(model.head.parameters(), recipe.rate, weight_decay=recipe.decay)

    def logits(which: np.ndarray, batch: Batch) -> Tensor:
        return model.answer(features[[place[int(scene)] for scene in which]], batch)

    return _descend(optimizer, logits, train, recipe, seed)


ANY_HEAD: dict[str, Any] = {
    "head": "any",
    "steps": 0,
    "batch": 0,
    "tuned_steps": 0,
}  # so that the rest is shared


@functools.lru_cache(maxsize=1)
def _features(recipe: PretrainedRecipe, variant: str, seed: int, device: torch.device) -> Tensor:
    """Return the features of all training scenes, (n, N, C), cached; runs are ordered so that both probes of a seed
    reuse them."""
    train, _ = _exams(recipe, seed)
    tower = _tower(recipe.checkpoint, variant, device)
    with torch.no_grad():
        return torch.cat(
            [
                tower(train.pictures(part, 1.0).to(device))
                for part in np.array_split(train.asked, len(train.asked) // 32 + 1)
            ]
        )


def _tune(model: Probe, train: Exam, recipe: PretrainedRecipe, seed: int) -> list[float]:
    named = {name: p for name, p in model.tower.named_parameters() if p.requires_grad}
    groups = []
    if isinstance(recipe, RateRecipe):
        rope = [named.pop(name) for name in list(named) if ".rope." in name]
        groups = [{"params": rope, "lr": recipe.rope_rate, "weight_decay": 0.0}]
    groups += [
        {"params": list(named.values()), "lr": recipe.tower_rate},
        {"params": list(model.head.parameters()), "lr": recipe.tuned_rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.decay)
    recipe = replace(recipe, steps=recipe.tuned_steps, batch=recipe.tuned_batch)
    device = next(model.parameters()).device

    def logits(which: np.ndarray, batch: Batch) -> Tensor:
        return model(train.pictures(which, 1.0).to(device), batch)

    return _descend(optimizer, logits, train, recipe, seed)


def _descend(
    optimizer: torch.optim.Optimizer, logits: Any, train: Exam, recipe: PretrainedRecipe, seed: int
) -> list[float]:
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, recipe))
    sequence = order(np.random.default_rng([seed, 1]), train.asked, recipe.steps * recipe.batch)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    losses = []
    for step in range(recipe.steps):
        which = sequence[step * recipe.batch : (step + 1) * recipe.batch]
        batch = train.batch(which).to(parameters[0].device)
        loss = task_loss(logits(which, batch), batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            losses.append(round(loss.item(), 4))
    return losses


# --------------------------------------------------------------------------------------------------- moved positions


@contextmanager
def shuffled(tower: PatchFeatures, seed: int) -> Iterator[None]:
    """Give every patch the position of another one, by moving its pixels there, which is exact for any encoding. The
    head must not depend on the order of the features; the probes do not."""
    tower.order = torch.from_numpy(np.random.default_rng([seed, 2]).permutation(GRID * GRID))
    try:
        yield
    finally:
        tower.order = None


def moved(pixels: Tensor, order: Tensor) -> Tensor:
    """Return pictures (B, 3, S, S) whose blocks, GRID along a side, are reordered."""
    side = pixels.shape[-1] // GRID
    blocks = F.unfold(pixels, side, stride=side)[..., order.to(pixels.device)]
    return F.fold(blocks, pixels.shape[-2:], side, stride=side)


@contextmanager
def constant(tower: PatchFeatures) -> Iterator[None]:
    """Put all patches at one position: the learned embedding is its mean everywhere, nothing is rotated."""
    tables = [p for name, p in tower.module.named_parameters() if ABSOLUTE.search(name)]
    kept = [table.detach().clone() for table in tables]
    ropes = [(m, m.rope) for m in tower.module.modules() if isinstance(m, FusedAttention) and hasattr(m, "rope")]
    with torch.no_grad():
        for table in tables:  # (N, C) or (1, N, C), class token first if any
            rows = table if table.ndim == 2 else table[0]
            first = rows.shape[0] - int(rows.shape[0] ** 0.5) ** 2
            rows[first:] = rows[first:].mean(0)
        for module, rope in ropes:
            module.rope = Still(rope)
    try:
        yield
    finally:
        with torch.no_grad():
            for table, values in zip(tables, kept, strict=True):
                table.copy_(values)
        for module, rope in ropes:
            module.rope = rope


class Still(nn.Module):
    """An encoding that always uses position 0."""

    def __init__(self, rope: Any) -> None:
        super().__init__()
        self.rope = rope

    def forward(self, where: PatchGrid | Tensor) -> Any:
        at = where.coordinates() if isinstance(where, PatchGrid) else where
        return self.rope(torch.zeros_like(at, dtype=torch.float32))


# ------------------------------------------------------------------------------------------------------------- layers


@torch.no_grad()
def layers(tower: PatchFeatures, pixels: Tensor) -> dict[str, list[float]] | None:
    """Return statistics by layer, the first entry for its input; None for a tower that does not return its hidden
    states.

    "coherence": mean cosine of a patch with its 8 neighbours, minus that with patches 5 and more away; "hflip",
    "vflip", "rot90": mean cosine of a patch's features with those of the same patch in the flipped or rotated picture.
    """
    plain = _hidden(tower, pixels)
    if plain is None:
        return None
    at = PatchGrid(GRID, GRID).coordinates().to(pixels.device)
    away = (at[:, None] - at[None]).abs().amax(-1)
    near, far = away == 1, away >= 5
    found: dict[str, list[float]] = {"coherence": []}
    for x in plain:
        unit = F.normalize(x.flatten(1, 2), dim=-1)
        cosine = (unit @ unit.mT).mean(0)
        found["coherence"].append(round((cosine[near].mean() - cosine[far].mean()).item(), 4))
    for name, (transform, back) in TRANSFORMS.items():
        transformed = _hidden(tower, transform(pixels, (-2, -1)))
        assert transformed is not None
        found[name] = [
            round(F.cosine_similarity(x, back(y, (1, 2)), dim=-1).mean().item(), 4)
            for x, y in zip(plain, transformed, strict=True)
        ]
    return found


def _flip(axis: int) -> Any:
    return lambda x, axes: x.flip(axes[axis])


TRANSFORMS = {
    "hflip": (_flip(1), _flip(1)),
    "vflip": (_flip(0), _flip(0)),
    "rot90": (lambda x, axes: x.rot90(1, axes), lambda x, axes: x.rot90(-1, axes)),
}


def _hidden(tower: PatchFeatures, pixels: Tensor) -> list[Tensor] | None:
    """Return (B, GRID, GRID, C) after the embedding and after each layer."""
    found: list[Any] = []
    config: Any = tower.module.config
    before = getattr(config, "output_hidden_states", False)
    hook = tower.module.register_forward_hook(lambda module, args, output: found.append(output))
    config.output_hidden_states = True
    try:
        tower(pixels)
    finally:
        config.output_hidden_states = before
        hook.remove()
    states = getattr(found[0], "hidden_states", None)
    if not states:
        return None
    return [tower._tower.patch_grid(state, pixels.shape[-1]) for state in states]
