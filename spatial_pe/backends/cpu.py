# SPDX-License-Identifier: Apache-2.0
"""C++ kernels (csrc/cpu): fused forward and backward, selected at run time for the CPU's instruction set."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from ..rotary import Rotary
from . import reference
from .base import AttentionCall, allocator, float32_tables, table_strides, view

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def _load() -> ModuleType | str:
    try:
        return importlib.import_module("spatial_pe._C")
    except ImportError as error:
        failure = Path(__file__).parents[1] / "_build_failure.txt"  # written by setup.py
        why = failure.read_text(encoding="utf-8").strip() if failure.exists() else str(error)
        return f"the compiled extension is missing ({why}): reinstall with a C++17 compiler on the PATH"


# Loaded here and not on first use: torch.compile traces the functions below, but cannot trace an import.
EXTENSION: ModuleType | str = _load()
# CPU features and build options of the extension; empty without it.
FEATURES: dict = {} if isinstance(EXTENSION, str) else EXTENSION.cpu_features()


def unavailable() -> str | None:
    return EXTENSION if isinstance(EXTENSION, str) else None


def cannot_serve(call: AttentionCall) -> str | None:
    dim = call.q.shape[-1]
    if call.q.device.type != "cpu":
        return f"q is on {call.q.device}: this backend runs on the CPU"
    if call.q.dtype not in DTYPES:
        return f"no {call.q.dtype} kernel: float32, bfloat16 and float16 only"
    if dim % 8 or not 16 <= dim <= 256:
        return f"head_dim is {dim}: must be a multiple of 8 from 16 to 256"
    return None


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Return out (B, N, H, D) and lse (B, H, N) float32, zero where a sample has no token."""
    q = call.q
    problem = _problem(call)
    empty = allocator(call)
    out = empty(q.shape)
    lse = empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    _module().forward(problem, q=view(q), k=view(call.k), v=view(call.v), out=view(out), lse=lse.data_ptr())
    return out, lse


def backward(call: AttentionCall, out: Tensor, lse: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv, contiguous."""
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    empty = allocator(call)
    dq, dk, dv = (empty(x.shape) for x in (call.q, call.k, call.v))
    _module().backward(
        _problem(call),
        q=view(call.q),
        k=view(call.k),
        v=view(call.v),
        out=view(out),
        lse=lse.data_ptr(),
        dout=view(dout),
        dq=view(dq),
        dk=view(dk),
        dv=view(dv),
    )
    return dq, dk, dv


# Only for tables that require a gradient: one pass over q and k, by torch.
angle_gradient = reference.angle_gradient


def cannot_rotate(x: Tensor) -> str | None:
    """Return why x (B, N, H, D) cannot be rotated, like cannot_serve, or None."""
    if (reason := unavailable()) is not None:
        return reason
    if x.device.type != "cpu":
        return f"x is on {x.device}: this backend runs on the CPU"
    if x.dtype not in DTYPES:
        return f"no {x.dtype} kernel: float32, bfloat16 and float16 only"
    return f"head_dim is {x.shape[-1]}: must be a multiple of 8" if x.shape[-1] % 8 else None


def rotation(xs: Sequence[Tensor], rotary: Rotary, inplace: bool = False, inverse: bool = False) -> tuple[Tensor, ...]:
    """Return R(x) of each x (B, N, H, D): contiguous, unless in place. inverse: by the inverse rotation."""
    table = {"rotary_dim": rotary.rotary_dim, "pairing": rotary.pairing}
    table |= _table(rotary.inverse() if inverse else rotary)
    outs = tuple(x if inplace else torch.empty(x.shape, dtype=x.dtype) for x in xs)
    for x, out in zip(xs, outs, strict=True):
        batch, tokens, heads, dim = x.shape
        sizes = {"dtype": DTYPES[x.dtype], "batch": batch, "tokens": tokens, "heads": heads, "head_dim": dim}
        _module().rotate(table | sizes | {"threads": torch.get_num_threads()}, x=view(x), out=view(out))
    return outs


def _module() -> ModuleType:
    if isinstance(EXTENSION, str):
        raise RuntimeError(f'backend "cpu" is not available: {EXTENSION}')
    return EXTENSION


def _problem(call: AttentionCall) -> dict:
    """Return the sizes, the sequences and the rotary tables, as plain numbers and addresses.

    The dict also holds the tensors behind its addresses, which keeps them alive.
    """
    batch, tokens, heads, dim = call.q.shape
    starts = [(b, start, stop - start, first, last - first) for b, start, stop, first, last in call.pairs()]
    problem = {
        "dtype": DTYPES[call.q.dtype],
        "batch": batch,
        "tokens": tokens,
        "heads": heads,
        "kv_heads": call.k.shape[2],
        "head_dim": dim,
        "scale": call.scale,
        "sequences": starts,
        "threads": torch.get_num_threads(),
    }
    if call.rotary is not None:
        problem |= {"rotary_dim": call.rotary.rotary_dim, "pairing": call.rotary.pairing, **_table(call.rotary)}
    if call.keys is not None and call.keys.rotary is not None:
        problem |= _table(call.keys.rotary, "_k")
    return problem


def _table(rotary: Rotary, side: str = "") -> dict:
    cos, sin = float32_tables(rotary)
    strides = table_strides(cos)
    addresses = {"cos": (cos.data_ptr(), *strides), "sin": (sin.data_ptr(), *strides), "keep": (cos, sin)}
    return {name + side: value for name, value in addresses.items()}
