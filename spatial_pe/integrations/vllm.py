# SPDX-License-Identifier: Apache-2.0
"""Plug-in for vLLM: vision towers of a server rotate inside of their attention, in one call for all images and windows.

vLLM's towers rotate by a module (``ApplyRotaryEmb``) and attend by another (``MMEncoderAttention``), both inside of an
attention class of the model. When a model is loaded, the two get other classes: the first hands q and k on as they are,
and leaves the tables; the second takes both to ``rope_attention``. So a model's own forward runs, whatever its name is.
Each kind of attention is compared with its own result first, on a small random input, and keeps vLLM's path if they
differ.

``SPATIAL_PE_VLLM=0`` switches it off, as does a ``VLLM_PLUGINS`` that does not name ``spatial_pe``. Nothing of vLLM is
imported before vLLM asks.
"""

from __future__ import annotations

import functools
import logging
import os
from collections import Counter
from collections.abc import Iterator
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._utils.tensor_cache import once_per_forward
from ..ops.attention import rope_attention
from ..rotary import Rotary

SWITCH = "SPATIAL_PE_VLLM"
# Relative difference of two results whose roundings differ.
SAME = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.03}
LENGTHS = (0, 5, 6, 16)  # cu_seqlens of the comparison
# Arguments of attention modules beside the tokens, which come first.
KNOWN = {
    "cu_seqlens",
    "max_seqlen",
    "sequence_lengths",
    "rotary_pos_emb_cos",
    "rotary_pos_emb_sin",
    "cos",
    "sin",
    "rotary_pos_emb",
    "rope_freqs_cis",
    "rope_emb",
    "position_embeddings",
    "attention_mask",
    "output_attentions",
}

logger = logging.getLogger("vllm.spatial_pe")  # vLLM shows what is below its own name


def register() -> None:
    """Serve the vision towers of every model that this process loads: the entry point of ``vllm.general_plugins``.

    May be called several times. Of a version of vLLM that lacks what is needed, the reason is logged.
    """
    if os.environ.get(SWITCH, "1") == "0":
        return
    try:
        from vllm.model_executor.layers.attention.mm_encoder_attention import MMEncoderAttention  # noqa: F401
        from vllm.model_executor.layers.rotary_embedding.common import ApplyRotaryEmb  # noqa: F401
        from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    except ImportError as missing:
        logger.warning("spatial_pe serves no vision tower: this version of vLLM has no %s", missing)
        return
    for loader in (BaseModelLoader, *_subclasses(BaseModelLoader)):
        if "load_model" in vars(loader) and not hasattr(loader.load_model, "_spatial_pe"):
            loader.load_model = _serving(loader.load_model)


def _subclasses(cls: Any) -> Iterator[Any]:
    for child in cls.__subclasses__():
        yield child
        yield from _subclasses(child)


def _serving(load_model: Any) -> Any:
    @functools.wraps(load_model)
    def load(self: Any, *args: Any, **kwargs: Any) -> nn.Module:
        model = load_model(self, *args, **kwargs)
        try:
            if found := serve(model):
                logger.info("spatial_pe: %s", found)
        except Exception:
            logger.exception("spatial_pe serves no vision tower: vLLM's own path stays")
            unserve(model)
        return model

    load._spatial_pe = True  # type: ignore[attr-defined]
    return load


class Served(NamedTuple):
    """Attention modules by class: how many are served, and why others are not."""

    served: dict[str, int]
    refused: dict[str, str]

    def __str__(self) -> str:
        said = [f"{count} {name} rotate inside of their attention" for name, count in self.served.items()]
        said += [f"{name}: vLLM's own path, {reason}" for name, reason in self.refused.items()]
        return "; ".join(said)

    def __bool__(self) -> bool:
        return bool(self.served or self.refused)


