# SPDX-License-Identifier: Apache-2.0
"""apply_rotary: a standalone rotation, for use with other attention implementations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .._utils.dispatcher import in_transform, needs_dispatcher, needs_plain_ops, requires_grad, unrecorded
from ..backends import cpu
from ..backends.triton import backend as triton
from ..rotary import Rotary, angle_gradient, check_rotary_fits, rotated, table_gradients
from . import batching


def apply_rotary(x: Tensor, rotary: Rotary, *, inplace: bool = False) -> Tensor:
    """Rotate the channel pairs of x; differentiable in x and in the tables.

    Args:
        x: (B, N, H, D) or packed (T, H, D), any float dtype; R <= D.
        rotary: tables with N (or T) tokens.
        inplace: overwrite x, and return it. Only if no gradient is recorded.

    Returns:
        Same shape and dtype. The arithmetic is float32 (float64 for float64 x), rounded once. One pass over memory by a
        C++ kernel on the CPU, and on a GPU with Triton.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    if has_torch_function((x,)) and not torch.compiler.is_compiling():
        return handle_torch_function(apply_rotary, (x,), x, rotary, inplace=inplace)
    if isinstance(x, Tensor) and x.ndim == 3:
        return apply_rotary(x[None], rotary, inplace=inplace)[0]
    unrecorded(check_rotary_fits, x, rotary, "x")
    return _apply([x], rotary, inplace)[0]


