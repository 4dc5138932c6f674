# SPDX-License-Identifier: Apache-2.0
"""Compared variants: functions of (q, k, v) that compute attention with 2D RoPE, and ours without it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...modules import RoPE2DAttention
from ...ops.attention import rope_attention
from ...ops.rotate import apply_rotary_qk
from . import peers
from .cases import Inputs

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
LEVELS = ("kernel", "layer")
Call = Callable[[], Any]


class RefusedError(Exception):
    """A variant that cannot compute a case; the message says why."""


def ours(inputs: Inputs) -> Attention:
    how = {"cu_seqlens": inputs.cu_seqlens, "max_seqlen": inputs.max_seqlen, "rotary_k": inputs.rotary_k}
    return lambda q, k, v: rope_attention(q, k, v, inputs.rotary, **how)  # type: ignore[arg-type]


def off(inputs: Inputs) -> Attention:
    bounds, longest = inputs.cu_seqlens, inputs.max_seqlen
    return lambda q, k, v: rope_attention(q, k, v, None, cu_seqlens=bounds, max_seqlen=longest)


def eager(inputs: Inputs) -> Attention:
    """Rotate-half in float32, cast back, then torch's SDPA, one call per window (transformers' towers)."""
    attend = windows(inputs) if inputs.shape.packed else sdpa(inputs)
    return lambda q, k, v: attend(*rotate(q, k, inputs.cos, inputs.sin, inputs.cos_k, inputs.sin_k), v)


def compiled(inputs: Inputs) -> Attention:
    return _compile(eager(inputs))


def naive(inputs: Inputs) -> Attention:
    """Eager rotation and attention: the scores are materialised (transformers' attn_implementation="eager")."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = rotate(q, k, inputs.cos, inputs.sin, inputs.cos_k, inputs.sin_k)
        q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        return (scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v).transpose(-3, -2).contiguous()

    if inputs.shape.packed:
        raise RefusedError("has no packed sequences")
    return attend


def separate(inputs: Inputs) -> Attention:
    """Our rotary kernel, then torch's SDPA."""
    attend = sdpa(inputs)
    return lambda q, k, v: attend(*apply_rotary_qk(q, k, inputs.rotary, inputs.rotary_k), v)


@dataclass(frozen=True)
class Variant:
    """``make``: for inputs; ``call``: for a peer without torch tensors, the timed forward. ``rotates``: whether it
    computes the same function as ours."""

    label: str
    make: Callable[[Inputs], Attention] | None = None
    call: Callable[[Inputs, int], Call] | None = None
    rotates: bool = True
    cpu_only: bool = False


VARIANTS = {
    "ours": Variant("spatial_pe", ours),
    "off": Variant("spatial_pe, rotation off", off, rotates=False),
    "eager": Variant("eager rotation, SDPA", eager),
    "naive": Variant("eager rotation, eager attention", naive),
    "compiled": Variant("the same, torch.compile", compiled),
    "separate": Variant("our rotary kernel, SDPA", separate),
    "onnxruntime": Variant("ONNX Runtime", call=peers.onnxruntime, cpu_only=True),
    "openvino": Variant("OpenVINO", call=peers.openvino, cpu_only=True),
}


PEERS = tuple(name for name, variant in VARIANTS.items() if variant.call is not None)


def build(name: str, inputs: Inputs, direction: str, threads: int, level: str = "kernel") -> Call:
    """Build the timed call: the forward without a graph, or the backward of one forward; of attention (``level``
    "kernel"), or of a layer: the projections of a ViT block around it.

    Raises:
        RefusedError: it does not support this dtype, direction or device, or its package is missing.
    """
    variant = VARIANTS[name]
    if variant.cpu_only and inputs.device != "cpu":
        raise RefusedError("runs on the CPU only")
    if variant.call is not None:
        if direction != "forward":
            raise RefusedError("has no backward")
        if level != "kernel":
            raise RefusedError("is measured on attention alone")
        try:
            return variant.call(inputs, threads)
        except (ImportError, peers.UnsupportedError) as error:
            raise RefusedError(str(error)) from error
    assert variant.make is not None
    if level == "kernel":
        function: Callable[..., Tensor] = variant.make(inputs)
        arguments, leaves, grad = inputs.qkv, inputs.leaves, inputs.grad
    else:
        module, function = _layer(name, inputs)
        x = inputs.qkv[0].flatten(-2)
        arguments, leaves, grad = (x,), [x.detach().requires_grad_(), *module.parameters()], inputs.grad.flatten(-2)
    return timed(function, arguments, leaves, grad, direction)


def timed(
    function: Callable[..., Tensor], arguments: Sequence[Tensor], leaves: Sequence[Tensor], grad: Tensor, direction: str
) -> Call:
    """Return the timed call: the "forward" without a graph; the "backward", which computes the forward now and keeps
    its graph; or "forward+backward". The first leaves replace the arguments."""
    if direction == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return function(*arguments)

        return forward
    variables = leaves[: len(arguments)]
    if direction == "backward":
        out = function(*variables)
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)
    return lambda: torch.autograd.grad(function(*variables), leaves, grad)


