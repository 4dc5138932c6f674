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
from ..backends.base import AttentionCall, Keys
from ..backends.checks import check_angle_gradient, check_call, check_fits, check_gradients
from ..rotary import Rotary, table_gradients
from . import batching, composed, decompositions
from .decompositions import unflatten
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
    rotary_k: Rotary | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    seqlens_k: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute bidirectional attention with q and k rotated inside the kernel: softmax(R(q) R(k)ᵀ · scale) v.

    The tokens attend to themselves, or to other tokens (cross-attention): k and v then have M tokens, and a table and
    lengths of their own, the arguments that end in ``_k``.

    Args:
        q: (B, N, H, D), or packed (T, H, D) with ``cu_seqlens``. float32, float16, bfloat16 (float64 without a
            fused kernel). Only the last dimension must be contiguous: views into a fused qkv projection are read
            in place.
        k, v: (B, M, Hkv, D) or (S, Hkv, D); Hkv divides H (grouped-query attention).
        rotary: the angles, one row per token, prefix tokens included; None is plain attention.
        scale: factor on the scores; None is 1/sqrt(D).
        cu_seqlens: (sequences + 1,) int32, starts of the packed sequences and T; tokens attend within their sequence.
        max_seqlen: an upper bound of the lengths of the packed sequences. GPU kernels choose their tiles by it, so that
            ``cu_seqlens`` need not be read from the device. A longer sequence raises on the CPU; on a GPU its rows
            are NaN.
        seqlens: (B,) int32: sample b has only its first ``seqlens[b]`` tokens, the rest of its output is 0.
        rotary_k: the angles of k, of the pairs of ``rotary``; None: those of q, where k has as many tokens. Keys that
            are not rotated have rows of cos = 1, sin = 0.
        cu_seqlens_k, max_seqlen_k: starts of the sequences of k, as many as those of q; None: those of q.
        seqlens_k: (B,) int32, tokens of k; None: as ``seqlens``, where k has as many tokens, else all M. Queries
            without a key get 0.
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
            scale=scale, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, seqlens=seqlens, rotary_k=rotary_k,
            cu_seqlens_k=cu_seqlens_k, max_seqlen_k=max_seqlen_k, seqlens_k=seqlens_k, backend=backend,
        )  # fmt: skip
    if torch._C._is_any_autocast_enabled():
        q, k, v = _autocast(q), _autocast(k), _autocast(v)
    intercepted = is_intercepted()
    read = unrecorded if intercepted else _call
    own = (rotary_k, cu_seqlens_k, max_seqlen_k, seqlens_k)
    cross = read(check_call, q, k, v, rotary, cu_seqlens, max_seqlen, seqlens, *own)
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
    keys = _keys(q, k, rotary, cu_seqlens, max_seqlen, seqlens, *own) if cross else None
    call = AttentionCall(q, k, v, rotary, float(scale), cu_seqlens, max_seqlen, seqlens, keys)
    tensors = call.tensors
    dispatched = intercepted or are_special(tensors)
    plain = read(needs_plain_ops, tensors) if dispatched else None
    name = read(select, call, backend, plain)
    if name == "composed":
        out = composed.attention(call)
    elif dispatched:
        out, _ = torch.ops.spatial_pe.rope_attention(*_flatten(call, name))
    elif requires_grad(tensors):
        out, _ = _Attention.apply(_forward, *_flatten(call, name))  # type: ignore[attr-defined]
    else:
        out, _ = BACKENDS[name].forward(call)
    return out[0] if packed else out


_TINY = torch.finfo(torch.float32).tiny


def _keys(q, k, rotary, cu_seqlens, max_seqlen, seqlens, rotary_k, cu_seqlens_k, max_seqlen_k, seqlens_k) -> Keys:
    """Return the side of the keys, with what they have from the queries."""
    if cu_seqlens is not None and cu_seqlens_k is None:
        cu_seqlens_k, max_seqlen_k = cu_seqlens, max_seqlen if max_seqlen_k is None else max_seqlen_k
    if seqlens_k is None and seqlens is not None and q.shape[1] == k.shape[1]:
        seqlens_k = seqlens
    return Keys(rotary if rotary_k is None else rotary_k, cu_seqlens_k, max_seqlen_k, seqlens_k)


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

