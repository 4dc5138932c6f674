# SPDX-License-Identifier: Apache-2.0
"""The Triton backend. Imports Triton only after finding that it is installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._utils.dispatcher import assume_constant
from ...rotary import Rotary
from ..base import AttentionCall, Keys, float32_tables
from . import tuning_store
from .installed import VERSION, numbers
from .tiles import INTERPRETED, bucket, capability, few_programs


def _unusable(version: str | None) -> str | None:
    """Return why the kernels cannot be compiled with this version, or None."""
    if version is None:
        return "triton is not installed: pip install triton (Linux; comes with torch's CUDA and ROCm builds)"
    if (found := numbers(version)) and found < OLDEST:
        return f"triton {version} is installed, the kernels need 3.5 or newer (as torch 2.9 has): pip install -U triton"
    return None


# constexpr_function in its top level
OLDEST = (3, 5)
# The first versions whose tl.dot is right and deterministic on datacenter Blackwell, whose products go through tensor
# memory: earlier ones lack waits for it (triton#9871: sm_100, 4 warps, wrong by orders of magnitude in 3.6; #10590:
# sm_103 still in 3.7, fixed in its main branch). sm_120, consumer Blackwell, has no tensor memory: it uses mma.sync, as
# sm_80 does, and no such case is known.
SOUND_PRODUCTS = {(10, 0): (3, 7), (10, 1): (3, 7), (10, 3): (3, 8), (11, 0): (3, 7)}
# Computed once: unavailable() is called for every call, also while one is traced.
UNUSABLE = _unusable(VERSION)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Offsets within a tile, of at most 128 tokens, are 32 bits; those of tiles are 64.
MOST_BETWEEN_TOKENS = 2**31 // 128


def unavailable() -> str | None:
    if UNUSABLE is not None:
        return UNUSABLE
    # called for every call: is_available asks the driver each time
    if INTERPRETED or torch.cuda.is_initialized() or torch.cuda.is_available():
        return None
    return "no GPU that torch can use"


def cannot_serve(call: AttentionCall) -> str | None:
    return _cannot_compute(call) or _unsound_products(call.q.device)


@assume_constant
def _unsound_products(device: torch.device) -> str | None:
    """Return why attention is wrong on this GPU with this version of Triton, or None. Rotations use no products."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    major, minor = capability(device.index)
    wanted, found = SOUND_PRODUCTS.get((major, minor)), numbers(VERSION)
    if wanted is None or found is None or found >= wanted:
        return None
    return (
        f"triton {VERSION} compiles products for sm_{major}{minor} that differ from run to run (triton#9871, #10590): "
        f"needs {wanted[0]}.{wanted[1]} or newer"
    )


def _cannot_compute(call: AttentionCall) -> str | None:
    device = call.q.device
    dim = call.q.shape[-1]
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return f"q is on {device}: this backend runs on a GPU"
    if device.type == "cuda" and torch.version.hip is None and capability(device.index) < (8, 0):
        major, minor = capability(device.index)
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


def faster(call: AttentionCall) -> str | None:
    """Return "triton", "cuda" or "composed", as `spatial-pe tune` measured it for such calls on this GPU, or None.

    It measures large batches, which are not representative of a single image that leaves SMs without a program, and tokens
    that attend to themselves.
    """
    q = call.q
    if call.keys is not None or q.device.type != "cuda" or not tuning_store.any_rows(q.device) or few_programs(call):
        return None
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (q, call.k, call.v))
    return tuning_store.faster(q.device, q.dtype, q.shape[-1], bucket(call.longest), training)


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Return out (B, N, H, D) and lse (B, H, N) float32, zero where a sample has no token."""
    from . import launch_cache, plan

    if call.q.device.type == "cpu":
        list(call.pairs())  # checks the lengths; on a GPU that would wait for them
    signature, inputs = _signature(call)
    out, lse = launch_cache.run(signature, inputs, lambda *tensors: plan.plan_forward(_with(call, *tensors)))
    return out, lse


def backward(call: AttentionCall, out: Tensor, lse: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv, contiguous."""
    from . import launch_cache, plan

    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    signature, inputs = _signature(call)

    def planned(out: Tensor, lse: Tensor, dout: Tensor, *tensors: Tensor) -> plan.Plan:
        return plan.plan_backward(_with(call, *tensors), out, lse, dout)

    dq, dk, dv = launch_cache.run((dout.stride(), signature), (out, lse, dout, *inputs), planned)
    return dq, dk, dv


