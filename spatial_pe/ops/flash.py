# SPDX-License-Identifier: Apache-2.0
"""Composed path by an installed flash-attn, or torch's varlen_attn: attention after the rotation.

PROVIDERS lists the packages and their limits; ROWS says when one is called instead of torch's SDPA
(scaled_dot_product_attention), which computes the rest. Nothing is imported before a call on a GPU could use it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .._utils.console import first_line
from .._utils.dispatcher import is_traced, needs_dispatcher
from ..backends.base import AttentionCall
from ..backends.cuda import aligned
from ..backends.longest import longest_sequence
from ..backends.triton.tiles import capability
from ..rotary import Rotary
from .rotate import apply_rotary_qk


@dataclass(frozen=True)
class Provider:
    """Functions of another package, by name: (B, N, H, D) -> the same, and (T, H, D) with cu_seqlens -> the same."""

    name: str
    install: str
    module: str
    dense: str | None
    packed: str
    most_dim: int
    # arguments: cu_seqlens and max_seqlen of queries and of keys, the scale
    bounds: tuple[str, str] = ("cu_seqlens_q", "cu_seqlens_k")
    longest: tuple[str, str] = ("max_seqlen_q", "max_seqlen_k")
    scale: str = "softmax_scale"


FA2 = Provider("flash-attn 2", "flash-attn", "flash_attn", "flash_attn_func", "flash_attn_varlen_func", 256)
# 192: above, it has no deterministic backward
FA3 = Provider("flash-attn 3", "flash-attn-3", "flash_attn_interface", "flash_attn_func", "flash_attn_varlen_func", 192)
FA4 = Provider("flash-attn 4", "flash-attn-4", "flash_attn.cute", "flash_attn_func", "flash_attn_varlen_func", 128)
VARLEN = Provider(
    *("torch's varlen_attn", "torch>=2.10", "torch.nn.attention.varlen", None, "varlen_attn", 256),
    bounds=("cu_seq_q", "cu_seq_k"),
    longest=("max_q", "max_k"),
    scale="scale",
)
PROVIDERS = (FA2, FA3, FA4, VARLEN)


@dataclass(frozen=True)
class Row:
    """A provider instead of SDPA, for sequences of `longest` tokens and more, on GPUs of these major capabilities."""

    packed: bool
    majors: tuple[int, ...]
    provider: Provider
    why: str
    longest: int = 1
    beats_triton: int | None = None  # from so many tokens on, where the Triton kernels are available; None: never


# In order of preference. None of it was measured by us: the numbers are published, where a source is named, or
# modelled.
#
# Packed: SDPA has no cu_seqlens. It is called once for each distinct length, after a wait for the device to read them;
# so providers that take cu_seqlens come first, the newest kernels first. On Blackwell FA4 takes 0.85 of the time of
# cuDNN's packed kernel (pytorch#191576), which torch does not call. FA2's kernels, which varlen_attn has too, run from
# sm_80 on.
# Dense: on Hopper either cuDNN (in SDPA) or FA3 is the fastest up to 1,025 tokens, by 19 % at most; beyond it is FA3,
# by 2 % at 2,304 (sglang#30089, #30090) and 16 % at 4,096 (its paper; on an H20 cuDNN is faster by 5 %:
# flash-attention#1310). On Blackwell cuDNN is 1.2 to 2 times faster than FA4 (sglang#33655, cuDNN 9.19). Elsewhere SDPA
# calls FA2's kernels itself. Head_dim and dtype make no difference; limits of a provider are in PROVIDERS.
LONG = 2048
_NO_WAIT = "takes cu_seqlens: no call per length, and no wait for the device"
ROWS = (
    Row(True, (9,), FA3, _NO_WAIT, beats_triton=LONG),
    Row(True, (10, 11), FA4, _NO_WAIT, beats_triton=1),
    Row(True, (9,), FA4, _NO_WAIT, beats_triton=LONG),
    Row(True, (8, 9, 10, 11, 12), FA2, _NO_WAIT),
    Row(True, (8, 9, 10, 11, 12), VARLEN, _NO_WAIT),
    Row(False, (9,), FA3, "2 to 16 % faster than cuDNN from 2,048 tokens on (published)", LONG, LONG),
)
# The only device type; tests set it to the CPU, with functions that run there.
DEVICE = "cuda"
DTYPES = (torch.bfloat16, torch.float16)
# Sequences are the second dimension of the grid of FA2's launches.
MOST_SEQUENCES = 65535


def choose(call: AttentionCall) -> tuple[Row | None, str]:
    """Return the row for this call and why; or None, and why SDPA is called."""
    q, packed = call.q, call.cu_seqlens is not None
    if q.device.type != DEVICE:
        return None, "flash-attn runs on GPUs only"
    if is_traced(q):  # sizes may be symbolic
        return None, _DISPATCHED
    keys = call.keys
    if call.seqlens is not None or (keys is not None and keys.seqlens is not None):
        return None, "padded samples need a mask"
    plain = q.shape[2] == call.k.shape[2] and call.scale == 1.0 / math.sqrt(q.shape[-1])
    found = _choose(
        q.device, q.dtype, q.shape[-1], packed, LONG if min(q.shape[1], call.k.shape[1]) >= LONG else 1, plain
    )
    if found[0] is None:  # most dense calls
        return found
    if not torch.backends.cuda.flash_sdp_enabled():
        return None, "flash attention is switched off (torch.nn.attention.sdpa_kernel)"
    if q.numel() == 0 or call.k.numel() == 0:
        return None, "there are no tokens"
    tensors = call.tensors
    if call.cu_seqlens is not None:
        if call.cu_seqlens.shape[0] > MOST_SEQUENCES + 1:
            return None, f"{call.cu_seqlens.shape[0] - 1} sequences: at most {MOST_SEQUENCES}"
        tensors = (*tensors, call.cu_seqlens)
        if keys is not None and keys.cu_seqlens is not None:
            tensors = (*tensors, keys.cu_seqlens)
    return (None, _DISPATCHED) if needs_dispatcher(tensors) else found


_DISPATCHED = "traced or transformed calls use torch's operators"


@functools.lru_cache(256)
def _choose(
    device: torch.device, dtype: torch.dtype, dim: int, packed: bool, longest: int, plain: bool
) -> tuple[Row | None, str]:
    if dtype not in DTYPES:
        return None, f"flash-attn has no {dtype}: bfloat16 and float16 only"
    if dim % 8:
        return None, f"head_dim is {dim}: flash-attn needs a multiple of 8"
    chip = major(device)
    missing = []
    for row in ROWS:
        provider = row.provider
        if row.packed != packed or chip not in row.majors or longest < row.longest:
            continue
        if dim > provider.most_dim:
            missing.append(f"{provider.name} has no head_dim {dim}")
        elif (why := unusable(provider, plain)) is not None:
            missing.append(why)
        else:
            return row, row.why
    return None, "; ".join(missing) or "torch's SDPA has as fast a kernel"


def major(device: torch.device) -> int:
    """Return the major compute capability; 0 for anything but NVIDIA: ROCm, a fake tensor's GPU."""
    return capability(device.index)[0] if torch.version.cuda is not None and torch.cuda.is_available() else 0