# ------------------------------------------------------------------------------------------------------------ helpers


def _layer(name: str, inputs: Inputs) -> tuple[RoPE2DAttention, Callable[[Tensor], Tensor]]:
    """Build RoPE2DAttention for ours; the others between the same projections."""
    shape = inputs.shape
    rope = None if name == "off" else "axial"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = RoPE2DAttention(shape.heads * shape.head_dim, shape.heads, rope).to(inputs.device, inputs.dtype)
    if name in ("ours", "off"):
        rotary = inputs.rotary if name == "ours" else None
        packed = {"cu_seqlens": inputs.cu_seqlens, "max_seqlen": inputs.max_seqlen}
        return module, lambda x: module(x, rotary, **packed)
    make = VARIANTS["eager" if name == "compiled" else name].make
    assert make is not None
    attend = make(inputs)

    def layer(x: Tensor) -> Tensor:
        qkv = module.qkv(x).unflatten(-1, (3, shape.heads, shape.head_dim)).unbind(-3)
        return module.proj(attend(*qkv).flatten(-2))

    return module, _compile(layer) if name == "compiled" else layer


def _compile(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile for one shape. Without the reset the ninth shape would run uncompiled: dynamo counts them by line of
    code."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, cos_k: Tensor | None = None, sin_k: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rotate q, k (..., N, H, D) by cos, sin (N, D) float32; k by its own, if given."""

    def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x32 = x.float()
        a, b = x32.chunk(2, dim=-1)
        return (x32 * cos.unsqueeze(-2) + torch.cat((-b, a), dim=-1) * sin.unsqueeze(-2)).to(x.dtype)

    return rotated(q, cos, sin), rotated(k, cos if cos_k is None else cos_k, sin if sin_k is None else sin_k)


def sdpa(inputs: Inputs, backend: SDPBackend | None = None) -> Attention:
    """torch's SDPA, (B, N, H, D) -> the same, contiguous, as the output projection needs it; windows (T, H, D) as a
    batch, which no tower does."""
    packed, length = inputs.shape.packed, inputs.shape.tokens

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if packed:
            q, k, v = (x.unflatten(0, (-1, length)) for x in (q, k, v))  # a view
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v)
        out = out.transpose(1, 2).contiguous()
        return out.flatten(0, 1) if packed else out

    return attend


def windows(inputs: Inputs) -> Attention:
    """torch's SDPA with a call for each window, as transformers' Qwen2.5-VL does."""
    length = inputs.shape.tokens

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        each = zip(*(x.transpose(0, 1)[None].split(length, 2) for x in (q, k, v)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*window).transpose(1, 2) for window in each], 1)[0]

    return attend
