# SPDX-License-Identifier: Apache-2.0
"""rope_attention: softmax(R(q) R(k)ᵀ · scale) v, and the torch op behind it."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .._utils.dispatcher import (
    are_special,
    has_autocast,
    in_transform,
    is_intercepted,
    needs_dispatcher,
    needs_plain_ops,
    requires_grad,
    unrecorded,
)
from ..backends import reference
from ..backends.base import AttentionCall
from ..backends.checks import check_angle_gradient, check_call, check_fits, check_gradients
from ..rotary import Rotary, table_gradients
from . import batching, composed, decompositions
from .select import BACKENDS, select


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
    """Compute bidirectional attention with q and k rotated inside the kernel: softmax(R(q) R(k)ᵀ · scale) v.

    Args:
        q: (B, N, H, D), or packed (T, H, D) with ``cu_seqlens``. float32, float16, bfloat16 (float64 without a
            fused kernel). Only the last dimension must be contiguous: views into a fused qkv projection are read
            in place.
        k, v: (B, N, Hkv, D) or (T, Hkv, D); Hkv divides H (grouped-query attention).
        rotary: the angles, one row per token, prefix tokens included; None is plain attention.
        scale: factor on the scores; None is 1/sqrt(D).
        cu_seqlens: (sequences + 1,) int32, starts of the packed sequences and T; tokens attend within their sequence.
        max_seqlen: an upper bound of the lengths of the packed sequences. GPU kernels choose their tiles by it, so that
            ``cu_seqlens`` need not be read from the device. A longer sequence raises on the CPU; on a GPU its rows
            are NaN.
        seqlens: (B,) int32: sample b has only its first ``seqlens[b]`` tokens, the rest of its output is 0.
        backend: "auto", or a name from ``spatial_pe.backends()``, which raises if it cannot compute the call.

    Returns:
        Same shape and dtype as q, contiguous.

    Rotation and softmax are float32 inside; R(q) and R(k) are rounded once, to the input dtype. Differentiable in
    q, k, v and in the tables of ``rotary`` (the gradient of the angles: dcos and dsin are its parts along the circle,
    ``-sin dφ`` and ``cos dφ``). NaN and Inf in q, k, v propagate as in torch's scaled_dot_product_attention.

    ``cu_seqlens`` and ``seqlens`` that do not match the tokens raise where their values can be read (on the CPU); on a
    GPU and in a traced graph the rows outside of all sequences are NaN. Tracing, exporting and function transforms: see
    docs/transforms.md.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    if has_torch_function((q, k, v)) and not torch.compiler.is_compiling():
        return handle_torch_function(
            rope_attention, (q, k, v), q, k, v, rotary,
            scale=scale, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, seqlens=seqlens, backend=backend,
        )  # fmt: skip
    if torch._C._is_any_autocast_enabled():
        q, k, v = _autocast(q), _autocast(k), _autocast(v)
    intercepted = is_intercepted()
    read = unrecorded if intercepted else _call
    read(check_call, q, k, v, rotary, cu_seqlens, max_seqlen, seqlens)
    if scale is None:
        scale = 1.0 / math.sqrt(read(_head_dim, q))
    elif isinstance(scale, Tensor):
        raise TypeError("scale must be a number, got a Tensor: multiply q by it, which also gives it a gradient")
    elif not -math.inf < scale < math.inf:  # math.isfinite takes no symbolic float
        raise ValueError(f"scale must be a finite number, got {scale}")
    if scale < 0:  # kernels take the maximum of a row before scaling
        q, scale = -q, -scale
    if scale < _TINY:  # kernels mask with scores of -inf, and 0 times that is NaN
        q, scale = q * 0, 1.0
    packed = cu_seqlens is not None
    if packed:
        q, k, v = q[None], k[None], v[None]
    call = AttentionCall(q, k, v, rotary, float(scale), cu_seqlens, max_seqlen, seqlens)
    tensors = call.tensors
    dispatched = intercepted or are_special(tensors)
    plain = read(needs_plain_ops, tensors) if dispatched else None
    name = read(select, call, backend, plain)
    if name == "composed":
        out = composed.attention(call)
    elif dispatched:
        out, _ = torch.ops.spatial_pe.rope_attention(*_flatten(call), name)
    elif requires_grad(tensors):
        out, _ = _Attention.apply(_forward, *_flatten(call), name)  # type: ignore[attr-defined]
    else:
        out, _ = BACKENDS[name].forward(call)
    return out[0] if packed else out


_TINY = torch.finfo(torch.float32).tiny


def _autocast(x: Any) -> Any:
    """Cast x as autocast requires: norms before the attention may have made q and k float32, and not v."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    device = x.device.type
    wanted = has_autocast(device) and torch.is_autocast_enabled(device)
    return x.to(torch.get_autocast_dtype(device)) if wanted else x


def _head_dim(q: Tensor) -> int:
    return q.shape[-1]


def _call(function: Callable, *args: Any) -> Any:
    return function(*args)


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


def _flatten(call: AttentionCall) -> tuple:
    """Return the call as the op's arguments, except the backend. q, k, v have four dimensions."""
    cos = sin = None
    pairing = "half"
    if call.rotary is not None:
        cos, sin, pairing = call.rotary.cos, call.rotary.sin, call.rotary.pairing
    return (call.q, call.k, call.v, cos, sin, pairing, call.scale, call.cu_seqlens, call.max_seqlen, call.seqlens)


def _unflatten(q, k, v, cos, sin, pairing, scale, cu_seqlens, max_seqlen, seqlens) -> AttentionCall:
    rotary = None if cos is None else Rotary._unchecked(cos, sin, pairing)
    return AttentionCall(q, k, v, rotary, scale, cu_seqlens, max_seqlen, seqlens)


