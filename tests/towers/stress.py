# SPDX-License-Identifier: Apache-2.0
"""Threads, grids, checkpointing, dtypes and modes at random, against the unpatched model with a rotation by hand."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from families import FAMILIES, randn
from torch import Tensor, nn
from transformers import AttentionInterface

import spatial_pe

# Of 8 x 8 pixels; three of them have as many patches.
GRIDS = ((2, 4), (4, 2), (1, 8), (3, 3), (2, 2))
HEADS, DIM, LAYERS = 2, 24, 2
MODES = ("no_grad", "inference", "train", "train", "twice", "late")


@dataclass
class Pair:
    """A patched tower, the unpatched one of the same weights, and what the latter computes of each grid's image."""

    kind: str
    model: nn.Module
    plain: nn.Module
    images: dict[tuple[int, int], Tensor]
    truth: dict[tuple[int, int], tuple[Tensor, Tensor]]


def make(rng: random.Random, **options: Any) -> Pair:
    kind = rng.choice(("axial", "mixed"))
    model = FAMILIES["dinov2"].make(seed=rng.randrange(100), **options)
    AttentionInterface.register("by_hand", _attention)
    plain = FAMILIES["dinov2"].make(implementation="by_hand", **options)
    plain.load_state_dict(model.state_dict())
    spatial_pe.patch(model, rope=kind)
    with torch.no_grad():
        for i, rope in enumerate(_ropes(model)):
            for parameter in rope.parameters():
                parameter.copy_(0.5 * randn(*parameter.shape, seed=i))
    images = {grid: randn(rng.choice((1, 2)), 3, 8 * grid[0], 8 * grid[1], seed=i) for i, grid in enumerate(GRIDS)}
    truth = {grid: _by_hand(plain, _ropes(model), grid, x) for grid, x in images.items()}
    return Pair(kind, model, plain, images, truth)


def _ropes(model: nn.Module) -> list[nn.Module]:
    return [m.rope for m in model.modules() if isinstance(getattr(m, "rope", None), nn.Module)]


# ------------------------------------------------------------------------------------------------------- the episodes


def threads(rng: random.Random) -> None:
    """One model, several threads, each with forwards and backwards on grids of its own."""
    pair, checkpointing = make(rng), rng.choice((None, "reentrant", "not reentrant"))
    pair.model.train()
    if checkpointing:
        pair.model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})

    def serve(rng: random.Random) -> None:
        for _ in range(6):
            grids = [rng.choice(GRIDS) for _ in range(2)]
            mode = rng.choice(MODES)
            if mode == "twice" and checkpointing == "reentrant":
                mode = "late"  # torch frees what it recomputed
            _run(pair, mode, grids)

    _in_threads([partial(serve, random.Random(rng.random())) for _ in range(rng.randint(1, 4))])


def towers(rng: random.Random) -> None:
    """Several models, each patched, run and unpatched in a thread of its own."""
    pairs = [make(rng) for _ in range(3)]
    for pair in pairs:
        spatial_pe.unpatch(pair.model)
    plain = [pair.model(pixel_values=pair.images[GRIDS[0]]).last_hidden_state for pair in pairs]

    def serve(pair: Pair, before: Tensor, rng: random.Random) -> None:
        for _ in range(2):
            spatial_pe.patch(pair.model, rope=pair.kind)  # the identity
            same = pair.model(pixel_values=pair.images[GRIDS[0]]).last_hidden_state
            _close(same, before, "patched with the identity")
            spatial_pe.unpatch(pair.model)
            after = pair.model(pixel_values=pair.images[GRIDS[0]]).last_hidden_state
            assert torch.equal(after, before), "unpatched it is not what it was"

    _in_threads([partial(serve, *each, random.Random(rng.random())) for each in zip(pairs, plain, strict=True)])


def moves(rng: random.Random) -> None:
    """Casts, and moves to a device and back, of a patched tower that has already run."""
    pair = make(rng)
    state = {name: x.clone() for name, x in pair.model.state_dict().items()}
    for _ in range(4):
        _run(pair, rng.choice(MODES), [rng.choice(GRIDS) for _ in range(2)])
        move = rng.choice(("double", "half", "bfloat16", "meta"))
        if move == "meta":  # the only other device of a machine without one
            pair.model.to("meta").to_empty(device="cpu").load_state_dict(state)
            continue
        dtype = getattr(torch, "float64" if move == "double" else move if move == "bfloat16" else "float16")
        grid = rng.choice(GRIDS)
        with torch.no_grad():
            got = pair.model.to(dtype)(pixel_values=pair.images[grid].to(dtype)).last_hidden_state
            _ROTATION.update(grid=grid, ropes=_ropes(pair.model))
            theirs = pair.plain.to(dtype)(pixel_values=pair.images[grid].to(dtype)).last_hidden_state
        truth = pair.truth[grid][0]
        error, allowed = ((x.double() - truth).norm() / truth.norm() for x in (got, theirs))
        assert got.dtype == dtype and error < 1.5 * allowed + 1e-5, f"{dtype}: off by {error:.2g}, eager {allowed:.2g}"
        assert all(p.dtype in (torch.float32, torch.float64) for rope in _ropes(pair.model) for p in rope.parameters())
        for model in (pair.model, pair.plain):
            model.float().load_state_dict({k: v for k, v in state.items() if k in model.state_dict()})