def serve(model: nn.Module) -> Served:
    """Let the attention modules of a loaded model's vision towers rotate inside of their attention."""
    served: Counter[str] = Counter()
    refused: dict[str, str] = {}
    verdicts: dict[tuple, str | None] = {}
    for module in list(model.modules()):
        parts = _parts(module)
        if parts is None:
            continue
        rotary, attention = parts
        name = type(module).__name__
        kind = (type(module), attention.num_heads, attention.num_kv_heads, attention.head_size, rotary.is_neox_style)
        if kind not in verdicts:
            verdicts[kind] = _refusal(module, attention) or _compare(module, rotary, attention)
        reason = verdicts[kind]
        if reason is None:
            _swap(module, rotary, attention)
            served[name] += 1
        else:
            refused[name] = reason
    return Served(dict(served), refused)


def unserve(model: nn.Module) -> None:
    """Undo ``serve``."""
    for module in model.modules():
        if isinstance(module, Deferred | Fused):
            module.__class__ = type(module).__mro__[2]
            del module._spatial_pe
        for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, Consumed)]:
            del module._forward_hooks[key]


def _parts(module: nn.Module) -> tuple[Any, Any] | None:
    """Return the rotation and the attention of an attention module, if it has one of each and is not served yet."""
    from vllm.model_executor.layers.attention.mm_encoder_attention import MMEncoderAttention
    from vllm.model_executor.layers.rotary_embedding.common import ApplyRotaryEmb

    rotary = [child for child in module.children() if isinstance(child, ApplyRotaryEmb)]
    attention = [child for child in module.children() if isinstance(child, MMEncoderAttention)]
    if len(rotary) != 1 or len(attention) != 1 or isinstance(attention[0], Fused):
        return None
    return rotary[0], attention[0]


def _refusal(module: nn.Module, attention: Any) -> str | None:
    """Return why an attention module cannot be served, or None."""
    _, *names = signature(module.forward).parameters
    others = [name for name in names if name not in KNOWN]
    if others:  # MiMo's full_attn: some calls go to another attention
        return f"its forward takes {', '.join(others)}"
    if getattr(attention, "fp8_enabled", False):
        return "it is quantised to FP8"
    if attention.attn_backend.name == "FLASHINFER":
        return "its cu_seqlens are byte offsets for cuDNN"
    return None


# ---------------------------------------------------------------------------------------------------- the two modules


class Meeting:
    """Tables of one attention module on their way from its rotation to its attention, each with what it rotates."""

    def __init__(self) -> None:
        self.left: list[tuple[Tensor, Tensor, Tensor]] = []


class Deferred(nn.Module):
    """vLLM's rotation, which leaves it to the attention."""

    _spatial_pe: Meeting

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        self._spatial_pe.left.append((x, cos, sin))
        return x

    forward_native = forward_cuda = forward_hip = forward_cpu = forward_xpu = forward  # called by name (Siglip2-NaViT)


class Consumed:
    """Forward hook of an attention module: raises if a rotation was left, and not taken to the attention."""

    def __init__(self, meeting: Meeting) -> None:
        self.meeting = meeting

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.meeting.left:
            self.meeting.left = []
            raise RuntimeError(f"spatial_pe: {type(module).__name__} attends by another module; set {SWITCH}=0")


class Fused(nn.Module):
    """vLLM's attention, with the rotation inside."""

    _spatial_pe: Meeting
    _interleaved: bool
    scale: float

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: Tensor | None = None,
        sequence_lengths: Tensor | None = None,
    ) -> Tensor:
        left, self._spatial_pe.left = self._spatial_pe.left, []
        q, k, v = (x if x.ndim == 4 else x.unflatten(-1, (-1, self.head_size)) for x in (query, key, value))  # type: ignore[arg-type]
        times = q.shape[0] if cu_seqlens is not None else 1
        rotary, rotary_k = self._tables(left, query, times), self._tables(left, key, times)
        bounds: dict[str, Any] = {}
        if cu_seqlens is not None:  # (B, N) tokens are packed in one sequence
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            longest = int(max_seqlen) if max_seqlen is not None and max_seqlen.device.type == "cpu" else None
            bounds = {"cu_seqlens": cu_seqlens.to(q.device, torch.int32), "max_seqlen": longest or None}
        rotary_k = None if rotary_k is rotary else rotary_k
        out = rope_attention(q, k, v, rotary, rotary_k=rotary_k, scale=self.scale, **bounds)
        return out.view(*query.shape[:-1], -1) if query.ndim != 4 else out.view(query.shape)

    def _tables(self, left: list[tuple[Tensor, Tensor, Tensor]], x: Tensor, times: int) -> Rotary | None:
        """Return the table that was left for x, that is for a tensor in the same memory, with its rows repeated."""
        if not left:
            return None
        found = left if torch.compiler.is_compiling() else [entry for entry in left if _shares_memory(entry[0], x)]
        if not found:
            raise RuntimeError(
                f"spatial_pe: q and k were copied between the rotation and the attention of a tower; set {SWITCH}=0"
            )
        _, cos, sin = found[0]
        pairing = "interleaved" if self._interleaved else "half"

        def make() -> Rotary:
            # copies: a view would keep the key of its own entry alive
            rows = (t.to(torch.float32, copy=True).repeat(times, 1) for t in (cos, sin))
            return Rotary(next(rows), next(rows), pairing)  # type: ignore[arg-type]

        return once_per_forward(cos, (sin,), (pairing, times), make)


