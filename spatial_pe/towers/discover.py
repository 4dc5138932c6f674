# SPDX-License-Identifier: Apache-2.0
"""Finding the vision towers of a model and the attention modules in them, by structure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from inspect import Parameter, signature

from torch import nn

from .adapters import LEFT_ALONE, SHAPES, FusedAttention, Shape
from .grids import is_patch_convolution
from .layout import QKV, Layout, read_layout
from .swap import swap_refusal


@dataclass(frozen=True, eq=False)
class Found:
    """An attention module: either its shape and layout, or the reason why it is not for us."""

    name: str
    module: nn.Module
    tower_name: str = ""
    tower: nn.Module | None = None
    shape: Shape | None = None
    layout: Layout | None = None
    reason: str | None = None

    @property
    def rotates(self) -> bool:
        """Whether its tower hands it a rotation: timm's attention can take one, and need not be given any.

        Only a tower that says ``rope = None`` has none: others may keep it under another name.
        """
        if self.shape is None or not self.shape.rotation:
            return False
        return self.shape.first != "x" or getattr(self.tower, "rope", self) is not None

    @property
    def pads(self) -> bool:
        """Whether its tower may pad: of timm's only those that take patch_valid."""
        timm = self.shape is not None and self.shape.first == "x"
        return not timm or (self.tower is not None and "patch_valid" in _arguments(type(self.tower)))

    @property
    def packs_images(self) -> bool:
        """Pixtral: several images in a batch of one, told apart by a mask that the tower builds."""
        if self.tower is None or self.shape is None or self.shape.name != "batched":
            return False
        takes = _arguments(type(self.tower))
        return {"pixel_values", "image_sizes"} <= takes.keys() and isinstance(
            getattr(self.tower, "patch_size", None), int
        )


def discover(model: nn.Module) -> list[Found]:
    """All attention modules of a model, those outside of its vision towers included (with that as the reason)."""
    modules = dict(model.named_modules())
    attention = {name: module for name, module in modules.items() if _is_attention(module)}
    for name in list(attention):  # a module that holds another one is only its container
        if any(other != name and _inside(other, name) for other in attention):
            del attention[name]
    towers = _towers(modules, attention)
    found = []
    for name, module in attention.items():
        holders = [tower for tower in towers if _inside(name, tower)]
        if not holders:
            found.append(Found(name, module, reason="not inside a vision tower"))
        else:
            tower = max(holders, key=len)
            found.append(_classify(name, module, tower, modules[tower]))
    return found


def _classify(name: str, module: nn.Module, tower_name: str, tower: nn.Module) -> Found:
    if isinstance(module, FusedAttention):
        return Found(name, module, tower_name, tower, reason="already patched")
    shape = _shape_of(type(module))
    layout: Layout | str = "" if isinstance(shape, str) else read_layout(module)
    reason = LEFT_ALONE.get(type(module).__name__) or swap_refusal(module)
    if reason is None and isinstance(module, nn.MultiheadAttention):
        reason = "torch.nn.MultiheadAttention is not patched"
    if reason is None and isinstance(shape, str):
        reason = shape
    if reason is None and isinstance(layout, str):
        reason = layout
    if reason is None and getattr(module, "is_causal", False):
        reason = "is_causal is True: attention over patches is bidirectional here"
    if reason is None:
        bias = next((n for n in _names_in(tower) if "relative_position" in n or "rel_pos" in n), None)
        reason = f"its tower has a relative position bias ({bias})" if bias else None
    if reason is not None or isinstance(shape, str) or isinstance(layout, str):
        return Found(name, module, tower_name, tower, reason=reason)
    return Found(name, module, tower_name, tower, shape, layout)


def _shape_of(cls: type[nn.Module]) -> Shape | str:
    arguments = _arguments(cls)
    names = list(arguments)
    given = frozenset(names[1:])
    for shape in SHAPES:
        if names and names[0] == shape.first and shape.needs <= given <= shape.takes:
            return shape
    return f"its forward takes ({', '.join(names)})"


def _arguments(cls: type[nn.Module]) -> dict[str, Parameter]:
    """The named arguments of a forward, self, *args and **kwargs left out."""
    variable = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    parameters = list(signature(cls.forward).parameters.values())[1:]
    return {p.name: p for p in parameters if p.kind not in variable}


def _is_attention(module: nn.Module) -> bool:
    if "attention" in type(module).__name__.lower():
        return True
    return any(all(isinstance(getattr(module, n, None), nn.Module) for n in names) for names in QKV)


def _towers(modules: dict[str, nn.Module], attention: dict[str, nn.Module]) -> set[str]:
    """A tower is the smallest module that holds both a patch embedding and attention."""
    patches = [name for name, module in modules.items() if _is_patch_embedding(name, module)]
    patches = patches or [name for name, module in modules.items() if is_patch_convolution(module)]
    towers = set()
    for name in patches:
        while name:
            name = name.rpartition(".")[0]
            if any(_inside(other, name) for other in attention):
                towers.add(name)
                break
    return towers


def _is_patch_embedding(name: str, module: nn.Module) -> bool:
    last = _last(name)
    kind = type(module).__name__.lower()
    # timm's NaFlexEmbeds has a linear layer in place of the convolution, named proj
    return "patch_embed" in last or "patch_conv" in last or "patchembed" in kind or "naflexembeds" in kind


def _names_in(tower: nn.Module) -> Iterator[str]:
    yield from (name for name, _ in tower.named_modules())
    yield from (name for name, _ in tower.named_parameters())


def _inside(name: str, holder: str) -> bool:
    return holder == "" or name == holder or name.startswith(holder + ".")


def _last(name: str) -> str:
    return name.rpartition(".")[2]
