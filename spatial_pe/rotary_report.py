# SPDX-License-Identifier: Apache-2.0
"""Check whether a table or function is a rotation and encodes relative position, by probing it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._utils.console import wrap
from .grid import PatchGrid
from .rotary import Rotary, rotated, split_pairs
from .rotary_findings import STILL, Finding, Probed, doubled, findings, worst

# At a time: 8 MB.
_MOST_LOGITS = 1 << 20

# Random (q, k): a single pair already gives a deviation of the right size.
_PROBES = 4


@dataclass(frozen=True)
class RotaryReport:
    """Result of ``verify_rotary``. Printing it gives a readable summary.

    Attributes:
        is_rotation: every token's linear map is a rotation: singular values and determinants are 1.
        is_relative: <fn(q)_n, fn(k)_m> depends on n and m only through their offset (rows, columns), for patches of
            the same image. A grid of one patch has no two pairs to compare and is relative.
        norm_ratio: smallest and largest |fn(x)_n| / |x|, over random x and all tokens: the typical distortion.
        singular_values: smallest and largest over all x: the worst distortion, exact.
        logit_deviation: the largest spread (max - min) of <fn(q)_n, fn(k)_m> / (|q| |k|) among all n, m of the same
            offset, over the offsets and a few random q, k.
        determinant: smallest and largest determinant of the blocks of channels that a token's map mixes (2 x 2 for
            anything like RoPE, 1 x 1 for channels that pass through).
        encodes_position: the map of some patch differs from that of another of the same image. False: attention
            cannot tell where a patch is, as with angles that are all 0. None: no image has two patches to compare.
        axes: for each channel pair (or larger block), the coordinate that its rotation depends on: ``"rows"``,
            ``"cols"``, ``"both"`` or ``"none"``. Channels that are not mixed are left out, unless a Rotary pairs them.
        unrotated_is_identity: prefix and suffix tokens are returned unchanged (True if there are none).
        tolerance: used for is_rotation and is_relative.
        findings: what is wrong or suspicious, and why, the worst first: ``Finding`` with a level, a cause, and a text.
    """

    is_rotation: bool
    is_relative: bool
    norm_ratio: tuple[float, float]
    singular_values: tuple[float, float]
    logit_deviation: float
    determinant: tuple[float, float]
    encodes_position: bool | None
    axes: dict[tuple[int, ...], str]
    unrotated_is_identity: bool
    tolerance: float
    findings: tuple[Finding, ...] = ()

    @property
    def level(self) -> str:
        """The worst level of the findings: "wrong", "suspicious" or "fine"."""
        return worst(self.findings)

    def __str__(self) -> str:
        def span(pair: tuple[float, float]) -> str:
            return f"{pair[0]:.6g} .. {pair[1]:.6g}"

        answers = {True: "yes", False: "NO", None: "unknown, of one patch"}
        rotation, relative, position = (answers[x] for x in (self.is_rotation, self.is_relative, self.encodes_position))
        lines = [
            f"rotation: {rotation}; relative: {relative}; encodes position: {position} (tolerance {self.tolerance:g})",
            f"  |fn(x)| / |x|     {span(self.norm_ratio)} for random x, {span(self.singular_values)} at worst",
            f"  block determinant {span(self.determinant)}",
            f"  logit deviation   {self.logit_deviation:.3g} of |q| |k|, among patches at the same offset",
        ]
        for axis in ("rows", "cols", "both", "none"):
            blocks = [block for block, driver in self.axes.items() if driver == axis]
            if blocks:
                shown = ", ".join(map(str, blocks[:2])) + (f", .. {blocks[-1]}" if len(blocks) > 2 else "")
                # "none" would read as "no problem"
                label = "no position" if axis == "none" else axis
                lines.append(f"  {label:<17} {len(blocks)} pairs: {shown}")
        for finding in self.findings:
            lines += wrap(str(finding), "  ", "    ")
        return "\n".join(lines)


def verify_rotary(
    fn_or_rotary: Rotary | Callable[[Any], Any],
    grid: PatchGrid,
    *,
    head_dim: int | None = None,
    tolerance: float = 1e-4,
) -> RotaryReport:
    """Check whether a rotary table or function rotates, and depends only on relative position.

    The map of each token is found by applying the function to basis vectors, D calls, and must be the same for every
    call. Time and memory grow with D N D and with N^2: a grid of 16 x 16 is as conclusive as a large one.

    Args:
        fn_or_rotary: a Rotary (each sample and head of its tables is checked); an encoding, which maps the grid to
            one; or any function from (N, D) float64 to (N, D), N the tokens of the grid in their order, one head, on
            the CPU. A function must be linear in x and act on each token alone; one that needs another dtype
            converts: ``lambda x: f(x.float())``.
        grid: positions of the N tokens. Packed grids are checked image by image.
        head_dim: D. For a Rotary at least its rotary_dim, which is the default; for a function 64 is the default.
            Tables of D columns, each angle twice, are found and named.
        tolerance: how far from 1 (0) the singular values and determinants (logit deviation) may be. The default
            covers float32 tables: angles of a 100 x 100 grid are rounded by 1e-5. For a bfloat16 path use 2e-2.

    Raises:
        TypeError: grid is not a PatchGrid, or the function does not return a tensor.
        ValueError: another number of tokens, head_dim out of range, a function that is not linear, that mixes
            tokens, or that returns another shape or NaN.
    """
    if not isinstance(grid, PatchGrid):
        raise TypeError(f"grid must be a spatial_pe.PatchGrid, got {type(grid).__name__}")
    given = _called(fn_or_rotary, grid)
    functions, pairs, dim = _functions(given, grid, head_dim)
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(_PROBES, 2, dim, generator=generator, dtype=torch.float64)
    parts = [_probe(fn, grid, dim, pairs, probes) for fn in functions]

    singular_values = _hull([part.singular_values for part in parts])
    determinant = _hull([part.determinant for part in parts])
    deviation = max(part.logit_deviation for part in parts)
    furthest = max(abs(x - 1.0) for x in (*singular_values, *determinant))
    moves = [part.moves for part in parts]
    probed = Probed(
        heads=[part.pairs for part in parts],
        axes=_merge_axes([part.axes for part in parts]),
        images=_images(grid),
        is_rotation=furthest <= tolerance,
        is_relative=deviation <= tolerance,
        encodes_position=None if moves[0] is None else any(moves),
        unrotated_is_identity=all(part.unrotated_error <= tolerance for part in parts),
        norm_ratio=_hull([part.norm_ratio for part in parts]),
        determinant=determinant,
        table=given if isinstance(given, Rotary) else None,
        shifted=max(part.shifted_deviation for part in parts) <= tolerance,
    )
    return RotaryReport(
        is_rotation=probed.is_rotation,
        is_relative=probed.is_relative,
        norm_ratio=probed.norm_ratio,
        singular_values=singular_values,
        logit_deviation=deviation,
        determinant=determinant,
        encodes_position=probed.encodes_position,
        axes=probed.axes,
        unrotated_is_identity=probed.unrotated_is_identity,
        tolerance=tolerance,
        findings=findings(probed),
    )


def _called(given: Any, grid: PatchGrid) -> Any:
    """Return the table of an encoding; anything else as it is: a function of x fails on a grid."""
    if isinstance(given, type):
        raise TypeError(f"fn_or_rotary is the class {given.__name__}: make one, {given.__name__}(head_dim)")
    if isinstance(given, Rotary) or not callable(given):
        return given
    try:
        table = given(grid)
    except Exception:
        return given
    return table if isinstance(table, Rotary) else given


def _functions(
    given: Rotary | Callable[[Tensor], Tensor], grid: PatchGrid, head_dim: int | None
) -> tuple[list[Callable[[Tensor], Tensor]], list[tuple[int, int]], int]:
    """Return one (N, D) -> (N, D) function per sample and head, the known pairs, and D."""
    if not isinstance(given, Rotary):
        if not callable(given):
            hint = ": Rotary(cos, sin), with a column for each pair" if isinstance(given, tuple | list) else ""
            raise TypeError(
                f"fn_or_rotary must be a Rotary, an encoding or a function, got {type(given).__name__}{hint}"
            )
        dim = 64 if head_dim is None else head_dim
        if dim < 1:
            raise ValueError(f"head_dim must be at least 1, got {dim}")
        return [given], [], dim
    if given.num_tokens != grid.num_tokens:
        raise ValueError(f"rotary has {given.num_tokens} tokens, the grid {grid.num_tokens}")
    dim = given.rotary_dim if head_dim is None or doubled(given) else head_dim
    if dim < given.rotary_dim:
        raise ValueError(f"head_dim must be at least rotary_dim={given.rotary_dim}, got {dim}")
    # float64 arithmetic on the values of the table
    cos, sin = (table.detach().double().cpu() for table in (given.cos, given.sin))
    rotaries = [
        Rotary(cos[b : b + 1, :, h : h + 1], sin[b : b + 1, :, h : h + 1], given.pairing)
        for b in range(cos.shape[0])
        for h in range(cos.shape[2])
    ]
    first, second = split_pairs(torch.arange(given.rotary_dim), given.pairing)
    pairs = list(zip(first.tolist(), second.tolist(), strict=True))
    return [_one_head(rotary) for rotary in rotaries], pairs, dim


def _one_head(rotary: Rotary) -> Callable[[Tensor], Tensor]:
    return lambda x: rotated(x[:, None], rotary)[:, 0]


@dataclass(frozen=True)
class _Part:
    """Findings for one function."""

    norm_ratio: tuple[float, float]
    singular_values: tuple[float, float]
    determinant: tuple[float, float]
    logit_deviation: float
    moves: bool | None
    axes: dict[tuple[int, ...], str]
    pairs: dict[tuple[int, ...], Tensor]  # (N, 2, 2) of each pair
    unrotated_error: float
    shifted_deviation: float  # if the tokens before the patches were the first patches


def _probe(
    fn: Callable[[Tensor], Tensor], grid: PatchGrid, dim: int, pairs: list[tuple[int, int]], probes: Tensor
) -> _Part:
    tokens = grid.num_tokens

    def call(x: Tensor) -> Tensor:
        try:
            with torch.no_grad():
                out = fn(x.clone())
        except Exception as failed:
            raise ValueError(
                f"fn fails on x ({tokens}, {dim}), the tokens of the grid and head_dim: "
                f"{type(failed).__name__}: {failed}"
            ) from failed
        if not isinstance(out, Tensor):
            raise TypeError(f"fn must return a tensor, got {type(out).__name__}")
        if out.shape != (tokens, dim):
            raise ValueError(f"fn must map ({tokens}, {dim}) to the same shape, got {tuple(out.shape)}")
        if not torch.isfinite(out).all():
            raise ValueError("fn returned NaN or Inf")
        return out.detach().double().cpu()

    q, k = ([call(vector.expand(tokens, dim)) for vector in probes[:, i]] for i in (0, 1))
    _check_linear(call, probes, q[0], k[0])

    # maps[n, j, i]: the contribution of channel i of token n to channel j
    maps = torch.stack([call(unit.expand(tokens, dim)) for unit in torch.eye(dim, dtype=torch.float64)], dim=-1)
    blocks = _blocks(maps, pairs)
    values, determinants, axes = [], [], {}
    mixed: dict[tuple[int, ...], Tensor] = {}
    for block in blocks:
        index = torch.tensor(block)
        local = maps[:, index[:, None], index]  # (N, s, s)
        values.append(_range(torch.linalg.svdvals(local)))
        determinants.append(_range(torch.linalg.det(local)))
        if len(block) > 1:
            axes[block] = _axis(local, grid)
        if len(block) == 2:
            mixed[block] = local

    norms = torch.stack([x.norm(dim=-1) / vector.norm() for x, vector in zip(q, probes[:, 0], strict=True)])
    still = maps[~grid.rotated] - torch.eye(dim, dtype=torch.float64)
    return _Part(
        norm_ratio=_range(norms),
        singular_values=_hull(values),
        determinant=_hull(determinants),
        logit_deviation=max(
            _deviation(x, y, grid) / float(pair.norm(dim=-1).prod()) for x, y, pair in zip(q, k, probes, strict=True)
        ),
        moves=_moves(maps, grid),
        axes=axes,
        pairs=mixed,
        unrotated_error=float(still.abs().max()) if still.numel() else 0.0,
        shifted_deviation=max(
            _deviation(x, y, grid, grid.prefix) / float(pair.norm(dim=-1).prod())
            for x, y, pair in zip(q, k, probes, strict=True)
        )
        if grid.prefix
        else float("inf"),
    )


def _check_linear(call: Callable[[Tensor], Tensor], probes: Tensor, fn_q: Tensor, fn_k: Tensor) -> None:
    """Raise unless a combination of q and k with other factors for each token is mapped to that combination."""
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, fn_q.shape[0], 1, generator=generator, dtype=torch.float64)
    got, expected = call(a * probes[0, 0] + b * probes[0, 1]), a * fn_q + b * fn_k
    # 3e-2: wide enough for a bfloat16 function, far below what a norm, a bias or a permutation does
    if (got - expected).abs().max() > 3e-2 * expected.abs().max():
        raise ValueError(
            "fn must be linear in x and act on each token alone: is a norm, bias or permutation inside it?"
        )


def _blocks(maps: Tensor, pairs: list[tuple[int, int]]) -> list[tuple[int, ...]]:
    """Return the channels that some token's map mixes, as connected sets ordered by their first channel."""
    dim = maps.shape[-1]
    linked = maps.abs().amax(0) > STILL
    for a, b in pairs:
        linked[a, b] = True
    linked |= linked.T.clone()
    blocks, seen = [], set()
    for start in range(dim):
        if start in seen:
            continue
        block, frontier = {start}, [start]
        while frontier:
            for other in linked[frontier.pop()].nonzero().flatten().tolist():
                if other not in block:
                    block.add(other)
                    frontier.append(other)
        seen |= block
        blocks.append(tuple(sorted(block)))
    return blocks


