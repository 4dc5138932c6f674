# SPDX-License-Identifier: Apache-2.0
"""A small tower of transformers' own classes, with random weights and its inputs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")


@dataclass(frozen=True)
class Family:
    """One tower. ``options`` are the config's; ``attention`` the class that must be patched, ``layers`` how often, and
    ``calls`` how often a forward calls them, if that is another number.

    ``valid(inputs)``: for towers that pad, which tokens (B, N) exist; what a tower returns for others is not compared.
    """

    module: str
    model: str
    config: str
    options: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]
    attention: tuple[str, ...]  # the newest name first
    layers: int = 2
    valid: Callable[[dict[str, Any]], Tensor] | None = None
    calls: int | None = None

    def load(self) -> tuple[type, type]:
        """The model's class and its config's."""
        package = f"transformers.models.{self.module}"
        modeling = importlib.import_module(f"{package}.modeling_{self.module}")
        configuration = importlib.import_module(f"{package}.configuration_{self.module}")
        return getattr(modeling, self.model), getattr(configuration, self.config)

    def available(self) -> bool:
        try:
            self.load()
        except (ImportError, AttributeError):
            return False
        return True

    def outputs(self, model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
        """What the model returns for the tokens that exist."""
        return outputs(model, inputs, self.valid(inputs) if self.valid else None)

    def make(self, seed: int = 0, implementation: str = "sdpa", **options: Any) -> nn.Module:
        model, config = self.load()
        chosen = config(**{**self.options, **options})
        chosen._attn_implementation = implementation
        return randomize(model(chosen), seed).eval()


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that make attention uneven: with the usual std of 0.02 every rotation would look right."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_gain = parameter.ndim == 1 and name.endswith("weight")
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        with torch.no_grad():
            parameter.copy_(1 + 0.1 * noise if is_gain else noise * (1.5 / fan_in**0.5 if fan_in > 1 else 0.1))
    return model


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outputs(model: nn.Module, inputs: dict[str, Any], valid: Tensor | None = None, **more: Any) -> list[Tensor]:
    """All floating point tensors that a tower returns, of the tokens that exist."""
    result = model(**inputs, **more)
    if isinstance(result, Tensor):
        result = (result,)
    flat: list[Any] = []
    for value in result.values() if hasattr(result, "values") else result:
        flat += value if isinstance(value, tuple | list) else [value]
    found = [value for value in flat if isinstance(value, Tensor) and value.is_floating_point()]
    return [x[valid] if valid is not None and x.shape[:2] == valid.shape else x for x in found]


def distance(x: Tensor, y: Tensor) -> float:
    """The error of x relative to y."""
    return float((x.detach().double() - y.detach().double()).norm() / y.detach().double().norm())


def to(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


# -------------------------------------------------------------------------------------- what many towers have in common

VIT = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def pixels(height: int, width: int, batch: int = 2, **more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": randn(batch, 3, height, width), **more}
