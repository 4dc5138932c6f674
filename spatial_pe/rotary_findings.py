# SPDX-License-Identifier: Apache-2.0
"""Causes of what is wrong in a probed encoding: those that were met in public code.

The probe (rotary_report.py) gives the 2 x 2 matrix of every channel pair at every token. From it follow the angle of a
pair per row and per column, whether one angle or two are in it, and whether the angles of an axis are a geometric
sequence that has been wrapped at half a circle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .rotary import Rotary

Pair = tuple[int, ...]
# Of an image, in row-major order: token indices, and (height, width).
Image = tuple[Tensor, tuple[int, int]]
LEVELS = ("fine", "suspicious", "wrong")
# Radians. Smaller changes of an angle are rounding: float32 sines of equal angles differ by 6e-8 (a vectorised sine
# rounds differently from a scalar one), and the slowest pair in use (theta 1e6, head_dim 128) changes by 1.2e-6 a
# patch. Angles up to 256 in float32 are rounded by 1.5e-5.
STILL, ROUNDING = 3e-7, 1e-4
# An axis whose fastest pair rotates by less than this over the whole image leaves scores nearly as they are:
# cos(0.5) = 0.88. A ladder from 1 radian a patch rotates by 15 over 16 patches.
LEAST_ANGLE = 0.5
# Of a predicted angle, in radians, wrapped; and of the logarithm of the ratio of neighbours in a geometric sequence.
PREDICTED, GEOMETRIC = 0.05, 0.02
DEGREES = math.degrees(1)


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        level: "wrong": not 2D RoPE; "suspicious": it may be meant, and seldom is.
        cause: a short name: "two_angles", "sign", "lengths", "not_relative", "no_position", "axis_missing",
            "flattened", "full_width", "prefix", "aliasing", "degrees", "slow", "still".
        text: what, where, and what to do.
    """

    level: str
    cause: str
    text: str

    def __str__(self) -> str:
        return f"{self.level.upper() if self.level == 'wrong' else self.level}: {self.text}"


def worst(findings: Sequence[Finding]) -> str:
    """Return the highest level among the findings."""
    return max((finding.level for finding in findings), key=LEVELS.index, default="fine")


# ---------------------------------------------------------------------------------------------------------- one pair


def is_rotation(local: Tensor) -> bool:
    """Return whether all (N, 2, 2) matrices of a pair are rotations, up to the rounding of float32 tables."""
    angle = _angles(local)
    expected = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1).view_as(local)
    return bool((local - expected).abs().max() < 1e-3)


def two_angles(local: Tensor) -> Tensor | None:
    """Return the (N, 2) angles by which the two channels of a pair are rotated, if each is by one of its own."""
    first, second = torch.atan2(-local[:, 0, 1], local[:, 0, 0]), torch.atan2(local[:, 1, 0], local[:, 1, 1])
    unit = local.norm(dim=-1)
    if bool((torch.linalg.det(local) + 1).abs().max() < 1e-3):
        return None  # a reflection
    differ = (torch.remainder(first - second + math.pi, 2 * math.pi) - math.pi).abs().max() > 1e-3
    return torch.stack([first, second], -1) if bool((unit - 1).abs().max() < 1e-3) and differ else None


def speed(local: Tensor, image: Image) -> tuple[float, float]:
    """Return the angles of a pair per row and per column, radians in (-pi, pi]."""
    tokens, (height, width) = image
    angle = _angles(local[tokens]).view(height, width)
    return _step(angle), _step(angle.T)


def _angles(local: Tensor) -> Tensor:
    return torch.atan2(local[:, 1, 0], local[:, 0, 0])


def _step(angle: Tensor) -> float:
    """Return the mean step between neighbouring rows: roughly from neighbours, then from the first and the last."""
    last = len(angle) - 1
    if last == 0:
        return 0.0
    steps = angle.diff(dim=0)
    step = float(torch.atan2(steps.sin().mean(), steps.cos().mean()))
    rest = angle[-1] - angle[0] - last * step
    return step + float(torch.atan2(rest.sin().mean(), rest.cos().mean())) / last


