# SPDX-License-Identifier: Apache-2.0
"""Layout: the projections and sizes of an attention module, read from it once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .forms import ForwardForm

# Names of projections. To add a family with new ones, add them here; a form may have its own.
QKV = (("qkv",), ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"))
QKV_BIAS = ("q_bias", "k_bias", "v_bias")  # timm's EVA: beside a fused projection without bias
OUT = ("proj", "out_proj", "o_proj", "projection_layer")
NORMS = ("q_norm", "k_norm", "v_norm")
OUT_NORM = "norm"  # timm: of all heads, before the output projection
GATE = "gate"  # timm: a sigmoid gate on the heads, before the output projection
OUT_DROPOUT = ("proj_drop", "projection_dropout")
HEADS = ("num_heads", "num_attention_heads")
HEAD_DIM = ("head_dim", "attention_head_size")
SCALE = ("scaling", "scale")
DROPOUT = ("attention_dropout", "attn_drop", "dropout", "dropout_prob")


@dataclass(frozen=True)
class Layout:
    """Map of C -> q (H, D), k and v (Hkv, D) -> C."""

    qkv: tuple[str, ...]  # one fused projection, its output ordered [q | k | v], or three
    bias: tuple[str, ...]  # QKV_BIAS or none
    norms: tuple[str, ...]  # of q and k, maybe v, before the rotation, or none
    norms_all_heads: bool  # over all heads at once (InternVL), not per head
    out_norm: str | None
    gate: str | None
    out: str | None  # None: the output projection is not in this module (BERT-style SelfAttention)
    out_dropout: str | None
    dropout: str | None
    width: int  # C
    heads: int
    kv_heads: int
    head_dim: int
    scaling: str | None  # the attribute that holds the scale of the scores; None: head_dim**-0.5


def read_layout(module: nn.Module, form: ForwardForm) -> Layout | str:
    """Return the layout of an attention module, by the form's names and then by those above, or why it is not
    supported."""
    qkv = next((names for names in (form.qkv, *QKV) if names and all(_child(module, n) for n in names)), None)
    heads, head_dim = _first(module, (form.heads, *HEADS)), _first(module, (form.head_dim, *HEAD_DIM))
    if qkv is None or not (isinstance(heads, int) or isinstance(head_dim, int)):
        return f"no query, key and value projections found, only {_children(module)}"
    projections = [_linear(getattr(module, name)) for name in qkv]
    if any(p is None for p in projections):
        return f"its projections are not linear layers but {type(getattr(module, qkv[0])).__name__}"
    widths = [int(p.out_features) for p in projections]
    width = int(projections[0].in_features)
    # q and fused qkv without a declared head_dim: q is as wide as the tokens
    head_dim = head_dim or (width if len(widths) == 1 else widths[0]) // heads
    heads = heads or widths[0] // head_dim
    if len(widths) == 1:
        key_width, odd = divmod(widths[0] - heads * head_dim, 2)
        widths = [heads * head_dim, key_width, key_width]
    else:
        odd = 0
    if odd or widths[0] != heads * head_dim or widths[1] != widths[2] or widths[1] % head_dim or widths[1] <= 0:
        return f"its projections are {widths} wide, which does not fit {heads} heads of {head_dim} channels"
    present = tuple(name for name in NORMS if _child(module, name))
    norms = tuple(name for name in present if not isinstance(getattr(module, name), nn.Identity))
    over = {_norm_width(module, name) for name in norms} - {None}
    bias = QKV_BIAS if len(qkv) == 1 and all(getattr(module, n, None) is not None for n in QKV_BIAS) else ()
    out = next((name for name in (form.out, *OUT) if _child(module, name)), None)
    out_norm = OUT_NORM if _child(module, OUT_NORM) and out else None
    gate = GATE if _child(module, GATE) and out else None
    out_dropout = next((name for name in OUT_DROPOUT if _child(module, name)), None)
    dropout = next((name for name in DROPOUT if hasattr(module, name)), None)
    unknown = _unknown_parts(module, {*qkv, *bias, *present, out_norm, gate, out, out_dropout, "rope"})
    if norms and (len(over) > 1 or not over <= {head_dim, heads * head_dim}):
        unknown.append(f"norms over {sorted(over)} channels")  # type: ignore[type-var]
    if unknown:
        return f"has {', '.join(unknown)}, which is not part of plain or rotary attention"
    return Layout(
        qkv=qkv,
        bias=bias,
        norms=norms,
        norms_all_heads=heads > 1 and over == {heads * head_dim},
        out_norm=out_norm,
        gate=gate,
        out=out,
        out_dropout=out_dropout,
        dropout=dropout,
        width=width,
        heads=heads,
        kv_heads=widths[1] // head_dim,
        head_dim=head_dim,
        scaling=next((name for name in (form.scale, *SCALE) if getattr(module, name, None) is not None), None),
    )


def project(module: nn.Module, layout: Layout, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Project (..., C) -> q (..., H, D), k and v (..., Hkv, D): views of the projections' results."""
    if len(layout.qkv) == 1:
        fused = _split(_fused(module, layout, x), layout.head_dim)  # (..., H + 2 Hkv, D)
        parts = list(fused.split((layout.heads, layout.kv_heads, layout.kv_heads), dim=-2))  # three slices of it
    else:
        parts = [_split(getattr(module, name)(x), layout.head_dim) for name in layout.qkv]
    for name in layout.norms:
        i, norm = NORMS.index(name), getattr(module, name)
        parts[i] = _split(norm(parts[i].flatten(-2)), layout.head_dim) if layout.norms_all_heads else norm(parts[i])
    q, k, v = parts
    return q, k, v


