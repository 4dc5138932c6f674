# SPDX-License-Identifier: Apache-2.0
"""What a tower's hooks record for its attention: the patch grid of a forward, the images packed into one sequence.

Hooks are objects of importable classes, so that a patched model can be copied and pickled, and are found again by
their class when the model is unpatched.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatcher import needs_dispatcher, unrecorded
from ..grid import PatchGrid
from ..rotary import Rotary


class Grids:
    """Where the layers of a tower with an added RoPE find the patch grid of the forward that they are part of.

    Layers find it by the size of their input. With gradient checkpointing they ask again during backward, maybe after
    another forward: then a grid of another size is still here, and one with as many patches but another shape is
    noticed and raises, since nothing tells which of the two is being recomputed.
    """

    def __init__(self) -> None:
        self.known: dict[Any, Any] = {}
        self.awaiting: set = set()  # sizes with a forward that backward has not come back to
        self.ambiguous: set = set()
        self.latest: Any = None  # size of the last forward
        self.cached: tuple[Any, Any] | None = None
        self.traced: Tensor | None = (
            None  # of a forward that torch.jit.trace records: whether its grid is the recorded one
        )

    def record(self, size: Any, grid: Any, same: Callable[[Any, Any], bool]) -> None:
        if torch.compiler.is_compiling():  # what is read before it is written would become a guard on it
            self.known, self.latest = {size: grid}, size
            return
        self.latest = size
        if size in self.awaiting and not same(self.known[size], grid):
            self.ambiguous.add(size)
        else:
            self.ambiguous.discard(size)
        self.known[size] = grid
        if torch.is_grad_enabled():
            self.awaiting.add(size)

    def find(self, size: Any, what: str) -> Any:
        """The grid, or None if no forward has this size."""
        # inside backward: a checkpointed layer runs again (compiled code does not: its recomputation is traced)
        again = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        if not again:
            return self.known[size] if size == self.latest else None
        if size in self.known:
            if size in self.ambiguous:
                raise RuntimeError(
                    f"gradient checkpointing recomputes a layer with {what}, but two forwards with this many "
                    "patches in different shapes came before this backward: run backward after each of them"
                )
            self.awaiting.discard(size)
        return self.known.get(size)

    def where(self, x: Tensor, prefix: int, suffix: int) -> tuple[Any, Any]:
        """What to give to the encoding for tokens x (B, N, C), and a key that says when it is the same again."""
        raise NotImplementedError

    def rotary(self, rope: nn.Module, x: Tensor, prefix: int, suffix: int = 0) -> Any:
        """The tables of one layer; those of an encoding without parameters are made once for all layers."""
        where, key = unrecorded(self.where, x, prefix, suffix)
        # what is made while somebody traces belongs to the trace, and is no table for the next call
        if next(rope.parameters(), None) is not None or needs_dispatcher((x,)):
            return self._only_here(rope(where).to(x.device))
        key = (id(rope), key, x.device, x.dtype == torch.float64, torch.is_inference_mode_enabled())
        if self.cached is None or self.cached[0] != key:
            self.cached = (key, rope(where).to(x.device))
        return self.cached[1]

    def _only_here(self, tables: Any) -> Any:
        """The tables, in a torch.jit.trace NaN for another grid of as many patches: the trace holds no other check."""
        if self.traced is None or not isinstance(tables, Rotary):
            return tables
        cos, sin = (torch.where(self.traced.to(x.device), x, torch.nan) for x in (tables.cos, tables.sin))
        return Rotary._unchecked(cos, sin, tables.pairing)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cached": None, "traced": None}  # an id means nothing in a copy


class GridRecorder(Grids):
    """Forward hook on a tower's patch embedding convolution: its output (B, C, h, w) is the grid."""

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if isinstance(output, Tensor):  # and no node of torch.fx: the graph module records when it runs
            height, width = unrecorded(_grid_of, output)
            self.record(height * width, (height, width), operator.eq)
            self.traced = None
            if torch.jit.is_tracing():  # reads of a size are recorded
                rows, columns = (torch.as_tensor(size) for size in _grid_of(output))
                self.traced = (rows == height) & (columns == width)

    def where(self, x: Tensor, prefix: int, suffix: int) -> tuple[Any, Any]:
        patches = x.shape[1] - prefix - suffix
        shape = self.find(patches, f"{patches} patches")
        if shape is None:
            latest = self.known.get(self.latest)
            known = "{} x {}".format(*latest) if isinstance(latest, tuple) else "none"
            raise ValueError(
                f"attention got {x.shape[1]} tokens, {prefix + suffix} of them not patches, but the patch grid of this "
                f"forward is not of {patches} patches (it is {known}): RoPE needs every patch of the image, in order"
            )
        height, width = shape
        grid = PatchGrid(height, width, prefix, suffix)
        return grid, grid


