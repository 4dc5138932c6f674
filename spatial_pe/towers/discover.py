# SPDX-License-Identifier: Apache-2.0
"""Discovery of the vision towers of a model and their attention modules, by structure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from inspect import Parameter, signature

from torch import nn

from .equivalence import Proof
from .forms import FORMS, LEFT_ALONE, ForwardForm, attention_method
from .fused_attention import FusedAttention
from .grid_hooks import is_patch_convolution
from .layout import QKV, Layout, read_layout
from .patch_embedding import product_refusal
from .rotary_inputs import rope_of
from .swap import swap_refusal


@dataclass(frozen=True, eq=False)
class Skipped:
    """An attention module that is not patched, and why."""

    name: str
    module: nn.Module
    reason: str


@dataclass(frozen=True, eq=False)
class Candidate:
    """An attention module of a vision tower that has a known form: patched if it is verified or tested."""

    name: str
    module: nn.Module
    tower_name: str
    tower: nn.Module
    form: ForwardForm
    layout: Layout
    proof: Proof | None = None

    def skipped(self, reason: str) -> Skipped:
        return Skipped(self.name, self.module, reason)

    @property
    def rotates(self) -> bool:
        """Return whether its tower passes it a rotation: timm's attention can take one, but need not.

        Only a tower that has ``rope = None`` passes none: others may store it under another name.
        """
        if not self.form.rotation:
            return False
        if self.form.calls:
            return rope_of(self.module, self.form) is not None
        return self.form.first != "x" or getattr(self.tower, "rope", self) is not None

    @property
    def pads(self) -> bool:
        """Return whether its tower may pad: among timm's only those that take patch_valid."""
        return self.form.first != "x" or "patch_valid" in _arguments(type(self.tower))

    @property
    def packs_images(self) -> bool:
        """Return whether it packs images like Pixtral: a batch of one, separated by a mask that the tower builds."""
        if self.form.name != "batched":
            return False
        takes = _arguments(type(self.tower))
        return {"pixel_values", "image_sizes"} <= takes.keys() and isinstance(
            getattr(self.tower, "patch_size", None), int
        )


def discover(model: nn.Module) -> list[Candidate | Skipped]:
    """Return all attention modules of a model; those outside of its vision towers are skipped, with that reason, unless
    only attention over images takes such arguments."""
    modules = dict(model.named_modules())
    attention = {name: module for name, module in modules.items() if _is_attention(module)}
    for name in list(attention):  # a module that contains another one is only its container
        if any(other != name and _inside(other, name) for other in attention):
            del attention[name]
    towers = _towers(modules, attention)
    found: list[Candidate | Skipped] = []
    for name, module in attention.items():
        holders = [tower for tower in towers if _inside(name, tower)]
        form = module._spatial_pe.form if isinstance(module, FusedAttention) else _form_of(type(module))
        if not holders and isinstance(form, ForwardForm) and form.anywhere:
            holders = [name.partition(".")[0] if name.count(".") > 1 else ""]  # the part of the model that it is in
        if not holders:
            found.append(Skipped(name, module, "not inside a vision tower"))
        else:
            tower = max(holders, key=len)
            found.append(_classify(name, module, form, tower, modules[tower], _parent(modules, name)))
    return found


@dataclass(frozen=True, eq=False)
class Embedding:
    """A patch embedding whose input is already cut into patches."""

    name: str
    module: nn.Conv3d
    tower_name: str
    tower: nn.Module


def discover_embeddings(model: nn.Module, towers: dict[str, nn.Module]) -> list[Embedding]:
    """Return the patch embeddings of these towers that are a matrix product.

    Those of videos get pixel_values, over which they slide.
    """
    modules = dict(model.named_modules())
    found = []
    for name, module in modules.items():
        holders = [tower for tower in towers if _inside(name, tower) and name != tower]
        if not holders or product_refusal(module) is not None:
            continue
        takes = _arguments(type(_parent(modules, name)))
        if next(iter(takes), "pixel_values").startswith("pixel_values"):
            continue
        tower = max(holders, key=len)
        found.append(Embedding(name, module, tower, towers[tower]))  # type: ignore[arg-type]
    return found


