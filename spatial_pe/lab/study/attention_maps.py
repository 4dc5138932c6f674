# SPDX-License-Identifier: Apache-2.0
"""Attention maps of a trained tower: distance, and the attention from positions alone."""

from __future__ import annotations

import torch
from torch import Tensor

from ...grid import PatchGrid
from ...ops.rotate import apply_rotary
from ...rotary import Rotary
from .models import Block, Tower
from .position_encodings import Bias, Where


@torch.no_grad()
def attention(tower: Tower, pixels: Tensor) -> dict:
    """Return statistics of each layer and head.

    Args:
        pixels: (B, 3, S, S).

    Returns:
        "distance": [layer][head], distance of the patches that a patch attends to, in patches, weighted by attention,
        mean over patches and pictures;
        "position": [layer][row][column], attention of the patch next to the middle in a picture without content (all
        patches alike), so that it depends on positions alone; mean over heads, 1 is the weight of uniform attention;
        "similarity": [row][column], cosine of the embedding's position table at the same patch with all others; None
        without a table.
    """
    side = pixels.shape[-1] // tower.size.patch
    at = PatchGrid(side, side).coordinates().to(pixels.device)
    away = torch.cdist(at, at)
    distance = [(weights * away).sum(-1).mean((0, 2)).tolist() for weights in _weights(tower, pixels)]
    middle = (side // 2) * side + side // 2
    blank = torch.zeros_like(pixels[:1])
    position = [w[0, :, middle].mean(0).reshape(side, side) * side * side for w in _weights(tower, blank)]
    table = tower.position.table(Where(side, side, tower.size.grid, device=pixels.device))
    similarity = None
    if table is not None:
        similarity = torch.cosine_similarity(table[middle][None], table, dim=-1).reshape(side, side)
    return {
        "distance": _rounded(distance),
        "position": [_rounded(layer.tolist()) for layer in position],
        "similarity": None if similarity is None else _rounded(similarity.tolist()),
    }


def _weights(tower: Tower, pixels: Tensor) -> list[Tensor]:
    """Return the attention of each layer, (B, H, N, N)."""
    found = []
    x, hows = tower.embedded(pixels)
    for block, how in zip(tower.blocks, hows, strict=True):
        assert isinstance(block, Block)
        q, k, _ = block.heads_of(x)
        if isinstance(how, Rotary):
            q, k = apply_rotary(q, how), apply_rotary(k, how)
        elif callable(how):
            q, k = how(q), how(k)
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
        found.append((scores + how.values if isinstance(how, Bias) else scores).softmax(-1))
        x = block(x, how)
    return found


def _rounded(rows: list) -> list:
    return [[round(value, 4) for value in row] for row in rows]