def _leading(x: Tensor) -> tuple[int, int]:
    return x.shape[0], x.shape[1]


def _grid_of(x: Tensor) -> tuple[int, int]:
    return x.shape[-2], x.shape[-1]


class ShapesRecorder(Grids):
    """Forward pre-hook on a tower that is told the grid of each padded image, as ``spatial_shapes`` (B, 2) (SigLIP 2).

    The encoding gets (row, column) coordinates (B, N, 2); tokens past an image's own get (0, 0).
    """

    def __init__(self, position: int) -> None:
        super().__init__()
        self.position = position  # of spatial_shapes among the positional arguments

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        shapes = kwargs.get("spatial_shapes", args[self.position] if len(args) > self.position else None)
        if shapes is not None:
            if not isinstance(shapes, Tensor):
                shapes = torch.tensor(shapes, device="cpu")
            self.record(unrecorded(len, shapes), shapes, torch.equal)

    def where(self, x: Tensor, prefix: int, suffix: int) -> tuple[Tensor, Any]:
        batch, tokens = x.shape[0], x.shape[1]
        shapes = self.find(batch, f"{batch} images")
        if shapes is None:
            raise ValueError(f"attention got a batch of {batch} images, but no spatial_shapes of so many were given")
        height, width = shapes.to(x.device)[:, :, None].unbind(1)
        token = torch.arange(tokens, device=x.device)
        row, column = token // width.clamp(min=1), token % width.clamp(min=1)
        inside = token < height * width
        return torch.stack([row, column], dim=-1) * inside[..., None], (id(shapes), tokens)


class CoordinatesRecorder(GridRecorder):
    """Forward hook on the embedding of timm's NaFlexVit: it is given ``patch_coord`` (B, N, 2), the row and column of
    each patch of a padded batch, or makes patches of images and returns their grid."""

    def __call__(  # type: ignore[override]
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: tuple[Tensor, Any]
    ) -> None:
        places = kwargs.get("patch_coord", args[1] if len(args) > 1 else None)
        if places is not None:
            self.record(unrecorded(_leading, places), places, torch.equal)
        else:
            height, width = output[1]
            self.record(height * width, (height, width), operator.eq)

    def where(self, x: Tensor, prefix: int, suffix: int) -> tuple[Any, Any]:
        patches = x.shape[1] - prefix - suffix
        places = self.find((x.shape[0], patches), f"{patches} patches")
        if places is not None:
            coordinates = torch.nn.functional.pad(places, (0, 0, prefix, suffix)).to(x.device)
            return coordinates, (id(places), prefix, suffix)
        return super().where(x, prefix, suffix)


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


def grid_source(tower: nn.Module) -> Callable[[], Grids]:
    """What hooks up a recorder of the grids of a tower. Raises where nothing tells them."""
    takes = {m: list(signature(type(m).forward).parameters)[1:] for m in tower.modules()}
    if "spatial_shapes" in takes[tower]:
        shapes = ShapesRecorder(takes[tower].index("spatial_shapes"))
        return lambda: _hooked(shapes, tower.register_forward_pre_hook, with_kwargs=True)
    embedding = next((m for m, names in takes.items() if "patch_coord" in names and m is not tower), None)
    if embedding is not None:
        return lambda: _hooked(CoordinatesRecorder(), embedding.register_forward_hook, with_kwargs=True)
    found = [m for m in tower.modules() if isinstance(m, nn.Conv2d) and is_patch_convolution(m)]
    if len(found) != 1:
        raise ValueError(
            f"cannot add RoPE to {type(tower).__name__}: it has {len(found)} convolutions over disjoint patches, the "
            "grid is read from exactly one"
        )
    return lambda: _hooked(GridRecorder(), found[0].register_forward_hook)


def _hooked(recorder: Any, register: Callable, **options: Any) -> Grids:
    register(recorder, **options)
    return recorder


def is_patch_convolution(module: nn.Module) -> bool:
    """A convolution over disjoint patches."""
    if not isinstance(module, nn.Conv2d | nn.Conv3d):
        return False
    kernel, stride = module.kernel_size, module.stride
    return kernel == stride and max(kernel) > 1


def pack_images(tower: nn.Module) -> None:
    tower.register_forward_pre_hook(PackImages(), with_kwargs=True)
    tower.register_forward_hook(RestoreConfig(), always_call=True)


def remove_hooks(module: nn.Module) -> None:
    """Take our hooks off a module. By class and not by handle: handles do not survive a copy."""
    for kind in ("_forward_hooks", "_forward_pre_hooks"):
        hooks = getattr(module, kind)
        for key in [key for key, hook in hooks.items() if isinstance(hook, Grids | PackImages | RestoreConfig)]:
            for table in (hooks, getattr(module, f"{kind}_with_kwargs"), module._forward_hooks_always_called):
                table.pop(key, None)
