# SPDX-License-Identifier: Apache-2.0
"""The CPU kernel against what a user has today: forward, backward, rotation on and off.

    python -m benchmarks.throughput.attention_cpu --out benchmarks/results/<device>/attention_cpu.json

Variants of one shape take turns in one process; ratios are of medians. ``eager`` is what Hugging Face's vision towers
do: rotate-half in float32, cast back, then torch's SDPA (one call for each window where the sequences are packed).
``off`` is our kernel without rotation.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import spatial_pe
from benchmarks.timing import interleaved, medians
from spatial_pe.backends import cpu
from spatial_pe.environment import describe

# (name, batch, heads, tokens, head_dim, windows): with windows, batch sequences are packed into one
SHAPES = {
    "196": (4, 12, 196, 64, False),
    "576": (4, 16, 576, 64, False),
    "729": (2, 16, 729, 72, False),
    "1024": (1, 16, 1024, 80, False),
    "4096": (1, 16, 4096, 64, False),
    "windows": (70, 16, 64, 80, True),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def eager_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q, k (..., N, H, D); cos, sin (N, D) float32."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    q32, k32 = q.float(), k.float()
    return (q32 * cos + rotate_half(q32) * sin).to(q.dtype), (k32 * cos + rotate_half(k32) * sin).to(k.dtype)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(-3, -2), k.transpose(-3, -2), v.transpose(-3, -2)).transpose(
        -3, -2
    )


class Case:
    """One shape and dtype: the inputs, and the variants as functions of (q, k, v)."""

    def __init__(self, shape: tuple, dtype: torch.dtype) -> None:
        batch, heads, tokens, dim, packed = shape
        self.shape, self.dtype = shape, dtype
        lead = (batch * tokens,) if packed else (batch, tokens)
        # q, k, v are views of one fused projection, as in the towers
        qkv = torch.randn(*lead, 3, heads, dim).to(dtype)
        self.inputs = [x.requires_grad_() for x in qkv.detach().unbind(-3)]
        self.grad = torch.randn(*lead, heads, dim).to(dtype)
        side = round(tokens**0.5)
        grid = torch.stack(torch.meshgrid(torch.arange(side + 1), torch.arange(side + 1), indexing="ij"), -1).view(
            -1, 2
        )
        coordinates = grid[:tokens].repeat(batch if packed else 1, 1)
        self.rotary = spatial_pe.AxialRoPE(dim)(coordinates.float())
        table = [t[0, :, 0].repeat(1, 2) for t in (self.rotary.cos, self.rotary.sin)]
        self.cos, self.sin = table
        self.cu_seqlens = torch.arange(0, batch * tokens + 1, tokens, dtype=torch.int32) if packed else None
        self.flops = 4 * batch * heads * tokens * tokens * dim

    def ours(self, rotary: spatial_pe.Rotary | None):
        return lambda q, k, v: spatial_pe.rope_attention(q, k, v, rotary, cu_seqlens=self.cu_seqlens, backend="cpu")

    def eager(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = eager_rotary(q, k, self.cos, self.sin)
        if self.cu_seqlens is None:
            return sdpa(q, k, v)
        length = self.shape[2]
        return torch.cat(
            [sdpa(*parts) for parts in zip(q.split(length), k.split(length), v.split(length), strict=True)]
        )

    def variants(self) -> dict:
        return {"ours": self.ours(self.rotary), "off": self.ours(None), "eager": self.eager}

    def forward_calls(self) -> dict:
        def call(function):
            def run():
                with torch.no_grad():
                    return function(*self.inputs)

            return run

        return {name: call(function) for name, function in self.variants().items()}

    def backward_calls(self) -> dict:
        def call(function):
            out = function(*self.inputs)
            return lambda: torch.autograd.grad(out, self.inputs, self.grad, retain_graph=True)

        return {name: call(function) for name, function in self.variants().items()}


def measure(shapes: list[str], dtypes: list[str], threads: list[int], rounds: int, backward: bool) -> list[dict]:
    rows = []
    for count in threads:
        torch.set_num_threads(count)
        for name in shapes:
            for dtype in dtypes:
                case = Case(SHAPES[name], DTYPES[dtype])
                for direction in ("forward", "backward") if backward else ("forward",):
                    calls = case.forward_calls() if direction == "forward" else case.backward_calls()
                    samples = interleaved(calls, rounds if name != "4096" else max(3, rounds // 3))
                    rows.append(row(name, dtype, count, direction, case, samples))
                    print(line(rows[-1]), flush=True)
    return rows


def row(name: str, dtype: str, threads: int, direction: str, case: Case, samples: dict) -> dict:
    median = medians(samples)
    flops = case.flops * (1 if direction == "forward" else 2.5)
    return {
        "shape": name,
        "size": case.shape[:4],
        "dtype": dtype,
        "threads": threads,
        "direction": direction,
        "gflops": {variant: flops / seconds / 1e9 for variant, seconds in median.items()},
        "speedup": median["eager"] / median["ours"],
        "rotation_cost": median["ours"] / median["off"] - 1,
        "seconds": samples,
    }


def line(r: dict) -> str:
    rates = "  ".join(f"{name} {rate:6.1f}" for name, rate in r["gflops"].items())
    return (
        f"{r['shape']:>8} {r['dtype']} {r['threads']}t {r['direction']:<8}  {rates} GF/s"
        f"  {r['speedup']:.2f}x eager  rotation {r['rotation_cost']:+.1%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--forward-only", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.manual_seed(0)
    result = {"command": " ".join(["python -m benchmarks.throughput.attention_cpu", *sys.argv[1:]]), **describe()}
    result["cpu_features"] = cpu.FEATURES
    result["rows"] = measure(options.shapes, options.dtypes, options.threads, options.rounds, not options.forward_only)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
