# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels (csrc/cuda), with mma.sync: for windows, images whose keys and values fit into shared memory, and head
dimensions between powers of two. They need nvcc when the package is built; without it Triton is used."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from .._utils.dispatcher import assume_constant
from . import reference
from .base import AttentionCall, allocator, float32_tables, table_strides, view
from .triton import backend as triton

DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
HEAD_DIMS = (64, 72, 80, 88, 96, 128)
FORMS = {"dense": 0, "packed": 1, "padded": 2}
# q, k and v are copied 16 bytes at a time
ALIGNED = 8
MOST_BETWEEN = 2**31 - 1


def _load() -> ModuleType | str:
    if importlib.util.find_spec("spatial_pe._cuda") is None:
        failure = Path(__file__).parents[1] / "_cuda_build_failure.txt"  # written by setup.py
        why = f" ({failure.read_text(encoding='utf-8').strip()})" if failure.exists() else ""
        return f"the CUDA kernels are not built{why}: reinstall with nvcc on the PATH"
    try:
        return importlib.import_module("spatial_pe._cuda")
    except ImportError as error:
        return f"the CUDA kernels do not load ({error}): reinstall spatial_pe"


# Loaded here and not on first use: torch.compile traces the functions below, but cannot trace an import.
EXTENSION: ModuleType | str = _load()
# Tests replace EXTENSION by a module that runs the kernels on the host.
EMULATED = False


def unavailable() -> str | None:
    if isinstance(EXTENSION, str):
        return EXTENSION
    if EMULATED:
        return None
    if torch.version.hip is not None:
        return "this torch is built for ROCm"
    if not (torch.cuda.is_initialized() or torch.cuda.is_available()):
        return "no GPU that torch can use"
    return _runtime_error()


@assume_constant
@functools.cache
def _runtime_error() -> str | None:
    """Return the error of the statically linked CUDA runtime: it may need a newer driver than torch's."""
    _, error = _module().devices()
    return f"the CUDA runtime of the kernels finds no device ({error}): update the driver" if error else None


def cannot_serve(call: AttentionCall) -> str | None:
    if call.keys is not None:
        return "keys that are other tokens than the queries: not in these kernels yet"
    q, k, v = call.q, call.k, call.v
    if q.device.type != ("cpu" if EMULATED else "cuda"):
        return f"q is on {q.device}: this backend runs on a CUDA device"
    if not EMULATED and triton.capability(q.device.index) < (8, 0):
        return f"{torch.cuda.get_device_name(q.device)} is older than sm_80 (Ampere)"
    if q.dtype not in DTYPES:
        return f"no {q.dtype} kernel: bfloat16 and float16 only"
    if q.shape[-1] not in HEAD_DIMS:
        return f"head_dim is {q.shape[-1]}: compiled for {', '.join(map(str, HEAD_DIMS))}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not aligned(x):
            return f"{name} has rows that do not start at multiples of 16 bytes (strides {x.stride()})"
        if _too_far(x):
            return f"{name} has strides {x.stride()}: at most 2,147,483,647 elements between tokens and heads"
    rotary = call.rotary
    if rotary is not None and vector_of(rotary.rotary_dim, rotary.pairing) is None:
        return f'rotary_dim is {rotary.rotary_dim}, pairing "{rotary.pairing}": its runs of pairs must be even'
    return None


def aligned(x: Tensor) -> bool:
    """Return whether all rows start at a multiple of 16 bytes, by the strides only; for the address see _begun."""
    batch, token, head, _ = x.stride()
    if batch % ALIGNED == 0 and token % ALIGNED == 0 and head % ALIGNED == 0:
        return True
    # a dimension of one element may have any stride
    return all(
        stride % ALIGNED == 0 or size == 1 for stride, size in zip((batch, token, head), x.shape[:3], strict=True)
    )


def _too_far(x: Tensor) -> bool:
    """Return whether a stride of tokens or heads exceeds the 32 bits that the kernels use."""
    return x.stride(1) > MOST_BETWEEN or x.stride(2) > MOST_BETWEEN