def _parent(modules: dict[str, nn.Module], name: str) -> nn.Module:
    return modules[name.rpartition(".")[0]]


def _classify(
    name: str, module: nn.Module, form: ForwardForm | str, tower_name: str, tower: nn.Module, parent: nn.Module
) -> Candidate | Skipped:
    layout: Layout | str = "" if isinstance(form, str) else read_layout(module, form)
    reason = _reason(module, tower, form, layout) or _bypassed(module, parent)
    if reason is not None or isinstance(form, str) or isinstance(layout, str):
        return Skipped(name, module, reason or "")
    return Candidate(name, module, tower_name, tower, form, layout)


def _reason(module: nn.Module, tower: nn.Module, form: ForwardForm | str, layout: Layout | str) -> str | None:
    """Return why an attention module is skipped, or None."""
    if isinstance(module, FusedAttention):
        return "already patched"
    if (reason := LEFT_ALONE.get(type(module).__name__) or swap_refusal(module)) is not None:
        return reason
    if isinstance(form, str):
        return form
    if isinstance(layout, str):
        return layout
    if getattr(module, "is_causal", False):
        return "is_causal is True: attention over patches is bidirectional here"
    bias = next((n for n in _names_in(tower) if "relative_position" in n or "rel_pos" in n), None)
    return f"its tower has a relative position bias ({bias})" if bias else None


def _bypassed(module: nn.Module, parent: nn.Module) -> str | None:
    """Return why torch's attention is left alone in this parent, or None."""
    if not isinstance(module, nn.MultiheadAttention):
        return None
    if module.add_zero_attn:
        return "add_zero_attn is True: attention to a key of zeros"
    if isinstance(parent, nn.TransformerEncoderLayer):
        return "its torch.nn.TransformerEncoderLayer reads its weights and does not call it"
    width = module.embed_dim
    if any(p.ndim > 1 and p.shape[-1] == width for p in parent.parameters(recurse=False)):
        return "it pools: its queries are parameters, not patches"
    return None


def _form_of(cls: type[nn.Module]) -> ForwardForm | str:
    names = list(_arguments(cls, attention_method(cls)))
    given = frozenset(names[1:])
    for form in FORMS:
        if names and names[0] == form.first and form.needs <= given <= form.needs | form.takes:
            return form
    return f"its forward takes ({', '.join(names)})"


def _arguments(cls: type[nn.Module], method: str = "forward") -> dict[str, Parameter]:
    """Return the named arguments of a method, without self, *args and **kwargs."""
    variable = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    parameters = list(signature(getattr(cls, method)).parameters.values())[1:]
    return {p.name: p for p in parameters if p.kind not in variable}


def _is_attention(module: nn.Module) -> bool:
    if "attention" in type(module).__name__.lower():
        return True
    known = (*QKV, *(form.qkv for form in FORMS if form.qkv))
    return any(all(isinstance(getattr(module, n, None), nn.Module) for n in names) for names in known)


def _towers(modules: dict[str, nn.Module], attention: dict[str, nn.Module]) -> set[str]:
    """Return the towers: the smallest modules that contain both a patch embedding and attention."""
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
    # timm's NaFlexEmbeds has a linear layer instead of the convolution, named proj
    # C-RADIO's patch_generator cuts patches by a reshape
    return (
        "patch_embed" in last
        or "patch_generator" in last
        or "patch_conv" in last
        or "patchembed" in kind
        or "naflexembeds" in kind
    )


def _names_in(tower: nn.Module) -> Iterator[str]:
    yield from (name for name, _ in tower.named_modules())
    yield from (name for name, _ in tower.named_parameters())


def _inside(name: str, holder: str) -> bool:
    return holder == "" or name == holder or name.startswith(holder + ".")


def _last(name: str) -> str:
    return name.rpartition(".")[2]
