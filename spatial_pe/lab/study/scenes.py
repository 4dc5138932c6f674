# SPDX-License-Identifier: Apache-2.0
"""Scenes with exact ground truth, of rendered shapes and of real pixels, drawn at any resolution.

A ``Scene`` is a list of sprites in the unit square; ``Album`` draws scenes at a size in pixels. What a sprite looks
like (its ``name``) comes from one of three domains: coloured shapes; handwriting (scikit-learn's digits); crops of
photographs (scikit-image's). Everything about a sprite but its name is a nuisance: the shape of a red one, the writer
of the digit, the place of the crop in the photograph. Training and test scenes share no handwriting and no part of a
photograph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

Array = np.ndarray
Shape = Callable[[Array, Array], Array]  # the signed distance from its edge, negative inside

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 215, 40),
    "magenta": (215, 60, 205),
    "cyan": (50, 205, 215),
}
DIGITS = {"zero": 0, "one": 1, "two": 2, "four": 4, "six": 6, "seven": 7}
PHOTOGRAPHS = {
    "fur": "chelsea",
    "tissue": "immunohistochemistry",
    "sky": "rocket",
    "brick": "brick",
    "cup": "coffee",
    "stars": "hubble_deep_field",
}
DOMAINS: dict[str, tuple[str, ...]] = {"shapes": (*COLOURS,), "digits": (*DIGITS,), "photographs": (*PHOTOGRAPHS,)}
NAMES = tuple(name for names in DOMAINS.values() for name in names)


LOOKS = 96  # of each name, in each split
GROUNDS = 128


@dataclass(frozen=True)
class Sprite:
    """``name``: one of NAMES or MARKS; ``look``: index of its LOOKS; centre and side in parts of the image."""

    name: str
    look: int
    x: float
    y: float
    side: float


@dataclass(frozen=True)
class Scene:
    """``ground``: index of the background in GROUNDS; ``split``: "train" or "test", whose pixels are used."""

    sprites: tuple[Sprite, ...]
    ground: int
    split: str

    def transformed(self, transform: str) -> Scene:
        """Flip or rotate by a row of TRANSFORMS; the sprites stay upright, so that none becomes unfamiliar."""
        places = [TRANSFORMS[transform](sprite.x, sprite.y) for sprite in self.sprites]
        return replace(
            self, sprites=tuple(replace(sprite, x=x, y=y) for sprite, (x, y) in zip(self.sprites, places, strict=True))
        )


TRANSFORMS: dict[str, Callable[[float, float], tuple[float, float]]] = {
    "hflip": lambda x, y: (1.0 - x, y),
    "vflip": lambda x, y: (x, 1.0 - y),
    "rot90": lambda x, y: (y, 1.0 - x),  # counterclockwise, as numpy's and torch's rot90
}


class Album:
    """Renderer of some of ``scenes`` (one split): the same scene at another size is the same picture with more pixels.

    Each look is drawn once per size, at half-pixel offsets, and pasted: 0.2 ms an image at 64 pixels, so that training
    draws its batches on the fly and a data set is as large as its list of scenes.
    """

    def __init__(self, scenes: Sequence[Scene]) -> None:
        self.split = scenes[0].split
        self.grounds = np.array([scene.ground for scene in scenes])
        ends = np.cumsum([len(scene.sprites) for scene in scenes])
        self.spans = [np.arange(end - len(scene.sprites), end) for end, scene in zip(ends, scenes, strict=True)]
        sprites = [sprite for scene in scenes for sprite in scene.sprites]
        self.looks = np.array([[KINDS.index(sprite.name), sprite.look] for sprite in sprites])
        self.places = np.array([[sprite.y, sprite.x] for sprite in sprites])
        self.sides = np.array([sprite.side for sprite in sprites])

    def __len__(self) -> int:
        return len(self.grounds)

    def draw(self, which: Sequence[int] | Array, size: int) -> Array:
        """Return pictures (n, 3, size, size) uint8."""
        margin = 2  # half a pixel of a sprite at the edge may fall outside
        canvas = np.pad(
            _grounds(self.split, size)[self.grounds[which]], ((0, 0), (margin, margin), (margin, margin), (0, 0))
        )
        picture = np.repeat(np.arange(len(which)), [len(self.spans[index]) for index in which])
        sprite = np.concatenate([self.spans[index] for index in which])
        for side in np.unique(self.sides[sprite]):
            some = self.sides[sprite] == side
            self._paste(canvas, picture[some], sprite[some], float(side), size, margin)
        return canvas[:, margin:-margin, margin:-margin].transpose(0, 3, 1, 2)

    def roles(self, grid: int) -> Array:
        """Return the content of each patch of a grid x grid picture, (n, grid * grid) int64: 0 for nothing, 1 to 6 for
        the first to sixth name of its domain, then the marks."""
        centres = (np.arange(grid) + 0.5) / grid
        role = np.where(self.looks[:, 0] < len(NAMES), self.looks[:, 0] % ROLES, self.looks[:, 0] - len(NAMES) + ROLES)
        picture = np.repeat(np.arange(len(self)), [len(span) for span in self.spans])
        # (s, grid, grid): Chebyshev distance of the patch centre from the sprite's
        rows, columns = (abs(centres - self.places[:, axis, None]) for axis in (0, 1))
        away = np.maximum(rows[:, :, None], columns[:, None, :])
        inside = away < self.sides[:, None, None] / 2 + 0.25 / grid
        roles = np.zeros((len(self), grid, grid), np.int64)
        nearest = np.full(roles.shape, np.inf)
        np.minimum.at(nearest, picture, np.where(inside, away, np.inf))
        sprite, row, column = np.nonzero(inside & (away == nearest[picture]))
        roles[picture[sprite], row, column] = 1 + role[sprite]
        return roles.reshape(len(self), -1)

    def _paste(self, canvas: Array, picture: Array, sprite: Array, side: float, size: int, margin: int) -> None:
        """Paste all sprites of one size at once: they do not overlap, so their order is irrelevant."""
        stamps = _stamps(self.split, size, side)
        box = stamps.shape[-2]
        halves = np.round(2 * size * self.places[sprite]).astype(int) - 2 * (box // 2)
        top, left = (halves // 2 + margin).T
        kind, look = self.looks[sprite].T
        stamp = stamps[kind, look, halves[:, 0] % 2, halves[:, 1] % 2]  # (s, box, box, 4)
        where, row, column = np.nonzero(stamp[..., 3])
        colour = stamp[where, row, column].astype(np.uint16)
        at = picture[where], top[where] + row, left[where] + column
        opacity = colour[:, 3:]
        canvas[at] = (canvas[at] * (255 - opacity) + colour[:, :3] * opacity) // 255


@functools.cache
def _stamps(split: str, size: int, side: float) -> Array:
    """Render every look of every kind of sprite, (kinds, LOOKS, 2, 2, box, box, 4) uint8: colour and opacity, its
    centre at pixel box // 2, moved by 0 or 1/2 down and right."""
    width = side * size
    box = int(np.ceil(width)) + 1
    stamps = np.zeros((len(KINDS), LOOKS, 2, 2, box, box, 4), np.uint8)
    for kind, look, down, right in np.ndindex(*stamps.shape[:4]):
        v, u = ((np.arange(box) + 0.5 - box // 2 - half / 2) * (2 / width) for half in (down, right))
        colour, opacity = _look(KINDS[kind], look, split, u, v, 2 / width)
        stamps[kind, look, down, right, ..., :3] = np.clip(colour, 0, 255)
        stamps[kind, look, down, right, ..., 3] = 255 * opacity
    return stamps


@functools.cache
def _grounds(split: str, size: int) -> Array:
    """Return dark parts of photographs, tinted, of low contrast: (GROUNDS, size, size, 3) uint8."""
    across = (np.arange(size) + 0.5) * (2 / size) - 1
    names = list(PHOTOGRAPHS)
    grounds = np.empty((GROUNDS, size, size, 3), np.uint8)
    for index in range(GROUNDS):
        rng = np.random.default_rng([index, split == "test"])
        crop = _crop(names[rng.integers(len(names))], split, rng, across, across)
        grounds[index] = 0.25 * crop + 0.75 * rng.uniform(30, 90, 3)
    return grounds


def _look(name: str, look: int, split: str, u: Array, v: Array, pixel: float) -> tuple[Array, Array]:
    """Return colour (h, w, 3) or (3,) and opacity (h, w) of a sprite at its columns u (w,) and rows v (h,), -1 .. 1;
    ``pixel``: the width of one."""
    rng = np.random.default_rng([KINDS.index(name), look, split == "test"])
    if name in COLOURS:
        shape = SHAPES[rng.integers(len(SHAPES))]
        return np.array(COLOURS[name]) + rng.uniform(-20, 20, 3), _coverage(shape, u, v, pixel)
    if name in DIGITS:
        glyphs = _digits(split)[DIGITS[name]]
        glyph = glyphs[look % len(glyphs)]
        inside = abs(u[None]).clip(abs(v[:, None])) <= 1 + pixel
        return rng.uniform(200, 255, 3), _sample(glyph, (v + 1) * 4 + 0.5, (u + 1) * 4 + 0.5) * inside
    if name in PHOTOGRAPHS:
        return _crop(name, split, rng, u, v), _coverage(_disc, u, v, pixel)
    colour, shape = MARKS[name]
    return np.array(colour), _coverage(shape, u, v, pixel)


def _coverage(shape: Shape, u: Array, v: Array, pixel: float) -> Array:
    """Return how much of each pixel a shape covers: its edge is one pixel wide."""
    return (0.5 - shape(u[None], v[:, None]) / pixel).clip(0, 1)


# ------------------------------------------------------------------------------- shapes: signed distances, -1 .. 1


def _disc(u: Array, v: Array) -> Array:
    return np.hypot(u, v) - 0.9


def _square(u: Array, v: Array) -> Array:
    return np.maximum(abs(u), abs(v)) - 0.8


def _diamond(u: Array, v: Array) -> Array:
    return (abs(u) + abs(v) - 1) / np.sqrt(2)


def _ring(u: Array, v: Array) -> Array:
    return abs(np.hypot(u, v) - 0.65) - 0.25


def _cross(u: Array, v: Array) -> Array:
    return np.minimum(np.maximum(abs(u) - 0.3, abs(v) - 0.95), np.maximum(abs(u) - 0.95, abs(v) - 0.3))


def _triangle(u: Array, v: Array) -> Array:
    return np.maximum(v - 0.75, abs(u) * 0.87 - (v + 0.95) * 0.45)


SHAPES = (_disc, _square, _diamond, _ring, _cross, _triangle)
# marks of the map; they look alike in every domain
MARKS = {
    "start": ((60, 230, 90), _disc),
    "goal": ((240, 70, 60), _diamond),
    "wall": ((235, 235, 235), _square),
}
KINDS = (*NAMES, *MARKS)
ROLES = 6  # names in a domain


# -------------------------------------------------------------------------------------------------------- real pixels


@functools.cache
def _digits(split: str) -> dict[int, Array]:
    """Load handwritten digits, 8 x 8 with a border of 1, ink 0 .. 1. The first two thirds train, the rest, by other
    writers, test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    parts = {"train": slice(0, 1200), "test": slice(1200, None)}
    images, labels = (data.images[parts[split]] / 12).clip(0, 1), data.target[parts[split]]
    images = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    return {digit: images[labels == digit] for digit in DIGITS.values()}


@functools.cache
def _photograph(name: str, split: str) -> Array:
    """Return (96, 96, 3): half of a photograph, the left one for training and the right one for testing."""
    from skimage import data, transform

    picture = getattr(data, PHOTOGRAPHS[name])()
    picture = picture if picture.ndim == 3 else np.stack([picture] * 3, axis=-1)
    half = picture.shape[1] // 2
    picture = picture[:, :half] if split == "train" else picture[:, -half:]
    return 255 * transform.resize(picture[:half], (96, 96), anti_aliasing=True)


def _crop(name: str, split: str, rng: np.random.Generator, u: Array, v: Array) -> Array:
    """Return a part of a photograph, 24 x 24 of its 96 x 96 pixels, at rows v and columns u: (h, w, 3)."""
    picture = _photograph(name, split)
    left, top = rng.uniform(12, 83, 2)
    return _sample(picture, top + 12 * v, left + 12 * u)


def _sample(picture: Array, rows: Array, columns: Array) -> Array:
    """Interpolate linearly at each of the rows (h,) and columns (w,): (h, w, ...)."""

    def blend(x: Array, at: Array) -> Array:
        first = np.floor(at).clip(0, len(x) - 2).astype(int)
        weight = (at - first).clip(0, 1).reshape(-1, *[1] * (x.ndim - 1))
        return x[first] * (1 - weight) + x[first + 1] * weight

    return blend(blend(picture, rows).swapaxes(0, 1), columns).swapaxes(0, 1)
