# SPDX-License-Identifier: Apache-2.0
"""Layout: where an attention module keeps its projections, and its sizes, read from the module once."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

# The names that the field uses. Adding a family that has new ones is adding them here.
QKV = (("qkv",), ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"))
OUT = ("proj", "out_proj", "o_proj")
NORMS = ("q_norm", "k_norm")
HEADS = ("num_heads", "num_attention_heads")
HEAD_DIM = ("head_dim", "attention_head_size")
SCALE = ("scaling", "scale")
DROPOUT = ("attention_dropout", "dropout", "dropout_prob")


@dataclass(frozen=True)
class Layout:
    """C -> q (H, D), k and v (Hkv, D) -> C."""

    qkv: tuple[str, ...]  # one fused projection, its output ordered [q | k | v], or three
    out: str | None  # None: the output projection is not in this module (BERT-style SelfAttention)
    norms: tuple[str, ...]  # per-head norms of q and k before the rotation, or none
    dropout: str | None
    width: int  # C
    heads: int
    kv_heads: int
    head_dim: int
    scale: float


def read_layout(module: nn.Module) -> Layout | str:
    """The layout of an attention module, or why it has none that this package knows."""
    qkv = next((names for names in QKV if all(isinstance(getattr(module, n, None), nn.Module) for n in names)), None)
    heads = _first(module, HEADS)
    if qkv is None or not isinstance(heads, int):
        return f"no query, key and value projections found, only {_children(module)}"
    projections = [getattr(module, name) for name in qkv]
    if not all(hasattr(p, "in_features") and hasattr(p, "out_features") for p in projections):
        return f"its projections are not linear layers but {type(projections[0]).__name__}"
    widths = [p.out_features for p in projections]
    # q and fused qkv without a declared head_dim: q is as wide as the tokens
    head_dim = _first(module, HEAD_DIM) or (projections[0].in_features if len(widths) == 1 else widths[0]) // heads
    if len(widths) == 1:
        key_width, odd = divmod(widths[0] - heads * head_dim, 2)
        widths = [heads * head_dim, key_width, key_width]
    else:
        odd = 0
    if odd or widths[0] != heads * head_dim or widths[1] != widths[2] or widths[1] % head_dim or widths[1] <= 0:
        return f"its projections are {widths} wide, which does not fit {heads} heads of {head_dim} channels"
    out = next((name for name in OUT if isinstance(getattr(module, name, None), nn.Module)), None)
    norms = NORMS if all(isinstance(getattr(module, name, None), nn.Module) for name in NORMS) else ()
    dropout = next((name for name in DROPOUT if hasattr(module, name)), None)
    unknown = _unknown_parts(module, {*qkv, *norms, out, "rope"}, head_dim, norms)
    if unknown:
        return f"has {unknown}, which is not part of plain or rotary attention"
    scale = _first(module, SCALE)
    scale = head_dim**-0.5 if scale is None else float(scale)
    return Layout(qkv, out, norms, dropout, projections[0].in_features, heads, widths[1] // head_dim, head_dim, scale)


def project(module: nn.Module, layout: Layout, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(..., C) -> q (..., H, D), k and v (..., Hkv, D): views of what the projections return."""
    if len(layout.qkv) == 1:
        fused = getattr(module, layout.qkv[0])(x)
        # (..., (H + 2 Hkv) D) -> (..., H + 2 Hkv, D) -> three slices of it
        heads = fused.view(*fused.shape[:-1], -1, layout.head_dim)
        q, k, v = heads.split((layout.heads, layout.kv_heads, layout.kv_heads), dim=-2)
    else:
        q, k, v = (getattr(module, name)(x) for name in layout.qkv)
        shape = (*x.shape[:-1], -1, layout.head_dim)
        q, k, v = q.view(shape), k.view(shape), v.view(shape)
    if layout.norms:
        q, k = getattr(module, layout.norms[0])(q), getattr(module, layout.norms[1])(k)
    return q, k, v


def dropout_of(module: nn.Module, layout: Layout) -> float:
    """The attention dropout that acts in this call."""
    if not module.training or layout.dropout is None:
        return 0.0
    value = getattr(module, layout.dropout)
    return float(getattr(value, "p", value))


def _first(module: nn.Module, names: tuple[str, ...]):
    return next((getattr(module, name) for name in names if getattr(module, name, None) is not None), None)


def _children(module: nn.Module) -> str:
    return ", ".join(f"{name} ({type(child).__name__})" for name, child in module.named_children()) or "no submodules"


def _unknown_parts(module: nn.Module, known: set, head_dim: int, norms: tuple[str, ...]) -> str:
    """Parameters, buffers and submodules that say: this attention computes more than we know of."""
    own = [name for name, value in (*module._parameters.items(), *module._buffers.items()) if value is not None]
    inert = (nn.Dropout, nn.Identity)
    own += [name for name, child in module.named_children() if name not in known and not isinstance(child, inert)]
    for name in norms:
        weight = getattr(getattr(module, name), "weight", None)
        if weight is not None and weight.numel() != head_dim:
            own.append(f"{name} over {weight.numel()} channels")
    return ", ".join(own)
