# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels against what a user has today, forward and forward + backward.

    python -m benchmarks.throughput.attention_gpu --out benchmarks/results/<device>/attention.json [--quick] [--dry]

Variants of one shape take turns in one process; ratios are of medians; times are those of CUDA events around enough
launches that the device never waits for the host.

    eager-*    what Hugging Face's towers do: rotate-half in float32, then torch's SDPA (default, cuDNN, flash)
    compiled   eager-default under torch.compile
    flex       eager rotary under torch.compile, then FlexAttention
    ours, off  the fused kernels with and without rotation

``--dry`` needs no GPU: it builds the inputs of every shape at a tenth of the batch on the CPU, runs every variant that
a CPU can run on the first head, and plans every launch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import spatial_pe
from benchmarks.throughput.attention_cpu import eager_rotary
from spatial_pe.backends.call import Call
from spatial_pe.environment import describe

DIMS = (64, 72, 80, 96, 128)
TOKENS = (64, 196, 256, 576, 729, 1024, 1025, 2304, 4096)
QUICK = ((64, 80), (196, 64), (576, 64), (729, 72), (1024, 80), (4096, 64))
HEADS = 16
# Tokens of all samples: the large batch. 64-token sequences stand for Qwen2.5-VL's windows, which are packed.
LARGE = 36_864


class Case:
    """One shape in bfloat16: q, k, v as views of a fused projection, and the variants as functions of them."""

    def __init__(self, tokens: int, dim: int, batch: int, device: str) -> None:
        self.tokens, self.dim, self.batch = tokens, dim, batch
        qkv = torch.randn(batch, tokens, 3, HEADS, dim, device=device, dtype=torch.bfloat16)
        self.inputs = [x.requires_grad_() for x in qkv.unbind(2)]
        self.grad = torch.randn(batch, tokens, HEADS, dim, device=device, dtype=torch.bfloat16)
        side = int(tokens**0.5) + 1
        rows = torch.arange(tokens)
        coordinates = torch.stack([rows // side, rows % side], 1).float()
        rotary = spatial_pe.AxialRoPE(dim)(coordinates)
        self.rotary = rotary.to(device)
        self.tables = [t[0, :, 0].repeat(1, 2).to(device) for t in (rotary.cos, rotary.sin)]

    @property
    def flops(self) -> int:
        return 4 * self.batch * HEADS * self.tokens**2 * self.dim

    def variants(self, device: str) -> dict[str, Callable[..., Tensor]]:
        cos, sin = self.tables

        def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = eager_rotary(q, k, cos, sin)
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

        def forced(backend: SDPBackend) -> Callable[..., Tensor]:
            def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                with sdpa_kernel(backend):
                    return eager(q, k, v)

            return call

        def fused(rotary) -> Callable[..., Tensor]:
            backend = "triton" if device == "cuda" else "auto"
            return lambda q, k, v: spatial_pe.rope_attention(q, k, v, rotary, backend=backend)

        found = {"ours": fused(self.rotary), "off": fused(None), "eager-default": eager}
        if device == "cuda":
            from torch.nn.attention.flex_attention import flex_attention

            def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                q, k = eager_rotary(q, k, cos, sin)
                return flex_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

            found |= {
                "eager-cudnn": forced(SDPBackend.CUDNN_ATTENTION),
                "eager-flash": forced(SDPBackend.FLASH_ATTENTION),
                "compiled": torch.compile(eager),
                "flex": torch.compile(flex),
            }
        return found

    def calls(self, function: Callable[..., Tensor]) -> dict[str, Callable[[], object]]:
        def forward() -> Tensor:
            with torch.no_grad():
                return function(*self.inputs)

        def both() -> tuple[Tensor, ...]:
            return torch.autograd.grad(function(*self.inputs), self.inputs, self.grad)

        return {"forward": forward, "forward+backward": both}


def milliseconds(calls: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Milliseconds per call, variants in turns. A sample is long enough (2 ms) to hide the host behind a full queue."""
    repeats = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        repeats[name] = max(3, int(2.0 / max(_sample(call, 5), 1e-3)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in list(calls) if turn % 2 == 0 else reversed(calls):
            samples[name].append(_sample(calls[name], repeats[name]))
    return samples


def _sample(call: Callable, repeats: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)  # a millisecond's head start for the host
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats


def shapes(quick: bool) -> list[tuple[int, int, int]]:
    """(tokens, dim, batch)"""
    pairs = QUICK if quick else [(n, d) for n in TOKENS for d in DIMS]
    found = [(n, d, max(1, LARGE // n)) for n, d in pairs]
    return found if quick else found + [(n, 64, b) for n in (196, 576, 1024) for b in (1, 2, 4, 8)]


def measure(case: Case, rounds: int) -> list[dict]:
    rows = []
    variants = {name: case.calls(function) for name, function in case.variants("cuda").items()}
    for direction in ("forward", "forward+backward"):
        calls, refused = {}, {}
        for name, by_direction in variants.items():
            try:
                by_direction[direction]()
                calls[name] = by_direction[direction]
            except RuntimeError as error:  # no such SDPA backend for this shape
                refused[name] = str(error).splitlines()[0][:200]
        samples = milliseconds(calls, rounds)
        median = {name: statistics.median(times) for name, times in samples.items()}
        factor = 1.0 if direction == "forward" else 3.5
        rows.append(
            {
                "size": [case.batch, HEADS, case.tokens, case.dim],
                "direction": direction,
                "tflops": {name: case.flops * factor / time / 1e9 for name, time in median.items()},
                "speedup": {name: time / median["ours"] for name, time in median.items()},
                "refused": refused,
                "milliseconds": samples,
            }
        )
        rates = "  ".join(f"{name} {rate:.0f}" for name, rate in rows[-1]["tflops"].items())
        print(f"{case.batch:>4} x {case.tokens:>4} x {case.dim:>3} {direction:<17} TFLOP/s  {rates}", flush=True)
    return rows


def dry(tokens: int, dim: int, batch: int) -> None:
    """Plan and run what can be without a GPU."""
    from spatial_pe.backends.triton.plan import plan_backward, plan_forward

    case = Case(tokens, dim, 1, "cpu")
    q, k, v = (x.detach() for x in case.inputs)
    call = Call(q, k, v, case.rotary, dim**-0.5, None, None, None)
    plan = plan_forward(call)
    launches = [*plan.launches, *plan_backward(call, *plan.results, case.grad).launches]
    case.inputs = [x.detach()[:, :, :1].requires_grad_() for x in case.inputs]
    case.grad = case.grad[:, :, :1]
    for function in case.variants("cpu").values():
        for run in case.calls(function).values():
            run()
    print(f"{batch:>4} x {tokens:>4} x {dim:>3}  {len(launches)} launches: {', '.join(map(str, launches))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="six shapes")
    parser.add_argument("--dry", action="store_true", help="without a GPU: build and plan every shape")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        parser.error("no GPU that torch can use; --dry builds and plans without one")
    torch.manual_seed(0)
    rows = []
    with nullcontext() if options.dry else torch.cuda.device(0):
        for tokens, dim, batch in shapes(options.quick):
            if options.dry:
                dry(tokens, dim, batch)
            else:
                rows += measure(Case(tokens, dim, batch, "cuda"), options.rounds)
    if options.out and not options.dry:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        command = " ".join(["python -m benchmarks.throughput.attention_gpu", *sys.argv[1:]])
        options.out.write_text(json.dumps({"command": command, **describe(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
