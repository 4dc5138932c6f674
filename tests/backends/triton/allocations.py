# SPDX-License-Identifier: Apache-2.0
"""Memory that shows who wrote where it should not, and where nobody wrote."""

from __future__ import annotations

import torch
from torch import Tensor

NEVER = 512.0  # in all new memory; no result has it
AROUND = 4096  # elements of it on both sides of a tensor


class Memory:
    """What plans allocate, with NEVER in and around each tensor."""

    def __init__(self, monkeypatch) -> None:
        self.buffers: list[tuple[Tensor, int]] = []
        new_empty = Tensor.new_empty
        monkeypatch.setattr(torch, "empty", lambda shape, *, dtype, device: self.tensor(shape, dtype))
        monkeypatch.setattr(torch, "empty_like", lambda x: self.tensor(x.shape, x.dtype))
        monkeypatch.setattr(
            Tensor,
            "new_empty",
            lambda x, shape, **other: new_empty(x, shape, **other) if other else self.tensor(shape, x.dtype),
        )

    def tensor(self, shape, dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel()
        self.buffers.append((torch.full((size + 2 * AROUND,), NEVER, dtype=dtype), size))
        return self.buffers[-1][0][AROUND : AROUND + size].view(shape)

    def check(self, *results: Tensor) -> None:
        """Nothing was written around any tensor, and everything in the results."""
        for buffer, size in self.buffers:
            assert (buffer[:AROUND] == NEVER).all() and (buffer[AROUND + size :] == NEVER).all()
        for x in results:
            assert not (x == NEVER).any()
