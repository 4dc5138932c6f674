# SPDX-License-Identifier: Apache-2.0
"""Map a call to its launches. Launches are data, so that tests can compile exactly those that users run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ...rotary import Rotary
from ..base import AttentionCall, float32_tables, table_strides
from . import tiles
from .kernels.angle_gradient import angles_kernel
from .kernels.backward import key_kernel, query_kernel
from .kernels.blocks import channel_cut, operand_width, pair_cut
from .kernels.forward import forward_kernel
from .kernels.pre_rotate import operands_kernel
from .kernels.rotate import rotate_kernel
from .kernels.sequences import PACKED, programs
from .kernels.windows import window_backward_kernel, window_forward_kernel
from .launch import Launch


@dataclass(frozen=True)
class Plan:
    """Launches in order, the tensors that hold the results, and scratch tensors."""

    launches: tuple[Launch, ...]
    results: tuple[Tensor, ...]
    scratch: tuple[Tensor, ...] = ()

    def run(self, device: torch.device) -> None:
        with on(device):
            for launch in self.launches:
                launch.run()


def on(device: torch.device):
    """Make the device current: Triton launches there. Entering a context costs 2 us, so only if needed."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@dataclass(frozen=True)
class Shared:
    """Arguments that all kernels of a call share."""

    call: AttentionCall
    bounds: Tensor  # cu_seqlens, seqlens, or any tensor where there are none
    choice: tiles.Choice
    tables: tuple[Tensor, Tensor]
    table_strides: tuple[int, int, int]

    @classmethod
    def of(cls, call: AttentionCall, choice: tiles.Choice | None) -> Shared:
        tables = (call.q, call.q) if call.rotary is None else float32_tables(call.rotary)
        table = (0, 0, 0) if call.rotary is None else table_strides(tables[0])
        bounds = call.q if call.bounds is None else call.bounds
        return cls(call, bounds, choice or tiles.choice_of(call), tables, table)

    @property
    def form(self) -> str:
        return self.call.form

    @property
    def sequences(self) -> int:
        return self.call.num_sequences

    @property
    def tokens(self) -> int:
        return self.call.q.shape[1]

    @property
    def rows(self) -> int:
        """Tokens of all samples."""
        return self.call.q.shape[0] * self.tokens

    @property
    def heads(self) -> int:
        return self.call.q.shape[2]

    @property
    def kv_heads(self) -> int:
        return self.call.k.shape[2]

    def constants(self, *tensors: Tensor) -> dict[str, Any]:
        """Return the compile-time constants of kernels that read these tensors."""
        dim = self.call.q.shape[-1]
        return head_constants(dim, self.call.rotary) | {
            "CUT": channel_cut(dim),
            "ALIGN": alignment(*tensors),
            "TABLE_ALIGN": alignment(*self.tables),
            "FORM": self.form,
        }

    @property
    def materialize(self) -> dict[str, bool]:
        return {
            "MATERIALIZE": self.choice.family == "ampere" and self.call.rotary is not None and not tiles.INTERPRETED
        }

    def grid(self, block: int, heads: int) -> tuple[int, int]:
        return programs(self.form, self.sequences, self.tokens, block), heads


def head_constants(dim: int, rotary: Rotary | None) -> dict[str, Any]:
    return {
        "D": dim,
        "R": 0 if rotary is None else rotary.rotary_dim,
        "PAIRING": "half" if rotary is None else rotary.pairing,
        "PAIRS": pair_cut(dim),
    }


def alignment(*tensors: Tensor) -> int:
    """Return a divisor of all strides: the number of elements in 16 bytes, or 1."""
    wide = 16 // tensors[0].itemsize
    return wide if all(stride % wide == 0 for x in tensors for stride in x.stride()[:-1]) else 1


def strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


# ---------------------------------------------------------------------------------------------------------- forward


