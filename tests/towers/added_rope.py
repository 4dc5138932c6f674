# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of an added RoPE."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import nn

POSITION = ("position_embedding.weight", "position_embeddings")


def encodings(model) -> list[nn.Module]:
    return [m.rope for m in model.modules() if isinstance(getattr(m, "rope", None), nn.Module)]


def hidden(model, inputs):
    return model(**inputs).last_hidden_state


def shaken(model, seed=3):
    """The encodings moved away from where they started."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for rope in encodings(model):
            for parameter in rope.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@contextmanager
def forward_on(module, grid):
    """As inside of a forward of its tower on this grid."""
    grids = module._spatial_pe.grids
    grids.enter()
    grids.record(grid)
    yield
    grids.leave()
