# SPDX-License-Identifier: Apache-2.0
"""Towers that pack images into one sequence and build an S x S mask (Pixtral): the attention gets cu_seqlens instead.

A hook passes the cu_seqlens of the images to the attention as ``cu_seq_lens_q``, which the layers forward. The tower
reads from its config which attention it runs, and builds no mask for flash attention. So for the thread that runs this
forward, and for no other, the tower's ``config`` is a copy with that setting; the config itself is not changed.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .classes import Swapped


class _Threads(threading.local):
    def __init__(self) -> None:
        self.configs: dict[int, list[Any]] = {}  # configs of running forwards, by tower


_THREADS = _Threads()


class PackedTower(Swapped):
    """Base of the class that such a tower gets: ``config`` depends on the thread's running forward."""

    @classmethod
    def label(cls, original: type[nn.Module]) -> str:
        return original.__name__  # save_pretrained writes it as the architecture

    @property
    def config(self) -> Any:
        packed = _THREADS.configs.get(id(self))
        return packed[-1] if packed else self.__dict__["config"]

    @config.setter
    def config(self, value: Any) -> None:
        self.__dict__["config"] = value


class PackImages:
    """Forward pre-hook on such a tower."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        config: Any = module.config
        running = _THREADS.configs.setdefault(id(module), [])
        if kwargs.get("output_attentions") or getattr(config, "output_attentions", False):
            running.append(module.__dict__["config"])  # attention weights are requested: use the original mask
            return args, kwargs
        pixels = args[0] if args else kwargs["pixel_values"]
        sizes = args[1] if len(args) > 1 else kwargs.get("image_sizes")
        lengths = _patch_counts(pixels, sizes, int(module.patch_size))  # type: ignore[arg-type]
        bounds = torch.tensor([0, *lengths], device="cpu").cumsum(0).to(device=pixels.device, dtype=torch.int32)
        packed = copy.copy(module.__dict__["config"])
        packed._attn_implementation = "flash_attention_2"
        running.append(packed)
        names = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        return args, {**kwargs, **names, "max_length_q": max(lengths), "max_length_k": max(lengths)}


class Unpack:
    """Forward hook on such a tower, called also when the forward raises: restores its config."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        running = _THREADS.configs.get(id(module))
        if running:  # empty if another hook raised before PackImages was called
            running.pop()
        if not running:
            _THREADS.configs.pop(id(module), None)


def pack_images(tower: nn.Module) -> None:
    tower.register_forward_pre_hook(PackImages(), with_kwargs=True)
    tower.register_forward_hook(Unpack(), always_call=True)


def _patch_counts(pixels: Tensor, sizes: Any, patch: int) -> list[int]:
    """Return the patches of each image; an image is the upper left part of its padded pixels."""
    batch, _, height, width = pixels.shape
    pairs: Iterable = [(height, width)] * batch if sizes is None else sizes
    if isinstance(pairs, Tensor):
        pairs = pairs.tolist()
    return [min(h, height) // patch * (min(w, width) // patch) for (h, w), _ in zip(pairs, range(batch), strict=False)]
