# SPDX-License-Identifier: Apache-2.0
"""Every Triton and CUDA kernel once, on small shapes that end inside a tile, for compute-sanitizer:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m benchmarks.gpu_memcheck

Without torch's caching each tensor is an allocation of its own, so that an access next to it is seen.
"""

from __future__ import annotations

import torch

import spatial_pe
from spatial_pe.backends import cuda

# (samples, tokens) or the lengths of packed sequences; head_dim; heads, key heads
CASES: tuple[tuple[tuple[int, int] | list[int], int, tuple[int, int]], ...] = (
    ((2, 197), 72, (2, 2)),
    ([64, 64, 0, 20], 80, (2, 2)),  # windows
    ((1, 1100), 64, (1, 1)),  # k is turned by a kernel of its own
    ([1, 300, 0, 65], 64, (2, 2)),
    ((1, 129), 80, (4, 2)),
    ((1, 300), 128, (2, 1)),
    ((2, 37), 64, (2, 2)),  # shorter than a tile
)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    for lengths, dim, (heads, kv_heads) in CASES:
        bounds = longest = None
        if isinstance(lengths, list):
            bounds, longest = torch.tensor([0, *lengths]).cumsum(0).int().cuda(), max(lengths)
            lead: tuple[int, ...] = (sum(lengths),)
        else:
            lead = lengths
        rotary = spatial_pe.Rotary.from_angles(torch.rand(lead[-1], dim // 2, generator=generator)).to("cuda")
        q, k, v = (
            torch.randn(*lead, count, dim, generator=generator).to("cuda", torch.bfloat16).requires_grad_()
            for count in (heads, kv_heads, kv_heads)
        )
        found: tuple[torch.Tensor, ...] = ()
        for backend in ("triton", "cuda") if cuda.unavailable() is None else ("triton",):
            out = spatial_pe.rope_attention(q, k, v, rotary, cu_seqlens=bounds, max_seqlen=longest, backend=backend)
            found += (out, *torch.autograd.grad(out, (q, k, v), torch.randn_like(out)))
        turned = spatial_pe.apply_rotary_qk(q, k, rotary)
        found += torch.autograd.grad(turned, (q, k), [torch.randn_like(x) for x in turned])
        torch.cuda.synchronize()
        assert all(torch.isfinite(x).all() for x in found), f"NaN at {lengths}, {dim}"
        print(f"{lengths} tokens, {heads} and {kv_heads} heads of {dim}: done", flush=True)


if __name__ == "__main__":
    main()
