# SPDX-License-Identifier: Apache-2.0
"""Attention to other tokens, against float64 by complex numbers."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spatial_pe import Rotary, rope_attention
from spatial_pe.rotary import PAIRINGS

from .exact import pair_channels

NAMES = ("out", "q", "k", "v", "rotary", "rotary_k")


@dataclass
class Cross:
    """A call: queries and keys of each sequence. form: "dense", "packed" or "padded"."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    form: str = "packed"
    heads: int = 2
    kv_heads: int = 2
    dim: int = 64
    rotary_dim: int = 64
    pairing: str = "half"
    table: str = "shared"  # or a table per "head", per "sample"
    views: bool = False  # of wider tensors, k and v of one
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        lengths = f"{self.form}-{self.queries}-{self.keys}"
        channels = f"{self.heads}/{self.kv_heads}x{self.dim}-{self.rotary_dim}-{self.pairing}"
        return f"{lengths}-{channels}-{self.table}{'-views' if self.views else ''}"

    def make(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        many = self.form != "packed"
        rows, columns = (max(x) if many else sum(x) for x in (self.queries, self.keys))
        lead = (len(self.queries),) if many else ()
        if self.views:
            q = randn(*lead, rows, self.heads + 1, self.dim).to(dtype)[..., 1:, :]
            k, v = randn(*lead, columns, 2 * self.kv_heads, self.dim).to(dtype).split(self.kv_heads, dim=-2)
        else:
            q = randn(*lead, rows, self.heads, self.dim).to(dtype)
            k, v = (randn(*lead, columns, self.kv_heads, self.dim).to(dtype) for _ in "kv")
        self.tensors = {"q": q, "k": k, "v": v}
        tables = (len(self.queries) if self.table == "sample" else 1, self.heads if self.table == "head" else 1)
        for name, tokens in (("rotary", rows), ("rotary_k", columns)):
            self.tensors[name] = 3 * randn(tables[0], tokens, tables[1], self.rotary_dim // 2)
        self.tensors["dout"] = randn(*lead, rows, self.heads, self.dim).to(dtype)
        if self.form == "padded":  # nothing that is read may come from there
            for b, (n, m) in enumerate(zip(self.queries, self.keys, strict=True)):
                self.tensors["q"][b, n:] = torch.nan
                self.tensors["k"][b, m:] = self.tensors["v"][b, m:] = torch.nan

    def sequences(self):
        """(sample, first and last query, first and last key)."""
        row = column = 0
        for b, (n, m) in enumerate(zip(self.queries, self.keys, strict=True)):
            if self.form == "packed":
                yield 0, row, row + n, column, column + m
                row, column = row + n, column + m
            else:
                yield b, 0, n, 0, m

    def lengths(self) -> dict[str, Tensor]:
        def of(values: tuple[int, ...], name: str) -> Tensor:
            if name == "seqlens":
                return torch.tensor(values, dtype=torch.int32)
            return torch.tensor([0, *values]).cumsum(0).to(torch.int32)

        name = {"packed": "cu_seqlens", "padded": "seqlens"}.get(self.form)
        return {} if name is None else {name: of(self.queries, name), f"{name}_k": of(self.keys, name)}

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        names = ("q", "k", "v", "rotary", "rotary_k")
        found = {name: self.tensors[name].detach() for name in names}
        return {name: (x if dtype is None else x.to(dtype)).detach().requires_grad_() for name, x in found.items()}

    def run(self, backend: str, device: str = "cpu") -> dict[str, Tensor]:
        leaves = {name: x.to(device) for name, x in self.leaves().items()}
        rotary, rotary_k = (Rotary.from_angles(leaves[name], self.pairing) for name in ("rotary", "rotary_k"))
        qkv = [leaves[name] for name in "qkv"]
        lengths = {name: x.to(device) for name, x in self.lengths().items()}
        out = rope_attention(*qkv, rotary, rotary_k=rotary_k, backend=backend, **lengths)
        grads = torch.autograd.grad(out, list(leaves.values()), self.tensors["dout"].to(device))
        return {"out": out.detach().cpu(), **{name: x.cpu() for name, x in zip(leaves, grads, strict=True)}}

    def exact(self) -> dict[str, Tensor]:
        leaves = self.leaves(torch.float64)
        q, k, v = (x if x.ndim == 4 else x[None] for x in (leaves[name] for name in "qkv"))
        out, group = torch.zeros_like(q), self.heads // self.kv_heads
        for b, start, stop, first, last in self.sequences():
            if last == first or stop == start:
                continue
            rows, columns = (
                leaves[name][b if self.table == "sample" else 0, part]
                for name, part in (("rotary", slice(start, stop)), ("rotary_k", slice(first, last)))
            )
            x, y = self.rotated(q[b, start:stop], rows), self.rotated(k[b, first:last], columns)
            y, z = (t.repeat_interleave(group, dim=1) for t in (y, v[b, first:last]))
            weights = (torch.einsum("nhd,mhd->hnm", x, y) * self.dim**-0.5).softmax(-1)
            attended = torch.einsum("hnm,mhd->nhd", weights, z)
            out = out.index_put((torch.tensor(b), torch.arange(start, stop)), attended)
        out = out if leaves["q"].ndim == 4 else out[0]
        grads = torch.autograd.grad(out, list(leaves.values()), self.tensors["dout"].double())
        return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}

    def check(self, got: dict[str, Tensor], eager: dict[str, Tensor]) -> None:
        """The error rule: 1.5 times the error of the composed path, which rotates in float32 and calls torch's SDPA."""
        truth = self.exact()
        for name in NAMES:
            error, own = ((x[name].double() - truth[name]).norm().item() for x in (got, eager))
            assert got[name].shape == truth[name].shape and got[name].isfinite().all(), name
            assert error <= 1.5 * own + 1e-5 * (1 + truth[name].norm().item()), (name, error, own)

    def rotated(self, x: Tensor, angles: Tensor) -> Tensor:
        first, second = pair_channels(self.rotary_dim, self.pairing)
        z = torch.complex(x[..., first], x[..., second]) * torch.polar(torch.ones_like(angles), angles)
        order = torch.tensor([*first, *second, *range(self.rotary_dim, self.dim)]).argsort()
        return torch.cat([z.real, z.imag, x[..., self.rotary_dim :]], dim=-1)[..., order]


def random_call(rng: random.Random) -> Cross:
    """Return a call of any form that the compiled backends serve, of enough elements for the error rule."""
    form = rng.choice(("dense", "packed", "padded"))
    count = rng.randint(1, 4)

    def lengths(least: int) -> tuple[int, ...]:
        drawn = [rng.choice((least, 17, 64, rng.randint(least, 150))) for _ in range(count)]
        return (drawn[0],) * count if form == "dense" else (*drawn[:-1], max(drawn[-1], 33))

    kv_heads, group = rng.randint(1, 2), rng.choice((1, 1, 2, 3))
    dim = 8 * rng.randint(4, 16)
    pairing = rng.choice(PAIRINGS)
    table = rng.choice(
        ("shared", "shared", "head" if group == 1 else "shared", "shared" if form == "packed" else "sample")
    )
    return Cross(
        *(lengths(2 if form == "dense" else 0), lengths(2 if form == "dense" else 0), form),
        heads=kv_heads * group, kv_heads=kv_heads, dim=dim, rotary_dim=rng.choice((dim, 4 * rng.randint(1, dim // 4))),
        pairing=pairing, table=table, views=rng.random() < 0.5,
    )  # fmt: skip


CASES = [
    Cross((5,), (37,), "dense", 4, 2, 64, 48),
    Cross((130, 130), (7, 7), "dense", dim=80, rotary_dim=80, pairing="interleaved"),
    Cross((300,), (1000,), "dense", 2, 1, 64, 32, "axis_half"),
    Cross((64, 64), (129, 129), "dense", 3, 3, 256, 256, table="head"),
    Cross((70, 70, 70), (70, 70, 70), "dense", table="sample"),
    Cross((5, 0, 130, 1, 7, 64), (37, 9, 3, 200, 0, 64), heads=4),
    Cross((1, 1, 0), (0, 300, 0), dim=72, rotary_dim=36),
    Cross((70, 0, 33, 1), (150, 20, 0, 1), "padded", 4, 2),
    Cross((9, 9), (9, 3), "padded", dim=32, rotary_dim=32),
]
