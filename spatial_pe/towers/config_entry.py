# SPDX-License-Identifier: Apache-2.0
"""What a saved model says about how it was patched: in config.json, and among its weights.

``patch`` notes its arguments as ``spatial_pe`` in the config of the tower, so they reach config.json. An attention
module with an added encoding also gets a tensor, ``added_rope_requires_spatial_pe``: transformers alone reports it as
unexpected when it loads such a directory, and never gives the tower without its rotation in silence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .options import PatchOptions

NOTE = "spatial_pe"
MARK = "added_rope_requires_spatial_pe"


def remember(model: nn.Module, tower: str, options: PatchOptions, backend: str) -> None:
    """Note what was done to a tower, in its config or that of the nearest module around it that has one (timm's)."""
    while not hasattr(config := getattr(model.get_submodule(tower), "config", None), "to_dict"):
        if not tower:
            return
        tower = tower.rpartition(".")[0]
    setattr(config, NOTE, {**options.to_config(), "backend": backend})


def forget(module: nn.Module) -> None:
    config: Any = getattr(module, "config", None)
    if hasattr(config, "to_dict") and NOTE in vars(config):
        delattr(config, NOTE)


def noted(model: nn.Module) -> list[nn.Module]:
    """The towers of a loaded model whose config has such a note: of modules that share a config, the outermost."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "to_dict") and getattr(config, NOTE, None):
            found.setdefault(id(config), module)
    return list(found.values())


def marking(device: torch.device) -> Tensor:
    """The tensor, named MARK, of an attention module with an added encoding, whose weights are on this device."""
    return torch.ones((), device="cpu" if device.type == "meta" else device)