def wrapped(angle: float) -> float:
    return math.remainder(angle, 2 * math.pi)


# ------------------------------------------------------------------------------------------------------------- causes


@dataclass(frozen=True)
class Probed:
    """Results of the probe. heads: for each sample and head the (N, 2, 2) matrices of its pairs. axes: as reported."""

    heads: Sequence[dict[Pair, Tensor]]
    axes: dict[Pair, str]
    images: Sequence[Image]
    is_rotation: bool
    is_relative: bool
    encodes_position: bool | None
    unrotated_is_identity: bool
    norm_ratio: tuple[float, float]
    determinant: tuple[float, float]
    table: Rotary | None
    shifted: bool  # relative if the prefix tokens are counted as the first patches

    @property
    def largest(self) -> Image:
        return max(self.images, key=lambda image: min(image[1]) * 1000 + max(image[1]))

    def speeds(self, head: dict[Pair, Tensor]) -> dict[Pair, tuple[float, float]]:
        return {pair: speed(local, self.largest) for pair, local in head.items() if is_rotation(local)}


def findings(probed: Probed) -> tuple[Finding, ...]:
    """Return all findings, the worst first."""
    found = [finding for check in CHECKS for finding in check(probed)]
    return tuple(sorted(found, key=lambda finding: -LEVELS.index(finding.level)))


def _rotates(probed: Probed) -> list[Finding]:
    if probed.is_rotation:
        return []
    pairs: dict[Pair, Tensor] = {}
    for head in probed.heads:
        for pair, local in head.items():
            if (angles := two_angles(local)) is not None:
                pairs.setdefault(pair, angles)
    if pairs and all(bool((a + b).sin().abs().max() < 1e-3) for a, b in (x.unbind(-1) for x in pairs.values())):
        text = (
            f"a minus sign is missing in {len(pairs)} pairs: the two channels of each are rotated by opposite angles. "
            "A pair (x1, x2) becomes (x1 cos - x2 sin, x1 sin + x2 cos); rotate-half is torch.cat([-x2, x1], -1)"
        )
        return [Finding("wrong", "sign", text)]
    if pairs:
        pair, angles = next(iter(pairs.items()))
        at = int((angles[:, 0] - angles[:, 1]).sin().abs().argmax())
        a, b = (round(angle, 4) + 0.0 for angle in angles[at].tolist())  # 0, and not -0
        layout = (
            "each angle must stand twice side by side, angles.repeat_interleave(2, -1), not torch.cat([angles, angles])"
            if pair[1] - pair[0] == 1
            else "both halves must hold all angles, torch.cat([angles, angles], -1), and not each angle twice, or one "
            "axis in each half"
        )
        text = (
            f"two angles in one pair: of {len(pairs)} pairs, e.g. channels {pair}, one channel is rotated by {a:.3g} "
            f"and the other by {b:.3g} (token {at}). The tables are laid out for another pairing: under this one "
            f"{layout}"
        )
        return [Finding("wrong", "two_angles", text)]
    low, high = probed.norm_ratio
    least, most = probed.determinant
    text = f"not a rotation: lengths change by {low:.3g} to {high:.3g}, determinants are {least:.3g} to {most:.3g}"
    if abs(least + 1) < 1e-3:
        text += ": a sign is reversed in one channel of a pair"
    return [Finding("wrong", "lengths", text)]


def _relative(probed: Probed) -> list[Finding]:
    if probed.is_relative or not probed.is_rotation:
        return []
    if probed.shifted:
        text = (
            "shifted by the prefix: the angles of the first token of all, and not of the first patch, are those of "
            "patch 0. Count patches from behind the prefix tokens"
        )
        return [Finding("wrong", "prefix", text)]
    text = (
        "not relative: scores of patches at the same offset differ. The angles must be linear in row and column, and "
        "the same for all tokens, q and k"
    )
    return [Finding("wrong", "not_relative", text)]


def _position(probed: Probed) -> list[Finding]:
    if probed.encodes_position is not False:
        return []
    text = "every patch is mapped alike, so attention cannot tell where it is: are the angles all 0?"
    return [Finding("wrong", "no_position", text)]