def apply_rotary_qk(
    q: Tensor, k: Tensor, rotary: Rotary, rotary_k: Rotary | None = None, *, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate q and k as apply_rotary does, by one kernel on a GPU with Triton, for use before another attention.

    Args:
        q, k: (B, N, H, D) and (B, N, Hkv, D), or packed (T, H, D) and (T, Hkv, D), of one dtype; views of a
            projection are read in place. With ``rotary_k``, k may have another number of tokens.
        rotary: tables with N (or T) tokens; with tables per head, Hkv must be H.
        rotary_k: tables for k (then a kernel for each); None: those of q.
        inplace: overwrite q and k, and return them. Only if no gradient is recorded.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    if has_torch_function((q, k)) and not torch.compiler.is_compiling():
        return handle_torch_function(apply_rotary_qk, (q, k), q, k, rotary, rotary_k, inplace=inplace)
    if isinstance(q, Tensor) and isinstance(k, Tensor) and q.ndim == k.ndim == 3:
        q, k = apply_rotary_qk(q[None], k[None], rotary, rotary_k, inplace=inplace)
        return q[0], k[0]
    unrecorded(_check_qk, q, k, rotary, rotary_k)
    if rotary_k is None:
        q, k = _apply([q, k], rotary, inplace)
        return q, k
    return _apply([q], rotary, inplace)[0], _apply([k], rotary_k, inplace)[0]


def _check_qk(q: Tensor, k: Tensor, rotary: Rotary, rotary_k: Rotary | None) -> None:
    check_rotary_fits(q, rotary, "q")
    check_rotary_fits(k, rotary if rotary_k is None else rotary_k, "k", "rotary" if rotary_k is None else "rotary_k")
    if q.dtype != k.dtype:
        raise TypeError(f"q and k must share a dtype, got q {q.dtype}, k {k.dtype}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must have the same head_dim, got {q.shape[-1]} and {k.shape[-1]}")
    if q.shape[0] != k.shape[0]:  # the kernel counts the samples of q
        raise ValueError(f"q and k must have the same batch, got {tuple(q.shape)} and {tuple(k.shape)}")


def _apply(xs: list[Tensor], rotary: Rotary, inplace: bool) -> Sequence[Tensor]:
    tensors = (*xs, rotary.cos, rotary.sin)
    if inplace and requires_grad(tensors):
        raise ValueError("inplace=True overwrites what the gradient needs: use inplace=False, or torch.no_grad()")
    plain = needs_plain_ops(tensors) or in_transform()  # plain operators have rules for every transform
    seen = needs_dispatcher(tensors)
    # on the CPU also for whoever traces, as a compiler fuses them, and for tables with a gradient, which is that of any
    # table there and not of angles alone
    plain_on_cpu = seen or requires_grad(tensors[-2:])
    if plain or not all(_kernel_serves(x, plain_on_cpu) for x in xs):
        rotated_xs = [rotated(x, rotary) for x in xs]
        return [x.copy_(new) for x, new in zip(xs, rotated_xs, strict=True)] if inplace else rotated_xs
    if inplace:
        rotate_in_place = torch.ops.spatial_pe.rotate_ if seen else _rotate_inplace
        rotate_in_place(xs, rotary.cos, rotary.sin, rotary.pairing)
        return xs
    if seen:
        return torch.ops.spatial_pe.rotate(xs, rotary.cos, rotary.sin, rotary.pairing, False)
    if requires_grad(tensors):
        return _Eager.apply(rotary.cos, rotary.sin, rotary.pairing, *xs)
    return _rotate(xs, rotary.cos, rotary.sin, rotary.pairing, False)


def _kernel_serves(x: Tensor, plain_on_cpu: bool) -> bool:
    if x.stride(-1) != 1:
        return False
    if x.device.type == "cpu":
        return not plain_on_cpu and cpu.cannot_rotate(x) is None
    return x.device.type == "cuda" and triton.cannot_rotate(x) is None


def _backend(xs: Sequence[Tensor]) -> Any:
    """Return the module whose ``rotation`` computes. On a CPU without the extension: Triton's interpreter."""
    return cpu if all(cpu.cannot_rotate(x) is None for x in xs) else triton


# ------------------------------------------------------------------------------------------------------ the torch ops

_LIBRARY = torch.library.Library("spatial_pe", "FRAGMENT")
# xs: x, or q and k
_LIBRARY.define("rotate(Tensor[] xs, Tensor cos, Tensor sin, str pairing, bool inverse) -> Tensor[]")
_LIBRARY.define("rotate_(Tensor(a!)[] xs, Tensor cos, Tensor sin, str pairing) -> ()")


@torch.library.impl(_LIBRARY, "rotate", "CompositeExplicitAutograd")
def _rotate(xs, cos, sin, pairing, inverse):
    return list(_backend(xs).rotation(xs, Rotary._unchecked(cos, sin, pairing), inverse=inverse))


@torch.library.impl(_LIBRARY, "rotate_", "CompositeExplicitAutograd")
def _rotate_inplace(xs, cos, sin, pairing):
    _backend(xs).rotation(xs, Rotary._unchecked(cos, sin, pairing), inplace=True)


@torch.library.register_fake("spatial_pe::rotate", lib=_LIBRARY)
def _rotate_fake(xs, cos, sin, pairing, inverse):
    return [x.new_empty(x.shape) for x in xs]


@torch.library.register_fake("spatial_pe::rotate_", lib=_LIBRARY)
def _rotate_inplace_fake(xs, cos, sin, pairing):
    return None


def _setup_context(ctx, inputs, output) -> None:
    xs, cos, sin, pairing, inverse = inputs
    wanted = cos.requires_grad or sin.requires_grad
    ctx.save_for_backward(cos, sin, *(xs if wanted else ()))
    ctx.pairing, ctx.inverse, ctx.wanted = pairing, inverse, wanted


def _backward(ctx, grads) -> tuple:
    cos, sin, *xs = ctx.saved_tensors
    if any(map(torch._C._functorch.is_legacy_batchedtensor, grads)):
        return _of_batched(ctx, grads, cos, sin, xs)
    grads = [g if g.stride(-1) == 1 else g.contiguous() for g in grads]
    # with gradients recorded (create_graph=True), call the op, which has its own gradient
    seen = torch.is_grad_enabled() or needs_dispatcher((*grads, cos))
    rotate = torch.ops.spatial_pe.rotate if seen else _rotate
    dxs = rotate(grads, cos, sin, ctx.pairing, not ctx.inverse)
    dcos = dsin = None
    if ctx.wanted:
        dphi = sum(angle_gradient(x, dx, cos, ctx.pairing) for x, dx in zip(xs, dxs, strict=True))
        if ctx.inverse:
            dphi = -dphi
        dcos, dsin = table_gradients(cos, sin, dphi)  # type: ignore[arg-type]
    return dxs, dcos, dsin, None, None


def _of_batched(ctx: Any, grads: Sequence[Tensor], cos: Tensor, sin: Tensor, xs: list[Tensor]) -> tuple:
    """Return what _backward does, for torch.autograd.grad(..., is_grads_batched=True): an op of lists has no rule
    there, the derivatives of plain operators have."""
    with torch.enable_grad():
        xs = xs or [torch.zeros(g.shape, dtype=g.dtype, device=g.device) for g in grads]
        xs = [x if x.requires_grad else x.detach().requires_grad_() for x in xs]
        rotary = Rotary._unchecked(cos, sin, ctx.pairing)
        ys = [rotated(x, rotary.inverse() if ctx.inverse else rotary) for x in xs]
    tables = [x for x in (cos, sin) if x.requires_grad]
    created = {"create_graph": torch.is_grad_enabled(), "materialize_grads": True}
    found = list(torch.autograd.grad(ys, [*xs, *tables], grads, **created))
    dxs = [found.pop(0) for _ in xs]
    dcos, dsin = (found.pop(0) if x.requires_grad else None for x in (cos, sin))
    return dxs, dcos, dsin, None, None


torch.library.register_vmap("spatial_pe::rotate", batching.rotate, lib=_LIBRARY)
torch.library.register_autograd("spatial_pe::rotate", _backward, setup_context=_setup_context, lib=_LIBRARY)


class _Eager(torch.autograd.Function):
    """Autograd function for plain eager calls; avoids the overhead of torch.library."""

    @staticmethod
    def forward(ctx, cos, sin, pairing, *xs):
        rotated_xs = tuple(_rotate(xs, cos, sin, pairing, False))
        _setup_context(ctx, (xs, cos, sin, pairing, False), rotated_xs)
        return rotated_xs

    @staticmethod
    def backward(ctx, *grads):
        dxs, dcos, dsin, _, _ = _backward(ctx, grads)
        return dcos, dsin, None, *dxs