def _fused(module: nn.Module, layout: Layout, x: Tensor) -> Tensor:
    linear = getattr(module, layout.qkv[0])
    if not layout.bias:
        return linear(x)
    bias = torch.cat([getattr(module, name) for name in layout.bias])
    if type(linear) is nn.Linear and linear.bias is None:
        return nn.functional.linear(x, linear.weight, bias)  # as timm: the bias in the same pass
    fused = linear(x)  # wrapped, e.g. by PEFT
    return fused + bias.to(fused.dtype)


def output(module: nn.Module, layout: Layout, attended: Tensor, x: Tensor) -> Tensor:
    """Project (..., H, D) -> (..., C); x are the tokens, the input of a gate."""
    flat = attended.view(*attended.shape[:-2], -1)
    if layout.out_norm is not None:
        flat = getattr(module, layout.out_norm)(flat)
    if layout.gate is not None:
        flat = flat * getattr(module, layout.gate)(x).sigmoid()
    for name in (layout.out, layout.out_dropout):
        if name is not None:
            flat = getattr(module, name)(flat)
    return flat


def scale_of(module: nn.Module, layout: Layout) -> float:
    """Return the current scale of the scores."""
    return layout.head_dim**-0.5 if layout.scaling is None else float(getattr(module, layout.scaling))


def dropout_of(module: nn.Module, layout: Layout) -> float:
    """Return the attention dropout that is active in this call."""
    if not module.training or layout.dropout is None:
        return 0.0
    value = getattr(module, layout.dropout)
    return float(getattr(value, "p", value))


def _split(x: Tensor, head_dim: int) -> Tensor:
    return x.view(*x.shape[:-1], -1, head_dim)


def _first(module: nn.Module, names: tuple[str, ...]) -> Any:
    return next((getattr(module, name) for name in names if getattr(module, name, None) is not None), None)


def _child(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), nn.Module)


def _linear(module: nn.Module) -> Any:
    """Return the linear layer that a projection is, or that it wraps (Gemma 4's, which clips; PEFT's)."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module
    inner = [m for m in module.children() if hasattr(m, "in_features") and hasattr(m, "out_features")]
    return inner[0] if len(inner) == 1 else None


def _norm_width(module: nn.Module, name: str) -> int | None:
    weight = getattr(getattr(module, name), "weight", None)
    return None if weight is None else weight.numel()


def _children(module: nn.Module) -> str:
    return ", ".join(f"{name} ({type(child).__name__})" for name, child in module.named_children()) or "no submodules"


def _unknown_parts(module: nn.Module, known: set) -> list[str]:
    """Return parameters, buffers and submodules that are unknown: this attention computes more than it supports."""
    own = (*module._parameters.items(), *module._buffers.items())
    found = [name for name, value in own if value is not None and name not in known]
    inert = (nn.Dropout, nn.Identity)
    others = {name: child for name, child in module.named_children() if name not in known}
    return found + [name for name, child in others.items() if not isinstance(child, inert)]