def _prefix(probed: Probed) -> list[Finding]:
    if probed.unrotated_is_identity:
        return []
    return [Finding("wrong", "prefix", "prefix or suffix tokens are CHANGED: their angle should be 0")]


def _axes(probed: Probed) -> list[Finding]:
    """Return an axis on which nothing depends, or one index for both."""
    if not probed.encodes_position:
        return []
    height, width = (max(image[1][i] for image in probed.images) for i in (0, 1))
    driven = set(probed.axes.values())
    for axis, other, size in (("rows", "columns", width), ("cols", "rows", height)):
        if size > 1 and driven <= {axis, "none"}:
            kept = "row" if axis == "rows" else "column"
            text = f"no pair depends on the {other[:-1]}: all patches of a {kept} are the same to attention"
            return [Finding("wrong", "axis_missing", text)]
    if height > 1 and width > 1 and all(_flattened(probed.speeds(head), probed.largest[1]) for head in probed.heads):
        text = (
            "one index over the flattened grid: a step down rotates every pair as far as a whole row of steps to the "
            "right, so that the end of a row is beside the start of the next. 2D RoPE gives rows and columns pairs of "
            "their own"
        )
        return [Finding("wrong", "flattened", text)]
    if height > 1 and width > 1 and (one := _one_combination(probed)) is not None:
        row, column = one
        text = (
            f"rows and columns enter every pair in one combination, {row:.3g} row + {column:.3g} column: all patches "
            "along a diagonal are the same to attention"
        )
        return [Finding("wrong", "axis_missing", text)]
    still = sum(axis == "none" for axis in probed.axes.values())
    if still:
        text = f"{still} of {len(probed.axes)} pairs never rotate: channels that pass through need no pair"
        return [Finding("suspicious", "still", text)]
    return []


def _one_combination(probed: Probed) -> tuple[float, float] | None:
    """Return (row, column) of the direction that the angles of all pairs of all heads have in common, if they have."""
    speeds = [pair for head in probed.heads for pair in probed.speeds(head).values() if max(map(abs, pair)) > ROUNDING]
    if len(speeds) < 2 or any(abs(row) < STILL or abs(column) < STILL for row, column in speeds):
        return None
    row, column = max(speeds, key=lambda pair: math.hypot(*pair))
    size = math.hypot(row, column)
    alike = all(abs(r * column - c * row) < 1e-3 * math.hypot(r, c) * size for r, c in speeds)
    return (row / size, column / size) if alike else None


def _flattened(speeds: dict[Pair, tuple[float, float]], size: tuple[int, int]) -> bool:
    """Return whether a step along one axis is as many steps along the other as that is long, for every pair."""
    moving = [pair for pair in speeds.values() if max(map(abs, pair)) > ROUNDING]
    height, width = size
    by_rows = all(abs(wrapped(row - width * column)) < ROUNDING for row, column in moving)
    by_columns = all(abs(wrapped(column - height * row)) < ROUNDING for row, column in moving)
    return len(moving) > 1 and (by_rows or by_columns)


def _wavelengths(probed: Probed) -> list[Finding]:
    """Return what is odd about the angles per patch of each axis: wrapped ones, degrees, ones too small to matter."""
    found: dict[str, Finding] = {}
    for head in probed.heads:
        speeds = probed.speeds(head)
        for index, axis in enumerate(("rows", "cols")):
            along = [abs(pair[index]) for pair in speeds.values() if abs(pair[index]) > STILL]
            extent = probed.largest[1][index] - 1
            if not along or extent < 1:
                continue
            fastest = fastest_of(along)
            if fastest > math.pi:
                found.setdefault("aliasing", _aliasing(axis, fastest))
            elif max(along) * extent < LEAST_ANGLE:
                text = (
                    f"{axis}: the fastest pair rotates by {max(along) * extent:.2g} radians over {extent + 1} patches, "
                    "which scores hardly show: are the coordinates divided by too much, or radians taken for degrees?"
                )
                found.setdefault("slow " + axis, Finding("suspicious", "slow", text))
    return list(found.values())


