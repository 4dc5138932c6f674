# SPDX-License-Identifier: Apache-2.0
"""Threads, grids, checkpointing and modes at random, against the unpatched model with a rotation written by hand."""

from __future__ import annotations

import random
import threading
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


def episode(rng: random.Random) -> None:
    """One model, several threads, each with forwards and backwards on grids of its own."""
    kind, checkpointing = rng.choice(("axial", "mixed")), rng.choice((None, "reentrant", "not reentrant"))
    model = FAMILIES["dinov2"].make(seed=rng.randrange(100))
    AttentionInterface.register("by_hand", _attention)
    plain = FAMILIES["dinov2"].make(implementation="by_hand")
    plain.load_state_dict(model.state_dict())
    spatial_pe.patch(model, rope=kind)
    ropes = [m.rope for m in model.modules() if isinstance(getattr(m, "rope", None), nn.Module)]
    with torch.no_grad():
        for i, rope in enumerate(ropes):
            for parameter in rope.parameters():
                parameter.copy_(0.5 * randn(*parameter.shape, seed=i))
    images = {grid: randn(rng.choice((1, 2)), 3, 8 * grid[0], 8 * grid[1], seed=i) for i, grid in enumerate(GRIDS)}
    truth = {grid: _by_hand(plain, ropes, grid, x) for grid, x in images.items()}
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    errors: list[Any] = []

    def serve(rng: random.Random) -> None:
        try:
            for _ in range(6):
                grids = [rng.choice(GRIDS) for _ in range(2)]
                mode = rng.choice(MODES)
                if mode == "twice" and checkpointing == "reentrant":
                    mode = "late"  # torch frees what it recomputed
                _run(model, mode, grids, images, truth)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=serve, args=(random.Random(rng.random()),)) for _ in range(rng.randint(1, 4))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        what = f"{kind}, checkpointing {checkpointing}, {len(threads)} threads"
        raise AssertionError(f"{what}: {errors[0]!r}") from errors[0]


def _run(model: nn.Module, mode: str, grids: list, images: dict, truth: dict) -> None:
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
    error = float((got.detach() - expected).norm() / expected.norm())
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
    z = [torch.complex(*pairs(x)) * torch.polar(torch.ones_like(angles), angles) for x in (q, k)]
    scores = torch.einsum("bhnp,bhmp->bhnm", z[0], z[1].conj()).real * scaling
    return torch.einsum("bhnm,bhmd->bnhd", scores.softmax(-1), v), None


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
