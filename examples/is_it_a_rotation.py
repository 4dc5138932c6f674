# SPDX-License-Identifier: Apache-2.0
"""Check whether a RoPE is a rotation.

``verify_rotary`` takes a table of angles, or any function over the tokens of a grid, and says whether it keeps norms,
whether scores depend on the offset of two patches alone, and which axis rotates which channels. A right one, and one
with a mistake that is easy to make: a table laid out by axis, [rows, rows, columns, columns], applied by a rotate-half
over the whole head, which pairs a row's angle with a column's. For your own: replace ``wrong``.
"""

import torch

from spatial_pe import AxialRoPE, PatchGrid, verify_rotary

HEAD_DIM = 32
grid = PatchGrid(6, 8, prefix=1)  # behind one CLS token, which must not be rotated


def wrong(x):
    """(N, D) float64 -> (N, D): the function under test."""
    frequencies = 100.0 ** -torch.linspace(0, 1, HEAD_DIM // 4, dtype=x.dtype)
    row, column = grid.coordinates().to(x.dtype).unbind(-1)
    by_row, by_column = row[:, None] * frequencies, column[:, None] * frequencies  # (N, D/4) each
    angles = torch.cat([by_row, by_row, by_column, by_column], dim=-1)  # right for a rotate-half within each axis
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


print("AxialRoPE")
print(right := verify_rotary(AxialRoPE(HEAD_DIM)(grid), grid))
print("\na table by axis, a rotate-half over the whole head")
print(found := verify_rotary(wrong, grid, head_dim=HEAD_DIM))
print()
print("AxialRoPE is a rotation and relative:", right.is_rotation and right.is_relative)
print("the other is a rotation and relative:", found.is_rotation and found.is_relative)