def plan_forward(call: AttentionCall, choice: tiles.Choice | None = None) -> Plan:
    """Plan the forward. choice: overrides the tiles of the device."""
    shared = Shared.of(call, choice)
    q, k, v = call.q, call.k, call.v
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[0], shared.heads, shared.tokens), dtype=torch.float32, device=q.device)
    sizes = (shared.sequences, shared.tokens, shared.heads, shared.heads // shared.kv_heads, call.scale)
    if window := shared.choice.window_forward:
        per_program = tiles.heads_per_program(window, shared.sequences, shared.heads)
        forward = Launch(
            window_forward_kernel,
            (shared.sequences, triton.cdiv(shared.heads, per_program)),
            (q, k, v, out, lse, *shared.tables, shared.bounds, *sizes)
            + (*strides(q), *strides(k), *strides(v), *shared.table_strides),
            shared.constants(q, k, v)
            | shared.materialize
            | {"BLOCK": window.block, "PER_PROGRAM": per_program, "STAGES": window.stages},
            window.warps,
        )
        return Plan((forward,), (out, lse))

    tile = shared.choice.forward
    launches: tuple[Launch, ...] = ()
    scratch: tuple[Tensor, ...] = ()
    keys, key_strides = k, strides(k)
    before = call.rotary is not None and tile.rotate_k == "before"
    family = shared.choice.family
    # in the loop, 8 bytes of spills with "axis_half" at D = 72
    scattered = call.rotary is not None and call.rotary.pairing == "axis_half"
    join = tiles.joins(family, q.dtype) and (before or not scattered)
    if before:
        launch, keys, key_strides = pre_rotation(k, shared)
        launches, scratch = (launch,), (keys,)
    forward = Launch(
        forward_kernel,
        shared.grid(tile.bm, shared.heads),
        (q, keys, v, out, lse, *shared.tables, shared.bounds, *sizes)
        + (*strides(q), *key_strides, *strides(v), *shared.table_strides),
        shared.constants(q, keys, v)
        | shared.materialize
        | {"ROTATE_K": not before, "JOIN": join, "RUNNING": q.dtype == torch.float16}
        | {"ONES": tiles.ones(family, q.dtype)}
        | {"BM": tile.bm, "BN": tile.bn, "STAGES": tile.stages},
        tile.warps,
        tile.maxnreg,
    )
    return Plan((*launches, forward), (out, lse), scratch)


def pre_rotation(x: Tensor, shared: Shared) -> tuple[Launch, Tensor, tuple[int, int, int]]:
    """Return a launch that writes R(x) as operands, the result (H, B N, padded D), and its strides (0, token, head)."""
    tokens, heads, dim = x.shape[1:]
    config = tiles.OPERANDS
    blocks = x.shape[0] * triton.cdiv(tokens, config.block)
    per_program = tiles.heads_per_program(config, blocks, heads)
    rotary = shared.call.rotary
    out = torch.empty((heads, shared.rows, operand_width(dim)), dtype=x.dtype, device=x.device)
    launch = Launch(
        operands_kernel,
        (blocks, triton.cdiv(heads, per_program)),
        (x, out, *shared.tables, tokens, shared.rows, heads, *strides(x), *shared.table_strides),
        head_constants(dim, rotary)
        | {"ALIGN": alignment(x), "TABLE_ALIGN": alignment(*shared.tables)}
        | {"PER_HEAD": rotary is not None and rotary.cos.shape[2] > 1}
        | {"BLOCK": config.block, "PER_PROGRAM": per_program},
        config.warps,
    )
    return launch, out, (0, out.stride(1), out.stride(0))


# --------------------------------------------------------------------------------------------------------- backward


def plan_backward(
    call: AttentionCall, out: Tensor, lse: Tensor, dout: Tensor, choice: tiles.Choice | None = None
) -> Plan:
    """Plan the backward; dout (B, N, H, D) with a last dimension of stride 1."""
    shared = Shared.of(call, choice)
    q, k, v = call.q, call.k, call.v
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    group = shared.heads // shared.kv_heads
    if window := shared.choice.window_backward:
        backward = Launch(
            window_backward_kernel,
            (shared.sequences, shared.kv_heads),
            (q, k, v, out, dout, lse, dq, dk, dv, *shared.tables, shared.bounds)
            + (shared.sequences, shared.tokens, shared.heads, shared.kv_heads, group, call.scale)
            + (*strides(q), *strides(k), *strides(v), *strides(dout), *shared.table_strides),
            shared.constants(q, k, v, dout) | shared.materialize | {"BLOCK": window.block},
            window.warps,
        )
        return Plan((backward,), (dq, dk, dv))

    rotate_k, rotated_k, _ = pre_rotation(k, shared)
    rotated_q = rotated_k.new_empty((shared.heads, shared.rows, rotated_k.shape[-1]))
    delta = torch.empty_like(lse)
    constants = shared.constants(q, v, dout)
    tile = shared.choice.query
    by_query = Launch(
        query_kernel,
        shared.grid(tile.bm, shared.heads),
        (q, rotated_k, v, out, dout, lse, dq, rotated_q, delta, *shared.tables, shared.bounds)
        + (shared.sequences, shared.tokens, shared.rows, shared.heads, group, call.scale)
        + (*strides(q), *strides(v), *strides(dout), *shared.table_strides),
        constants | {"SPLIT": tile.split, "BM": tile.bm, "BN": tile.bn, "STAGES": tile.stages},
        tile.warps,
        tile.maxnreg,
    )
    tile = shared.choice.key
    by_key = Launch(
        key_kernel,
        shared.grid(tile.bn, shared.kv_heads),
        (rotated_q, rotated_k, v, dout, lse, delta, dk, dv, *shared.tables, shared.bounds)
        + (shared.sequences, shared.tokens, shared.rows, shared.heads, shared.kv_heads, group, call.scale)
        + (*strides(v), *strides(dout), *shared.table_strides),
        constants
        # in a loop over heads, or with sequence starts that 16 does not divide (Triton 3.6), a second inner loop spills more
        | {
            "SPLIT": tile.split and group == 1 and shared.form != PACKED,
            "BM": tile.bm,
            "BN": tile.bn,
            "STAGES": tile.stages,
        },
        tile.warps,
        tile.maxnreg,
    )
    return Plan((rotate_k, by_query, by_key), (dq, dk, dv), (rotated_k, rotated_q, delta))


# ------------------------------------------------------------------------------------- the rotation and its angles


def plan_rotation(xs: Sequence[Tensor], rotary: Rotary, inplace: bool = False, inverse: bool = False) -> Plan:
    """Plan R(x) of x, or of q and k, (B, N, H|Hkv, D), in one launch; contiguous, or in place, with no results."""
    tables = float32_tables(rotary)
    outs = tuple(xs) if inplace else tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in xs)
    q, k = xs[0], xs[-1]
    batch, tokens, heads, dim = q.shape
    kv_heads = k.shape[2] if len(xs) == 2 else 0
    config = tiles.ROTATION
    # in place, channels that pass through are not visited
    pairs = (rotary.rotary_dim if inplace else dim) // 2
    launch = Launch(
        rotate_kernel,
        (batch * triton.cdiv(tokens, config.block), triton.cdiv(heads + kv_heads, config.per_program)),
        (q, k, outs[0], outs[-1], *tables, tokens, heads, heads + kv_heads)
        + (*strides(q), *strides(k), *strides(outs[0]), *strides(outs[-1]), *table_strides(tables[0])),
        {
            "D": dim,
            "R": rotary.rotary_dim,
            "PAIRING": rotary.pairing,
            "PAIRS": pair_cut(2 * pairs),
            "VISITED": pairs,
            "ALIGN": alignment(*xs, *outs),
            "TABLE_ALIGN": alignment(*tables),
            "PER_HEAD": rotary.cos.shape[2] > 1,
            "INVERSE": inverse,
            "BLOCK": config.block,
            "PER_PROGRAM": config.per_program,
        },
        config.warps,
    )
    return Plan((launch,), () if inplace else outs)


