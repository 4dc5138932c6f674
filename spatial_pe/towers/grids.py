# SPDX-License-Identifier: Apache-2.0
"""What a tower's hooks record for its attention: the patch grid of a forward, the images packed into one sequence.

Hooks are objects of importable classes, so that a patched model can be copied and pickled, and are found again by
their class when the model is unpatched.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..grid import PatchGrid
from ..rotary import Rotary


class GridRecorder:
    """Forward hook on a tower's patch embedding convolution: its output (B, C, h, w) is the grid.

    Layers find the grid by their number of patches. With gradient checkpointing they ask again during backward, maybe
    after another forward: then a grid of another size is still here, and one with as many patches but another shape is
    noticed and raises, since nothing tells which of the two is being recomputed.
    """

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[int, int]] = {}
        self.awaiting: set[int] = set()  # numbers of patches with a forward that backward has not come back to
        self.ambiguous: set[int] = set()
        self.cached: tuple[Any, Rotary] | None = None

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        shape = (output.shape[-2], output.shape[-1])
        patches = shape[0] * shape[1]
        if patches in self.awaiting and self.shapes[patches] != shape:
            self.ambiguous.add(patches)
        else:
            self.ambiguous.discard(patches)
        self.shapes[patches] = shape
        if torch.is_grad_enabled():
            self.awaiting.add(patches)

    def grid(self, tokens: int, prefix: int) -> PatchGrid:
        """The grid of a sequence of prefix + h * w tokens."""
        patches = tokens - prefix
        if patches not in self.shapes:
            known = ", ".join(f"{h} x {w}" for h, w in self.shapes.values()) or "none"
            raise ValueError(
                f"attention got {tokens} tokens, {prefix} of them prefix, but no patch grid has {patches} patches "
                f"(seen: {known}): RoPE needs every patch of the image, in order"
            )
        # inside backward: a checkpointed layer runs again (compiled code does not: its recomputation is traced)
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            if patches in self.ambiguous:
                raise RuntimeError(
                    f"gradient checkpointing recomputes a layer with {patches} patches, but two forwards with this "
                    "many patches in different shapes came before this backward: run backward after each of them"
                )
            self.awaiting.discard(patches)
        return PatchGrid(*self.shapes[patches], prefix=prefix)

    def rotary(self, rope: nn.Module, tokens: int, prefix: int, like: Tensor) -> Rotary:
        """The tables of one layer; those of an encoding without parameters are made once for all layers."""
        grid = self.grid(tokens, prefix)
        if next(rope.parameters(), None) is not None:
            return rope(grid).to(like.device)
        key = (id(rope), grid, like.device, like.dtype == torch.float64)
        if self.cached is None or self.cached[0] != key:
            self.cached = (key, rope(grid).to(like.device))
        return self.cached[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cached": None}  # an id means nothing in a copy


class PackImages:
    """Forward pre-hook on a tower that packs images into one sequence and builds an S x S mask (Pixtral).

    It passes the bounds of the images to the attention as ``cu_seq_lens_q``, which the layers hand on, and lets the
    tower believe, for this forward, that it runs flash attention: then it builds no mask. The tower's ``config`` is
    replaced by a copy and not written to: its layers, and other models, share it.
    """

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        config: Any = module.config
        if kwargs.get("output_attentions") or getattr(config, "output_attentions", False):
            return None  # weights over all tokens: the model's own way, with its mask
        pixels = args[0] if args else kwargs["pixel_values"]
        sizes = args[1] if len(args) > 1 else kwargs.get("image_sizes")
        lengths = _patch_counts(pixels, sizes, int(module.patch_size))  # type: ignore[arg-type]
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(device=pixels.device, dtype=torch.int32)
        packed = copy.copy(config)
        packed._attn_implementation = "flash_attention_2"
        module.__dict__["_spatial_pe_config"] = config
        module.config = packed
        names = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        return args, {**kwargs, **names, "max_length_q": max(lengths), "max_length_k": max(lengths)}


class RestoreConfig:
    """Forward hook, called also when the forward raises: undoes what ``PackImages`` did to the tower."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if "_spatial_pe_config" in module.__dict__:
            module.config = module.__dict__.pop("_spatial_pe_config")


def _patch_counts(pixels: Tensor, sizes: Any, patch: int) -> list[int]:
    """Patches of each image; an image is the upper left part of its padded pixels."""
    batch, _, height, width = pixels.shape
    pairs: Iterable = [(height, width)] * batch if sizes is None else sizes
    if isinstance(pairs, Tensor):
        pairs = pairs.tolist()
    return [min(h, height) // patch * (min(w, width) // patch) for (h, w), _ in zip(pairs, range(batch), strict=False)]


def add_hooks(tower: nn.Module, hook: PackImages) -> None:
    tower.register_forward_pre_hook(hook, with_kwargs=True)
    tower.register_forward_hook(RestoreConfig(), always_call=True)


def remove_hooks(module: nn.Module) -> None:
    """Take our hooks off a module. By class and not by handle: handles do not survive a copy."""
    for kind in ("_forward_hooks", "_forward_pre_hooks"):
        hooks = getattr(module, kind)
        for key in [key for key, hook in hooks.items() if isinstance(hook, GridRecorder | PackImages | RestoreConfig)]:
            for table in (hooks, getattr(module, f"{kind}_with_kwargs"), module._forward_hooks_always_called):
                table.pop(key, None)
