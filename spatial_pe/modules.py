# SPDX-License-Identifier: Apache-2.0
"""RoPE2DAttention and RoPE2DCrossAttention: multi-head attention over patch grids. RoPE2D: the rotation alone, as CroCo
has it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._utils.dispatcher import fx_node, is_traced, requires_grad
from ._utils.tensor_cache import once_per_forward
from .encodings import AxialRoPE, MixedRoPE, widest
from .grid import PatchGrid
from .ops.attention import rope_attention
from .ops.rotate import apply_rotary
from .rotary import Rotary


class _MultiHeadAttention(nn.Module):
    """Heads and backend, the common part of the two modules below."""

    def __init__(self, embed_dim: int, num_heads: int, num_kv_heads: int | None, backend: str) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim, got num_heads={num_heads}, embed_dim={embed_dim}")
        self.num_heads, self.num_kv_heads = num_heads, num_heads if num_kv_heads is None else num_kv_heads
        if self.num_kv_heads < 1 or num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads, got {self.num_kv_heads} and {num_heads}")
        self.head_dim = embed_dim // num_heads
        self.backend = backend

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"


class RoPE2DAttention(_MultiHeadAttention):
    """Multi-head self-attention with 2D RoPE on q and k, for a ViT block.

    Args:
        embed_dim: width C of the tokens; ``num_heads`` must divide it.
        num_heads: H; head_dim D = C / H.
        rope: "axial" (fixed angles), "mixed" (learned per head), a module that maps a PatchGrid or (N, 2)
            coordinates to a Rotary, or None for plain attention.
        qkv_bias, proj_bias: biases of the input and output projections.
        num_kv_heads: key/value heads for grouped-query attention; None is ``num_heads``.
        backend: see ``rope_attention``.

    Shapes:
        forward(x, grid): x (B, N, C) and a grid, (N, 2) coordinates or a Rotary -> (B, N, C); or packed
        (T, C) with ``PatchGrid.packed`` or ``cu_seqlens``.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        rope: str | nn.Module | None = "axial",
        qkv_bias: bool = True,
        proj_bias: bool = True,
        num_kv_heads: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(embed_dim, num_heads, num_kv_heads, backend)
        self.qkv = nn.Linear(embed_dim, (num_heads + 2 * self.num_kv_heads) * self.head_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim, bias=proj_bias)
        # last: it stays float32 in a model of any dtype, and libraries take a model's dtype from its first parameter
        self.rope = _encoding(rope, self.head_dim, num_heads)

    def forward(
        self,
        x: Tensor,
        grid: PatchGrid | Tensor | Rotary | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        seqlens: Tensor | None = None,
    ) -> Tensor:
        lengths = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, "seqlens": seqlens}
        if (node := fx_node(self, x, grid, **lengths)) is not None:
            return node
        if x.ndim not in (2, 3):
            raise ValueError(f"x must be (B, N, C) or packed (T, C), got shape {tuple(x.shape)}")
        rotary = _rotary(self.rope, grid, x)
        if x.ndim == 2 and cu_seqlens is None:
            if not isinstance(grid, PatchGrid):
                raise ValueError("packed x (T, C) needs cu_seqlens, or a PatchGrid that has them")
            cu_seqlens, max_seqlen = grid.cu_seqlens.to(x.device), grid.max_seqlen
        # (..., (H + 2 Hkv) D) -> q (..., H, D), k, v (..., Hkv, D): views of one projection
        q, k, v = (
            self.qkv(x)
            .unflatten(-1, (-1, self.head_dim))
            .split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=-2)
        )
        out = rope_attention(
            q, k, v, rotary, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, seqlens=seqlens, backend=self.backend
        )
        return self.proj(out.flatten(-2))