def unusable(provider: Provider, plain: bool = True) -> str | None:
    """Return why a provider cannot be called, or None. plain: as many key heads as query heads, the default scale."""
    functions = _functions(provider)
    if isinstance(functions, str):
        return functions
    if not plain and functions.plain_only:
        return f"this {provider.name} takes no scale and no grouped heads"
    return None


@dataclass(frozen=True)
class Functions:
    dense: Callable | None
    packed: Callable
    options: tuple[str, ...]  # which of enable_gqa and deterministic the functions take
    plain_only: bool


# Providers that raised when they were called, e.g. a kernel left out of a build. SDPA is called from then on.
_FAILED: dict[str, str] = {}


@functools.cache
def _functions(provider: Provider) -> Functions | str:
    """Import the functions and check their signatures. A broken package counts as missing."""
    if provider.name in _FAILED:
        return _FAILED[provider.name]
    try:
        module = importlib.import_module(provider.module)
        packed = getattr(module, provider.packed)
        dense = getattr(module, provider.dense) if provider.dense is not None else None
    except (ImportError, AttributeError):  # flash-attn 4 alone leaves an empty flash_attn
        return f"{provider.name} is not installed"
    except Exception as error:  # built for another torch, CUDA or machine
        return f"{provider.name} does not load ({type(error).__name__}: {error})"
    known = inspect.signature(packed).parameters
    if any(name not in known for name in (*provider.bounds, *provider.longest)):
        return f"this {provider.name} has another signature"
    options = tuple(name for name in ("enable_gqa", "deterministic") if name in known)
    # torch 2.10: neither scale nor groups
    plain_only = provider.scale not in known or (provider is VARLEN and "enable_gqa" not in known)
    return Functions(dense, packed, options, plain_only)


