# SPDX-License-Identifier: Apache-2.0
"""From a call to the launches that serve it. Launches are data, so that tests can compile exactly those that users run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ...rotary import Rotary
from ..call import Call
from . import configs
from .angles import angles_kernel
from .attention import forward_kernel
from .attention_backward import key_kernel, query_kernel
from .launch import Launch
from .operands import operands_kernel
from .pieces import channel_cut, operand_width, pair_cut
from .rotate import rotate_kernel
from .sequences import DENSE, PACKED, PADDED, programs
from .windows import window_backward_kernel, window_forward_kernel


@dataclass(frozen=True)
class Plan:
    """Launches in their order, the tensors that hold the results after them, and those only needed on the way."""

    launches: tuple[Launch, ...]
    results: tuple[Tensor, ...]
    scratch: tuple[Tensor, ...] = ()

    def run(self, device: torch.device) -> None:
        with on(device):
            for launch in self.launches:
                launch.run()


def on(device: torch.device):
    """Triton launches on the current device, whatever the tensors say. Entering a context costs 2 us, so only if needed."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@dataclass(frozen=True)
class Shape:
    """What all kernels of a call share."""

    call: Call
    form: str
    bounds: Tensor  # cu_seqlens, seqlens, or any tensor where there are none
    sequences: int
    choice: configs.Choice
    tables: tuple[Tensor, Tensor]
    table_strides: tuple[int, int, int]

    @classmethod
    def of(cls, call: Call, choice: configs.Choice | None) -> Shape:
        q = call.q
        bounds = call.cu_seqlens if call.cu_seqlens is not None else call.seqlens
        form = PACKED if call.cu_seqlens is not None else PADDED if call.seqlens is not None else DENSE
        sequences = q.shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
        tables = (q, q) if call.rotary is None else tables_of(call.rotary)
        table = (0, 0, 0) if call.rotary is None else table_strides(tables[0])
        bounds = q if bounds is None else bounds
        return cls(call, form, bounds, sequences, choice or configs.choice_of(call), tables, table)

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
        """What is compiled in, for kernels that read these tensors."""
        dim = self.call.q.shape[-1]
        return head_constants(dim, self.call.rotary) | {
            "CUT": channel_cut(dim),
            "ALIGN": alignment(*tensors),
            "TABLE_ALIGN": alignment(*self.tables),
            "FORM": self.form,
        }

    @property
    def settle(self) -> dict[str, bool]:
        return {"SETTLE": self.choice.family == "ampere" and self.call.rotary is not None and not configs.INTERPRETED}

    def grid(self, block: int, heads: int) -> tuple[int, int]:
        return programs(self.form, self.sequences, self.tokens, block), heads


def head_constants(dim: int, rotary: Rotary | None) -> dict[str, Any]:
    return {
        "D": dim,
        "R": 0 if rotary is None else rotary.rotary_dim,
        "PAIRING": "half" if rotary is None else rotary.pairing,
        "PAIRS": pair_cut(dim),
    }


def tables_of(rotary: Rotary) -> tuple[Tensor, Tensor]:
    """float32 tables, contiguous in the last dimension and alike in the others."""
    cos, sin = rotary.cos, rotary.sin
    if cos.dtype != torch.float32:
        cos, sin = cos.float(), sin.float()
    if cos.stride(-1) != 1 or cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin


def table_strides(cos: Tensor) -> tuple[int, int, int]:
    """(batch, token, head), 0 where samples or heads share a table."""
    return 0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(1), 0 if cos.shape[2] == 1 else cos.stride(2)


def alignment(*tensors: Tensor) -> int:
    """What divides all strides: the elements of a load of 16 bytes, or 1."""
    wide = 16 // tensors[0].itemsize
    return wide if all(stride % wide == 0 for x in tensors for stride in x.stride()[:-1]) else 1


def strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


# ---------------------------------------------------------------------------------------------------------- forward


