# SPDX-License-Identifier: Apache-2.0
"""From a call to the launches that serve it. Launches are data, so that tests can compile exactly those that users run."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ...rotary import Rotary
from ..call import Call
from . import configs
from .attention import forward_kernel
from .attention_backward import key_kernel, query_kernel
from .launch import Launch
from .pieces import starts, widths
from .rotate import rotate_kernel
from .sequences import DENSE, PACKED, PADDED, programs
from .windows import window_backward_kernel, window_forward_kernel


@dataclass(frozen=True)
class Plan:
    """Launches in their order, and the tensors that hold the results after them."""

    launches: tuple[Launch, ...]
    results: tuple[Tensor, ...]

    def run(self, device: torch.device) -> None:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            for launch in self.launches:
                launch.run()


@dataclass(frozen=True)
class Shape:
    """What all kernels of a call share."""

    call: Call
    form: str
    bounds: Tensor  # cu_seqlens, seqlens, or any tensor where there are none
    sequences: int
    family: configs.Family
    tables: tuple[Tensor, Tensor]
    table_strides: tuple[int, int, int]

    @classmethod
    def of(cls, call: Call, family: configs.Family | None) -> Shape:
        q = call.q
        bounds = call.cu_seqlens if call.cu_seqlens is not None else call.seqlens
        form = PACKED if call.cu_seqlens is not None else PADDED if call.seqlens is not None else DENSE
        sequences = q.shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
        if call.rotary is None:
            tables, strides = (q, q), (0, 0, 0)
        else:
            tables, strides = tables_of(call.rotary)
        return cls(
            call,
            form,
            q if bounds is None else bounds,
            sequences,
            family or configs.family_of(q.device),
            tables,
            strides,
        )

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

    def window(self, backward: bool) -> tuple[int, configs.Window] | None:
        """(tile, configuration) if windows.py serves the call. How long packed sequences are, only max_seqlen says."""
        q = self.call.q
        longest = self.call.max_seqlen if self.form == PACKED and self.call.max_seqlen else self.tokens
        found = configs.window(self.family, q.dtype, longest, q.shape[-1], backward)
        return None if found is None else (max(16, triton.next_power_of_2(longest)), found)

    def constants(self, *tensors: Tensor) -> dict:
        """What is compiled in, for kernels that read these tensors."""
        return head_constants(self.call.q.shape[-1], self.call.rotary) | {
            "ALIGN": alignment(*tensors),
            "TABLE_ALIGN": alignment(*self.tables),
            "FORM": self.form,
        }

    def grid(self, block: int, heads: int) -> tuple[int, int]:
        return programs(self.form, self.sequences, self.tokens, block), heads


def head_constants(dim: int, rotary: Rotary | None) -> dict:
    return {
        "D": dim,
        "R": 0 if rotary is None else rotary.rotary_dim,
        "PAIRING": "half" if rotary is None else rotary.pairing,
        "START": starts(dim),
        "WIDTH": widths(dim),
    }


def tables_of(rotary: Rotary) -> tuple[tuple[Tensor, Tensor], tuple[int, int, int]]:
    """float32 tables, contiguous in the last dimension and alike in the others, and their strides (batch, token, head)."""
    cos, sin = (t.detach().float() for t in (rotary.cos, rotary.sin))
    if cos.stride(-1) != 1 or cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    batch, token, head = (
        0 if size == 1 else stride for size, stride in zip(cos.shape[:3], cos.stride()[:3], strict=True)
    )
    return (cos, sin), (batch, cos.stride(1) if cos.shape[1] > 1 else token, head)


def alignment(*tensors: Tensor) -> int:
    """What divides all strides: the elements of a load of 16 bytes, or 1."""
    wide = 16 // tensors[0].itemsize
    return wide if all(stride % wide == 0 for x in tensors for stride in x.stride()[:-1]) else 1


def strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


# ---------------------------------------------------------------------------------------------------------- forward


def plan_forward(call: Call, family: configs.Family | None = None) -> Plan:
    """family: plan for another kind of GPU than that of the tensors."""
    shape = Shape.of(call, family)
    q, k, v = call.q, call.k, call.v
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[0], shape.heads, shape.tokens), dtype=torch.float32, device=q.device)
    sizes = (shape.sequences, shape.tokens, shape.heads, shape.heads // shape.kv_heads, call.scale)
    if window := shape.window(backward=False):
        arguments = (
            *(q, k, v, out, lse, *shape.tables, shape.bounds, *sizes),
            *(*strides(q), *strides(k), *strides(v), *shape.table_strides),
        )
        return Plan((_windows(window_forward_kernel, shape, window, arguments, shape.heads, (q, k, v)),), (out, lse))

    tile = configs.forward_tile(shape.family, q.dtype, q.shape[-1])
    in_loop = call.rotary is not None and shape.tokens <= configs.ROTATE_K_UP_TO[shape.family]
    launches: tuple[Launch, ...] = ()
    keys, key_strides = k, strides(k)
    if not in_loop and call.rotary is not None:
        turn, keys, key_strides = turned(k, shape)
        launches = (turn,)
    forward = Launch(
        forward_kernel,
        shape.grid(tile.bm, shape.heads),
        (q, keys, v, out, lse, *shape.tables, shape.bounds, *sizes)
        + (*strides(q), *key_strides, *strides(v), *shape.table_strides),
        shape.constants(q, keys, v)
        | {"ROTATE_K": in_loop or call.rotary is None, "BM": tile.bm, "BN": tile.bn, "STAGES": tile.stages},
        tile.warps,
    )
    return Plan((*launches, forward), (out, lse))


def turned(x: Tensor, shape: Shape) -> tuple[Launch, Tensor, tuple[int, int, int]]:
    """R(x) in operand order, (H, B N, padded D), the launch that makes it, and its strides (0, token, head)."""
    tokens, heads, dim = x.shape[1:]
    block = configs.ROTATE_BLOCK
    out = torch.empty((heads, shape.rows, sum(widths(dim))), dtype=x.dtype, device=x.device)
    launch = Launch(
        rotate_kernel,
        (x.shape[0] * triton.cdiv(tokens, block), heads),
        (x, out, *shape.tables, tokens, shape.rows, *strides(x), *shape.table_strides),
        head_constants(dim, shape.call.rotary)
        | {"ALIGN": alignment(x), "TABLE_ALIGN": alignment(*shape.tables), "BLOCK": block},
        4,
    )
    return launch, out, (0, out.stride(1), out.stride(0))


def _windows(
    kernel, shape: Shape, window: tuple[int, configs.Window], arguments: tuple, heads: int, read: tuple
) -> Launch:
    block, config = window
    return Launch(
        kernel,
        (triton.cdiv(shape.sequences, config.per_program), heads),
        arguments,
        shape.constants(*read) | {"BLOCK": block, "PER_PROGRAM": config.per_program, "STAGES": config.stages},
        config.warps,
    )


# --------------------------------------------------------------------------------------------------------- backward


def plan_backward(call: Call, out: Tensor, lse: Tensor, dout: Tensor, family: configs.Family | None = None) -> Plan:
    shape = Shape.of(call, family)
    q, k, v = call.q, call.k, call.v
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    group = shape.heads // shape.kv_heads
    if window := shape.window(backward=True):
        arguments = (
            *(q, k, v, out, dout, lse, dq, dk, dv, *shape.tables, shape.bounds),
            *(shape.sequences, shape.tokens, shape.heads, shape.kv_heads, group, call.scale),
            *(*strides(q), *strides(k), *strides(v), *strides(dout), *shape.table_strides),
        )
        return Plan(
            (_windows(window_backward_kernel, shape, window, arguments, shape.kv_heads, (q, k, v, dout)),), (dq, dk, dv)
        )

    turn, turned_k, _ = turned(k, shape)
    turned_q = turned_k.new_empty((shape.heads, shape.rows, turned_k.shape[-1]))
    delta = torch.empty_like(lse)
    constants = shape.constants(q, v, dout)
    tile = configs.query_tile(shape.family, q.dtype, q.shape[-1])
    by_query = Launch(
        query_kernel,
        shape.grid(tile.bm, shape.heads),
        (q, turned_k, v, out, dout, lse, dq, turned_q, delta, *shape.tables, shape.bounds)
        + (shape.sequences, shape.tokens, shape.rows, shape.heads, group, call.scale)
        + (*strides(q), *strides(v), *strides(dout), *shape.table_strides),
        constants | {"BM": tile.bm, "BN": tile.bn, "STAGES": tile.stages},
        tile.warps,
    )
    tile = configs.key_tile(shape.family, q.dtype, q.shape[-1])
    by_key = Launch(
        key_kernel,
        shape.grid(tile.bn, shape.kv_heads),
        (turned_q, turned_k, v, dout, lse, delta, dk, dv, *shape.tables, shape.bounds)
        + (shape.sequences, shape.tokens, shape.rows, shape.heads, shape.kv_heads, group, call.scale)
        + (*strides(v), *strides(dout), *shape.table_strides),
        constants | {"BM": tile.bm, "BN": tile.bn, "STAGES": tile.stages},
        tile.warps,
    )
    return Plan((turn, by_query, by_key), (dq, dk, dv))