def clear_cache() -> None:
    """Clear the cache, so that packages are looked for again."""
    _functions.cache_clear()
    _choose.cache_clear()


def attention(call: AttentionCall, row: Row) -> Tensor | None:
    """Return out (B, N, H, D), contiguous; or None if the provider raises: from then on SDPA is called."""
    provider, functions = row.provider, _functions(row.provider)
    assert not isinstance(functions, str)
    q, k, v, tables = call.q, call.k, call.v, [call.rotary, call.key_rotary]
    arguments: dict[str, Any] = {}
    if row.packed:
        arguments, one = _packed_arguments(call, provider)
        if call.rotary is None:
            q, k = q * one, k * one
        tables = [rotary and Rotary._unchecked(rotary.cos * one, rotary.sin, rotary.pairing) for rotary in tables]
    rotary, rotary_k = tables
    if rotary is not None:
        q, k = apply_rotary_qk(q, k, rotary, None if call.keys is None else rotary_k)
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    if row.packed:
        q, k, v = q[0], k[0], v[0]
    if not functions.plain_only:
        arguments[provider.scale] = call.scale
    if "enable_gqa" in functions.options:
        arguments["enable_gqa"] = q.shape[-2] != k.shape[-2]
    if "deterministic" in functions.options:
        arguments["deterministic"] = torch.are_deterministic_algorithms_enabled()
    try:
        out = (functions.packed if row.packed else functions.dense)(q, k, v, **arguments)  # type: ignore[misc]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a kernel left out of the build, a missing compiler: any error is possible
        _FAILED[provider.name] = f"{provider.name} failed ({type(error).__name__}: {first_line(error)})"
        warnings.warn(f"spatial_pe: {_FAILED[provider.name]}; torch's own attention is used instead", stacklevel=2)
        clear_cache()
        return None
    out = out[0] if isinstance(out, tuple) else out  # some releases return lse, too
    _refuse_second_derivatives(out, (q, k, v))
    return (out[None] if row.packed else out).contiguous()


def _aligned(x: Tensor) -> Tensor:
    """Return x at an address that is a multiple of 16 bytes: kernels load 16 bytes at a time; not all check."""
    good = x.stride(-1) == 1 and aligned(x) and x.data_ptr() % 16 == 0
    return x if good else x.clone(memory_format=torch.contiguous_format)


# ------------------------------------------------------------------------------------------------------ packed bounds


