# SPDX-License-Identifier: Apache-2.0
"""rope_attention: softmax(R(q) R(k)ᵀ · scale) v, and the torch op behind it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .backends import composed
from .backends.call import Call
from .backends.select import BACKENDS, select
from .checks import check_call
from .rotary import Rotary
from .watched import wants_gradient, watched


def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: Rotary | None = None,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Bidirectional attention with q and k rotated inside: softmax(R(q) R(k)ᵀ · scale) v.

    Args:
        q: (B, N, H, D), or packed (T, H, D) with ``cu_seqlens``. float32, float16, bfloat16 (float64 without a
            fused kernel). Only the last dimension must be contiguous: views into a fused qkv projection are read
            in place.
        k, v: (B, N, Hkv, D) or (T, Hkv, D); Hkv divides H (grouped-query attention).
        rotary: the angles, one row per token, prefix tokens included; None is plain attention.
        scale: factor on the scores; None is 1/sqrt(D).
        cu_seqlens: (sequences + 1,) int32, starts of the packed sequences and T; tokens attend within theirs.
        max_seqlen: the longest sequence; only a hint, so that no backend has to read it from the device.
        seqlens: (B,) int32: sample b has only its first ``seqlens[b]`` tokens, the rest of its output is 0.
        backend: "auto", or a name from ``spatial_pe.backends()``, which raises if it cannot serve the call.

    Returns:
        Same shape and dtype as q, contiguous.

    Rotation and softmax are float32 inside; R(q) and R(k) are rounded once, to the input dtype. Differentiable in
    q, k, v and in the tables of ``rotary`` (the gradient of the angles: dcos and dsin are its parts along the circle,
    ``-sin dφ`` and ``cos dφ``). NaN and Inf in q, k, v propagate as in torch's scaled_dot_product_attention.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    check_call(q, k, v, rotary, cu_seqlens, seqlens)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1])
    elif not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale}")
    if scale < 0:  # kernels take the maximum of a row before scaling
        q, scale = -q, -scale
    if scale < torch.finfo(torch.float32).tiny:  # kernels mask with scores of -inf, and 0 times that is NaN
        q, scale = q * 0, 1.0
    device = q.device.type  # meta has no autocast, and asking about it raises
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        low = torch.get_autocast_dtype(device)
        q, k, v = q.to(low), k.to(low), v.to(low)
    packed = cu_seqlens is not None
    if packed:
        q, k, v = q[None], k[None], v[None]
    call = Call(q, k, v, rotary, float(scale), cu_seqlens, max_seqlen, seqlens)
    name = select(call, backend)
    if name == "composed":
        out = composed.attention(call)
    elif watched(tensors := _tensors(call)):
        out, _ = torch.ops.spatial_pe.rope_attention(*_flatten(call), name)
    elif wants_gradient(tensors):
        out, _ = _Eager.apply(*_flatten(call), name)
    else:
        out, _ = BACKENDS[name].forward(call)
    return out[0] if packed else out


def _tensors(call: Call) -> tuple[Tensor, ...]:
    """Those that may want a gradient."""
    rotary = call.rotary
    return (call.q, call.k, call.v) if rotary is None else (call.q, call.k, call.v, rotary.cos, rotary.sin)


# ------------------------------------------------------------------------------------------------------- the torch op

_ARGS = (
    "Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, str pairing, float scale, "
    "Tensor? cu_seqlens, SymInt? max_seqlen, Tensor? seqlens, str backend"
)
_LIBRARY = torch.library.Library("spatial_pe", "DEF")
_LIBRARY.define(f"rope_attention({_ARGS}) -> (Tensor, Tensor)")
_LIBRARY.define(
    "angle_gradient(Tensor q, Tensor k, Tensor dq, Tensor dk, Tensor cos, str pairing, Tensor? seqlens, str backend)"
    " -> Tensor"
)
_LIBRARY.define(f"rope_attention_backward(Tensor dout, Tensor out, Tensor lse, {_ARGS}) -> (Tensor, Tensor, Tensor)")


def _flatten(call: Call) -> tuple:
    """The call as the op's arguments, backend excepted. q, k, v have four dimensions."""
    cos = sin = None
    pairing = "half"
    if call.rotary is not None:
        cos, sin, pairing = call.rotary.cos, call.rotary.sin, call.rotary.pairing
    return (call.q, call.k, call.v, cos, sin, pairing, call.scale, call.cu_seqlens, call.max_seqlen, call.seqlens)


