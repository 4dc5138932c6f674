# SPDX-License-Identifier: Apache-2.0
"""Selection of a backend for a call, with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch

from ..backends import cpu, cuda, reference
from ..backends.base import AttentionCall
from ..backends.triton import backend as triton
from ..backends.triton.tiles import family_of
from . import composed, flash

# In the order in which "auto" tries them. The reference is used only when named: it builds N x N scores.
BACKENDS: dict[str, ModuleType] = {
    "cpu": cpu,
    "cuda": cuda,
    "triton": triton,
    "composed": composed,
    "reference": reference,
}
AUTO = ("cpu", "cuda", "triton", "composed")


def select(call: AttentionCall, backend: str, plain: str | None = None) -> str:
    """Return the name of the backend for this call. plain: why only plain torch operators may be used, or None.

    Raises:
        ValueError: a forced backend is unknown or cannot compute the call; says why.
    """
    if backend == "auto":
        return "composed" if plain else next(name for name in AUTO if refusal(name, call) is None)
    check_backend(backend)
    if plain and backend != "composed":
        raise ValueError(
            f'spatial_pe: backend="{backend}" does not compute {plain}: use backend="auto" or backend="composed"'
        )
    reason = BACKENDS[backend].cannot_serve(call)
    if reason is not None:
        raise ValueError(f'backend="{backend}" cannot serve this call: {reason}')
    return backend


def check_backend(backend: str) -> None:
    """Raise ValueError unless this is "auto" or a backend that this machine has."""
    if backend == "auto":
        return
    if backend not in BACKENDS:
        raise ValueError(f'backend must be "auto" or one of {list(BACKENDS)}, got {backend!r}')
    reason = BACKENDS[backend].unavailable()
    if reason is not None:
        raise ValueError(f'backend="{backend}" cannot serve this call: {reason}')


def refusal(name: str, call: AttentionCall) -> str | None:
    """Return why "auto" skips this backend for this call, or None."""
    return BACKENDS[name].unavailable() or BACKENDS[name].cannot_serve(call) or _slower(name, call)


def _slower(name: str, call: AttentionCall) -> str | None:
    """Return why "auto" skips a backend that could compute the call: another is faster, or it was not measured yet."""
    if name == "triton":
        return _triton_slower(call)
    if name == "cuda":
        return _cuda_slower(call)
    if name != "cpu":
        return None
    if cpu.FEATURES["isa"] == "portable":
        return "this CPU has neither AVX2 nor AVX-512: torch's own attention is likely faster"
    if {"amx_bf16", "amx_fp16"} & set(cpu.FEATURES["flags"]) and call.q.dtype.itemsize == 2:
        return "this CPU has AMX, which torch uses for 16-bit matrix products and these kernels do not"
    return None


def _triton_slower(call: AttentionCall) -> str | None:
    """Return why Triton is slower: as measured by `spatial-pe tune`, else published or modelled."""
    tokens, dim = call.q.shape[1], call.q.shape[-1]
    if call.q.device.type == "cpu":
        return "Triton's interpreter is for tests"
    faster = triton.faster(call)
    if faster == "cuda":
        return "cuda was measured to be faster"
    packed = call.cu_seqlens is not None
    row, _ = flash.choose(call)
    if faster is not None:  # a backend that waits for the lengths is skipped, whatever it took on equal ones
        return f"{faster} was measured to be faster" if faster != "triton" and not (packed and row is None) else None
    if row is not None and row.beats_triton is not None and _longest(call) >= row.beats_triton:
        return f"{row.provider.name} behind a rotation is likely faster (published, not measured here)"
    if packed:
        return None
    if call.q.dtype == torch.float32:
        return "float32 products leave the tensor cores idle: torch's own attention is likely faster (modelled)"
    if family_of(call.q.device) == "blackwell":
        # B200, head_dim 64: cuDNN 979 TFLOP/s at 1,024 tokens (flash-attention#2605); plain Triton, head_dim 128: 267
        # to 567 at 1,024 to 4,096 (tritonbench#1014). sm_120 differs: it has no tcgen05 that cuDNN could use, so Triton
        # competes with FA2's kernels, as on Ampere.
        return "cuDNN's attention is 2 to 3.5 times as fast as Triton's on this GPU (published, not measured here)"
    if dim > 80 and tokens > 1024:
        return f"head_dim {dim} and {tokens} tokens: torch's own attention is likely faster (modelled)"
    return None


def _longest(call: AttentionCall) -> int:
    """Return the length of the longest sequence; 1 for packed ones without max_seqlen."""
    if call.cu_seqlens is None:
        return call.q.shape[1]
    return 1 if call.max_seqlen is None else int(call.max_seqlen)


def _cuda_slower(call: AttentionCall) -> str | None:
    """Return why cuda is skipped: only `spatial-pe tune` on this GPU, which also compares its results with another
    backend, shows that these kernels are right and fast there."""
    if call.q.device.type == "cpu":
        return "the emulator is for tests"
    if (faster := triton.faster(call)) is None:
        return "not measured on this GPU for such calls: `spatial-pe tune` does"
    return None if faster == "cuda" else f"{faster} was measured to be faster"


@dataclass(frozen=True)
class BackendTable:
    """Backends in the order in which they are tried: (name, None if available else the reason)."""

    rows: tuple[tuple[str, str | None], ...]

    def __iter__(self):
        return iter(self.rows)

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.rows)
        return "\n".join(f"{name:<{width}}  {f'missing: {why}' if why else 'available'}" for name, why in self.rows)


def backends() -> BackendTable:
    """Return the backends of this machine, with the reason for each missing one."""
    return BackendTable(tuple((name, module.unavailable()) for name, module in BACKENDS.items()))
