# SPDX-License-Identifier: Apache-2.0
"""Token positions: patch grids, packed sequences of images, attention windows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._utils.dispatcher import is_intercepted
from .rotary import Rotary


@dataclass(frozen=True, init=False)
class PatchGrid:
    """The patch tokens of one image, or of several images packed into one sequence.

    The tokens of an image are ``prefix`` tokens that are not rotated (CLS, registers), ``height * width``
    patches, and ``suffix`` tokens that are not rotated (Llama 4 keeps CLS last). Patches are row-major, or, with
    ``merge_size`` m > 1, ordered in m x m blocks that are themselves row-major (Qwen-VL's patch merger).

    Args:
        height, width: patches per column and per row, at least 1.
        prefix, suffix: tokens before and after the patches of each image.
        merge_size: side of the merge blocks; must divide height and width.

    Raises:
        TypeError, ValueError: naming the argument and what it must be.
    """

    images: tuple[tuple[int, int], ...]
    prefix: int
    suffix: int
    merge_size: int

    def __init__(self, height: int, width: int, prefix: int = 0, suffix: int = 0, *, merge_size: int = 1) -> None:
        self._set(((height, width),), prefix, suffix, merge_size)

    @classmethod
    def packed(
        cls, images: Iterable[Sequence[int]], merge_size: int = 1, *, prefix: int = 0, suffix: int = 0
    ) -> PatchGrid:
        """Pack several images into one sequence, in order; ``images`` holds (height, width) pairs in patches."""
        pairs = tuple(tuple(image) for image in images)
        if not pairs:
            raise ValueError("images is empty: give at least one (height, width) pair")
        for pair in pairs:
            if len(pair) != 2:
                raise ValueError(
                    f"images must hold (height, width) pairs, got {pair}: repeat a pair for each video frame"
                )
        grid = cls.__new__(cls)
        grid._set(pairs, prefix, suffix, merge_size)
        return grid

    def _set(self, images: tuple, prefix: int, suffix: int, merge_size: int) -> None:
        for name, value, low in (("prefix", prefix, 0), ("suffix", suffix, 0), ("merge_size", merge_size, 1)):
            _check_int(name, value, low)
        for height, width in images:
            _check_int("height", height, 1)
            _check_int("width", width, 1)
            if height % merge_size or width % merge_size:
                raise ValueError(f"merge_size={merge_size} must divide the grid, got {height} x {width} patches")
        # frozen: the fields are set once, here
        object.__setattr__(self, "images", tuple((int(h), int(w)) for h, w in images))
        object.__setattr__(self, "prefix", int(prefix))
        object.__setattr__(self, "suffix", int(suffix))
        object.__setattr__(self, "merge_size", int(merge_size))

    def __fx_create_arg__(self, tracer: Any) -> Any:
        """Return the node of a constant in a torch.fx graph."""
        options = {"prefix": self.prefix, "suffix": self.suffix}
        return tracer.create_node("call_function", PatchGrid.packed, (self.images, self.merge_size), options)

    # ------------------------------------------------------------------ sizes

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of tokens of each image."""
        return tuple(self.prefix + h * w + self.suffix for h, w in self.images)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths)

    @property
    def cu_seqlens(self) -> Tensor:
        """(images + 1,) int32: start of each image, and the total."""
        return _cumulative(self.lengths)

    # ------------------------------------------------------------- per token

    @property
    def rotated(self) -> Tensor:
        """(N,) bool: False for prefix and suffix tokens."""
        return self._once("rotated", lambda h, w: torch.ones(h * w, dtype=torch.bool, device="cpu"))

    def coordinates(self) -> Tensor:
        """(N, 2) float32: (row, column) in patches; 0 for tokens that are not rotated."""
        return self._once("coordinates", lambda h, w: _raster(h, w, self.merge_size))

    def _once(self, name: str, of_patches: Callable[[int, int], Tensor]) -> Tensor:
        """Return a per-image tensor for all images, zeros for unrotated tokens, cached: each layer of a tower asks the
        same grid, 45 us when computed and 2 us for a copy."""

        def make() -> Tensor:
            return torch.cat([_pad(of_patches(h, w), self.prefix, self.suffix) for h, w in self.images])

        if is_intercepted():
            return make()
        kept: dict[str, Tensor] = self.__dict__.get("_kept", {})
        if name not in kept:
            with torch.inference_mode(False):  # usable by autograd too
                kept = {**kept, name: make()}
            object.__setattr__(self, "_kept", kept)  # a new one, since other threads may read the old one
        return kept[name].clone()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    def sizes(self) -> Tensor:
        """(N, 2) float32: (height, width) of the image that each token belongs to."""
        shape = torch.tensor(self.images, dtype=torch.float32, device="cpu")
        return shape.repeat_interleave(torch.tensor(self.lengths, device="cpu"), dim=0)

    # --------------------------------------------------------------- windows

    def windows(self, size: int) -> Windows:
        """Group the tokens into square windows, image by image, as Qwen2.5-VL does.

        Windows tile each image from its top left corner, row-major; those at the right and lower edge may be
        smaller. Inside a window the tokens keep their order.

        Args:
            size: side of a window in patches, a multiple of ``merge_size``.

        Returns:
            Windows. Unpacks as ``permutation, cu_seqlens = grid.windows(size)`` too.

        Raises:
            TypeError, ValueError: ``size``, or a grid with prefix or suffix tokens.
        """
        _check_int("size", size, 1)
        if self.prefix or self.suffix:
            raise ValueError(
                f"windows hold patches only, but the grid has prefix={self.prefix}, suffix={self.suffix}: take a grid "
                "without them, and the tokens of the patches alone"
            )
        if size % self.merge_size:
            raise ValueError(f"size={size} must be a multiple of merge_size={self.merge_size}")
        order, lengths, start = [], [], 0
        for h, w in self.images:
            row, column = _raster(h, w, self.merge_size).long().unbind(1)
            window = (row // size) * -(-w // size) + column // size
            order.append(start + torch.argsort(window, stable=True))
            lengths += torch.bincount(window).tolist()
            start += h * w
        return Windows(torch.cat(order), _cumulative(lengths), max(lengths))


@dataclass(frozen=True, eq=False)
class Windows:
    """Attention windows of a grid: the order of the tokens, and where each window starts.

    ``pack`` brings q, k, v and the rotary of the grid into that order, all together: a rotary that is left behind
    rotates every token by the angles of another one.

    Attributes:
        permutation: (N,) int64, on the CPU; ``x[permutation]`` is ordered by window.
        cu_seqlens: (windows + 1,) int32, on the CPU, over the permuted tokens: for ``rope_attention``.
        max_seqlen: tokens of the largest window: for ``rope_attention``.
    """

    permutation: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    def pack(self, *parts: Any) -> tuple[Any, ...]:
        """Return the parts in the order of the windows, a tuple of as many.

        Args:
            parts: tensors (N, ...), N the tokens of the grid in its order, and the Rotary of the grid. None (no
                rotary) stays None.

        Raises:
            TypeError, ValueError: something else, or another number of tokens. A batch of images is one packed grid.
        """
        if len(parts) > 2 and all(isinstance(part, Tensor) for part in parts):
            raise ValueError(
                "pack the rotary too, windows.pack(q, k, v, rotary): in the grid's order it rotates every token by the "
                "angles of another one (None: attention without rotation)"
            )
        return tuple(self._packed(part, index) for index, part in enumerate(parts))

    def unpack(self, out: Tensor) -> Tensor:
        """Return a tensor (N, ...) that is ordered by window, e.g. the output of attention, in the grid's order."""
        self._check(out, "out")
        return out.index_select(0, self.permutation.argsort().to(out.device))

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.permutation, self.cu_seqlens))

    def _packed(self, part: Any, index: int) -> Any:
        if part is None:
            return None
        if isinstance(part, Rotary):
            if part.num_tokens != len(self.permutation):
                raise ValueError(
                    f"the rotary has {part.num_tokens} tokens, the grid of these windows {len(self.permutation)}: it "
                    "must be that of the whole grid"
                )
            return part.index_tokens(self.permutation.to(part.device))
        self._check(part, f"argument {index} of pack")
        return part.index_select(0, self.permutation.to(part.device))

    def _check(self, x: Any, name: str) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, a Rotary or None, got {type(x).__name__}")
        if x.ndim == 0 or x.shape[0] != len(self.permutation):
            raise ValueError(
                f"{name} must be ({len(self.permutation)}, ...), a row for each token of the grid, got shape "
                f"{tuple(x.shape)}: a batch of images is one grid, PatchGrid.packed([(height, width)] * batch), and "
                "its tensors are x.flatten(0, 1)"
            )


