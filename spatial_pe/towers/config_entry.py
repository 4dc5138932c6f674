# SPDX-License-Identifier: Apache-2.0
"""Record of how a model was patched: in config.json, and among its weights.

``patch`` writes its arguments as ``spatial_pe`` into the config of the tower, so they reach config.json. An attention
module with an added encoding also gets a tensor, ``added_rope_requires_spatial_pe``: plain transformers reports it as
unexpected, so a checkpoint is never silently loaded without its RoPE.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .options import PatchOptions

NOTE = "spatial_pe"
MARK = "added_rope_requires_spatial_pe"


def remember(model: nn.Module, tower: str, options: PatchOptions, backend: str, patch_embed: bool) -> None:
    """Write the entry of a tower into its config or that of the nearest parent module that has one (timm's)."""
    while not hasattr(config := getattr(model.get_submodule(tower), "config", None), "to_dict"):
        if not tower:
            return
        tower = tower.rpartition(".")[0]
    more = {} if patch_embed else {"patch_embed": False}
    setattr(config, NOTE, {**options.to_config(), "backend": backend, **more})


def forget(module: nn.Module) -> None:
    config: Any = getattr(module, "config", None)
    if hasattr(config, "to_dict") and NOTE in vars(config):
        delattr(config, NOTE)


def noted(model: nn.Module) -> list[nn.Module]:
    """Return the towers of a loaded model whose config has an entry: of modules that share a config, the outermost."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "to_dict") and getattr(config, NOTE, None):
            found.setdefault(id(config), module)
    return list(found.values())


def marking(device: torch.device) -> Tensor:
    """Return the tensor, named MARK, of an attention module with an added encoding, on the device of its weights."""
    return torch.ones((), device="cpu" if device.type == "meta" else device)