def _aliasing(axis: str, fastest: float) -> Finding:
    if abs(fastest / DEGREES - 1) < 0.02:
        text = f"{axis}: the fastest pair rotates by {fastest:.3g} radians per patch, one in degrees: use radians"
        return Finding("wrong", "degrees", text)
    text = (
        f"aliasing: {axis}: the fastest pair rotates by {fastest:.3g} radians per patch, more than half a circle: what "
        f"lies {2 * math.pi / fastest:.2g} patches away looks the same to it"
    )
    return Finding("suspicious", "aliasing", text)


def fastest_of(speeds: Sequence[float]) -> float:
    """Return the largest angle per patch of pairs in their order, as it was before it was wrapped.

    The slow pairs of a geometric sequence are as they were made. It is fitted to them and continued; where it predicts
    all others, wrapped, the fast ones are its continuation. Else the largest one as it is.
    """
    order = min((list(speeds), list(speeds)[::-1]), key=_tail)
    begin = _tail(order)
    kept = order[begin : begin + 8]
    known, unknown = len(kept), begin
    if unknown == 0 or not (known >= 3 or (known == 2 and unknown >= 2)):
        return max(speeds)
    x = torch.arange(known, dtype=torch.float64)
    y = torch.tensor(kept, dtype=torch.float64).log()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    level = float(y.mean() - slope * x.mean())
    predicted = [math.exp(level - slope * i) for i in range(unknown, 0, -1)]
    fits = all(abs(abs(wrapped(p)) - w) < PREDICTED for p, w in zip(predicted, order, strict=False))
    return predicted[0] if fits and predicted[0] > math.pi else max(speeds)


def _tail(speeds: list[float]) -> int:
    """Return where the geometric sequence begins that the speeds end with."""
    logs = [math.log(speed) for speed in speeds]
    steps = [a - b for a, b in pairwise(logs)]
    begin = len(steps)
    # rounding hides the ratio of the slowest ones, so the fastest that is known so far says what it is
    while (
        begin > 0
        and steps[begin - 1] > 0
        and (begin == len(steps) or abs(steps[begin - 1] - steps[begin]) < GEOMETRIC * max(1.0, steps[begin]))
    ):
        begin -= 1
    return begin


def _full_width(probed: Probed) -> list[Finding]:
    if probed.table is None or (layout := doubled(probed.table)) is None:
        return []
    columns = probed.table.cos.shape[-1]
    text = (
        f"full-width tables: {columns} columns, each angle twice, under which {2 * columns} channels rotate. A Rotary "
        f"has a column for each pair: Rotary(cos{layout}, sin{layout})"
    )
    return [Finding("wrong", "full_width", text)]


def doubled(table: Rotary) -> str | None:
    """Return the index that takes each angle of a full-width table once, or None for a table that is none."""
    cos, sin = table.cos, table.sin
    columns = cos.shape[-1]
    if columns < 4 or columns % 2:
        return None
    # more than one angle, at more than one place: a table of zeros is not full-width
    if bool((cos == cos[..., :1]).all()) or bool((sin == sin[:, :1]).all()):
        return None
    half = columns // 2
    if all(torch.equal(x[..., :half], x[..., half:]) for x in (cos, sin)):
        return f"[..., :{half}]"
    if all(torch.equal(x[..., 0::2], x[..., 1::2]) for x in (cos, sin)):
        return "[..., ::2]"
    if columns % 4 == 0:
        parts = [x.unflatten(-1, (2, 2, -1)) for x in (cos, sin)]
        if all(torch.equal(x[..., :, 0, :], x[..., :, 1, :]) for x in parts):  # [rows, rows, columns, columns]
            return ".unflatten(-1, (2, 2, -1))[..., 0, :].flatten(-2)"
    return None


CHECKS: tuple[Callable[[Probed], list[Finding]], ...] = (
    _full_width, _rotates, _relative, _position, _prefix, _axes, _wavelengths,
)  # fmt: skip
