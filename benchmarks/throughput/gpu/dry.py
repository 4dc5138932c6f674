# SPDX-License-Identifier: Apache-2.0
"""What a machine without a GPU can check of the benchmark: that all variants compute the same function, forward and
backward, and that every launch of every shape can be planned."""

from __future__ import annotations

import time

import torch

import spatial_pe
from spatial_pe.backends.call import Call
from spatial_pe.backends.triton.plan import plan_backward, plan_forward, plan_rotation

from . import variants
from .cases import DIMS, WINDOW, Inputs, Shape, plan
from .measure import SAME, relative

# What a CPU cannot run: cuDNN, flash-attn, varlen_attn; FlexAttention has no backward there.
CANNOT = ("eager-cudnn", "compiled-cudnn", "rotary-cudnn", variants.VARLEN, *variants.FLASH_ATTN)
# torch.compile's front end; the code that inductor writes for a CPU says nothing about a GPU's.
COMPILER = "aot_eager"


def run() -> None:
    begin = time.monotonic()
    torch.manual_seed(0)
    tiny = [Shape(3, tokens, dim, heads=2) for dim in DIMS for tokens in (WINDOW, 37)]
    for shape in tiny:
        checked = agree(shape, compiled=shape.dim in (64, 80))
        print(f"{shape!s:<32} agree: {', '.join(checked)}", flush=True)
    launches = 0
    works = plan(quick=False)
    for work in works:
        launches += planned(work.shape)
    print(f"{len(works)} shapes, {launches} launches planned, {time.monotonic() - begin:.0f} s")


def agree(shape: Shape, compiled: bool) -> list[str]:
    """Every variant against the reference backend in float64; returns those that ran. Raises where one differs."""
    torch._dynamo.reset()
    inputs = Inputs(shape, "cpu")
    exact = _exact(inputs)
    checked = []
    for name in variants.names(shape, compiled):
        if name in CANNOT:
            continue
        attention = variants.build(name, inputs, COMPILER)
        got = [variants.call(attention, inputs, "forward")()]
        if name != variants.FLEX:
            got += variants.call(attention, inputs, "backward")()
            again = variants.call(attention, inputs, "forward+backward")()
            if not all(torch.equal(x, y) for x, y in zip(again, got[1:], strict=True)):
                raise ArithmeticError(f"{name} at {shape}: the backward alone and after the forward differ")
        error = relative(got, exact[: len(got)])
        if (error < SAME) == (name in variants.PLAIN):
            raise ArithmeticError(f"{name} at {shape}: differs from the reference by {error:.2g}")
        checked.append(name)
    for name, rotation in variants.rotations(inputs).items():
        if name != "copy":
            turned = [spatial_pe.apply_rotary(x.double(), inputs.rotary) for x in inputs.qkv[:2]]
            if not relative(list(rotation()), turned) < SAME:
                raise ArithmeticError(f"rotary {name} at {shape} differs from the reference")
    return checked


def _exact(inputs: Inputs) -> list[torch.Tensor]:
    """out, dq, dk, dv in float64."""
    leaves = [x.detach().double().requires_grad_() for x in inputs.leaves]
    out = spatial_pe.rope_attention(
        *leaves, inputs.rotary, cu_seqlens=inputs.cu_seqlens, max_seqlen=inputs.max_seqlen, backend="reference"
    )
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs.grad.double())]


def planned(shape: Shape) -> int:
    """Launches of a shape at its full size, with and without rotation. Tensors without memory: only strides matter."""
    with torch.device("meta"):
        lead = (1, shape.batch * shape.tokens) if shape.packed else (shape.batch, shape.tokens)
        qkv = torch.empty(*lead, 3, shape.heads, shape.dim, dtype=torch.bfloat16).unbind(2)
        grad = torch.empty(*lead, shape.heads, shape.dim, dtype=torch.bfloat16)
        table = torch.empty(1, lead[1], 1, shape.dim // 2)
        bounds = torch.empty(shape.batch + 1, dtype=torch.int32) if shape.packed else None
        turned = spatial_pe.Rotary(table, table)
        count = len(plan_rotation(qkv[:2], turned).launches)
        longest = shape.tokens if shape.packed else None
        for rotary in (turned, None):
            call = Call(*qkv, rotary, shape.dim**-0.5, bounds, longest, None)
            forward = plan_forward(call)
            count += len(forward.launches) + len(plan_backward(call, *forward.results, grad).launches)
    return count