def _moves(maps: Tensor, grid: PatchGrid) -> bool | None:
    """Return whether the maps of two patches of an image differ; None without two patches."""
    images = [maps[image] for image, _ in _images(grid) if len(image) > 1]
    return any(bool((image - image[:1]).abs().max() > STILL) for image in images) if images else None


def _axis(local: Tensor, grid: PatchGrid) -> str:
    """Return the coordinate that changes the (N, s, s) maps of one block."""
    rows = cols = False
    for image, (height, width) in _images(grid):
        by_place = local[image].view(height, width, -1)
        rows |= bool((by_place - by_place[:1]).abs().max() > STILL)
        cols |= bool((by_place - by_place[:, :1]).abs().max() > STILL)
    return {(True, True): "both", (True, False): "rows", (False, True): "cols", (False, False): "none"}[rows, cols]


def _deviation(q: Tensor, k: Tensor, grid: PatchGrid, shift: int = 0) -> float:
    """Return the largest spread of <q_n, k_m> among the patches n, m of an image with the same offset; of the tokens
    that lie ``shift`` before them."""
    worst = 0.0
    for patches, (height, width) in _images(grid):
        image = patches - shift
        place = torch.arange(height * width)
        row, column = place // width, place % width
        low = torch.full(((2 * height - 1) * (2 * width - 1),), torch.inf, dtype=torch.float64)
        high = -low
        keys = k[image]
        for some in place.split(max(1, _MOST_LOGITS // len(place))):
            down, right = row - row[some, None], column - column[some, None]
            offset = ((down + height - 1) * (2 * width - 1) + right + width - 1).flatten()
            logits = (q[image][some] @ keys.T).flatten()
            low.scatter_reduce_(0, offset, logits, "amin")
            high.scatter_reduce_(0, offset, logits, "amax")
        worst = max(worst, float((high - low).max()))
    return worst


def _images(grid: PatchGrid) -> list[tuple[Tensor, tuple[int, int]]]:
    """Return for each image the token index of its patches in row-major order, and (height, width)."""
    images, start = [], 0
    coordinates = grid.coordinates().long()
    for (height, width), length in zip(grid.images, grid.lengths, strict=True):
        patches = start + grid.prefix + torch.arange(height * width)
        row, column = coordinates[patches].unbind(1)
        images.append((patches[torch.argsort(row * width + column)], (height, width)))
        start += length
    return images


def _merge_axes(parts: list[dict[tuple[int, ...], str]]) -> dict[tuple[int, ...], str]:
    """Merge over heads: a block that depends on rows in one head and on columns in another depends on both."""
    merged: dict[tuple[int, ...], str] = {}
    for axes in parts:
        for block, axis in axes.items():
            before = merged.get(block, "none")
            known = {before, axis} - {"none"}
            merged[block] = "both" if len(known) > 1 else (known.pop() if known else "none")
    return merged


def _range(x: Tensor) -> tuple[float, float]:
    return float(x.min()), float(x.max())


def _hull(ranges: list[tuple[float, float]]) -> tuple[float, float]:
    return min(low for low, _ in ranges), max(high for _, high in ranges)