def _forward(*args):
    *flat, backend = args
    return BACKENDS[backend].forward(_unflatten(*flat))


def _backward(dout, out, lse, *args):
    *flat, backend = args
    return BACKENDS[backend].backward(_unflatten(*flat), out, lse, dout)


def _angle_gradient(q, k, dq, dk, cos, pairing, seqlens, backend):
    return BACKENDS[backend].angle_gradient(q, k, dq, dk, cos, pairing, seqlens)


# A traced graph calls the op with unchecked tensors, e.g. of another size than the tables that it holds.


@torch.library.impl(_LIBRARY, "rope_attention", "CompositeExplicitAutograd")
def _forward_op(*args):
    check_fits(_unflatten(*args[:-1]))
    return _forward(*args)


@torch.library.impl(_LIBRARY, "rope_attention_backward", "CompositeExplicitAutograd")
def _backward_op(dout, out, lse, *args):
    call = _unflatten(*args[:-1])
    check_fits(call)
    check_gradients(call, out, lse, dout)
    return _backward(dout, out.contiguous(), lse.contiguous(), *args)


@torch.library.impl(_LIBRARY, "angle_gradient", "CompositeExplicitAutograd")
def _angle_gradient_op(*args):
    check_angle_gradient(*args[:5])
    return _angle_gradient(*args).contiguous()  # as the fake kernel


@torch.library.register_fake("spatial_pe::angle_gradient", lib=_LIBRARY)
def _angle_gradient_fake(q, k, dq, dk, cos, *args):
    return cos.new_empty(cos.shape)


@torch.library.register_fake("spatial_pe::rope_attention", lib=_LIBRARY)
def _forward_fake(q, *args):
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


@torch.library.register_fake("spatial_pe::rope_attention_backward", lib=_LIBRARY)
def _backward_fake(dout, out, lse, q, k, v, *args):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


for _name, _rule in (("rope_attention", batching.forward), ("rope_attention_backward", batching.backward)):
    torch.library.register_vmap(f"spatial_pe::{_name}", _rule, lib=_LIBRARY)

# ---------------------------------------------------------------------------------------------------------- gradients


class _Attention(torch.autograd.function._SingleLevelFunction):
    """Autograd function at one level: that of eager autograd, or that of the active function transform.

    torch.autograd.Function would record at all levels at once, which the dispatcher already does for an op; and its
    setup_context binds the arguments by inspection, in every call.
    """

    @staticmethod
    def forward(ctx, run, *args):
        output = run(*args)
        _setup_context(ctx, args, output)
        return output

    @staticmethod
    def backward(ctx, dout, _dlse):
        return (None, *_gradients(ctx, dout))


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, cos, sin, pairing, scale, cu_seqlens, max_seqlen, seqlens, backend = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, cos, sin, cu_seqlens, seqlens, out, lse)
    ctx.pairing, ctx.scale, ctx.max_seqlen, ctx.backend = pairing, scale, max_seqlen, backend


def _gradients(ctx, dout: Tensor) -> tuple:
    q, k, v, cos, sin, cu_seqlens, seqlens, out, lse = ctx.saved_tensors
    flat = (q, k, v, cos, sin, ctx.pairing, ctx.scale, cu_seqlens, ctx.max_seqlen, seqlens)
    # with gradients recorded (create_graph=True), call the op, which raises when they are differentiated again
    seen = torch.is_grad_enabled() or needs_dispatcher((q, k, v, dout))
    backward = torch.ops.spatial_pe.rope_attention_backward if seen else _backward
    dq, dk, dv = backward(dout, out, lse, *flat, ctx.backend)
    dcos = dsin = None
    if ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:
        dphi = _dphi(seen)(q, k, dq, dk, cos, ctx.pairing, seqlens, ctx.backend)
        dcos, dsin = table_gradients(cos, sin, dphi)
    return dq, dk, dv, dcos, dsin, None, None, None, None, None, None


def _dphi(seen: bool) -> Callable[..., Tensor]:
    if not seen:
        return _angle_gradient
    if not in_transform():
        return torch.ops.spatial_pe.angle_gradient
    return lambda *args: reference.angle_gradient(*args[:-1])  # plain operators have rules for every transform


class _AttentionBackward(torch.autograd.function._SingleLevelFunction):
    """Raise when a gradient is differentiated again."""

    @staticmethod
    def forward(ctx, run, *args):
        return run(*args)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            'spatial_pe.rope_attention has no double backward: use backend="composed" under '
            "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
        )


def _differentiable(name: str, function: Any, plain: Callable) -> None:
    """Register an op at the Autograd key: it records ``function``, or calls ``plain`` if only plain operators work."""
    op = getattr(torch.ops.spatial_pe, name).default

    def at_autograd(keyset, *args):
        tensors = [x for x in args if isinstance(x, Tensor)]
        if needs_plain_ops(tensors) is not None:
            return plain(*args)

        def below(*args):
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

        if not requires_grad(tensors):
            return below(*args)
        with _single_level():
            return function.apply(below, *args)

    _LIBRARY.impl(name, at_autograd, "Autograd", with_keyset=True)


@contextmanager
def _single_level():
    allowed = torch._C._functorch.get_single_level_autograd_function_allowed()
    torch._C._functorch.set_single_level_autograd_function_allowed(True)
    try:
        yield
    finally:
        torch._C._functorch.set_single_level_autograd_function_allowed(allowed)


_differentiable("rope_attention", _Attention, decompositions.rope_attention)
_differentiable("rope_attention_backward", _AttentionBackward, decompositions.rope_attention_backward)
_differentiable("angle_gradient", _AttentionBackward, decompositions.angle_gradient)
decompositions.register()
