# SPDX-License-Identifier: Apache-2.0
"""Layout: the projections and sizes of an attention module, read from it once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .forms import ForwardForm

# Names of projections: [q | k | v] in one, [q | k] and v, or three. To add a family with new ones, add them here; a
# form may have its own.
QKV = (
    ("qkv",),
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("projq", "projk", "projv"),
    ("qkv_proj",),
    ("to_qkv",),
    ("to_qk", "to_v"),
)
NORMED = (("to_qkv",), ("to_qk", "to_v"))  # vit-pytorch's: the norm of the tokens is in the module, before them
PARTS = {1: (3,), 2: (2, 1), 3: (1, 1, 1)}  # how many of q, k and v each projection makes
PACKED = "in_proj_weight"  # torch: the weight of a fused projection, without a module
PACKED_BIAS = "in_proj_bias"
QKV_BIAS = ("q_bias", "k_bias", "v_bias")  # timm's EVA: beside a fused projection without bias
OUT = ("proj", "out_proj", "o_proj", "projection_layer", "to_out")
NORMS = (("q_norm", "k_norm", "v_norm"), ("ln_q", "ln_k", "ln_v"))
# timm: of all heads, before the output projection; vit-pytorch: of the tokens, before all others
NORM = "norm"
GATE = "gate"  # timm: a sigmoid gate on the heads, before the output projection
OUT_DROPOUT = ("proj_drop", "projection_dropout", "out_drop")
HEADS = ("num_heads", "num_attention_heads", "heads")
HEAD_DIM = ("head_dim", "attention_head_size")
SCALE = ("scaling", "scale")
DROPOUT = ("attention_dropout", "attn_drop", "dropout", "dropout_prob", "dropout_p")


@dataclass(frozen=True)
class Layout:
    """Map of C -> q (H, D), k and v (Hkv, D) -> C."""

    qkv: tuple[str, ...]  # one to three projections, see QKV, or (PACKED,)
    bias: tuple[str, ...]  # QKV_BIAS or none
    norms: tuple[str | None, ...]  # of q, k and v before the rotation
    norms_all_heads: bool  # over all heads at once (InternVL), not per head
    token_norm: str | None  # of the tokens, before the projections
    out_norm: str | None
    gate: str | None
    out: str | None  # None: the output projection is not in this module (BERT-style SelfAttention)
    out_dropout: str | None
    dropout: str | None
    width: int  # C
    key_width: int  # of the tokens of the keys
    heads: int
    kv_heads: int
    head_dim: int
    scaling: str | None  # the attribute that holds the scale of the scores; None: head_dim**-0.5


def read_layout(module: nn.Module, form: ForwardForm) -> Layout | str:
    """Return the layout of an attention module, by the form's names and then by those above, or why it is not
    supported."""
    qkv = next((names for names in (form.qkv, *QKV) if names and all(_projects(module, n) for n in names)), None)
    if qkv is None and _projects(module, PACKED):
        qkv = (PACKED,)
    heads, head_dim = _first(module, (form.heads, *HEADS)), _first(module, (form.head_dim, *HEAD_DIM))
    if qkv is None or not (isinstance(heads, int) or isinstance(head_dim, int)):
        return f"no query, key and value projections found, only {_children(module)}"
    projections = [_linear(getattr(module, name)) for name in qkv]
    if any(p is None for p in projections):
        return f"its projections are not linear layers but {type(getattr(module, qkv[0])).__name__}"
    widths = [int(p.out_features) for p in projections]
    width, key_width = int(projections[0].in_features), int(projections[-1].in_features)
    if any(int(p.in_features) != key_width for p in projections[1:]) or (width != key_width and not form.keys):
        return f"its projections take {[int(p.in_features) for p in projections]} channels"
    out = next((name for name in (form.out, *OUT) if name and _child(module, name)), None)
    if head_dim is None:
        head_dim = _all_heads(module, out, width if len(widths) < 3 else widths[0]) // heads
    heads = heads or widths[0] // head_dim
    if len(widths) < 3:
        keys, odd = divmod(sum(widths) - heads * head_dim, 2)
        odd += len(widths) == 2 and widths[1] != keys
        widths = [heads * head_dim, keys, keys]
    else:
        odd = 0
    if odd or widths[0] != heads * head_dim or widths[1] != widths[2] or widths[1] % head_dim or widths[1] <= 0:
        return f"its projections are {widths} wide, which does not fit {heads} heads of {head_dim} channels"
    of_qkv = next((names for names in NORMS if any(_child(module, name) for name in names)), NORMS[0])
    norms = tuple(name if _is_active(module, name) else None for name in of_qkv)
    over = {_norm_width(module, name) for name in norms if name} - {None}
    bias = QKV_BIAS if len(qkv) == 1 and all(getattr(module, n, None) is not None for n in QKV_BIAS) else ()
    first = NORM if _child(module, NORM) and qkv in NORMED else None
    out_norm = NORM if _child(module, NORM) and out and not first else None
    gate = GATE if _child(module, GATE) and out else None
    out_dropout = next((name for name in OUT_DROPOUT if _child(module, name)), None)
    dropout = next((name for name in DROPOUT if hasattr(module, name)), None)
    unknown = _unknown_parts(
        module, {*qkv, *bias, *of_qkv, PACKED_BIAS, first, out_norm, gate, out, out_dropout, "rope", *form.rope}
    )
    if over and (len(over) > 1 or not over <= {head_dim, heads * head_dim}):
        unknown.append(f"norms over {sorted(over)} channels")  # type: ignore[type-var]
    if unknown and not form.method:  # a layer has other parts
        return f"has {', '.join(unknown)}, which is not part of plain or rotary attention"
    return Layout(
        qkv=qkv,
        bias=bias,
        norms=norms if any(norms) else (),
        norms_all_heads=heads > 1 and over == {heads * head_dim},
        token_norm=first,
        out_norm=out_norm,
        gate=gate,
        out=out,
        out_dropout=out_dropout,
        dropout=dropout,
        width=width,
        key_width=key_width,
        heads=heads,
        kv_heads=widths[1] // head_dim,
        head_dim=head_dim,
        scaling=next((name for name in (form.scale, *SCALE) if getattr(module, name, None) is not None), None),
    )


def project(
    module: nn.Module, layout: Layout, x: Tensor, keys: Tensor | None = None, values: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Project (..., C) -> q (..., H, D), k and v (..., Hkv, D): views of the projections' results.

    keys, values: the tokens that k and v are made from, if they are others than x.
    """
    keys = x if keys is None else keys
    values = keys if values is None else values
    counts = (layout.heads, layout.kv_heads, layout.kv_heads)
    if layout.token_norm is not None:  # only where there are no others
        x = keys = values = getattr(module, layout.token_norm)(x)
    parts: list[Tensor] = []
    if len(layout.qkv) < 3 and keys is x and values is x:
        for name, made in zip(layout.qkv, PARTS[len(layout.qkv)], strict=True):
            fused = _split(_linearly(module, layout, name, x), layout.head_dim)
            parts += fused.split(counts[len(parts) : len(parts) + made], dim=-2)  # slices of it
    elif layout.qkv == (PACKED,):
        parts = [_split(y, layout.head_dim) for y in _packed_apart(module, (x, keys, values))]
    elif len(layout.qkv) == 3:
        parts = [
            _split(getattr(module, name)(tokens), layout.head_dim)
            for name, tokens in zip(layout.qkv, (x, keys, values), strict=True)
        ]
    else:
        raise NotImplementedError(f"{layout.qkv} of other tokens")
    for i, norm_name in enumerate(layout.norms):
        if norm_name is not None:
            norm = getattr(module, norm_name)
            parts[i] = _split(norm(parts[i].flatten(-2)), layout.head_dim) if layout.norms_all_heads else norm(parts[i])
    q, k, v = parts
    return q, k, v


