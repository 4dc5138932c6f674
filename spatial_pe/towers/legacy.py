# SPDX-License-Identifier: Apache-2.0
"""The position encoding of the public code of arXiv 2601.09954, only to reproduce its table.

Its table gives the first half of a head's channels the angles of the row and the second half those of the column, each
sequence twice: [row, row, column, column]. It applies rotate-half across the full head, so each pair mixes a row angle
(channel j) with a column angle (channel j + D/2). That is no rotation: on a 16 x 16 grid at D = 64 norms change by up
to 7 %, and the score of two patches depends on their positions, not only on their offset (``verify_rotary``).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..grid import PatchGrid

LEGACY = ("2601.09954",)


class Mismatched2DRoPE(nn.Module):
    """Map a grid or coordinates to a function of q and k, (B, N, H, D) -> (B, N, H, D).

    Args:
        head_dim: D, a multiple of 4.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"head_dim must be a multiple of 4, got {head_dim}")
        self.head_dim = head_dim

    def forward(self, where: PatchGrid | Tensor) -> Mismatched:
        coordinates = where.coordinates() if isinstance(where, PatchGrid) else where.float()
        half = self.head_dim // 2
        frequencies = 10000.0 ** (-torch.arange(0, half, 2, device=coordinates.device).float() / half)
        row, column = (coordinates[..., axis, None] * frequencies for axis in (0, 1))
        angles = torch.cat([row, row, column, column], dim=-1)
        angles = angles if angles.ndim == 3 else angles[None]
        return Mismatched(angles.cos()[:, :, None], angles.sin()[:, :, None])


@dataclass(frozen=True)
class Mismatched:
    """Function of q and k with the tables cos, sin (B|1, N, 1, D) float32."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        first, second = x.to(wide).chunk(2, dim=-1)
        rotated = torch.cat([-second, first], dim=-1)
        return (x.to(wide) * self.cos + rotated * self.sin).to(x.dtype)

    def to(self, device: torch.device) -> Mismatched:
        return Mismatched(self.cos.to(device), self.sin.to(device))


def warn_of_legacy() -> None:
    warnings.warn(
        'legacy="2601.09954" is what that paper\'s public code computes, which is not a rotation: rows and columns are '
        "mixed within each channel pair, norms change and scores depend on absolute position; it also sets the learned "
        'position embedding to zero. Use it to reproduce the paper\'s table only; rope="axial" is 2D RoPE.',
        stacklevel=3,
    )
