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
from ..base import AttentionCall, Form, float32_tables, form_of, table_strides
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
class Side:
    """The queries, or the keys: how many tokens, which of them are a sequence, and their table."""

    form: Form
    bounds: Tensor  # cu_seqlens, seqlens, or any tensor where there are none
    tokens: int
    rows: int  # tokens of all samples
    tables: tuple[Tensor, Tensor]
    table_strides: tuple[int, int, int]

    @classmethod
    def of(cls, x: Tensor, rotary: Rotary | None, cu_seqlens: Tensor | None, seqlens: Tensor | None) -> Side:
        bounds = next((lengths for lengths in (cu_seqlens, seqlens) if lengths is not None), x)
        tables = (x, x) if rotary is None else float32_tables(rotary)
        table = (0, 0, 0) if rotary is None else table_strides(tables[0])
        return cls(form_of(cu_seqlens, seqlens), bounds, x.shape[1], x.shape[0] * x.shape[1], tables, table)


@dataclass(frozen=True)
class Shared:
    """Arguments that all kernels of a call share. ``queries`` and ``keys`` are one object where k has the tokens of q."""

    call: AttentionCall
    choice: tiles.Choice
    queries: Side
    keys: Side

    @classmethod
    def of(cls, call: AttentionCall, choice: tiles.Choice | None) -> Shared:
        queries = Side.of(call.q, call.rotary, call.cu_seqlens, call.seqlens)
        own = call.keys
        keys = queries if own is None else Side.of(call.k, own.rotary, own.cu_seqlens, own.seqlens)
        return cls(call, choice or tiles.choice_of(call), queries, keys)

    @property
    def sequences(self) -> int:
        return self.call.num_sequences

    @property
    def heads(self) -> int:
        return self.call.q.shape[2]

    @property
    def kv_heads(self) -> int:
        return self.call.k.shape[2]

    def constants(self, side: Side, *tensors: Tensor) -> dict[str, Any]:
        """Return the compile-time constants of kernels that read these tensors, with results for the tokens of a side."""
        dim = self.call.q.shape[-1]
        return head_constants(dim, self.call.rotary) | {
            "CUT": channel_cut(dim),
            "ALIGN": alignment(*tensors),
            "TABLE_ALIGN": alignment(*side.tables),
            "FORM": side.form,
        }

    def other(self, side: Side) -> dict[str, str]:
        """Return the constant of the kernels that take the two sides apart: the form of the other one."""
        if self.queries is self.keys:
            return {"OTHER": ""}
        return {"OTHER": self.keys.form if side is self.queries else self.queries.form}

    @property
    def materialize(self) -> dict[str, bool]:
        return {
            "MATERIALIZE": self.choice.family in ("ampere", "ada")
            and self.call.rotary is not None
            and not tiles.INTERPRETED
        }

    def grid(self, side: Side, block: int, heads: int) -> tuple[int, int]:
        return programs(side.form, self.sequences, side.tokens, block), heads


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
    queries, keys = shared.queries, shared.keys
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[0], shared.heads, queries.tokens), dtype=torch.float32, device=q.device)
    group = shared.heads // shared.kv_heads
    if window := shared.choice.window_forward:
        per_program = tiles.heads_per_program(window, shared.sequences, shared.heads)
        forward = Launch(
            window_forward_kernel,
            (shared.sequences, triton.cdiv(shared.heads, per_program)),
            (q, k, v, out, lse, *queries.tables, queries.bounds)
            + (shared.sequences, queries.tokens, shared.heads, group, call.scale)
            + (*strides(q), *strides(k), *strides(v), *queries.table_strides),
            shared.constants(queries, q, k, v)
            | shared.materialize
            | {"BLOCK": window.block, "PER_PROGRAM": per_program, "STAGES": window.stages},
            window.warps,
        )
        return Plan((forward,), (out, lse))

    tile = shared.choice.forward
    launches: tuple[Launch, ...] = ()
    scratch: tuple[Tensor, ...] = ()
    loaded, key_strides = k, strides(k)
    # a table of their own: the loop has one
    before = call.rotary is not None and (tile.rotate_k == "before" or keys is not queries)
    family = shared.choice.family
    # in the loop, 8 bytes of spills with "axis_half" at D = 72
    scattered = call.rotary is not None and call.rotary.pairing == "axis_half"
    join = tiles.joins(family, q.dtype) and (before or not scattered)
    if before:
        launch, loaded, key_strides = pre_rotation(k, shared)
        launches, scratch = (launch,), (loaded,)
    forward = Launch(
        forward_kernel,
        shared.grid(queries, tile.bm, shared.heads),
        (q, loaded, v, out, lse, *queries.tables, queries.bounds, keys.bounds)
        + (shared.sequences, queries.tokens, keys.tokens, shared.heads, group, call.scale)
        + (*strides(q), *key_strides, *strides(v), *queries.table_strides),
        shared.constants(queries, q, loaded, v)
        | shared.other(queries)
        | shared.materialize
        | {"ROTATE_K": not before, "JOIN": join, "RUNNING": q.dtype == torch.float16}
        | {"ONES": tiles.ones(family, q.dtype)}
        | {"BM": tile.bm, "BN": tile.bn, "STAGES": tile.stages},
        tile.warps,
        tile.maxnreg,
    )
    return Plan((*launches, forward), (out, lse), scratch)