# ``cross`` says whether k has other tokens than q: then those behind it are read, else they are None.
_ARGS = (
    "Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, str pairing, float scale, "
    "Tensor? cu_seqlens, SymInt? max_seqlen, Tensor? seqlens, str backend, bool cross=False, "
    "Tensor? cos_k=None, Tensor? sin_k=None, Tensor? cu_seqlens_k=None, SymInt? max_seqlen_k=None, "
    "Tensor? seqlens_k=None"
)
_LIBRARY = torch.library.Library("spatial_pe", "DEF")
_LIBRARY.define(f"rope_attention({_ARGS}) -> (Tensor, Tensor)")
_LIBRARY.define(
    "angle_gradient(Tensor q, Tensor? k, Tensor dq, Tensor? dk, Tensor cos, str pairing, Tensor? seqlens, str backend)"
    " -> Tensor"
)
_LIBRARY.define(f"rope_attention_backward(Tensor dout, Tensor out, Tensor lse, {_ARGS}) -> (Tensor, Tensor, Tensor)")


def _flatten(call: AttentionCall, backend: str) -> tuple:
    """Return the call as the op's arguments. q, k, v have four dimensions."""
    cos, sin, pairing = _tables(call.rotary)
    flat = (call.q, call.k, call.v, cos, sin, pairing, call.scale, call.cu_seqlens, call.max_seqlen, call.seqlens)
    if (keys := call.keys) is None:
        return (*flat, backend)
    cos, sin, _ = _tables(keys.rotary)
    return (*flat, backend, True, cos, sin, keys.cu_seqlens, keys.max_seqlen, keys.seqlens)


def _tables(rotary: Rotary | None) -> tuple[Tensor | None, Tensor | None, str]:
    return (None, None, "half") if rotary is None else (rotary.cos, rotary.sin, rotary.pairing)


def _forward(*args):
    call, backend = unflatten(*args)
    return BACKENDS[backend].forward(call)


def _backward(dout, out, lse, *args):
    call, backend = unflatten(*args)
    return BACKENDS[backend].backward(call, out, lse, dout)


def _angle_gradient(q, k, dq, dk, cos, pairing, seqlens, backend):
    return BACKENDS[backend].angle_gradient(q, k, dq, dk, cos, pairing, seqlens)


# A traced graph calls the op with unchecked tensors, e.g. of another size than the tables that it holds.


@torch.library.impl(_LIBRARY, "rope_attention", "CompositeExplicitAutograd")
def _forward_op(*args):
    check_fits(unflatten(*args)[0])
    return _forward(*args)


@torch.library.impl(_LIBRARY, "rope_attention_backward", "CompositeExplicitAutograd")
def _backward_op(dout, out, lse, *args):
    call, _ = unflatten(*args)
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
    q, k, v, cos, sin, pairing, scale, cu_seqlens, max_seqlen, seqlens, backend, *keys = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.pairing, ctx.scale, ctx.max_seqlen, ctx.backend = pairing, scale, max_seqlen, backend
    ctx.given, ctx.cross = len(inputs), bool(keys and keys[0])
    of_keys: tuple = ()
    if ctx.cross:
        keys += [None] * (6 - len(keys))  # the dispatcher leaves out None at the end
        _, cos_k, sin_k, cu_seqlens_k, ctx.max_seqlen_k, seqlens_k = keys
        of_keys = (cos_k, sin_k, cu_seqlens_k, seqlens_k)
    ctx.save_for_backward(q, k, v, cos, sin, cu_seqlens, seqlens, out, lse, *of_keys)


def _gradients(ctx, dout: Tensor) -> tuple:
    q, k, v, cos, sin, cu_seqlens, seqlens, out, lse, *of_keys = ctx.saved_tensors
    flat: tuple = (q, k, v, cos, sin, ctx.pairing, ctx.scale, cu_seqlens, ctx.max_seqlen, seqlens, ctx.backend)
    if ctx.cross:
        cos_k, sin_k, cu_seqlens_k, seqlens_k = of_keys
        flat += (True, cos_k, sin_k, cu_seqlens_k, ctx.max_seqlen_k, seqlens_k)
    # with gradients recorded (create_graph=True), call the op, which raises when they are differentiated again
    seen = torch.is_grad_enabled() or needs_dispatcher((q, k, v, dout))
    backward = torch.ops.spatial_pe.rope_attention_backward if seen else _backward
    dq, dk, dv = backward(dout, out, lse, *flat)
    dcos = dsin = dcos_k = dsin_k = None
    if ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:
        of_both = (q, None, dq, None) if ctx.cross else (q, k, dq, dk)
        dphi = _dphi(seen)(*of_both, cos, ctx.pairing, seqlens, ctx.backend)
        dcos, dsin = table_gradients(cos, sin, dphi)
    if ctx.cross and any(ctx.needs_input_grad[13:15]):
        dphi = _dphi(seen)(k, None, dk, None, cos_k, ctx.pairing, seqlens_k, ctx.backend)
        dcos_k, dsin_k = table_gradients(cos_k, sin_k, dphi)
    grads = (dq, dk, dv, dcos, dsin, *(None,) * 7, dcos_k, dsin_k, None, None, None)
    return grads[: ctx.given]


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
