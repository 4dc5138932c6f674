# SPDX-License-Identifier: Apache-2.0
"""Calls of the Triton backend on a driver that launches nothing but notes what it was told, in a process of its own:
test_replay.py runs this and says why."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from oracles import Case, make
from oracles.cross import Cross
from triton.runtime.jit import JITFunction

from spatial_pe import Rotary, rope_attention
from spatial_pe.backends.triton import backend, launch_cache, tiles
from tools.host_overhead import FakeGPU, Launched

CASES = {
    "window": Case(batch=2, tokens=64, dim=80, dtype=torch.bfloat16),
    "loop": Case(batch=2, tokens=196, dim=64, dtype=torch.bfloat16),
    "before": Case(batch=1, tokens=300, dim=72, dtype=torch.bfloat16, kv_heads=1),
    "per head": Case(batch=2, tokens=70, dim=64, dtype=torch.float16, table="both"),
    "packed": Case(lengths=(64, 64, 20), dim=80, dtype=torch.bfloat16),
    "padded": Case(batch=2, tokens=150, seqlens=(150, 3), dim=64, dtype=torch.bfloat16),
    "no rotary": Case(batch=2, tokens=70, rotary_dim=0, dtype=torch.bfloat16),
    "view": Case(batch=2, tokens=70, dim=64, layout="heads_first", dtype=torch.bfloat16),
    "other tokens": Cross((130, 130), (300, 300), "dense"),
    "other tokens, packed": Cross((64, 0, 20), (3, 90, 70)),
    "other tokens, padded": Cross((70, 3), (20, 90), "padded"),
}


def main() -> None:
    gpu = FakeGPU(keep=True).install()
    tiles.INTERPRETED = False
    found = 0

    def launched(function) -> list[Launched]:
        gpu.launches.clear()
        function()
        return list(gpu.launches)

    def runs_of_triton(function) -> int:
        before, counted = JITFunction.run, []
        JITFunction.run = lambda *a, **k: (counted.append(1), before(*a, **k))[1]
        try:
            function()
        finally:
            JITFunction.run = before
        return len(counted)

    for name in CASES if len(sys.argv) == 1 else sys.argv[1:]:
        case = CASES[name]
        launch_cache.clear_cache()
        made = CallsToOtherTokens if isinstance(case, Cross) else Calls
        first, second = made(case), made(case)
        planned = launched(second)  # what this call is told without anything kept
        launch_cache.clear_cache()
        launched(first)
        assert runs_of_triton(first) == 0, f"{name}: planned again"
        replayed = launched(second)
        assert [x.name for x in planned] == [x.name for x in replayed], name
        for a, b in zip(planned, replayed, strict=True):
            assert a.grid == b.grid, f"{name}: {a.name}"
            for i, (x, y) in enumerate(zip(a.arguments, b.arguments, strict=True)):
                same = alike(x, y, second.inputs) if isinstance(x, torch.Tensor) else x == y
                assert same, f"{name}: argument {i} of {a.name}: {x!r} then {y!r}"
        found += len(planned)
    the_same_tensor_three_times(launched)
    another_shape_is_planned(runs_of_triton)
    unaligned_is_planned(runs_of_triton)
    print(f"{found} launches")


class Calls:
    """Forward, backward with a gradient of the angles, and rotation, on fresh tensors."""

    def __init__(self, case: Case) -> None:
        made = make(case)
        self.made = made
        self.inputs = {x.data_ptr() for x in (*made.leaves.values(), made.dout)}

    def __call__(self) -> None:
        made = self.made
        rotary = made.rotary()
        out = rope_attention(
            made.q, made.k, made.v, rotary, cu_seqlens=made.cu_seqlens, seqlens=made.seqlens,
            max_seqlen=max(made.case.lengths) if made.case.lengths else None, backend="triton",
        )  # fmt: skip
        torch.autograd.grad(out, list(made.leaves.values()), made.dout)
        if rotary is not None and made.case.lengths is None:
            with torch.no_grad():
                backend.rotation([made.q, made.k], rotary)
                backend.rotation([made.q], rotary, inverse=True)
                backend.rotation([made.q.clone()], rotary, inplace=True)


class CallsToOtherTokens:
    """Forward, and backward with the gradients of both tables."""

    def __init__(self, case: Cross) -> None:
        self.case = replace(case, tensors={})
        self.case.make(torch.bfloat16)
        self.inputs = {x.data_ptr() for x in self.case.tensors.values()}

    def __call__(self) -> None:
        self.case.run("triton")


def alike(x: torch.Tensor, y: torch.Tensor, inputs: set[int]) -> bool:
    """Inputs have their addresses; what is made anew each time has its shape and dtype."""
    if x.data_ptr() in inputs or y.data_ptr() in inputs:
        return x.data_ptr() == y.data_ptr()
    return x.shape == y.shape and x.dtype == y.dtype and x.stride() == y.stride()


def the_same_tensor_three_times(launched) -> None:
    """rope_attention(x, x, x), then three tensors: the same signature, other places."""
    launch_cache.clear_cache()
    x, y, z = (torch.randn(1, 70, 2, 64, dtype=torch.bfloat16) for _ in range(3))
    launched(lambda: rope_attention(x, x, x, backend="triton"))
    (told,) = launched(lambda: rope_attention(x, y, z, backend="triton"))
    assert [a.data_ptr() for a in told.arguments[:3]] == [a.data_ptr() for a in (x, y, z)]


def another_shape_is_planned(runs_of_triton) -> None:
    launch_cache.clear_cache()
    rotary = Rotary.from_angles(torch.randn(70, 32))
    q = torch.randn(2, 70, 4, 64, dtype=torch.bfloat16)
    calls = {
        "first": lambda: rope_attention(q, q, q, rotary, backend="triton"),
        "scale": lambda: rope_attention(q, q, q, rotary, scale=0.3, backend="triton"),
        "strides": lambda: rope_attention(
            q, q.transpose(1, 2).contiguous().transpose(1, 2), q, rotary, backend="triton"
        ),
        "heads": lambda: rope_attention(q, q[:, :, :2], q[:, :, :2], rotary, backend="triton"),
        "pairing": lambda: rope_attention(
            q, q, q, Rotary.from_angles(torch.randn(70, 32), "interleaved"), backend="triton"
        ),
        "none": lambda: rope_attention(q, q, q, backend="triton"),
        "other keys": lambda: rope_attention(
            q, q, q, rotary, rotary_k=Rotary.from_angles(torch.randn(70, 32)), backend="triton"
        ),
        "batch": lambda: rope_attention(q[:1], q[:1], q[:1], rotary, backend="triton"),
        "padded": lambda: rope_attention(
            q, q, q, rotary, seqlens=torch.tensor([3, 70], dtype=torch.int32), backend="triton"
        ),
    }
    for name, function in calls.items():
        assert runs_of_triton(function) > 0, f"{name} was taken for another call"
        assert runs_of_triton(function) == 0, name


def unaligned_is_planned(runs_of_triton) -> None:
    """Kernels that are kept were compiled for addresses that 16 divides."""
    aligned = torch.randn(1, 70, 2, 64, dtype=torch.bfloat16)
    unaligned = torch.randn(70 * 2 * 64 + 1, dtype=torch.bfloat16)[1:].view(1, 70, 2, 64)
    launch_cache.clear_cache()
    rope_attention(aligned, aligned, aligned, backend="triton")
    for _ in range(2):
        assert runs_of_triton(lambda: rope_attention(unaligned, aligned, aligned, backend="triton")) > 0


if __name__ == "__main__":
    main()