def pre_rotation(k: Tensor, shared: Shared) -> tuple[Launch, Tensor, tuple[int, int, int]]:
    """Return a launch that writes R(k) as operands, the result (Hkv, B M, padded D), and its strides (0, token, head)."""
    tokens, heads, dim = k.shape[1:]
    config, side = tiles.OPERANDS, shared.keys
    blocks = k.shape[0] * triton.cdiv(tokens, config.block)
    per_program = tiles.heads_per_program(config, blocks, heads)
    rotary = shared.call.key_rotary
    out = torch.empty((heads, side.rows, operand_width(dim)), dtype=k.dtype, device=k.device)
    launch = Launch(
        operands_kernel,
        (blocks, triton.cdiv(heads, per_program)),
        (k, out, *side.tables, tokens, side.rows, heads, *strides(k), *side.table_strides),
        head_constants(dim, rotary)
        | {"ALIGN": alignment(k), "TABLE_ALIGN": alignment(*side.tables)}
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
    queries, keys = shared.queries, shared.keys
    if window := shared.choice.window_backward:
        backward = Launch(
            window_backward_kernel,
            (shared.sequences, shared.kv_heads),
            (q, k, v, out, dout, lse, dq, dk, dv, *queries.tables, queries.bounds)
            + (shared.sequences, queries.tokens, shared.heads, shared.kv_heads, group, call.scale)
            + (*strides(q), *strides(k), *strides(v), *strides(dout), *queries.table_strides),
            shared.constants(queries, q, k, v, dout) | shared.materialize | {"BLOCK": window.block},
            window.warps,
        )
        return Plan((backward,), (dq, dk, dv))

    rotate_k, rotated_k, _ = pre_rotation(k, shared)
    rotated_q = rotated_k.new_empty((shared.heads, queries.rows, rotated_k.shape[-1]))
    delta = torch.empty_like(lse)
    tile = shared.choice.query
    by_query = Launch(
        query_kernel,
        shared.grid(queries, tile.bm, shared.heads),
        (q, rotated_k, v, out, dout, lse, dq, rotated_q, delta, *queries.tables, queries.bounds, keys.bounds)
        + (shared.sequences, queries.tokens, keys.tokens, queries.rows, keys.rows, shared.heads, group, call.scale)
        + (*strides(q), *strides(v), *strides(dout), *queries.table_strides),
        shared.constants(queries, q, v, dout)
        | shared.other(queries)
        | {"SPLIT": tile.split, "BM": tile.bm, "BN": tile.bn, "STAGES": tile.stages},
        tile.warps,
        tile.maxnreg,
    )
    tile = shared.choice.key
    by_key = Launch(
        key_kernel,
        shared.grid(keys, tile.bn, shared.kv_heads),
        (rotated_q, rotated_k, v, dout, lse, delta, dk, dv, *keys.tables, keys.bounds, queries.bounds)
        + (shared.sequences, keys.tokens, queries.tokens, keys.rows, queries.rows)
        + (shared.heads, shared.kv_heads, group, call.scale)
        + (*strides(v), *strides(dout), *keys.table_strides),
        shared.constants(keys, q, v, dout)
        | shared.other(keys)
        # in a loop over heads, or with sequence starts that 16 does not divide (Triton 3.6), a second inner loop spills more
        | {
            "SPLIT": tile.split and group == 1 and keys.form != PACKED,
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