def _unflatten(q, k, v, cos, sin, pairing, scale, cu_seqlens, max_seqlen, seqlens) -> Call:
    rotary = None if cos is None else Rotary._unchecked(cos, sin, pairing)
    return Call(q, k, v, rotary, scale, cu_seqlens, max_seqlen, seqlens)


@torch.library.impl(_LIBRARY, "rope_attention", "CompositeExplicitAutograd")
def _forward(*args):
    *flat, backend = args
    return BACKENDS[backend].forward(_unflatten(*flat))


@torch.library.impl(_LIBRARY, "rope_attention_backward", "CompositeExplicitAutograd")
def _backward(dout, out, lse, *args):
    *flat, backend = args
    return BACKENDS[backend].backward(_unflatten(*flat), out, lse, dout)


@torch.library.impl(_LIBRARY, "angle_gradient", "CompositeExplicitAutograd")
def _angle_gradient(q, k, dq, dk, cos, pairing, seqlens, backend):
    return BACKENDS[backend].angle_gradient(q, k, dq, dk, cos, pairing, seqlens)


@torch.library.register_fake("spatial_pe::angle_gradient", lib=_LIBRARY)
def _angle_gradient_fake(q, k, dq, dk, cos, *args):
    return cos.new_empty(cos.shape)


@torch.library.register_fake("spatial_pe::rope_attention", lib=_LIBRARY)
def _forward_fake(q, *args):
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


@torch.library.register_fake("spatial_pe::rope_attention_backward", lib=_LIBRARY)
def _backward_fake(dout, out, lse, q, k, v, *args):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, cos, sin, pairing, scale, cu_seqlens, max_seqlen, seqlens, backend = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, cos, sin, cu_seqlens, seqlens, out, lse)
    ctx.pairing, ctx.scale, ctx.max_seqlen, ctx.backend = pairing, scale, max_seqlen, backend


def _autograd_backward(ctx, dout: Tensor, _dlse) -> tuple:
    q, k, v, cos, sin, cu_seqlens, seqlens, out, lse = ctx.saved_tensors
    flat = (q, k, v, cos, sin, ctx.pairing, ctx.scale, cu_seqlens, ctx.max_seqlen, seqlens)
    # with gradients recorded (create_graph=True) the op is there to raise when they are differentiated again
    seen = torch.is_grad_enabled() or watched((q, k, v, dout))
    attend_backward = torch.ops.spatial_pe.rope_attention_backward if seen else _backward
    dq, dk, dv = attend_backward(dout, out, lse, *flat, ctx.backend)
    dcos = dsin = None
    if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
        gradient = torch.ops.spatial_pe.angle_gradient if seen else _angle_gradient
        dphi = gradient(q, k, dq, dk, cos, ctx.pairing, seqlens, ctx.backend)
        dcos, dsin = -sin * dphi, cos * dphi
    return dq, dk, dv, dcos, dsin, None, None, None, None, None, None


torch.library.register_autograd(
    "spatial_pe::rope_attention", _autograd_backward, setup_context=_setup_context, lib=_LIBRARY
)


class _Eager(torch.autograd.Function):
    """The op for calls that nobody watches."""

    @staticmethod
    def forward(ctx, *args):  # torch binds arguments by inspection for a setup_context of its own, in every call
        output = _forward(*args)
        _setup_context(ctx, args, output)
        return output

    backward = staticmethod(_autograd_backward)


def _no_double_backward(ctx, *grads):
    raise RuntimeError(
        'rope_attention has no double backward: use backend="composed" under '
        "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
    )


for _name in ("rope_attention_backward", "angle_gradient"):
    torch.library.register_autograd(f"spatial_pe::{_name}", _no_double_backward, lib=_LIBRARY)