class RoPE2DCrossAttention(_MultiHeadAttention):
    """Multi-head cross-attention with 2D RoPE on q and k: the tokens of one image attend to those of another, or to a
    memory, each with the positions of its own grid.

    Args:
        embed_dim: width C of the tokens; ``num_heads`` must divide it.
        num_heads: H; head_dim D = C / H.
        context_dim: width of the other tokens; None is ``embed_dim``.
        rope, qkv_bias, proj_bias, num_kv_heads, backend: see ``RoPE2DAttention``.

    Shapes:
        forward(x, context, grid, context_grid): x (B, N, C), context (B, M, context_dim), and for each a grid,
        coordinates or a Rotary -> (B, N, C); or packed (T, C) and (S, context_dim) with ``PatchGrid.packed`` of as
        many images each, or ``cu_seqlens`` and ``cu_seqlens_k``. A context that is not rotated has
        ``Rotary.identity``.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        context_dim: int | None = None,
        rope: str | nn.Module | None = "axial",
        qkv_bias: bool = True,
        proj_bias: bool = True,
        num_kv_heads: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(embed_dim, num_heads, num_kv_heads, backend)
        self.q = nn.Linear(embed_dim, embed_dim, bias=qkv_bias)
        self.kv = nn.Linear(context_dim or embed_dim, 2 * self.num_kv_heads * self.head_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim, bias=proj_bias)
        self.rope = _encoding(rope, self.head_dim, num_heads)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        grid: PatchGrid | Tensor | Rotary | None = None,
        context_grid: PatchGrid | Tensor | Rotary | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        seqlens: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
        seqlens_k: Tensor | None = None,
    ) -> Tensor:
        lengths = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, "seqlens": seqlens}
        lengths |= {"cu_seqlens_k": cu_seqlens_k, "max_seqlen_k": max_seqlen_k, "seqlens_k": seqlens_k}
        if (node := fx_node(self, x, context, grid, context_grid, **lengths)) is not None:
            return node
        if x.ndim not in (2, 3) or context.ndim != x.ndim:
            raise ValueError(
                f"x and context must be (B, N, C) and (B, M, C), or packed (T, C) and (S, C), got shapes "
                f"{tuple(x.shape)} and {tuple(context.shape)}"
            )
        rotary = _rotary(self.rope, grid, x)
        rotary_k = _rotary(self.rope, context_grid, context, "context_grid", "context")
        if x.ndim == 2 and cu_seqlens is None:
            if not isinstance(grid, PatchGrid) or not isinstance(context_grid, PatchGrid):
                raise ValueError("packed x (T, C) needs cu_seqlens and cu_seqlens_k, or two PatchGrids that have them")
            cu_seqlens, max_seqlen = grid.cu_seqlens.to(x.device), grid.max_seqlen
            cu_seqlens_k, max_seqlen_k = context_grid.cu_seqlens.to(x.device), context_grid.max_seqlen
        q = self.q(x).unflatten(-1, (-1, self.head_dim))
        k, v = self.kv(context).unflatten(-1, (-1, self.head_dim)).chunk(2, dim=-2)
        # lengths of their own, also where both have as many tokens
        if seqlens is not None and seqlens_k is None:
            seqlens_k = torch.full_like(seqlens, context.shape[1])
        out = rope_attention(
            q, k, v, rotary, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, seqlens=seqlens, rotary_k=rotary_k,
            cu_seqlens_k=cu_seqlens_k, max_seqlen_k=max_seqlen_k, seqlens_k=seqlens_k, backend=self.backend,
        )  # fmt: skip
        return self.proj(out.flatten(-2))


class RoPE2D(nn.Module):
    """The 2D RoPE of CroCo, DUSt3R and MASt3R, instead of their ``RoPE2D``, and of curope's ``cuRoPE2D``.

    The first half of the channels is rotated by the row, the second by the column, each half as rotate-half does, with
    D/4 frequencies F0 freq^(-4i/D). Angles are formed in float64 where the device has it. Strides do not matter.

    Args:
        freq: base of the frequencies.
        F0: factor of all frequencies.
        heads_first: tokens are (B, H, N, D), as those modules take them; False: (B, N, H, D).
        inplace: overwrite the tokens, as curope does, where no gradient is recorded.

    Shapes:
        forward(tokens, positions): tokens (B, H, N, D), D a multiple of 4; positions (B, N, 2), row and column,
        integers or floats -> as tokens, in their dtype.

    Source: naver/croco models/pos_embed.py RoPE2D, models/curope/kernels.cu.
    """

    def __init__(
        self, freq: float = 100.0, F0: float = 1.0, *, heads_first: bool = True, inplace: bool = False
    ) -> None:
        super().__init__()
        if freq <= 0:
            raise ValueError(f"freq must be a positive number, got {freq!r}")
        self.base, self.F0 = float(freq), float(F0)
        self.heads_first, self.inplace = heads_first, inplace

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        if (node := fx_node(self, tokens, positions)) is not None:
            return node
        if tokens.ndim != 4 or tokens.shape[-1] % 4:
            layout = "(B, H, N, D)" if self.heads_first else "(B, N, H, D)"
            raise ValueError(f"tokens must be {layout} with D a multiple of 4, got shape {tuple(tokens.shape)}")
        x = tokens.transpose(1, 2) if self.heads_first else tokens
        if positions.shape != (*x.shape[:2], 2):
            raise ValueError(
                f"positions must be (B, N, 2), row and column of each token, {(*x.shape[:2], 2)} here, got "
                f"{tuple(positions.shape)}"
            )
        out = apply_rotary(x, self._table(positions, x.shape[-1]), inplace=self.inplace and not requires_grad((x,)))
        return out.transpose(1, 2) if self.heads_first else out

    def _table(self, positions: Tensor, dim: int) -> Rotary:
        """Return the table of the positions, the same for q and k of all layers."""

        def make() -> Rotary:
            exponents = torch.arange(0, dim, 4, device=positions.device).to(widest(positions.device)) / dim
            frequencies = self.F0 * self.base**-exponents
            angles = (positions[..., None].to(frequencies.dtype) * frequencies).flatten(-2)[:, :, None]
            return Rotary(angles.cos().float(), angles.sin().float(), "axis_half")

        if is_traced(positions) or requires_grad((positions,)):
            return make()
        return once_per_forward(positions, (), (dim, self.base, self.F0), make)

    def extra_repr(self) -> str:
        return f"freq={self.base:g}, F0={self.F0:g}, heads_first={self.heads_first}, inplace={self.inplace}"


def _rotary(
    rope: nn.Module | None, grid: PatchGrid | Tensor | Rotary | None, x: Tensor, name: str = "grid", tokens: str = "x"
) -> Rotary | None:
    if x.ndim == 3 and isinstance(grid, PatchGrid) and len(grid.images) > 1:
        raise ValueError(
            f"{name} packs {len(grid.images)} images: {tokens} must be packed (T, C), got shape {tuple(x.shape)}"
        )
    if isinstance(grid, Rotary):
        return grid
    if rope is None:
        return None
    if grid is None:
        raise ValueError(f"{name} is None: pass a PatchGrid, (N, 2) coordinates or a Rotary, or build with rope=None")
    return rope(grid).to(x.device)


def _encoding(rope: str | nn.Module | None, head_dim: int, num_heads: int) -> nn.Module | None:
    if rope is None or isinstance(rope, nn.Module):
        return rope
    if rope == "axial":
        return AxialRoPE(head_dim)
    if rope == "mixed":
        return MixedRoPE(head_dim, num_heads)
    raise ValueError(f'rope must be "axial", "mixed", a module or None, got {rope!r}')
