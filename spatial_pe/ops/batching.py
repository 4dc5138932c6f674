# SPDX-License-Identifier: Apache-2.0
"""torch.vmap rules of the op, its backward and the rotation: lanes become samples of one call.

A rule takes (info, in_dims, *arguments of the op) and returns (results, dimension of the lanes in each). Packed lanes
run one after the other: their sequences may differ, and each lane is checked separately.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Positions of the arguments that the two ops share; the backward has GRADIENTS before them: dout, out and lse. Those of
# keys of their own are at the end, or left out. Of the tables: where cos is, sin comes next.
TABLES, CU_SEQLENS, GRADIENTS = (3, 12), 7, 3

Results = tuple[tuple[Tensor, ...], tuple[int, ...]]


def forward(info: Any, in_dims: Sequence[int | None], *args: Any) -> Results:
    return _batched(torch.ops.spatial_pe.rope_attention, info.batch_size, in_dims, args, 0)


def backward(info: Any, in_dims: Sequence[int | None], *args: Any) -> Results:
    return _batched(torch.ops.spatial_pe.rope_attention_backward, info.batch_size, in_dims, args, GRADIENTS)


def rotate(
    info: Any, in_dims: Sequence[Any], xs: Sequence[Tensor], cos: Tensor, sin: Tensor, pairing: str, inverse: bool
) -> tuple[list[Tensor], list[int]]:
    lanes = info.batch_size
    by_lane = [_lanes_first(x, dim, lanes) for x, dim in zip(xs, in_dims[0], strict=True)]
    samples = by_lane[0].shape[1]
    tables = _folded_tables(cos, sin, in_dims[1:3], lanes, samples)
    rotated = torch.ops.spatial_pe.rotate([_folded(x) for x in by_lane], *tables, pairing, inverse)
    return [x.unflatten(0, (lanes, samples)) for x in rotated], [0] * len(rotated)


def _batched(op: Callable, lanes: int, in_dims: Sequence[int | None], args: tuple, shared: int) -> Results:
    by_lane = [_lanes_first(x, dim, lanes) for x, dim in zip(args, in_dims, strict=True)]
    if args[shared + CU_SEQLENS] is not None:
        each = [op(*(_readable(x[i]) if isinstance(x, Tensor) else x for x in by_lane)) for i in range(lanes)]
        results = tuple(torch.stack(parts) for parts in zip(*each, strict=True))
    else:
        samples = by_lane[0].shape[1]
        folded = [_folded(x) for x in by_lane]
        for at in (shared + position for position in TABLES):
            if at < len(args):
                both = slice(at, at + 2)
                folded[both] = _folded_tables(args[at], args[at + 1], in_dims[both], lanes, samples)
        results = tuple(x.unflatten(0, (lanes, samples)) for x in op(*folded))
    return results, (0,) * len(results)


def _lanes_first(x: Any, dim: int | None, lanes: int) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.expand(lanes, *x.shape) if dim is None else x.movedim(dim, 0)


def _folded(x: Any) -> Any:
    """Fold (lanes, B, ...) into (lanes * B, ...)."""
    return _readable(x.flatten(0, 1)) if isinstance(x, Tensor) else x


def _folded_tables(
    cos: Tensor | None, sin: Tensor | None, dims: Sequence[int | None], lanes: int, samples: int
) -> list[Tensor | None]:
    """Fold two (B|1, N, H|1, R/2), or with lanes, into (lanes * B | 1, N, H|1, R/2): a shared table stays one."""
    tables = [cos, sin]
    if cos is None or (dims[0] is dims[1] is None and cos.shape[0] == 1):
        return tables
    by_lane = (_lanes_first(x, dim, lanes) for x, dim in zip(tables, dims, strict=True))
    return [x.expand(-1, samples, -1, -1, -1).flatten(0, 1) for x in by_lane]


def _readable(x: Tensor) -> Tensor:
    """Return x with a last dimension of stride 1, as the kernels need it."""
    return x if x.stride(-1) == 1 else x.contiguous()
