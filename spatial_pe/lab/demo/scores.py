# SPDX-License-Identifier: Apache-2.0
"""Attention scores of rotated vectors by the offset of key and query in the grid."""

from __future__ import annotations

import torch
from torch import Tensor

from ...encodings import AxialRoPE
from ...grid import PatchGrid
from ...ops.rotate import apply_rotary
from ...rotary import Rotary, join_pairs

# Of the base frequency: rope-vit's and DINOv3's. At 10,000, Qwen-VL's, a grid of this size sees less of the decay.
BASE = 100.0
HEAD_DIM, SIDE = 64, 33


def score_by_offset(rotary: Rotary, side: int) -> Tensor:
    """Return the mean of R(q)·R(k) over all directions of q = k, |q| = 1: (side, side), the query in the centre.

    A pair of channels adds its share of |q|² times the cosine of the angle between query and key. Over all directions
    every pair has the same share, and so it has in the one vector that is rotated here.
    """
    pairs = rotary.rotary_dim // 2
    ones = torch.full((1, side * side, 1, pairs), pairs**-0.5)
    rotated = apply_rotary(join_pairs(ones, torch.zeros_like(ones), rotary.pairing), rotary)[0, :, 0]
    return (rotated @ rotated[side * side // 2]).unflatten(0, (side, side))


def axial(side: int = SIDE) -> Tensor:
    """Return the scores with 2D RoPE, half of the pairs for each axis."""
    return score_by_offset(AxialRoPE(HEAD_DIM, BASE)(PatchGrid(side, side)), side)


def flattened(side: int = SIDE) -> Tensor:
    """Return the scores with 1D RoPE over the patches as a list, row after row."""
    pairs = HEAD_DIM // 2
    frequencies = BASE ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    return score_by_offset(Rotary.from_angles((torch.arange(side * side)[:, None] * frequencies).float()), side)
