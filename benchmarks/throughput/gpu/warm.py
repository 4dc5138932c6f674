# SPDX-License-Identifier: Apache-2.0
"""Compile the kernels of a plan, in many processes, into the caches of Triton and inductor on the disk.

    python -m benchmarks.throughput.gpu.warm --plan table --out step1.json --seconds 60

table: exactly the Triton kernels of check.py and measure.py, from tensors without memory: nothing is launched here, and
`launches` lists those kernels. compiled: torch.compile and FlexAttention for the shapes of that plan, which have to
run. Failures here occur again in use, and are recorded there.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from spatial_pe.lab.bench.cases import Inputs, Shape

from . import state
from .cases import TARGETS, Work, large, plan

MOST_PROCESSES = 14
# The slowest task, a compilation by inductor, is faster: after the death of a process no results arrive.
TASK_SECONDS = 50
FORWARD = ("forward_kernel", "window_forward_kernel", "operands_kernel", "rotate_kernel")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def launches(shape: Shape, dtype: torch.dtype, family: str) -> Iterator[Any]:
    """Yield the launches of a shape at its full size: forward, backward, rotation and angles; in bfloat16 also without
    rotation."""
    import spatial_pe
    from spatial_pe.backends.base import AttentionCall
    from spatial_pe.backends.triton import tiles
    from spatial_pe.backends.triton.plan import plan_angles, plan_backward, plan_forward, plan_rotation

    with torch.device("meta"):
        lead = (1, shape.batch * shape.tokens) if shape.packed else (shape.batch, shape.tokens)
        qkv = torch.empty(*lead, 3, shape.heads, shape.head_dim, dtype=dtype).unbind(2)
        grad = torch.empty(*lead, shape.heads, shape.head_dim, dtype=dtype)
        table = torch.empty(1, lead[1], 1, shape.head_dim // 2)
        bounds = torch.empty(shape.batch + 1, dtype=torch.int32) if shape.packed else None
    rotary_table = spatial_pe.Rotary(table, table)
    longest = shape.tokens if shape.packed else None
    for rotary in (rotary_table, None) if dtype == torch.bfloat16 else (rotary_table,):
        call = AttentionCall(*qkv, rotary, shape.head_dim**-0.5, bounds, longest, None)
        # tuned tiles are not used: a session starts without
        bucket = tiles.bucket(call.longest)
        choice = tiles.prebuilt(family, dtype, shape.head_dim, bucket, tiles.few_programs(call))
        forward = plan_forward(call, choice)
        backward = plan_backward(call, *forward.results, grad, choice)
        yield from (*backward.launches, *forward.launches)
    yield from plan_rotation(qkv[:2], rotary_table).launches
    yield from plan_angles(qkv[0], qkv[1], *backward.results[:2], table.shape, "half", None).launches


def kernels(family: str) -> list[tuple[Shape, str, int]]:
    """Return (shape, dtype, index among its launches) of every distinct kernel, in the order of the plans: the large
    batches, then the small ones, which have different tiles."""
    found: dict[Any, tuple[Shape, str, int]] = {}
    wanted = [(large(*pair), name, True) for pair in TARGETS for name in DTYPES]
    wanted += [(work.shape, "bf16", False) for work in plan("small")]
    for shape, name, trained in wanted:
        for index, launch in enumerate(launches(shape, DTYPES[name], family)):
            if trained or launch.kernel.fn.__name__ in FORWARD:
                found.setdefault(specialised(launch), (shape, name, index))
    return list(found.values())


def specialised(launch: Any) -> tuple:
    """Return the just-in-time compiler's key of a kernel: constants, dtypes, integers of 1 and multiples of 16."""
    kinds = tuple(
        str(x.dtype) if isinstance(x, torch.Tensor) else type(x) if isinstance(x, float) else (x == 1, x % 16 == 0)
        for x in launch.arguments
    )
    return str(launch), tuple(sorted(launch.constants.items())), kinds


def build(task: tuple[Shape, str, int], family: str) -> str | None:
    """Compile a kernel and its launcher; return why it failed, or None."""
    shape, dtype, index = task
    launch = list(launches(shape, DTYPES[dtype], family))[index]
    try:
        compiled = launch.compile()
        if torch.cuda.is_available():
            _ = compiled.run  # loads it, and compiles the C code that launches it
    except Exception as error:
        return f"{launch}: {type(error).__name__}: {error}"[:300]
    return None


def build_for_this_gpu(task: tuple[Shape, str, int]) -> str | None:
    from spatial_pe.backends.triton import tiles

    return build(task, tiles.family_of(torch.device("cuda", 0)))


def run(task: tuple[Work, str]) -> str | None:
    """Run a variant once in both directions; return why it failed, or None."""
    from . import variants

    work, name = task
    try:
        inputs = Inputs(work.shape, torch.bfloat16, "cuda")
        function = variants.build(name, inputs)
        for direction in work.directions:
            variants.call(function, inputs, direction)()
            torch.cuda.synchronize()
    except Exception as error:
        return f"{work.shape}, {name}: {type(error).__name__}: {error}"[:300]
    return None


def tasks(name: str) -> tuple[Any, list[Any]]:
    if name == "table":
        from spatial_pe.backends.triton import tiles

        return build_for_this_gpu, kernels(tiles.family_of(torch.device("cuda", 0)))
    compiled = ("compiled-cudnn", "flex")
    return run, [(work, variant) for work in plan(name) for variant in work.variants if variant in compiled]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=("table", "compiled"), required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    begin = time.monotonic()
    function, todo = tasks(options.plan)
    processes = max(1, min(MOST_PROCESSES, len(os.sched_getaffinity(0)) - 2, len(todo)))
    pool = multiprocessing.get_context("spawn").Pool(processes)
    results = pool.imap_unordered(function, todo)
    done, failed = 0, []
    for _ in todo:
        try:
            left = options.seconds - (time.monotonic() - begin)
            why = results.next(timeout=max(0.0, min(left, TASK_SECONDS)))
        except multiprocessing.TimeoutError:
            break
        done += 1
        if why:
            failed.append(why)
            print(why, flush=True)
    found = {"done": done, "of": len(todo), "seconds": round(time.monotonic() - begin, 1), "failed": failed}
    print(f"compiled ahead: {done} of {len(todo)} in {found['seconds']:.0f} s, {processes} processes", flush=True)
    content = state.load(options.out)
    content["compiled"] = {**content.get("compiled", {}), options.plan: found}
    state.save(options.out, content)
    with suppress(Exception):
        pool.terminate()


if __name__ == "__main__":
    main()
