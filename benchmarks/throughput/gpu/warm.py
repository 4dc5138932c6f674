# SPDX-License-Identifier: Apache-2.0
"""Compiles what measure.py is going to run, in many processes, into the caches of Triton and inductor on the disk.

    python -m benchmarks.throughput.gpu.warm --seconds SECONDS [--quick]

A variant that does not work is left for measure.py to find; so is one that takes the device of a process down.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import time
from contextlib import suppress

import torch

from . import variants
from .cases import Inputs, Shape, plan

# Each holds a CUDA context and up to 3 GB of tensors.
MOST_PROCESSES = 10
# The slowest task, a compilation by inductor, does not take as long: nothing comes back once a process has died.
TASK_SECONDS = 45
Task = tuple[Shape, tuple[str, ...], tuple[str, ...]]  # variants, directions


def tasks(quick: bool) -> list[Task]:
    """In the order of the plan. What torch.compile compiles takes longest, and each is a task of its own."""
    found: list[Task] = []
    for work in plan(quick):
        directions = tuple(d for d in work.directions if d in ("forward", "forward+backward"))
        if "backward" in work.directions and "forward+backward" not in directions:
            directions += ("forward+backward",)
        found.append((work.shape, ("ours", "off", "rotary-default"), directions))
        if work.compiled:
            found += [(work.shape, (name,), directions) for name in (*variants.COMPILED, variants.FLEX)]
    return found


def warm(task: Task) -> list[str]:
    """Runs once what a task names; returns what failed."""
    shape, names, directions = task
    failed = []
    try:
        inputs = Inputs(shape, "cuda")
        for name in names:
            for direction in directions:
                try:
                    variants.call(variants.build(name, inputs), inputs, direction)()
                    torch.cuda.synchronize()
                except Exception as error:
                    failed.append(f"{shape}, {name} {direction}: {type(error).__name__}: {error}"[:200])
    except Exception as error:
        failed.append(f"{shape}: {type(error).__name__}: {error}"[:200])
    inputs = None
    torch._dynamo.reset()
    gc.collect()
    with suppress(Exception):  # the device of this process is lost: all that follows is compiled by the others
        torch.cuda.empty_cache()
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    begin = time.monotonic()
    todo = tasks(options.quick)
    processes = max(1, min(MOST_PROCESSES, len(os.sched_getaffinity(0)) - 2, len(todo)))
    pool = multiprocessing.get_context("spawn").Pool(processes)
    results = pool.imap_unordered(warm, todo)
    done = 0
    for _ in todo:
        try:
            left = options.seconds - (time.monotonic() - begin)
            failed = results.next(timeout=max(0.0, min(left, TASK_SECONDS)))
        except multiprocessing.TimeoutError:
            break
        done += 1
        print(*failed, sep="\n", end="\n" if failed else "", flush=True)
    print(f"compiled ahead: {done} of {len(todo)} tasks in {time.monotonic() - begin:.0f} s", flush=True)
    pool.terminate()


if __name__ == "__main__":
    main()