def _shares_memory(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage()._cdata == y.untyped_storage()._cdata


@functools.cache
def _class(base: type, original: type) -> type:
    return type(f"SpatialPe{original.__name__}", (base, original), {"__module__": original.__module__})


def _swap(module: nn.Module, rotary: Any, attention: Any) -> None:
    meeting = Meeting()
    interleaved = not rotary.is_neox_style
    rotary.__class__ = _class(Deferred, type(rotary))  # type: ignore[arg-type]
    attention.__class__ = _class(Fused, type(attention))  # type: ignore[arg-type]
    rotary._spatial_pe = attention._spatial_pe = meeting
    module.register_forward_hook(Consumed(meeting))
    attention._interleaved = interleaved


# -------------------------------------------------------------------------------------------------------- comparison


@torch.no_grad()
def _compare(module: nn.Module, rotary: Any, attention: Any) -> str | None:
    """Return why the result of an attention module changes, or None if it does not."""
    weight = next(p for p in module.parameters() if p.is_floating_point())
    for inputs in _examples(module, attention, weight):
        try:
            theirs = _first(module(**inputs))
        except Exception as failed:
            problem = f"it does not take the input of the comparison ({type(failed).__name__})"
            continue
        _swap(module, rotary, attention)
        try:
            ours = _first(module(**inputs))
        except Exception as failed:
            return f"it cannot be served ({type(failed).__name__}: {failed})"
        finally:
            unserve(module)
        difference = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
        return None if difference < SAME[weight.dtype] else f"the result differs by {difference:.2g}"
    return problem


def _examples(module: nn.Module, attention: Any, weight: Tensor) -> Iterator[dict[str, Any]]:
    """Yield arguments of an attention module's forward, in the layouts that vLLM's have."""
    tokens, pairs = LENGTHS[-1], attention.head_size // 2
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float32, device="cpu").to(weight.device)

    angles = random(tokens, pairs)
    twice = (angles.cos().repeat(1, 2), angles.sin().repeat(1, 2))
    width = max(getattr(child, "input_size", 0) for child in module.children())
    x = random(tokens, width).to(weight.dtype)
    longest = torch.tensor(10, dtype=torch.int32, device="cpu")
    known = {
        "cu_seqlens": torch.tensor(LENGTHS, dtype=torch.int32, device=weight.device),
        "rotary_pos_emb_cos": angles.cos().to(weight.dtype),
        "rotary_pos_emb_sin": angles.sin().to(weight.dtype),
        "cos": angles.cos().to(weight.dtype),
        "sin": angles.sin().to(weight.dtype),
        "rotary_pos_emb": angles,
        "rope_freqs_cis": torch.polar(torch.ones_like(angles), angles),
        "rope_emb": twice,
        "position_embeddings": twice,
        "max_seqlen": None if attention.attn_backend.name == "TORCH_SDPA" else longest,
    }
    first, *names = signature(module.forward).parameters
    others = {name: known.get(name) for name in names}
    for shaped in (x[:, None], x, x[None]):
        yield {first: shaped, **others}


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result