def plan_forward(call: Call, choice: configs.Choice | None = None) -> Plan:
    """choice: other tiles than those of the device, or those of another one."""
    shape = Shape.of(call, choice)
    q, k, v = call.q, call.k, call.v
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[0], shape.heads, shape.tokens), dtype=torch.float32, device=q.device)
    sizes = (shape.sequences, shape.tokens, shape.heads, shape.heads // shape.kv_heads, call.scale)
    if window := shape.choice.window_forward:
        per_program = configs.heads_per_program(window, shape.sequences, shape.heads)
        forward = Launch(
            window_forward_kernel,
            (shape.sequences, triton.cdiv(shape.heads, per_program)),
            (q, k, v, out, lse, *shape.tables, shape.bounds, *sizes)
            + (*strides(q), *strides(k), *strides(v), *shape.table_strides),
            shape.constants(q, k, v)
            | shape.settle
            | {"BLOCK": window.block, "PER_PROGRAM": per_program, "STAGES": window.stages},
            window.warps,
        )
        return Plan((forward,), (out, lse))

    tile = shape.choice.forward
    launches: tuple[Launch, ...] = ()
    scratch: tuple[Tensor, ...] = ()
    keys, key_strides = k, strides(k)
    before = call.rotary is not None and tile.turn == "before"
    family = shape.choice.family
    # in the loop, 8 bytes of spills with "axis_half" at D = 72
    scattered = call.rotary is not None and call.rotary.pairing == "axis_half"
    join = configs.joins(family, q.dtype) and (before or not scattered)
    if before:
        turn, keys, key_strides = turned(k, shape)
        launches, scratch = (turn,), (keys,)
    forward = Launch(
        forward_kernel,
        shape.grid(tile.bm, shape.heads),
        (q, keys, v, out, lse, *shape.tables, shape.bounds, *sizes)
        + (*strides(q), *key_strides, *strides(v), *shape.table_strides),
        shape.constants(q, keys, v)
        | shape.settle
        | {"ROTATE_K": not before, "JOIN": join, "RUNNING": q.dtype == torch.float16}
        | {"ONES": configs.ones(family, q.dtype)}
        | {"BM": tile.bm, "BN": tile.bn, "STAGES": tile.stages},
        tile.warps,
        tile.maxnreg,
    )
    return Plan((*launches, forward), (out, lse), scratch)


def turned(x: Tensor, shape: Shape) -> tuple[Launch, Tensor, tuple[int, int, int]]:
    """R(x) as operands, (H, B N, padded D), the launch that makes it, and its strides (0, token, head)."""
    tokens, heads, dim = x.shape[1:]
    config = configs.OPERANDS
    blocks = x.shape[0] * triton.cdiv(tokens, config.block)
    per_program = configs.heads_per_program(config, blocks, heads)
    rotary = shape.call.rotary
    out = torch.empty((heads, shape.rows, operand_width(dim)), dtype=x.dtype, device=x.device)
    launch = Launch(
        operands_kernel,
        (blocks, triton.cdiv(heads, per_program)),
        (x, out, *shape.tables, tokens, shape.rows, heads, *strides(x), *shape.table_strides),
        head_constants(dim, rotary)
        | {"ALIGN": alignment(x), "TABLE_ALIGN": alignment(*shape.tables)}
        | {"PER_HEAD": rotary is not None and rotary.cos.shape[2] > 1}
        | {"BLOCK": config.block, "PER_PROGRAM": per_program},
        config.warps,
    )
    return launch, out, (0, out.stride(1), out.stride(0))


# --------------------------------------------------------------------------------------------------------- backward


def plan_backward(call: Call, out: Tensor, lse: Tensor, dout: Tensor, choice: configs.Choice | None = None) -> Plan:
    """dout (B, N, H, D) with a last dimension of stride 1."""
    shape = Shape.of(call, choice)
    q, k, v = call.q, call.k, call.v
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    group = shape.heads // shape.kv_heads
    if window := shape.choice.window_backward:
        backward = Launch(
            window_backward_kernel,
            (shape.sequences, shape.kv_heads),
            (q, k, v, out, dout, lse, dq, dk, dv, *shape.tables, shape.bounds)
            + (shape.sequences, shape.tokens, shape.heads, shape.kv_heads, group, call.scale)
            + (*strides(q), *strides(k), *strides(v), *strides(dout), *shape.table_strides),
            shape.constants(q, k, v, dout) | shape.settle | {"BLOCK": window.block},
            window.warps,
        )
        return Plan((backward,), (dq, dk, dv))

    turn, turned_k, _ = turned(k, shape)
    turned_q = turned_k.new_empty((shape.heads, shape.rows, turned_k.shape[-1]))
    delta = torch.empty_like(lse)
    constants = shape.constants(q, v, dout)
    tile = shape.choice.query
    by_query = Launch(
        query_kernel,
        shape.grid(tile.bm, shape.heads),
        (q, turned_k, v, out, dout, lse, dq, turned_q, delta, *shape.tables, shape.bounds)
        + (shape.sequences, shape.tokens, shape.rows, shape.heads, group, call.scale)
        + (*strides(q), *strides(v), *strides(dout), *shape.table_strides),
        constants | {"SPLIT": tile.split, "BM": tile.bm, "BN": tile.bn, "STAGES": tile.stages},
        tile.warps,
        tile.maxnreg,
    )
    tile = shape.choice.key
    by_key = Launch(
        key_kernel,
        shape.grid(tile.bn, shape.kv_heads),
        (turned_q, turned_k, v, dout, lse, delta, dk, dv, *shape.tables, shape.bounds)
        + (shape.sequences, shape.tokens, shape.rows, shape.heads, shape.kv_heads, group, call.scale)
        + (*strides(v), *strides(dout), *shape.table_strides),
        constants
        # with a loop over heads around it, or starts of sequences that 16 does not divide (Triton 3.6), a loop more spills
        | {
            "SPLIT": tile.split and group == 1 and shape.form != PACKED,
            "BM": tile.bm,
            "BN": tile.bn,
            "STAGES": tile.stages,
        },
        tile.warps,
        tile.maxnreg,
    )
    return Plan((turn, by_query, by_key), (dq, dk, dv), (turned_k, turned_q, delta))


# ------------------------------------------------------------------------------------- the rotation and its angles


def plan_rotation(xs: Sequence[Tensor], rotary: Rotary, inplace: bool = False, inverse: bool = False) -> Plan:
    """R(x) of x, or of q and k, (B, N, H|Hkv, D), in one launch; contiguous, or in place, with no results."""
    tables = tables_of(rotary)
    outs = tuple(xs) if inplace else tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in xs)
    q, k = xs[0], xs[-1]
    batch, tokens, heads, dim = q.shape
    kv_heads = k.shape[2] if len(xs) == 2 else 0
    config = configs.ROTATION
    # in place, channels that pass through need no visit
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
    """dφ of every (sample, token, table head, pair): summed over the heads that share an angle; (B, N, H|1, R/2) float32.

    table: the shape of cos, (B|1, N, H|1, R/2).
    """
    batch, tokens, heads, dim = q.shape
    table_heads, pairs = table[2:]
    out = torch.empty((batch, tokens, table_heads, pairs), dtype=torch.float32, device=q.device)
    block = configs.ANGLES_BLOCK
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
