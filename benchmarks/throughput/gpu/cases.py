# SPDX-License-Identifier: Apache-2.0
"""Measured shapes, in order."""

from __future__ import annotations

from dataclasses import dataclass

from spatial_pe.lab.bench.cases import Shape

DIMS = (64, 72, 80)
# 64 tokens are a window of Qwen2.5-VL: packed, and an image of 448 x 448 pixels has 16 of them.
WINDOW, WINDOWS_OF_AN_IMAGE = 64, 16
HEADS = 16
# Total tokens in the large batch: 80 MB for each of q, k, v at head_dim 64, more than an L2 holds.
LARGE = 36_864
# Images in the small batches.
SMALL = (1, 8)
# (tokens, head_dim) with targets (report.TARGETS); the windows and the most different ones first, so that a run that
# ends early has one of each kind.
TARGETS = (
    *((64, 80), (576, 64), (196, 64), (729, 72), (1024, 80)),
    *((64, 64), (1024, 64), (4096, 64), (256, 64), (1025, 64)),
)
# torch.compile and FlexAttention compile for half a minute each, whatever the shape
COMPILED = {(576, 64): ("forward", "backward"), (64, 80): ("forward",)}
ATTENTION = ("forward", "backward", "forward+backward")


@dataclass(frozen=True)
class Work:
    """A shape, its measurements ("rotary" is the rotation alone), and its variants (see variants.py)."""

    shape: Shape
    directions: tuple[str, ...]
    rounds: int
    variants: tuple[str, ...]


FUSED = ("ours", "off", "cuda", "cuda-off", "auto")
SEPARATE = ("rotary-cudnn", "rotary-flash", "fa2", "fa3", "fa4")
EAGER = ("eager-cudnn", "eager-flash")
PACKED = ("eager-loop", "rotary-varlen")
TABLE = (*FUSED, *SEPARATE, *EAGER)
COMPILER = ("compiled-cudnn", "flex", "cudnn-rope")


def plan(name: str) -> list[Work]:
    """Return the work, most important first: a run does as much as it has time for, and lists the rest.

    table: the shapes with targets, a large batch of each. small: one image, and eight. compiled: torch.compile, and
    cuDNN's own rotation.
    """
    if name == "table":
        return [Work(large(*pair), ("forward", "backward", "rotary"), 7, _names(pair, TABLE)) for pair in TARGETS]
    if name == "small":
        few = ("ours", "off", "cuda", "auto", *SEPARATE, *EAGER)
        return [Work(small(*pair, n), ("forward",), 5, _names(pair, few)) for n in SMALL for pair in TARGETS[:5]]
    if name == "compiled":
        some = ("ours", "rotary-cudnn", "eager-cudnn", *COMPILER)
        return [Work(large(*pair), directions, 5, some) for pair, directions in COMPILED.items()]
    raise ValueError(f"no plan is called {name!r}")


PLANS = ("table", "small", "compiled")


def _names(pair: tuple[int, int], names: tuple[str, ...]) -> tuple[str, ...]:
    return (*names, *PACKED) if pair[0] == WINDOW else names


def large(tokens: int, dim: int) -> Shape:
    return shape(LARGE // tokens, tokens, dim)


def small(tokens: int, dim: int, images: int) -> Shape:
    return shape(images * WINDOWS_OF_AN_IMAGE if tokens == WINDOW else images, tokens, dim)


def shape(batch: int, tokens: int, dim: int, heads: int = HEADS) -> Shape:
    """Return the shape of a call; 64 tokens are a window, and the batch their number."""
    return Shape(batch, heads, tokens, dim, packed=tokens == WINDOW)
