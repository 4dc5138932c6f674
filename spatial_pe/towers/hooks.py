# SPDX-License-Identifier: Apache-2.0
"""Taking our hooks off a module."""

from __future__ import annotations

from torch import nn

from .grids import Grids, Hook
from .packing import PackImages, Unpack


def remove_hooks(module: nn.Module) -> None:
    """By class and not by handle: handles do not survive a copy."""
    for kind in ("_forward_hooks", "_forward_pre_hooks"):
        hooks = getattr(module, kind)
        for key in [key for key, hook in hooks.items() if isinstance(hook, Grids | Hook | PackImages | Unpack)]:
            for table in (hooks, getattr(module, f"{kind}_with_kwargs"), module._forward_hooks_always_called):
                table.pop(key, None)
