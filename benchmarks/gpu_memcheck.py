# SPDX-License-Identifier: Apache-2.0
"""Run kernels once, for profilers and sanitizers:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m benchmarks.gpu_memcheck
    ncu --clock-control none --kernel-name key_kernel python -m benchmarks.gpu_memcheck --profile

The CUDA kernels on small shapes that end inside a tile; without torch's caching each tensor is a separate allocation,
so that out-of-bounds accesses are detected. Not Triton's: the tool reports valid accesses of wgmma to shared memory
(compute-sanitizer-samples#19). --profile: Triton's forward and backward of 64 x 576 tokens, 16 heads of 64.
"""

from __future__ import annotations

import sys

import torch

import spatial_pe
from spatial_pe.backends import cuda

# (samples, tokens) or the lengths of packed sequences; head_dim; heads, key heads
CASES: tuple[tuple[tuple[int, int] | list[int], int, tuple[int, int]], ...] = (
    ((2, 197), 72, (2, 2)),
    ([64, 64, 0, 20], 80, (2, 2)),  # windows
    ((1, 1100), 64, (1, 1)),  # k is rotated by a separate kernel
    ([1, 300, 0, 65], 64, (2, 2)),
    ((1, 129), 80, (4, 2)),
    ((1, 300), 128, (2, 1)),
    ((2, 37), 64, (2, 2)),  # shorter than a tile
)


DEVICE = "cuda"


def main() -> int:
    if "--profile" in sys.argv[1:]:
        once("triton", (64, 576), 64, (16, 16))
        return 0
    if (why := cuda.unavailable()) is not None:
        print(f"not run: {why}")
        return 1
    for case in CASES:
        once("cuda", *case)
    return 0


def once(backend: str, lengths: tuple[int, int] | list[int], dim: int, counts: tuple[int, int]) -> None:
    """Run forward and backward; raise if a result is not finite."""
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads = counts
    bounds = longest = None
    lead = lengths
    if isinstance(lengths, list):
        bounds, longest = torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE), max(lengths)
        lead = (sum(lengths),)
    rotary = spatial_pe.Rotary.from_angles(torch.rand(lead[-1], dim // 2, generator=generator)).to(DEVICE)
    q, k, v = (
        torch.randn(*lead, count, dim, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    )
    out = spatial_pe.rope_attention(q, k, v, rotary, cu_seqlens=bounds, max_seqlen=longest, backend=backend)
    found = (out, *torch.autograd.grad(out, (q, k, v), torch.randn_like(out)))
    torch.cuda.synchronize()
    assert all(torch.isfinite(x).all() for x in found), f"NaN at {lengths}, {dim}"
    print(f"{lengths} tokens, {heads} and {kv_heads} heads of {dim}: done", flush=True)


if __name__ == "__main__":
    sys.exit(main())