def _linearly(module: nn.Module, layout: Layout, name: str, x: Tensor) -> Tensor:
    """Return the result of one projection."""
    if name == PACKED:
        return nn.functional.linear(x, module.in_proj_weight, module.in_proj_bias)  # type: ignore[arg-type]
    linear = getattr(module, name)
    if not layout.bias:
        return linear(x)
    bias = torch.cat([getattr(module, name) for name in layout.bias])
    if type(linear) is nn.Linear and linear.bias is None:
        return nn.functional.linear(x, linear.weight, bias)  # as timm: the bias in the same pass
    fused = linear(x)  # wrapped, e.g. by PEFT
    return fused + bias.to(fused.dtype)


def _packed_apart(module: nn.Module, tokens: tuple[Tensor, ...]) -> list[Tensor]:
    """Return q, k and v, each from tokens of its own, by the thirds of torch's fused projection."""
    weights = module.in_proj_weight.chunk(3)  # type: ignore[operator, union-attr]
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)  # type: ignore[operator]
    return [nn.functional.linear(x, w, b) for x, w, b in zip(tokens, weights, biases, strict=True)]


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


def _projects(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), nn.Parameter if name == PACKED else nn.Module)


def _is_active(module: nn.Module, name: str) -> bool:
    return _child(module, name) and not isinstance(getattr(module, name), nn.Identity)


@dataclass(frozen=True)
class _Weight:
    """The sizes of a fused projection of which there is only the weight."""

    out_features: int
    in_features: int


def _all_heads(module: nn.Module, out: str | None, default: int) -> int:
    """Return the channels of all heads of q: what the output projection takes."""
    linear = None if out is None else _linear(getattr(module, out))
    return default if linear is None else int(linear.in_features)


def _linear(module: nn.Module | nn.Parameter) -> Any:
    """Return the linear layer that a projection is, or that it wraps (Gemma 4's, which clips; PEFT's)."""
    if isinstance(module, nn.Parameter):
        return _Weight(*module.shape) if module.ndim == 2 else None
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
    # InternVL's own code has a module for flash-attn
    known = {*known, "inner_attn"}
    inert = (nn.Dropout, nn.Identity, nn.Softmax)  # which softmax is left to the proof
    others = {name: child for name, child in module.named_children() if name not in known}
    return found + [name for name, child in others.items() if not isinstance(child, inert)]