def _signature(call: AttentionCall) -> tuple[tuple, tuple[Tensor, ...]]:
    """Return all that determines the launches of a call, and its tensors in the order that _with takes."""
    q, k, v, keys = call.q, call.k, call.v, call.keys
    inputs = [q, k, v]
    side = _side(inputs, call.rotary, call.cu_seqlens, call.seqlens)
    of_keys = None if keys is None else _side(inputs, keys.rotary, keys.cu_seqlens, keys.seqlens)
    views = (q.dtype, q.shape, q.stride(), k.shape, k.stride(), v.stride())
    return (views, side, of_keys, call.num_sequences, bucket(call.longest), call.scale), tuple(inputs)


def _side(
    inputs: list[Tensor], rotary: Rotary | None, cu_seqlens: Tensor | None, seqlens: Tensor | None
) -> tuple[Any, ...]:
    """Return the part of the signature that is the queries' or the keys', and append their tensors to the inputs."""
    table = None
    if rotary is not None:
        cos, sin = float32_tables(rotary)
        table = (rotary.pairing, cos.shape, cos.stride())
        inputs += (cos, sin)
    inputs += [lengths for lengths in (cu_seqlens, seqlens) if lengths is not None]
    return table, cu_seqlens is not None, seqlens is not None


def _with(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> AttentionCall:
    """Return the call with other tensors, in the order of _signature."""
    left = list(others)

    def replaced(rotary: Rotary | None, cu_seqlens: Tensor | None, seqlens: Tensor | None) -> tuple[Any, ...]:
        table = rotary and Rotary._unchecked(left.pop(0), left.pop(0), rotary.pairing)
        return table, *(None if lengths is None else left.pop(0) for lengths in (cu_seqlens, seqlens))

    rotary, cu_seqlens, seqlens = replaced(call.rotary, call.cu_seqlens, call.seqlens)
    keys = call.keys
    if keys is not None:
        table, bounds, lengths = replaced(keys.rotary, keys.cu_seqlens, keys.seqlens)
        keys = Keys(table, bounds, keys.max_seqlen, lengths)
    return AttentionCall(q, k, v, rotary, call.scale, cu_seqlens, call.max_seqlen, seqlens, keys)


def angle_gradient(
    q: Tensor, k: Tensor | None, dq: Tensor, dk: Tensor | None, cos: Tensor, pairing: str, seqlens: Tensor | None
) -> Tensor:
    """Return dφ in the shape of the tables, (B|1, N, H|1, R/2) float32, from the final gradients of q and k, or of q."""
    from . import launch_cache, plan

    if k is None or dk is None:
        k, dk = q[:, :, :0], dq[:, :, :0]  # of no head
    inputs = (q, k, dq, dk) if seqlens is None else (q, k, dq, dk, seqlens)

    def planned(q: Tensor, k: Tensor, dq: Tensor, dk: Tensor, seqlens: Tensor | None = None) -> plan.Plan:
        return plan.plan_angles(q, k, dq, dk, cos.shape, pairing, seqlens)

    signature = ("angles", pairing, cos.shape, *((x.dtype, x.shape, x.stride()) for x in inputs))
    (dphi,) = launch_cache.run(signature, inputs, planned)
    return dphi.sum_to_size(cos.shape).to(cos.dtype)


def cannot_rotate(x: Tensor) -> str | None:
    """Return why x cannot be rotated, like cannot_serve, or None."""
    return unavailable() or _cannot_compute(AttentionCall(x, x, x, None, 1.0, None, None, None))


def rotation(xs: Sequence[Tensor], rotary: Rotary, inplace: bool = False, inverse: bool = False) -> tuple[Tensor, ...]:
    """Return R(x) of x, or of q and k, (B, N, H|Hkv, D): contiguous, unless in place. inverse: by the inverse rotation."""
    from . import launch_cache, plan

    cos, sin = float32_tables(rotary)

    def planned(*tensors: Tensor) -> plan.Plan:
        *xs, cos, sin = tensors
        return plan.plan_rotation(xs, Rotary._unchecked(cos, sin, rotary.pairing), inplace, inverse)

    inputs = (*xs, cos, sin)
    signature = ("rotation", rotary.pairing, inplace, inverse, *((x.dtype, x.shape, x.stride()) for x in inputs))
    results = launch_cache.run(signature, inputs, planned)
    return tuple(xs) if inplace else results
