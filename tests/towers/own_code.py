# SPDX-License-Identifier: Apache-2.0
"""Small models of the structure that public code outside of transformers and timm has, written here from its
interfaces: the arguments of forwards, the names of parts, and what is computed. The real packages: tests/models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from family import Family, randn, randomize
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, DIM = 48, 2, 24


@dataclass(frozen=True)
class OwnCode(Family):
    """A model that is built here."""

    build: Callable[[], nn.Module] | None = None

    def available(self) -> bool:
        return True

    def make(self, seed: int = 0, implementation: str = "sdpa", **options: Any) -> nn.Module:
        assert self.build is not None
        return randomize(self.build(**options), seed).eval()


def _own(build: Callable, inputs: Callable, *attention: str, layers: int = 2, calls: int | None = None) -> OwnCode:
    return OwnCode("", "", "", {}, inputs, attention, layers, calls=calls, build=build)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Naive attention of (B, H, N, D) -> (B, N, H D)."""
    return (((q @ k.transpose(-2, -1)) * scale).softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


def heads_of(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Tower(nn.Module):
    """A patch embedding and layers: layer(x, ...) is added to the tokens."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, 8, 8)
        self.blocks = nn.ModuleList(layers)

    def embed(self, pixel_values: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.patch_embed(pixel_values)
        return F.layer_norm(x.flatten(2).transpose(1, 2), (WIDTH,)), tuple(x.shape[-2:])  # type: ignore[return-value]


def places(grid: tuple[int, int], batch: int) -> Tensor:
    return torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1]))[None].repeat(batch, 1, 1)


def rotate_pairs(x: Tensor, table: Tensor) -> Tensor:
    """Neighbouring channels of (..., N, D) by complex (N, D/2)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * table).flatten(-2).type_as(x)


def images(height: int = 24, width: int = 32, batch: int = 2) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": randn(batch, 3, height, width)}


# ---------------------------------------------------------------------------- CroCo, DUSt3R; VGGT, Depth Anything 3


class AxisRope(nn.Module):
    """Rotation by (row, column) of each token: half of the channels by one, half by the other, in the tokens' dtype."""

    def __init__(self, base: float = 100.0) -> None:
        super().__init__()
        self.base = base

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        assert positions.ndim == 3 and positions.shape[-1] == 2
        quarter = tokens.shape[-1] // 4
        frequencies = self.base ** -(torch.arange(quarter).float() / quarter)
        parts = []
        for half, place in zip(tokens.chunk(2, dim=-1), positions.unbind(-1), strict=True):
            angles = (place[:, None, :, None].float() * frequencies).to(tokens.dtype)
            cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
            first, second = half.chunk(2, dim=-1)
            parts.append(half * cos + torch.cat([-second, first], -1) * sin)
        return torch.cat(parts, -1)


class ViewAttention(nn.Module):
    """CroCo's."""

    def __init__(self, rope: nn.Module | None) -> None:
        super().__init__()
        self.num_heads, self.scale = HEADS, DIM**-0.5
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.rope = rope

    def forward(self, x: Tensor, xpos: Tensor) -> Tensor:
        q, k, v = map(heads_of, self.qkv(x).chunk(3, -1))
        if self.rope is not None:
            q, k = self.rope(q, xpos), self.rope(k, xpos)
        return self.proj_drop(self.proj(softmax_attention(q, k, v, self.scale)))


class OtherViewAttention(nn.Module):
    """CroCo's, of its decoder."""

    def __init__(self, rope: nn.Module | None) -> None:
        super().__init__()
        self.num_heads, self.scale = HEADS, DIM**-0.5
        self.projq, self.projk, self.projv, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.rope = rope

    def forward(self, query: Tensor, key: Tensor, value: Tensor, qpos: Tensor, kpos: Tensor) -> Tensor:
        q, k, v = heads_of(self.projq(query)), heads_of(self.projk(key)), heads_of(self.projv(value))
        if self.rope is not None:
            q, k = self.rope(q, qpos), self.rope(k, kpos)
        return self.proj_drop(self.proj(softmax_attention(q, k, v, self.scale)))


class Croco(Tower):
    """Two views, each encoded; a decoder of one that looks at the other."""

    def __init__(self, rope: bool = True) -> None:
        shared = AxisRope() if rope else None
        super().__init__(ViewAttention(shared), ViewAttention(shared))
        self.decoder = OtherViewAttention(shared)

    def forward(self, pixel_values: Tensor, other: Tensor) -> Tensor:
        tokens, where = [], []
        for view in (pixel_values, other):
            x, grid = self.embed(view)
            where.append(places(grid, len(x)))
            for block in self.blocks:
                x = x + block(x, where[-1])
            tokens.append(x)
        return tokens[0] + self.decoder(tokens[0], tokens[1], tokens[1], *where)


class FrameAttention(nn.Module):
    """VGGT's."""

    def __init__(self, rope: nn.Module | None) -> None:
        super().__init__()
        self.num_heads, self.scale = HEADS, DIM**-0.5
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = (nn.LayerNorm(DIM) if rope else nn.Identity() for _ in range(2))
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.rope = rope

    def forward(self, x: Tensor, pos: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        q, k, v = map(heads_of, self.qkv(x).chunk(3, -1))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None and pos is not None:
            q, k = self.rope(q, pos), self.rope(k, pos)
        mask = None if attn_mask is None else attn_mask[:, None].repeat(1, HEADS, 1, 1)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class Frames(Tower):
    """Layers without positions, of each frame, and of all frames; a token without a place in front of each frame."""

    def __init__(self) -> None:
        rope = AxisRope()
        super().__init__(FrameAttention(None), FrameAttention(rope), FrameAttention(rope), FrameAttention(rope))
        self.camera = nn.Parameter(torch.zeros(1, 1, WIDTH))

    def forward(self, pixel_values: Tensor) -> Tensor:
        x, grid = self.embed(pixel_values)
        x = torch.cat([self.camera.expand(len(x), -1, -1), x], dim=1)
        where = F.pad(places(grid, len(x)) + 1, (0, 0, 1, 0))
        plain, frame, everywhere, late = self.blocks
        x = x + plain(x)
        x = x + frame(x, pos=where)
        joined, together = x.flatten(0, 1)[None], where.flatten(0, 1)[None]
        x = (joined + everywhere(joined, pos=together)).view(x.shape)
        return x + late(x, pos=None)


# ------------------------------------------------------------------------------------------------------ SAM 2's memory


class MemoryRope(nn.Module):
    """SAM 2's: a table of a square grid, made again for another one; keys are so many times the queries, and others."""

    def __init__(self, width_k: int = WIDTH, repeats: bool = False) -> None:
        super().__init__()
        self.num_heads = 1
        self.q_proj, self.out_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k_proj, self.v_proj = nn.Linear(width_k, WIDTH), nn.Linear(width_k, WIDTH)
        self.rope_k_repeat, self.dropout_p = repeats, 0.0
        self.freqs_cis = self.compute_cis(end_x=4, end_y=4)

    @staticmethod
    def compute_cis(end_x: float, end_y: float) -> Tensor:
        place = torch.arange(int(end_x) * int(end_y))
        frequencies = 10000.0 ** -(torch.arange(0, WIDTH, 4).float() / WIDTH)
        angles = [torch.outer(axis.float(), frequencies) for axis in (place % end_x, place // end_x)]
        return torch.polar(torch.ones(len(place), WIDTH // 2), torch.cat(angles, -1))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, num_k_exclude_rope: int = 0) -> Tensor:
        q, k, v = (x[:, None] for x in (self.q_proj(q), self.k_proj(k), self.v_proj(v)))
        tokens, rotated = q.shape[-2], k.shape[-2] - num_k_exclude_rope
        if self.freqs_cis.shape[0] != tokens:
            self.freqs_cis = self.compute_cis(end_x=math.sqrt(tokens), end_y=math.sqrt(tokens))
        assert rotated == tokens or self.rope_k_repeat
        table = self.freqs_cis.repeat(rotated // tokens, 1)
        k = torch.cat([rotate_pairs(k[..., :rotated, :], table), k[..., rotated:, :]], -2)
        x = F.scaled_dot_product_attention(rotate_pairs(q, self.freqs_cis), k, v)
        return self.out_proj(x[:, 0])


class Memory(nn.Module):
    """Nothing here embeds patches: the module is its own tower."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.cross_attn_image = MemoryRope(), MemoryRope(16, repeats=True)

    def forward(self, curr: Tensor, memory: Tensor, num_obj_ptr_tokens: int) -> Tensor:
        x = curr + self.self_attn(curr, curr, curr)
        return x + self.cross_attn_image(q=x, k=memory, v=memory, num_k_exclude_rope=num_obj_ptr_tokens)


def frame_and_memory(side: int) -> Callable[[], dict[str, Any]]:
    tokens = side * side
    return lambda: {"curr": randn(2, tokens, WIDTH), "memory": randn(2, 3 * tokens + 4, 16), "num_obj_ptr_tokens": 4}


# ------------------------------------------------------------------------------------ CLIP: torch.nn.MultiheadAttention


class ClipBlock(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        return x + self.attn(y, y, y, need_weights=False)[0]


class Clip(Tower):
    """open_clip's and OpenAI's tower; with a pooling by learned queries, as CoCa has it."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__(ClipBlock(batch_first), ClipBlock(batch_first))
        self.batch_first = batch_first
        self.class_embedding = nn.Parameter(torch.zeros(WIDTH))
        self.positional_embedding = nn.Parameter(torch.zeros(13, WIDTH))
        self.attn_pool = Pool()

    def forward(self, pixel_values: Tensor) -> Tensor:
        x, _ = self.embed(pixel_values)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)
        x = x + self.positional_embedding[: x.shape[1]]
        x = x if self.batch_first else x.transpose(0, 1)
        for block in self.blocks:
            x = block(x)
        return self.attn_pool(x if self.batch_first else x.transpose(0, 1))


class Pool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(3, WIDTH))
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(self.query.expand(len(x), -1, -1), x, x, need_weights=False)[0]


# ------------------------------------------------------------------------------------------------------- vit-pytorch


class NormedAttention(nn.Module):
    """vit-pytorch's: the norm is inside, and no number says how wide a head is."""

    def __init__(self, rotary_emb: nn.Module | None = None) -> None:
        super().__init__()
        inner = HEADS * 16
        self.heads, self.scale = HEADS, 16**-0.5
        self.norm, self.attend, self.dropout = nn.LayerNorm(WIDTH), nn.Softmax(dim=-1), nn.Dropout(0.0)
        self.to_qkv = nn.Linear(WIDTH, 3 * inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, WIDTH), nn.Dropout(0.0))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(heads_of, self.to_qkv(self.norm(x)).chunk(3, -1))
        attended = self.dropout(self.attend(q @ k.transpose(-1, -2) * self.scale)) @ v
        return self.to_out(attended.transpose(1, 2).flatten(2))


class HeadRope(nn.Module):
    """Each head has directions of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(HEADS, 8, 2, generator=torch.Generator().manual_seed(0)))

    def forward(self, input: Tensor, pos: Tensor) -> Tensor:
        x, y = input.float().chunk(2, dim=-1)
        angles = (self.freqs[None, :, None] * pos.float()[:, None, :, None]).sum(-1)  # (B, H, N, D/2)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([x * cos - y * sin, x * sin + y * cos], dim=-1).type_as(input)


class DirectedAttention(nn.Module):
    """vit-pytorch's with a rotation: q and k come from one projection, v from another."""

    def __init__(self) -> None:
        super().__init__()
        inner = HEADS * 16
        self.heads, self.scale, self.rotary_emb = HEADS, 16**-0.5, HeadRope()
        self.norm = nn.LayerNorm(WIDTH)
        self.to_qk, self.to_v = nn.Linear(WIDTH, 2 * inner, bias=False), nn.Linear(WIDTH, inner, bias=False)
        self.to_out = nn.Linear(inner, WIDTH)

    def forward(self, x: Tensor, pos: Any = None, block_mask: Any = None, mask_fn: Any = None) -> Tensor:
        x = self.norm(x)
        q, k, v = map(heads_of, (*self.to_qk(x).chunk(2, -1), self.to_v(x)))
        q, k = self.rotary_emb(q, pos), self.rotary_emb(k, pos)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=block_mask, scale=self.scale)
        return self.to_out(x.transpose(1, 2).flatten(2))


class Plain(Tower):
    """Layers that take the tokens alone."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        x, _ = self.embed(pixel_values)
        for block in self.blocks:
            y = block(x)
            x = x + (y[0] if isinstance(y, tuple) else y)
        return x


class Placed(Tower):
    def forward(self, pixel_values: Tensor) -> Tensor:
        x, grid = self.embed(pixel_values)
        for block in self.blocks:
            x = x + block(x, places(grid, len(x)), None, None)
        return x


# --------------------------------------------------------------------------------------------------------- remote code


def by_images(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Attention of (N, H, D) -> (N, H D), image by image."""
    found = []
    for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        parts = (x[start:stop].transpose(0, 1)[None] for x in (q, k, v))
        found.append(F.scaled_dot_product_attention(*parts)[0].transpose(0, 1).flatten(1))
    return torch.cat(found)


class MoonLayer(nn.Module):
    """Kimi-VL's: attention is a method of the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.hidden_size_per_attention_head, self.attn_implementation = HEADS, DIM, "sdpa"
        self.norm0, self.norm1, self.mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wqkv, self.wo = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def attention_qkvpacked(self, x: Tensor, cu_seqlens: Tensor, rope_freqs_cis: Any = None) -> Tensor:
        q, k, v = (y.unflatten(-1, (HEADS, DIM)) for y in self.wqkv(x).chunk(3, -1))
        q, k = (rotate_pairs(y, rope_freqs_cis[:, None]) for y in (q, k))
        return self.wo(by_images(q, k, v, cu_seqlens))

    def forward(self, hidden_states: Tensor, cu_seqlens: Tensor, rope_freqs_cis: Any = None) -> Tensor:
        x = hidden_states
        x = x + self.attention_qkvpacked(self.norm0(x), cu_seqlens, rope_freqs_cis=rope_freqs_cis)
        return x + self.mlp(self.norm1(x))


class Moon(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, 4, 4)
        self.blocks = nn.ModuleList([MoonLayer(), MoonLayer()])

    def forward(self, pixel_values: Tensor, cu_seqlens: Tensor) -> Tensor:
        x = F.layer_norm(self.patch_embed(pixel_values).flatten(1), (WIDTH,))
        angles = torch.outer(torch.arange(len(x)).float(), torch.linspace(0.1, 1, DIM // 2))
        table = torch.polar(torch.ones_like(angles), angles)
        for block in self.blocks:
            x = block(x, cu_seqlens, rope_freqs_cis=table)
        return x


class KeyeAttention(nn.Module):
    """Keye-VL's and PaddleOCR-VL's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale, self.dropout = HEADS, DIM, DIM**-0.5, 0.0
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        output_attentions: bool = False,
        cu_seqlens: Any = None,
        rope_emb: Any = None,
    ) -> tuple[Tensor, None]:
        parts = (project(hidden_states)[0].unflatten(-1, (HEADS, DIM)) for project in (self.q_proj, self.k_proj))
        cos, sin = (t[:, None].float() for t in rope_emb)
        q, k = (x * cos + torch.cat([-x[..., DIM // 2 :], x[..., : DIM // 2]], -1) * sin for x in parts)
        v = self.v_proj(hidden_states)[0].unflatten(-1, (HEADS, DIM))
        q, k = q.to(v.dtype), k.to(v.dtype)
        return self.out_proj(by_images(q, k, v, cu_seqlens))[None], None


class Keye(Moon):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([KeyeAttention(), KeyeAttention()])

    def forward(self, pixel_values: Tensor, cu_seqlens: Tensor) -> Tensor:
        x = F.layer_norm(self.patch_embed(pixel_values).flatten(1), (WIDTH,))[None]
        angles = torch.outer(torch.arange(x.shape[1]).float(), torch.linspace(0.1, 1, DIM // 2)).repeat(1, 2)
        for block in self.blocks:
            x = x + block(x, cu_seqlens=cu_seqlens, rope_emb=(angles.cos(), angles.sin()))[0]
        return x


def packed() -> dict[str, Any]:
    return {"pixel_values": randn(23, 3, 4, 4), "cu_seqlens": torch.tensor([0, 12, 13, 23], dtype=torch.int32)}


class BareAttention(nn.Module):
    """DeepSeek-OCR's."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, DIM
        self.qkv_proj, self.out_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(heads_of, self.qkv_proj(x).chunk(3, -1))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FlashInside(nn.Module):
    """InternVL's own code: a module for flash-attn, which takes half precision on a GPU alone."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale, self.use_flash_attn = HEADS, DIM, DIM**-0.5, True
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.inner_attn = nn.Module()

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.use_flash_attn:
            return self.inner_attn(hidden_states)  # raises, as flash-attn does here
        q, k, v = map(heads_of, self.qkv(hidden_states).chunk(3, -1))
        return self.proj_drop(self.proj(softmax_attention(q, k, v, self.scale)))


class GridRope(nn.Module):
    """Step3-VL's: q and k at once, by the size of the grid; a CLS token is not rotated."""

    def forward(self, q: Tensor, k: Tensor, grid_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
        rows, columns = places(grid_hw, 1)[0].float().unbind(-1)
        frequencies = 10.0 ** -torch.linspace(0, 1, DIM // 4)
        angles = torch.cat([torch.outer(columns, frequencies), torch.outer(rows, frequencies)], -1)
        angles = F.pad(angles, (0, 0, q.shape[-2] - len(angles), 0))
        table = torch.polar(torch.ones_like(angles), angles)
        return rotate_pairs(q, table), rotate_pairs(k, table)


class GridAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale, self.rope = HEADS, DIM, DIM**-0.5, GridRope()
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * WIDTH, WIDTH))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * WIDTH))
        self.out_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, grid_hw: tuple[int, int]) -> Tensor:
        q, k, v = map(heads_of, F.linear(hidden_states, self.in_proj_weight, self.in_proj_bias).chunk(3, -1))
        q, k = self.rope(q, k, grid_hw)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Grids(Tower):
    def __init__(self) -> None:
        super().__init__(GridAttention(), GridAttention())
        self.class_embedding = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, pixel_values: Tensor) -> Tensor:
        x, grid = self.embed(pixel_values)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)
        for block in self.blocks:
            x = x + block(x, grid)
        return x


class Generator(nn.Module):
    """C-RADIO's: patches are cut by a reshape, and embedded by a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedder = nn.Linear(3 * 64, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.embedder(F.unfold(x, 8, stride=8).transpose(1, 2))


class Radio(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = None
        self.patch_generator = Generator()
        self.blocks = nn.ModuleList([BareAttention(), BareAttention()])

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch_generator(pixel_values)
        for block in self.blocks:
            x = x + block(x)
        return x


def apply_rotary_pos_emb(q: Tensor, k: Tensor, freqs: Tensor) -> tuple[Tensor, Tensor]:
    """OneVision's, which is no rotation: neighbours are paired, but the table repeats after half of the channels."""
    cos, sin = freqs.cos()[:, None].float(), freqs.sin()[:, None].float()

    def turn(x: Tensor) -> Tensor:
        swapped = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return (x.float() * cos + swapped.float() * sin).type_as(x)

    return turn(q), turn(k)


class MismatchedAttention(nn.Module):
    """OneVision's."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale, self.dropout = HEADS, DIM, DIM**-0.5, 0.0
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        rotary_pos_emb: Any = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, None]:
        q, k, v = (heads_of(project(hidden_states)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rotary_pos_emb(q, k, rotary_pos_emb)
        return self.out_proj(softmax_attention(q, k, v, self.scale)), None


class Mismatched(Tower):
    def __init__(self) -> None:
        super().__init__(MismatchedAttention(), MismatchedAttention())

    def forward(self, pixel_values: Tensor) -> Tensor:
        x, grid = self.embed(pixel_values)
        where = places(grid, len(x)).float()
        freqs = torch.cat([where[..., :1] * torch.linspace(0.1, 1, 6), where[..., 1:] * torch.linspace(0.1, 1, 6)], -1)
        for block in self.blocks:
            x = x + block(x, rotary_pos_emb=freqs.repeat(1, 1, 2))[0]
        return x


OWN_CODE = {
    "croco": _own(
        Croco,
        lambda: {**images()(), "other": randn(2, 3, 16, 40, seed=2)},
        "ViewAttention",
        "OtherViewAttention",
        layers=3,
        calls=5,
    ),
    "croco without RoPE": _own(
        lambda: Croco(rope=False),
        lambda: {**images()(), "other": randn(2, 3, 16, 40, seed=2)},
        "ViewAttention",
        "OtherViewAttention",
        layers=3,
        calls=5,
    ),
    "vggt": _own(Frames, images(), "FrameAttention", layers=4),
    "sam2": _own(Memory, frame_and_memory(4), "MemoryRope"),
    "sam2, another grid": _own(Memory, frame_and_memory(5), "MemoryRope"),
    "open_clip": _own(Clip, images(), "MultiheadAttention"),
    "open_clip, batch second": _own(lambda: Clip(batch_first=False), images(), "MultiheadAttention"),
    "vit_pytorch": _own(lambda: Plain(NormedAttention(), NormedAttention()), images(), "NormedAttention"),
    "vit_pytorch, rotary": _own(
        lambda: Placed(DirectedAttention(), DirectedAttention()), images(), "DirectedAttention"
    ),
    "moonvit": _own(Moon, packed, "MoonLayer"),
    "keye": _own(Keye, packed, "KeyeAttention"),
    "deepseek": _own(lambda: Plain(BareAttention(), BareAttention()), images(), "BareAttention"),
    "step3": _own(Grids, images(), "GridAttention"),
    "c_radio": _own(Radio, images(), "BareAttention"),
    "onevision": _own(Mismatched, images(), "MismatchedAttention"),
}
