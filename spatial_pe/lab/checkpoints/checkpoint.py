# SPDX-License-Identifier: Apache-2.0
"""A vision tower to measure: the default one, or that of any checkpoint, as a function of pixels -> patch features."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..._utils.console import first_line
from ..._utils.errors import UserError
from . import assets

# Where vision-language models keep their tower.
TOWER_NAMES = ("vision_model", "vision_tower", "visual", "vision_encoder")


@dataclass(frozen=True, eq=False)
class Tower:
    """A tower and its input format. ``module`` maps normalised pixels to one feature per token."""

    name: str
    module: nn.Module
    patch_size: int
    image_size: int | None  # of a tower that takes only one
    frames: int = 1  # per patch (Qwen-VL: an image is repeated)
    merge: int = 1  # side of the blocks of patches that become one feature (Qwen-VL)
    mean: tuple[float, ...] = assets.IMAGENET_MEAN
    std: tuple[float, ...] = assets.IMAGENET_STD

    def copy(self, dtype: torch.dtype) -> Tower:
        """Return a tower with copied weights."""
        return replace(self, module=copy.deepcopy(self.module).to(dtype))

    def sharing_copy(self) -> Tower:
        """Return a tower with new modules around the same weights, so that before and after need the memory of one."""
        shared = {id(tensor): tensor for tensor in (*self.module.parameters(), *self.module.buffers())}
        return replace(self, module=copy.deepcopy(self.module, shared))

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """Map images (B, 3, S, S) in 0..1 to features (B, N, C) in the weights' dtype, prefix tokens included."""
        dtype = next(self.module.parameters()).dtype
        return self.call(assets.normalised(images, self.mean, self.std).to(dtype))

    def call(self, pixels: Tensor) -> Tensor:
        """Run the tower's forward only: the timed function."""
        accepted = inspect.signature(self.module.forward).parameters
        batch, _, height, width = pixels.shape
        if "grid_thw" in accepted:
            return self._call_packed(pixels)
        extra: dict = {}
        if "interpolate_pos_encoding" in accepted:
            extra["interpolate_pos_encoding"] = True
        if "image_sizes" in accepted:
            extra["image_sizes"] = [(height, width)] * batch
        out = first_tensor(self.module(pixels, **extra))
        return out.reshape(batch, -1, out.shape[-1])  # Pixtral packs its images: (1, B N, C)

    def _call_packed(self, pixels: Tensor) -> Tensor:
        """Run Qwen-VL: patches in merge-block order, rows of (3 · frames · patch²) pixels, and the grid of each
        image."""
        p, m, frames = self.patch_size, self.merge, self.frames
        batch, _, height, width = pixels.shape
        x = pixels.unfold(2, p, p).unfold(3, p, p)  # (B, 3, h, w, p, p)
        x = x.unflatten(3, (-1, m)).unflatten(2, (-1, m))  # (B, 3, h/m, m, w/m, m, p, p)
        x = x.permute(0, 2, 4, 3, 5, 1, 6, 7).unsqueeze(6).expand(*[-1] * 6, frames, -1, -1)
        grid = torch.tensor([[1, height // p, width // p]] * batch)
        out = first_tensor(self.module(x.flatten(5).flatten(0, 4), grid_thw=grid), prefer="pooler_output")
        return out.reshape(batch, -1, out.shape[-1])  # one feature per merge block, row-major

    def tokens(self, features: Tensor, size: int) -> int:
        """Return the tokens in attention, per image: more than there are features if the tower merges blocks at its
        end."""
        return max(features.shape[1], (size // self.patch_size) ** 2)

    def patch_grid(self, features: Tensor, size: int) -> Tensor:
        """Reshape (B, N, C) -> (B, h, w, C): without the prefix tokens; h = w = size / patch, less if blocks are
        merged."""
        side = size // self.patch_size
        if features.shape[1] < side * side:
            side //= self.merge
        return features[:, features.shape[1] - side * side :].unflatten(1, (side, side))

    def accepts(self, size: int) -> str | None:
        """Return why the tower refuses square images of this size, or None."""
        try:
            features = self.features(torch.full((1, 3, size, size), 0.5))
        except (ValueError, RuntimeError, TypeError, IndexError) as error:
            return f"{type(error).__name__}: {first_line(error)}"
        side = size // self.patch_size
        if features.shape[1] < (side // self.merge) ** 2:
            return f"{features.shape[1]} features for {side * side} patches"
        return None

    def sizes(self, wanted: tuple[int, ...]) -> list[int]:
        """Return the wanted sizes, rounded to whole (blocks of) patches; the fixed size of a tower that takes only one.

        Raises:
            UserError: it takes none of them; says why.
        """
        step = self.patch_size * self.merge
        rounded = sorted({max(1, round(size / step)) * step for size in wanted})
        refusals = {size: self.accepts(size) for size in rounded}
        good = [size for size in rounded if refusals[size] is None]
        if not good and self.image_size is not None and self.image_size not in refusals:
            refusals[self.image_size] = self.accepts(self.image_size)
            good = [self.image_size] if refusals[self.image_size] is None else []
        if not good:
            raise UserError(f"{self.name}: the tower could not be run on square images: {refusals}")
        return good


def default_tower(onnx_graph: bytes) -> Tower:
    return Tower("DINOv2-small", assets.dinov2_small(onnx_graph), patch_size=14, image_size=None)


def load_tower(path: str) -> Tower:
    """Load the vision tower of a local folder or hub checkpoint of transformers.

    Raises:
        UserError: it cannot be loaded, or has no vision tower.
    """
    from transformers import AutoModel

    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if looks_local and not Path(path).expanduser().exists():
        raise UserError(f"no folder {path!r}: --model takes a local checkpoint folder or a hub id (owner/name)")
    try:
        model = AutoModel.from_pretrained(str(Path(path).expanduser()) if Path(path).expanduser().exists() else path)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"{path!r} cannot be loaded: {first_line(error)}") from error
    module = next(_towers(model), None)
    if module is None:
        children = ", ".join(f"{name} ({type(child).__name__})" for name, child in model.named_children())
        raise UserError(f"{path!r} is a {type(model).__name__} without a vision tower: it holds {children}")
    mean, std = _normalisation(path)
    config: Any = module.config
    return Tower(
        name=f"{Path(path).name} ({type(module).__name__})",
        module=module.float().eval(),
        patch_size=_as_int(config.patch_size) or 1,
        image_size=_as_int(getattr(config, "image_size", None)),
        frames=getattr(config, "temporal_patch_size", 1),
        merge=getattr(config, "spatial_merge_size", 1),
        mean=mean,
        std=std,
    )


def _towers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield modules that take images and have a patch size, outermost first; named towers, so that a head is left
    out."""
    named = [module for name, module in model.named_modules() if name.rpartition(".")[2] in TOWER_NAMES]
    for module in (*named, model):
        accepted = inspect.signature(module.forward).parameters
        takes_images = "grid_thw" in accepted or ("pixel_values" in accepted and "input_ids" not in accepted)
        if takes_images and hasattr(getattr(module, "config", None), "patch_size"):
            yield module


def _normalisation(path: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std of the checkpoint's image processor; ImageNet's if it has none."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        options, _ = ImageProcessingMixin.get_image_processor_dict(path)
    except (OSError, ValueError):
        options = {}
    return tuple(options.get("image_mean", assets.IMAGENET_MEAN)), tuple(options.get("image_std", assets.IMAGENET_STD))


def first_tensor(output: object, prefer: str = "last_hidden_state") -> Tensor:
    """The tower's features, whether it returns a tensor, a tuple or a model output."""
    if isinstance(output, Tensor):
        return output
    named = getattr(output, prefer, None)
    return named if named is not None else output[0]  # type: ignore[index]


def _as_int(size: Any) -> int | None:
    """Return a size as int: sizes are ints or (height, width) in configurations."""
    return int(size[0]) if isinstance(size, list | tuple) else None if size is None else int(size)