def vector_of(rotary_dim: int, pairing: str) -> int | None:
    """Return how many pairs a thread rotates at a time: a divisor of every run of pairs and of its offset in a row."""
    run = rotary_dim // 4 if pairing == "axis_half" else rotary_dim // 2
    return next((size for size in (4, 2) if run % size == 0), None)


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Return out (B, N, H, D) and lse (B, H, N) float32, zero where a sample has no token."""
    q, k, v = (_begun(x) for x in (call.q, call.k, call.v))
    empty = allocator(call)
    out = empty(q.shape, dtype=q.dtype, device=q.device)
    lse = empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)
    arguments, keep = _arguments(call)
    _module().forward(arguments, q=view(q), k=view(k), v=view(v), out=view(out), lse=lse.data_ptr(), **_place(q))
    del keep
    return out, lse


def backward(call: AttentionCall, out: Tensor, lse: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv, contiguous."""
    if dout.stride(-1) != 1 or not aligned(dout):
        dout = dout.contiguous()
    q, k, v, out, dout = (_begun(x) for x in (call.q, call.k, call.v, out, dout))
    empty = allocator(call)
    dq, dk, dv = (empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    arguments, keep = _arguments(call)
    place = _place(q)
    delta = rotated_q = rotated_k = None
    if _module().scratch_wanted(arguments, place["device"]):
        delta = torch.empty_like(lse)
        if call.rotary is not None:
            rotated_q, rotated_k = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    _module().backward(
        arguments,
        q=view(q),
        k=view(k),
        v=view(v),
        out=view(out),
        lse=lse.data_ptr(),
        dout=view(dout),
        dq=view(dq),
        dk=view(dk),
        dv=view(dv),
        delta=0 if delta is None else delta.data_ptr(),
        q_rotated=(0, 0, 0, 0) if rotated_q is None else view(rotated_q),
        k_rotated=(0, 0, 0, 0) if rotated_k is None else view(rotated_k),
        **place,
    )
    del keep
    return dq, dk, dv


def angle_gradient(
    q: Tensor, k: Tensor | None, dq: Tensor, dk: Tensor | None, cos: Tensor, pairing: str, seqlens: Tensor | None
) -> Tensor:
    """Return dφ by one pass over q and k: Triton's if available."""
    backend = triton if q.device.type == "cuda" and triton.unavailable() is None else reference
    return backend.angle_gradient(q, k, dq, dk, cos, pairing, seqlens)


def _begun(x: Tensor) -> Tensor:
    """Return x, or a copy if its address is no multiple of 16 bytes, e.g. in a slice of a flat buffer."""
    return x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _module() -> ModuleType:
    if isinstance(EXTENSION, str):
        raise RuntimeError(f'backend "cuda" is not available: {EXTENSION}')
    return EXTENSION


def _place(x: Tensor) -> dict[str, int]:
    if EMULATED:
        return {"device": 0, "stream": 0}
    return {"device": x.device.index, "stream": torch.cuda.current_stream(x.device).cuda_stream}


def _arguments(call: AttentionCall) -> tuple[dict, tuple[Tensor, ...]]:
    """Return sizes, sequences and rotary tables, as plain numbers and addresses; and the tensors behind these, which
    must live until the launch. Memory that the allocator reuses afterwards is written on the same stream, so later."""
    _, tokens, heads, dim = call.q.shape
    bounds = call.bounds
    arguments = {
        "dtype": DTYPES[call.q.dtype],
        "longest": min(max(1, call.longest), tokens),
        "heads": heads,
        "kv_heads": call.k.shape[2],
        "head_dim": dim,
        "scale": call.scale,
        "form": FORMS[call.form],
        "bounds": 0 if bounds is None else bounds.data_ptr(),
        "sequences": call.num_sequences,
        "tokens": tokens,
        "vector": 4,
    }
    keep: tuple[Tensor, ...] = () if bounds is None else (bounds,)
    rotary = call.rotary
    if rotary is not None and rotary.rotary_dim > 0:
        # rows at multiples of 16 bytes; if 4 does not divide R/2, vectors have 2 pairs, 8 bytes
        cos, sin = float32_tables(rotary, 4)
        if cos.data_ptr() % 16 or sin.data_ptr() % 16:  # both, or their strides might differ
            cos, sin = (x.clone(memory_format=torch.contiguous_format) for x in (cos, sin))
        arguments |= {
            "vector": vector_of(rotary.rotary_dim, rotary.pairing),
            "rotary_dim": rotary.rotary_dim,
            "pairing": rotary.pairing,
            "cos": (cos.data_ptr(), *table_strides(cos)),
            "sin": sin.data_ptr(),
        }
        keep += (cos, sin)
    return arguments, keep