def dropouts(rng: random.Random) -> None:
    """Attention dropout in training: the same seed leaves out the same weights, checkpointed or not."""
    pair = make(rng, attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.2)
    checkpointing = rng.choice((None, "reentrant", "not reentrant"))
    for model in (pair.model, pair.plain):
        model.train()
    if checkpointing:
        pair.model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    for seed in range(3):
        grid = rng.choice(GRIDS)
        torch.manual_seed(seed)
        expected = _by_hand(pair.plain, _ropes(pair.model), grid, pair.images[grid])
        torch.manual_seed(seed)
        pixels = pair.images[grid].clone().requires_grad_()
        out = pair.model(pixel_values=pixels).last_hidden_state
        pair.model(pixel_values=pair.images[rng.choice(GRIDS)])
        _loss(out).backward()
        _close(out, expected[0], "dropout", grid)
        _close(pixels.grad, expected[1], "dropout, its gradient", grid)


def compiled(rng: random.Random) -> None:
    """What dynamo traced for one resolution, then for any, on others; inductor is left to the table of transforms."""
    torch.compiler.reset()
    pair = make(rng)
    pair.model = torch.compile(pair.model, backend="eager", dynamic=rng.choice((None, False, True)))  # type: ignore[assignment]
    for _ in range(3):
        _run(pair, rng.choice(("no_grad", "train", "train", "late")), [rng.choice(GRIDS) for _ in range(2)])
    torch.compiler.reset()


# kind of episode: how often
EPISODES: dict[Callable[[random.Random], None], int] = {threads: 6, towers: 2, moves: 3, dropouts: 2, compiled: 1}


def _in_threads(serves: list[Callable[[], None]]) -> None:
    errors: list[BaseException] = []

    def run(serve: Callable[[], None]) -> None:
        try:
            serve()
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=run, args=(serve,)) for serve in serves]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if errors:
        raise errors[0]


def _run(pair: Pair, mode: str, grids: list) -> None:
    model, images, truth = pair.model, pair.images, pair.truth
    if mode in ("no_grad", "inference"):
        with torch.no_grad() if mode == "no_grad" else torch.inference_mode():
            for grid in grids:
                _close(model(pixel_values=images[grid]).last_hidden_state, truth[grid][0], mode, grid)
        return
    pixels = [images[grid].clone().requires_grad_() for grid in grids]
    outs = [model(pixel_values=x).last_hidden_state for x in pixels]
    losses = [_loss(out) for out in outs]
    if mode == "late":  # another forward before the first backward
        with torch.no_grad():
            model(pixel_values=images[grids[0]])
    for i, loss in enumerate(losses):
        loss.backward(retain_graph=mode == "twice")
        if mode == "twice":
            model(pixel_values=images[grids[1 - i]])
            loss.backward()
    times = 2 if mode == "twice" else 1
    for grid, x, out in zip(grids, pixels, outs, strict=True):
        _close(out, truth[grid][0], mode, grid)
        _close(x.grad / times, truth[grid][1], mode, grid)


def _close(got: Tensor, expected: Tensor, *what: Any) -> None:
    error = float(((got - expected).norm() / expected.norm()).detach())
    assert error < 1e-4, f"off by {error:.2g} in {what}"


def _loss(out: Tensor) -> Tensor:
    return (out * torch.arange(out.numel()).mul(1.7).sin().view(out.shape)).sum()


# ---------------------------------------------------------------------------------------------- the rotation by hand


_ROTATION: dict[str, Any] = {}


def _by_hand(plain: nn.Module, ropes: list[nn.Module], grid: tuple[int, int], image: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient of the pixels, of the unpatched model."""
    _ROTATION.update(grid=grid, ropes=list(ropes))
    pixels = image.clone().requires_grad_()
    out = plain(pixel_values=pixels).last_hidden_state
    _loss(out).backward()
    return out.detach(), pixels.grad


def _attention(module, q, k, v, mask, scaling=None, dropout=0.0, **kwargs):
    """As transformers calls it, layer by layer: (B, H, N, D)."""
    angles = _angles(_ROTATION["ropes"].pop(0), *_ROTATION["grid"])  # (H, N, pairs)
    pairs = _half if angles.shape[0] == 1 else _interleaved
    z = [torch.complex(*pairs(x.to(angles.dtype))) * torch.polar(torch.ones_like(angles), angles) for x in (q, k)]
    weights = (torch.einsum("bhnp,bhmp->bhnm", z[0], z[1].conj()).real * scaling).softmax(-1)
    weights = nn.functional.dropout(weights, dropout)
    return torch.einsum("bhnm,bhmd->bnhd", weights, v.to(angles.dtype)).to(v.dtype), None


def _half(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., : DIM // 2], x[..., DIM // 2 :]


def _interleaved(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 0::2], x[..., 1::2]


def _angles(rope: nn.Module, height: int, width: int) -> Tensor:
    places = [(0.0, 0.0)] + [(float(r), float(c)) for r in range(height) for c in range(width)]  # CLS first
    row, column = torch.tensor(places).T
    if hasattr(rope, "num_heads"):
        of_row, of_column = rope.frequencies.detach()  # (H, pairs)
        return row[None, :, None] * of_row[:, None] + column[None, :, None] * of_column[:, None]
    count = DIM // 4
    ladder = torch.tensor([10000.0 ** (-i / count) for i in range(count)])
    angles = torch.cat([row[:, None] * ladder, column[:, None] * ladder], dim=-1)
    return (angles * rope.strength.detach())[None]