def _packed_arguments(call: AttentionCall, provider: Provider) -> tuple[dict[str, Any], Tensor]:
    """Return cu_seqlens and the longest sequence of queries and keys, by the provider's names, and `one`: see below."""
    assert call.cu_seqlens is not None
    bounds, longest, one = _safe_bounds(call.cu_seqlens, call.max_seqlen, call.q.shape[1])
    bounds_k, longest_k = bounds, longest
    if call.keys is not None:
        assert call.keys.cu_seqlens is not None
        bounds_k, longest_k, one_k = _safe_bounds(call.keys.cu_seqlens, call.keys.max_seqlen, call.k.shape[1])
        one = one * one_k
    pairs = ((provider.bounds, (bounds, bounds_k)), (provider.longest, (longest, longest_k)))
    return {name: value for names, values in pairs for name, value in zip(names, values, strict=True)}, one


def _safe_bounds(bounds: Tensor, max_seqlen: int | None, tokens: int) -> tuple[Tensor, int, Tensor]:
    """Return (cu_seqlens, max_seqlen, one) that are safe for kernels that check nothing, whatever cu_seqlens hold: no
    wait for the device, no access out of bounds, each token in a sequence of at most `longest`. If cu_seqlens do not
    match the tokens, they are replaced by sequences of equal lengths, and `one`, a factor for the inputs, is NaN, and
    so are the results and gradients of all tokens.

    Nine launches of a few microseconds, so cached for the layers that share a tensor.
    """
    longest = max_seqlen if max_seqlen is not None else longest_sequence(bounds)
    # in a CUDA graph the lengths of later replays are not known: choose bounds that hold for all
    longest = tokens if longest is None else int(longest)
    even = -(-tokens // max(bounds.shape[0] - 1, 1))
    longest = min(max(longest, even), tokens)
    if bounds.is_inference() or (bounds.is_cuda and torch.cuda.is_current_stream_capturing()):
        safe, one = _computed_bounds(bounds, tokens, longest, even)
        return safe, longest, one
    stream = torch.cuda.current_stream(bounds.device).cuda_stream if bounds.is_cuda else 0
    key = (bounds._version, bounds.data_ptr(), tokens, longest, stream)
    kept = _KEPT.get(bounds)
    if kept is None or kept[0] != key:
        kept = _KEPT[bounds] = (key, _computed_bounds(bounds, tokens, longest, even))
    safe, one = kept[1]
    return safe, longest, one


# cu_seqlens -> (cached inputs, (cu_seqlens, one))
_KEPT: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _computed_bounds(bounds: Tensor, tokens: int, longest: int, even: int) -> tuple[Tensor, Tensor]:
    lengths = bounds.diff()
    fits = ((lengths >= 0) & (lengths <= longest)).all() & (bounds[0] == 0) & (bounds[-1] == tokens)
    stand_in = (torch.arange(bounds.shape[0], device=bounds.device, dtype=bounds.dtype) * even).clamp(max=tokens)
    one = torch.where(fits, 1.0, torch.nan)
    return torch.where(fits, bounds, stand_in), one


# -------------------------------------------------------------------------------------------------- second derivatives


def _refuse_second_derivatives(out: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """Raise on a second derivative: flash-attn's backward is not recorded, so it would lack terms."""
    if out.grad_fn is None:
        return
    kept = list(inputs)

    def after_backward(dinputs: tuple[Tensor | None, ...], douts: tuple[Tensor | None, ...]) -> Any:
        if not torch.is_grad_enabled():
            return kept.clear()  # this may outlive what autograd has saved, and must not keep it alive
        if not kept:
            raise RuntimeError(_ONCE)
        left = (*kept, *(x for x in douts if x is not None))
        return tuple(None if x is None else _Once.apply(x, *left) for x in dinputs)

    out.grad_fn.register_hook(after_backward)


_ONCE = (
    "spatial_pe: flash-attn has no double backward: call under "
    "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), which keeps it out"
)


class _Once(torch.autograd.Function):
    """Identity on x, recorded as a function of all that x depends on, without a derivative."""

    @staticmethod
    def forward(ctx, x, *others):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(_ONCE)
