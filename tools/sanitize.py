# SPDX-License-Identifier: Apache-2.0
"""Run every CPU kernel over odd shapes, for a build with sanitizers: ``python -m tools.sanitize path/to/_C.so``.

    cmake -S csrc -B build/sanitize -DSPATIAL_PE_SANITIZE=address,undefined -DSPATIAL_PE_CUDA=0
    cmake --build build/sanitize
    LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so.6)" \\
        ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 python -m tools.sanitize build/sanitize/_C*.so

    cmake -S csrc -B build/races -DSPATIAL_PE_SANITIZE=thread -DSPATIAL_PE_CUDA=0   # likewise, with libtsan

A sanitizer ends the process at its first finding. Results are not compared here, but NaN in them is an error: inputs
are views into NaN, which also shows reads outside of them that no sanitizer detects.
"""

from __future__ import annotations

import importlib.util
import itertools
import random
import sys
import time
from typing import Any

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIMS = (16, 24, 40, 64, 72, 80, 88, 96, 104, 120, 128, 136, 200, 256)
# around the widths of vectors (4, 8, 16), row blocks (120) and key blocks (128), whose last rows end a buffer
TOKENS = (1, 2, 3, 5, 15, 16, 17, 31, 33, 63, 64, 65, 119, 120, 121, 127, 128, 129, 240, 241, 256)


def load(path: str) -> None:
    """Load the extension at ``path`` as spatial_pe._C, replacing the installed one."""
    spec = importlib.util.spec_from_file_location("spatial_pe._C", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["spatial_pe._C"] = module


def cases():
    """Yield every length and every head_dim for every dtype; the other options cycle."""
    from oracles import Case

    from spatial_pe.rotary import PAIRINGS

    rotations = itertools.cycle(itertools.product(PAIRINGS, ("shared", "both"), (0, 4, 12, None)))
    layouts = itertools.cycle(("contiguous", "fused", "wide", "heads_first"))
    groups = itertools.cycle(((2, 2), (3, 1), (4, 2)))
    rng = random.Random(0)
    for dtype in DTYPES:
        pairs = [(n, rng.choice(DIMS)) for n in TOKENS] + [(rng.choice(TOKENS), dim) for dim in DIMS]
        pairs += [(128, dim) for dim in DIMS]  # a full block of keys: its last row ends the working memory
        for tokens, dim in pairs:
            pairing, table, left = next(rotations)
            # 0: none; None: all channels; else that many fewer than all
            rotary_dim = {0: 0, None: dim}.get(left, dim - (left or 0))
            heads, kv_heads = next(groups)
            if kv_heads != heads and table == "both":
                table = "sample"
            if pairing == "axis_half" and rotary_dim % 4:
                rotary_dim -= 2
            rotation: dict[str, Any] = {"rotary_dim": rotary_dim, "pairing": pairing, "table": table}
            common: dict[str, Any] = {
                "dim": dim,
                "dtype": dtype,
                "heads": heads,
                "kv_heads": kv_heads,
                "layout": next(layouts),
            }
            yield Case(tokens=tokens, **common, **rotation)
        rotation = {"dim": 40, "rotary_dim": 38, "dtype": dtype}
        yield Case(lengths=(0, 1, 17, 0, 130, 2, 0), layout="fused", **rotation)
        yield Case(lengths=(64,) * 5, heads=3, **rotation)
        # on 1, 2 and 3 threads: items of a single thread, then items that all share, in several slices
        yield from [Case(lengths=(200,) * 5, heads=1, layout="wide", **rotation)] * 3
        yield Case(batch=3, tokens=130, seqlens=(0, 129, 1), layout="wide", **rotation)
        yield Case(batch=0, tokens=7, **rotation)
        yield Case(batch=2, tokens=0, **rotation)


def main(path: str) -> None:
    load(path)
    from oracles import CPU_KERNELS, make, run, threads
    from oracles.cross import CASES, random_call

    started = time.perf_counter()
    done = 0
    for kernel in CPU_KERNELS:
        with kernel.selected() as backend:
            for i, case in enumerate(cases()):
                # 1: the last item ends the working memory; 2 and 3 share the remaining heads
                with threads(1 + i % 3):
                    inputs = make(case)
                    for name, x in run(inputs, backend).items():
                        assert torch.isfinite(x).all(), f"{kernel}: {name} of {case} holds NaN"
                    rotate(inputs)
                done += 1
            rng = random.Random(0)
            for i, call in enumerate([*CASES, *(random_call(rng) for _ in range(24))]):
                call.make(DTYPES[i // 3 % 3])
                with threads(1 + i % 3):
                    for name, x in call.run(backend).items():
                        assert torch.isfinite(x).all(), f"{kernel}: {name} of {call} holds NaN"
                done += 1
            extreme(backend)
    print(f"{done} cases, {len(CPU_KERNELS)} instruction sets, {time.perf_counter() - started:.0f} s: no finding")


def rotate(inputs: Any) -> None:
    """Rotate q and k, in place and not."""
    from spatial_pe.backends import cpu

    rotary = inputs.rotary()
    if rotary is None:
        return
    with torch.no_grad():
        for x in (inputs.q, inputs.k):
            x = x if x.ndim == 4 else x[None]
            cpu.rotation([x], rotary)
            cpu.rotation([x.clone()], rotary, inplace=True)


def extreme(backend: str) -> None:
    """Run scores that make the kernel recompute a block, and values that are not finite."""
    from spatial_pe import rope_attention

    for value in (1e4, float("inf"), float("nan")):
        q, k, v = (torch.randn(1, 150, 2, 24, requires_grad=True) for _ in range(3))
        with torch.no_grad():
            k[:, 100:] *= value
        rope_attention(q, k, v, backend=backend).sum().backward()


if __name__ == "__main__":
    main(*sys.argv[1:])
