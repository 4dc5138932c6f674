# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels: fused forward and backward on a GPU, without a compiler on the user's machine.

    pieces.py     heads in powers of two, loading and turning them, products: what all kernels are made of
    sequences.py  which tokens a program works on: dense, packed, padded
    attention.py, attention_backward.py   sequences of any length
    windows.py    forward and backward of sequences of at most 128 tokens
    operands.py   turns k once, where the loop does not
    rotate.py     the rotation alone; angles.py: the gradient of its angles
    plan.py       from a call to the launches that serve it; launch.py: one of them
    configs.py    tile sizes; tune.py measures them, tuned.py keeps what was measured

This file answers what a backend must answer, and imports nothing of Triton until it is known to be there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from ...rotary import Rotary
from ..call import Call
from .configs import INTERPRETED

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Offsets within a tile, of at most 128 tokens, are 32 bits; those of tiles are 64.
MOST_BETWEEN_TOKENS = 2**31 // 128


def unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton (Linux; comes with torch's CUDA and ROCm builds)"
    if INTERPRETED or torch.cuda.is_available():
        return None
    return "no GPU that torch can use"


def cannot_serve(call: Call) -> str | None:
    device = call.q.device
    dim = call.q.shape[-1]
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return f"q is on {device}: this backend computes on a GPU"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} is sm_{major}{minor}: needs sm_80 (Ampere) or newer"
    if call.q.dtype not in DTYPES:
        return f"no {call.q.dtype} kernel: float32, bfloat16 and float16 only"
    if dim % 8 or not 16 <= dim <= 128:
        return f"head_dim is {dim}: must be a multiple of 8 from 16 to 128"
    if call.q.shape[2] > 65535:
        return f"q has {call.q.shape[2]} heads: at most 65,535, the limit of a launch's second dimension"
    for name, x in (("q", call.q), ("k", call.k), ("v", call.v)):
        if x.stride(1) >= MOST_BETWEEN_TOKENS:
            return f"{name} has {x.stride(1):,} elements between tokens: at most {MOST_BETWEEN_TOKENS - 1:,}"
    return None


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Returns out (B, N, H, D) and lse (B, H, N) float32, zero where a sample has no token."""
    from .plan import plan_forward

    if call.q.device.type == "cpu":
        list(call.sequences())  # checks the lengths; on a GPU that would wait for them
    plan = plan_forward(call)
    plan.run(call.q.device)
    out, lse = plan.results
    return out, lse


def backward(call: Call, out: Tensor, lse: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dq, dk, dv, contiguous."""
    from .plan import plan_backward

    plan = plan_backward(call, out, lse, dout)
    plan.run(call.q.device)
    dq, dk, dv = plan.results
    return dq, dk, dv


def angle_gradient(q: Tensor, k: Tensor, dq: Tensor, dk: Tensor, rotary: Rotary, seqlens: Tensor | None) -> Tensor:
    """dφ in the shape of the tables, (B|1, N, H|1, R/2) float32, from the final gradients of q and k."""
    from .plan import plan_angles

    plan = plan_angles(q, k, dq, dk, rotary, seqlens)
    plan.run(q.device)
    return plan.results[0].sum_to_size(rotary.cos.shape).to(rotary.cos.dtype)


def cannot_rotate(x: Tensor) -> str | None:
    """As cannot_serve, for the rotation alone."""
    return unavailable() or cannot_serve(Call(x, x, x, None, 1.0, None, None, None))


def rotation(xs: Sequence[Tensor], rotary: Rotary, inplace: bool = False, inverse: bool = False) -> tuple[Tensor, ...]:
    """R(x) of x, or of q and k, (B, N, H|Hkv, D): contiguous, unless in place. inverse: turned back."""
    from .plan import plan_rotation

    plan = plan_rotation(xs, rotary, inplace, inverse)
    plan.run(xs[0].device)
    return plan.results
