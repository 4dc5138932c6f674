# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of a patched tower in the rest of a user's stack."""

from __future__ import annotations

import torch
from families import FAMILIES, randn
from test_families import assert_error_rule
from torch import Tensor, nn

SMALL = ["qwen2_5_vl", "pixtral", "dinov3", "clip", "siglip"]


EPS = torch.finfo(torch.float32).eps


def attentions(model: nn.Module, name: str) -> list[nn.Module]:
    """The attention modules of a tower, patched or not."""
    return [m for m in model.modules() if type(m).__name__.removeprefix("Patched") in FAMILIES[name].attention]


def layer_names(model: nn.Module, name: str) -> list[str]:
    """The modules that hold one attention each."""
    own = attentions(model, name)
    return [key.rpartition(".")[0] for key, m in model.named_modules() if any(m is other for other in own)]


def ropes(model: nn.Module) -> list[nn.Module]:
    return [m.rope for m in model.modules() if isinstance(getattr(m, "rope", None), nn.Module)]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) > 0 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def assert_rule(ours, theirs, exact, dtype=torch.float32):
    """What test_families asks of outputs and gradients, each given as ``run`` returns them."""
    for i, triple in enumerate(zip(ours[0], theirs[0], exact[0], strict=True)):
        assert_error_rule(*triple, dtype, f"output {i}")
    assert ours[1].keys() == theirs[1].keys() == exact[1].keys()
    floor = 0.01 * torch.stack([g.norm() for g in exact[1].values()]).norm() if exact[1] else 0.0
    for key, gradient in exact[1].items():
        assert_error_rule(ours[1][key], theirs[1][key], gradient, dtype, f"gradient of {key}", floor)


def shaken(model: nn.Module) -> nn.Module:
    """Added encodings moved away from the identity, where nothing would show that they are there."""
    for i, rope in enumerate(ropes(model)):
        for parameter in rope.parameters():
            parameter.data.copy_(0.3 * randn(*parameter.shape, seed=20 + i))
    return model


def tower(name: str) -> tuple[nn.Module, dict]:
    """A tower that accelerate can offload: of SigLIP without the parts that read another module's weights themselves,
    which are the pooling head (a torch.nn.MultiheadAttention) and the interpolation of its positions."""
    if name == "siglip":
        return FAMILIES[name].make(vision_use_head=False), {"pixel_values": randn(2, 3, 32, 32)}
    return FAMILIES[name].make(), FAMILIES[name].inputs()
