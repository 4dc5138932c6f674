# SPDX-License-Identifier: Apache-2.0
"""Change the class of one attention module, and restore it.

The swap keeps parameters, state dict keys, hooks and isinstance. A ``forward`` stored on the instance would bypass it:
accelerate keeps the former one as ``_old_forward``, which is bound again; transformers 4 leaves the module's own bound
method behind after collecting hidden states, which is dropped; anything else is refused.
"""

from __future__ import annotations

from types import FunctionType, MethodType

from torch import nn

from .classes import Swapped, swapped_class
from .config_entry import MARK
from .fused_attention import Binding, FusedAttention
from .grid_hooks import Grids, Hook
from .packing import PackedTower, PackImages, Unpack, pack_images
from .patch_product import PatchProduct


def swap_refusal(module: nn.Module) -> str | None:
    """Return why a swap would be bypassed, or None."""
    state = module.__dict__
    if "_old_forward" in state:
        return None if _is_own(module, "_old_forward") else "its forward was replaced by a wrapper of something unknown"
    if "forward" in state and not _is_own(module, "forward"):
        return "its forward was replaced on the instance: a change of class would not be called"
    return None


def swap(module: nn.Module, binding: Binding) -> None:
    """Make module an instance of the patched class."""
    _rebind(module, swapped_class(FusedAttention, type(module)))
    module._spatial_pe = binding  # type: ignore[assignment]


def swap_embedding(module: nn.Conv3d) -> None:
    """Make module an instance of the class that computes a matrix product."""
    _rebind(module, swapped_class(PatchProduct, type(module)))


def swap_tower(tower: nn.Module) -> None:
    """Change the class of a tower that packs images, so that it passes cu_seqlens to its attention."""
    if not isinstance(tower, PackedTower):  # already the case if it was made by the class of a patched one
        _rebind(tower, swapped_class(PackedTower, type(tower)))
    pack_images(tower)


def restore(module: Swapped) -> None:
    """Restore the original class, and remove the added encoding."""
    if isinstance(module, FusedAttention):
        if module._spatial_pe.added:
            del module.rope
            delattr(module, MARK)
        del module._spatial_pe
    _rebind(module, module.original)


def _rebind(module: nn.Module, cls: type[nn.Module]) -> None:
    own = {name: _is_own(module, name) for name in ("forward", "_old_forward")}
    module.__class__ = cls
    if own["forward"]:
        del module.__dict__["forward"]  # the lookup then finds the class's own
    if own["_old_forward"]:
        module.__dict__["_old_forward"] = MethodType(_forward(cls), module)


def _is_own(module: nn.Module, name: str) -> bool:
    """Return whether an instance attribute is just the forward of the module's class, bound to it."""
    method = module.__dict__.get(name)
    return isinstance(method, MethodType) and method.__self__ is module and method.__func__ is _forward(type(module))


def _forward(cls: type[nn.Module]) -> FunctionType:
    return cls.forward  # type: ignore[return-value]


def remove_hooks(module: nn.Module) -> None:
    """Remove hooks, by class and not by handle: handles do not survive a copy."""
    for kind in ("_forward_hooks", "_forward_pre_hooks"):
        hooks = getattr(module, kind)
        for key in [key for key, hook in hooks.items() if isinstance(hook, Grids | Hook | PackImages | Unpack)]:
            for table in (hooks, getattr(module, f"{kind}_with_kwargs"), module._forward_hooks_always_called):
                table.pop(key, None)