def plan_angles(
    q: Tensor, k: Tensor, dq: Tensor, dk: Tensor, table: torch.Size, pairing: str, seqlens: Tensor | None
) -> Plan:
    """Plan dφ of every (sample, token, table head, pair): summed over heads that share an angle; (B, N, H|1, R/2) float32.

    table: Shared of cos, (B|1, N, H|1, R/2).
    """
    batch, tokens, heads, dim = q.shape
    table_heads, pairs = table[2:]
    out = torch.empty((batch, tokens, table_heads, pairs), dtype=torch.float32, device=q.device)
    block = tiles.ANGLES_BLOCK
    launch = Launch(
        angles_kernel,
        (batch * triton.cdiv(tokens, block), table_heads),
        (q, k, dq, dk, out, q if seqlens is None else seqlens, tokens, heads, k.shape[2], table_heads)
        + (*strides(q), *strides(k), *strides(dq), *strides(dk)),
        {
            "D": dim,
            "R": 2 * pairs,
            "PAIRING": pairing,
            "PAIRS": pair_cut(2 * pairs),
            "ALIGN": alignment(q, k, dq, dk),
            "PADDED": seqlens is not None,
            "PER_HEAD": table_heads > 1,
            "BLOCK": block,
        },
        4,
    )
    return Plan((launch,), (out,))
