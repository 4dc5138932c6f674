# SPDX-License-Identifier: Apache-2.0
"""Run random calls, patched towers and episodes of several threads for a given time, each checked: no error, no growth
of memory, no crash.

    python -m tools.soak --minutes 3 [--seed N]

A failure names the case and the seed that reproduces it.

Memory: torch and the libraries below it cache something for each new shape, and dynamo for each compilation. So the
last third repeats earlier cases, without compilations, and there nothing may grow. malloc has one arena: by default it
makes one for each thread, up to eight a core, and keeps them. oneDNN keeps no kernels: its cache of 1,024 goes up and
down. On a CPU with AMX, `--seed 1795922067` ended 61 MB up with it (set ONEDNN_PRIMITIVE_CACHE_CAPACITY=1024) and 25
without.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import random
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracles
import stress
import torch
from families import FAMILIES, HERE
from oracles import Case, exact, make, run
from oracles.cross import Cross, random_call
from oracles.rule import check, check_bound

import spatial_pe
from spatial_pe.rotary import PAIRINGS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
M_ARENA_MAX = -8  # of mallopt(3)
LAYOUTS = ("contiguous", "fused", "projection", "wide", "heads_first")
# Tokens of one call: the float64 result of more takes seconds.
MOST = 700
GROWTH_MB = 48


def draw(rng: random.Random) -> Case:
    """Return a random call that rope_attention must support."""
    dim = 8 * rng.randint(2, 32)
    kv_heads = rng.choice((1, 2, 3))
    heads = kv_heads * rng.choice((1, 1, 2, 4))
    pairing = rng.choice(PAIRINGS)
    rotary_dim = rng.choice((0, dim, dim, dim, 4 * rng.randint(1, dim // 4)))
    table = rng.choice(("shared", "shared", "head", "sample", "both"))
    if kv_heads != heads and table in ("head", "both"):
        table = "shared"  # k has other heads
    how: dict = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "dtype": rng.choice(DTYPES), "pairing": pairing}
    how |= {"rotary_dim": rotary_dim, "table": table, "layout": rng.choice(LAYOUTS)}
    if how["layout"] in ("fused", "projection") and kv_heads != heads:
        how["layout"] = "wide"
    kind = rng.choice(("dense", "dense", "packed", "padded"))
    if kind == "packed":
        lengths = [rng.choice((0, 1, 5, 64, rng.randint(1, 300))) for _ in range(rng.randint(1, 6))]
        how |= {"lengths": tuple(lengths) if sum(lengths) else (7,), "table": table if table == "head" else "shared"}
    else:
        batch = rng.randint(1, 3)
        tokens = rng.choice((1, 2, 7, 64, 196, 257, 577, rng.randint(1, MOST // batch)))
        how |= {"batch": batch, "tokens": min(tokens, MOST // batch), "prefix": rng.choice((0, 0, 1))}
        if kind == "padded":
            how["seqlens"] = tuple(rng.randint(0, how["tokens"]) for _ in range(batch))
    return Case(**how)


def attention(case: Case) -> None:
    inputs = make(case)
    got, truth = run(inputs, "auto"), exact(inputs)
    try:
        check(got, run(inputs, "composed"), truth, inputs)
    except AssertionError:
        check_bound(got, truth, inputs)  # so few elements that two random errors differ by more than half


def tower(name: str) -> None:
    """Check a tower patched, unpatched, and restored."""
    family = FAMILIES[name]
    model, inputs = family.make(), family.inputs()
    with torch.no_grad():
        before = family.outputs(model, inputs)
        spatial_pe.patch(model)
        patched = family.outputs(model, inputs)
        spatial_pe.unpatch(model)
        after = family.outputs(model, inputs)
    for a, b, c in zip(before, patched, after, strict=True):
        assert torch.equal(a, c), f"{name}: unpatched it is not what it was"
        error = (a - b).norm() / a.norm()
        assert error < 1e-4, f"{name}: patched it differs by {error:.1e}"


def episode(name_and_seed: str) -> None:
    name, seed = name_and_seed.split()
    getattr(stress, name)(random.Random(int(seed)))


def to_other_tokens(case_and_dtype: tuple[Cross, torch.dtype]) -> None:
    case, dtype = case_and_dtype
    case.make(dtype)
    case.check(case.run("auto"), case.run("composed"))
    case.tensors.clear()  # the case is kept


CHECKS: dict[str, Callable[[Any], None]] = {
    "calls": attention, "calls to other tokens": to_other_tokens, "towers": tower, "episodes": episode,
}  # fmt: skip


def draw_any(rng: random.Random) -> tuple[int, str, Any]:
    """Return threads, the kind of check, and its case."""
    kind = rng.choices(list(CHECKS), (80, 10, 10, 2))[0]
    if kind == "calls":
        return rng.randint(1, 4), kind, draw(rng)
    if kind == "calls to other tokens":
        return rng.randint(1, 4), kind, (random_call(rng), rng.choice(DTYPES))
    if kind == "towers":
        return rng.randint(1, 4), kind, rng.choice(HERE)
    names = [each.__name__ for each in stress.EPISODES]
    (name,) = rng.choices(names, list(stress.EPISODES.values()))
    return rng.randint(1, 4), kind, f"{name} {rng.randrange(2**31)}"


def resident_mb() -> float:
    """Return resident memory after garbage collection, and after malloc has released what it can."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


def growth_of(resident: list[float]) -> float:
    """Return the growth over samples that also go up and down, by some 40 MB here: between the medians of the first and
    the last quarter, which are three quarters of the time apart."""
    quarter = len(resident) // 4
    if quarter == 0:
        raise SystemExit("too few cases to tell whether memory grows: take more --minutes")
    return (statistics.median(resident[-quarter:]) - statistics.median(resident[:quarter])) / 0.75


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "0")  # read at oneDNN's first call
    rng = random.Random(options.seed)
    for first in stress.EPISODES:  # loads what each needs
        first(rng)
    begin, end = time.monotonic(), time.monotonic() + 60 * options.minutes
    done: Counter[str] = Counter()
    seen: list[tuple[int, str, Any]] = []
    resident: list[float] = []  # after each case that is repeated
    while (now := time.monotonic()) < end:
        repeats = now > end - (end - begin) / 3 and bool(seen)
        threads, kind, case = rng.choice(seen) if repeats else draw_any(rng)
        torch.set_num_threads(threads)
        try:
            CHECKS[kind](case)
        except Exception as error:
            print(f"--seed {options.seed}, SPATIAL_PE_SEED={oracles.SEED}: {case}: {error}", file=sys.stderr)
            raise
        done[kind] += 1
        if repeats:
            resident.append(resident_mb())
        elif not str(case).startswith("compiled"):
            seen.append((threads, kind, case))
    growth = growth_of(resident)
    counts = ", ".join(f"{done[kind]} {kind}" for kind in CHECKS)
    print(f"{counts}, {growth:+.0f} MB, --seed {options.seed}")
    if growth > GROWTH_MB:
        print(f"memory has grown by {growth:.0f} MB, allowed are {GROWTH_MB}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