# Mixed precision of FSDP rebuilds every dataclass among a block's arguments, and this one has its own constructor.
del PatchGrid.__dataclass_fields__


def _check_int(name: str, value: object, low: int) -> None:
    # checked first: a symbolic int of torch.compile supports no other check
    if isinstance(value, bool) or not (isinstance(value, int) or hasattr(value, "__index__")):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < low:  # type: ignore[operator]
        raise ValueError(f"{name} must be at least {low}, got {value}")


def _cumulative(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths], device="cpu").cumsum(0).to(torch.int32)


def _pad(x: Tensor, before: int, after: int) -> Tensor:
    """Pad (n, ...) with zeros (False) to (before + n + after, ...)."""
    return torch.cat([x.new_zeros(before, *x.shape[1:]), x, x.new_zeros(after, *x.shape[1:])])


def _raster(height: int, width: int, merge: int) -> Tensor:
    """Return (height * width, 2) float32 of (row, column), row-major over merge blocks, row-major inside each."""
    row, column = torch.meshgrid(*(torch.arange(n, device="cpu") for n in (height, width)), indexing="ij")
    points = torch.stack([row, column], dim=-1).float()
    # (h, w, 2) -> (h/m, m, w/m, m, 2) -> (h/m, w/m, m, m, 2)
    blocks = points.view(height // merge, merge, width // merge, merge, 2).transpose(1, 2)
    return blocks.reshape(-1, 2)
