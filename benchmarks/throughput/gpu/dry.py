# SPDX-License-Identifier: Apache-2.0
"""Check the three steps without a GPU, as far as possible, and predict how long they will take: `make gpu DRY=1`.

Every variant that a CPU can run is compared with the reference, forward and backward. Then each phase is timed:
compiling by a sample of exactly those kernels, compiled here for sm_90 (CPU seconds, so that load on the machine does
not matter), the rest by the model of model.py. Nothing that is printed was measured on a GPU.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import spatial_pe
from spatial_pe.backends import guard
from spatial_pe.lab.bench.cases import Inputs, Shape

from . import cases, model, state, variants, warm
from .cases import ATTENTION, COMPILER, DIMS, PACKED, TABLE, WINDOW, plan
from .check import DTYPES

ROOT = Path(__file__).parents[3]
# The Triton of torch 2.11, if installed: the steps were planned for it.
TRITON = ROOT / ".venv/triton-3.6"
FAMILY, TARGET = "hopper", ("cuda", 90, 32)
# Variants that a CPU cannot run: cuDNN, flash-attn, varlen_attn; FlexAttention has no backward there.
CANNOT = ("eager-cudnn", "compiled-cudnn", "rotary-cudnn", "rotary-varlen", "cudnn-rope", *variants.FLASH_ATTN)
# torch.compile's front end; the code that inductor writes for a CPU says nothing about a GPU's.
COMPILER_HERE = "aot_eager"
# One of so many kernels is compiled here, of each kind: of the measured ones, and of those of the tests.
SAMPLE, SAMPLE_OF_TESTS = 4, 20

# ---- the machine that the steps are planned for, and what was never measured there: all of it modelled
CORES = 16
SLOWER = 1.5  # its cores relative to these, and everything that shares them
START, COLD_START = 8.0, 15.0  # of a process: importing torch, a CUDA context; the first one, from a cold disk
TRANSFORMERS = 8.0  # importing two towers
PIP, CONFIGURE = 6.0, 8.0
CUDNN_PLAN = 0.8  # of a shape and a direction
INDUCTOR, INDUCTOR_AGAIN = 30.0, 3.0  # a variant in both directions, cold; of one direction, from its cache
DOUBLE_FLOPS, DOUBLE_BYTES = 40e12, 3.5e12  # a second, of matrix products and of all else in float64
LAUNCH = 1e-5
SANITIZER, PROFILE = 40.0, 22.0
CANDIDATE, A_TEST = 0.15, 0.8


# ------------------------------------------------------------------------------------------------------------- what
# it is


def agree(shape: Shape, compiled: bool) -> list[str]:
    """Compare every variant with float64; return those that ran. Raise if one differs."""
    torch._dynamo.reset()
    inputs = Inputs(shape, torch.float16)
    exact = guard.exact(inputs.call(), inputs.batched_grad)
    expected = {name: x[0] if shape.packed and name != "lse" else x for name, x in exact.items()}
    checked = []
    names = [
        *TABLE,
        "eager-default",
        "rotary-default",
        *(PACKED if shape.packed else ()),
        *(COMPILER if compiled else ()),
    ]
    for name in names:
        if name in CANNOT:
            continue
        attention = variants.build(name, inputs, COMPILER_HERE)
        got = {"out": variants.call(attention, inputs, "forward")()}
        if name != "flex":
            grads = variants.call(attention, inputs, "backward")()
            again = variants.call(attention, inputs, "forward+backward")()
            if not all(torch.equal(x, y) for x, y in zip(again, grads, strict=True)):
                raise ArithmeticError(f"{name} at {shape}: the backward alone and after the forward differ")
            got |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
        why = guard.wrong(lambda got=got: got, expected, torch.float16, twice=False)
        if (why is None) == (name in variants.PLAIN):
            raise ArithmeticError(f"{name} at {shape}: {why or 'as with the rotation'}")
        checked.append(name)
    for name, rotation in variants.rotations(inputs).items():
        if name != "copy":
            expected = [spatial_pe.apply_rotary(x.double(), inputs.rotary) for x in inputs.qkv[:2]]
            if not all(guard.worst_row(x, y) < 0.005 for x, y in zip(rotation(), expected, strict=True)):
                raise ArithmeticError(f"rotary {name} at {shape} differs from the reference")
    return checked


# ----------------------------------------------------------------------------------------------------------- compile
# here


class NoGpu:
    """Triton's driver of an absent GPU: sufficient to compile for it."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*TARGET)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compile_sample() -> None:
    """Print, in a separate process, how many kernels there are of each kind, and CPU seconds of some, one per line."""
    from triton.runtime.driver import driver

    driver.set_active(NoGpu())  # type: ignore[arg-type]
    measured = [list(warm.launches(s, warm.DTYPES[d], FAMILY))[i] for s, d, i in warm.kernels(FAMILY)]
    for name, every, launches in (
        ("measured", SAMPLE, measured),
        ("tested", SAMPLE_OF_TESTS, list(tested_kernels().values())),
        ("tuned", 10**9, list(tuned_kernels().values())),
    ):
        groups = defaultdict(list)
        for launch in launches:
            groups[launch.kernel.fn.__name__].append(launch)
        for kernel, found in groups.items():
            times = [] if name == "tuned" else [compile_seconds(launch) for launch in found[every // 2 :: every]]
            line = {"list": name, "kernel": kernel, "count": len(found), "seconds": times}
            print(json.dumps(line), flush=True)


def compile_seconds(launch: Any) -> float:
    begin = cpu_seconds()
    launch.compile()
    return cpu_seconds() - begin


def cpu_seconds() -> float:
    """Return CPU seconds of this process and of its finished children: ptxas."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@dataclass(frozen=True)
class Compiled:
    """Kernels of one list, by kind: their number, and CPU seconds of a sample."""

    counts: Mapping[str, int]
    times: Mapping[str, list[float]]

    @property
    def total(self) -> float:
        """Return the sum; a kind without a sample is taken to be like the others."""
        every = [x for found in self.times.values() for x in found]
        return sum(n * statistics.mean(self.times[kernel] or every) for kernel, n in self.counts.items())

    @property
    def slowest(self) -> float:
        return max(x for found in self.times.values() for x in found)

    def __str__(self) -> str:
        sampled = sum(map(len, self.times.values()))
        return f"{sampled} of {sum(self.counts.values())} kernels compiled here"


def compiled_here() -> dict[str, Compiled]:
    """Return the measured kernels, those of the tests, and those of the tuner (as long as the measured ones)."""
    path = os.pathsep.join([*([str(TRITON)] if TRITON.exists() else []), str(ROOT)])
    with tempfile.TemporaryDirectory() as cache:
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment |= {"PYTHONPATH": path, "TRITON_CACHE_DIR": cache}
        code = "from benchmarks.throughput.gpu import dry; dry.compile_sample()"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a kernel does not compile for sm_90:\n{done.stderr[-2000:]}")
    counts, times = defaultdict(dict), defaultdict(dict)
    for line in map(json.loads, done.stdout.splitlines()):
        counts[line["list"]][line["kernel"]] = line["count"]
        times[line["list"]][line["kernel"]] = line["seconds"]
    times["tuned"] = {kernel: times["measured"].get(kernel, []) for kernel in counts["tuned"]}
    return {name: Compiled(counts[name], times[name]) for name in counts}


def nvcc_seconds() -> float | None:
    """Return CPU seconds of the CUDA kernels of one head_dim, for sm_90; the six files are compiled in parallel."""
    if shutil.which("nvcc") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, out = ROOT / "csrc/cuda/kernels.cu", Path(folder) / "kernels.o"
        flags = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-gencode", "arch=compute_90,code=sm_90"]
        begin = cpu_seconds()
        done = subprocess.run(
            ["nvcc", "-c", *flags, "-DSPE_HEAD_DIM=80", str(source), "-o", str(out)], capture_output=True
        )
        return cpu_seconds() - begin if done.returncode == 0 else None


def tuned_kernels() -> dict[Any, Any]:
    """Return the kernels of `spatial-pe tune --quick`."""
    from spatial_pe import tuning
    from spatial_pe.backends.triton import tiles

    found: dict[Any, Any] = {}
    for problem in tuning.QUICK:
        call = problem.call(torch.device("meta"))
        dtype, dim, longest = problem.regime()
        base = tiles.prebuilt(FAMILY, dtype, dim, longest)
        results = (torch.empty_like(call.q), call.q.new_empty(call.q.shape[:3], dtype=torch.float32), call.q)
        for unit in tuning.CANDIDATES:
            for config in tuning.candidates(unit, problem, base):
                choice = replace(base, **{unit: config})
                if not unit.startswith("window"):
                    choice = replace(choice, window_forward=None, window_backward=None)
                found |= {warm.specialised(x): x for x in tuning.plan_of(unit, call, choice, results).launches}
    return found


def tested_kernels() -> dict[Any, Any]:
    """Return the kernels of tests/backends/gpu, in every dtype, with the tiles of a large batch."""
    sys.path.insert(0, str(ROOT / "tests"))
    from oracles import make
    from oracles.cases import GROUPS, HEAD_DIMS, LENGTHS, ROTATIONS, SCALES, SEQUENCES, VIEWS

    from spatial_pe.backends.base import AttentionCall
    from spatial_pe.backends.triton import tiles
    from spatial_pe.backends.triton.plan import plan_angles, plan_backward, plan_forward, plan_rotation

    found: dict[Any, Any] = {}
    cases = [c for c in [*LENGTHS, *HEAD_DIMS, *ROTATIONS, *SEQUENCES, *VIEWS, *GROUPS, *SCALES] if c.dim <= 128]
    for case in cases:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            inputs = make(replace(case, dtype=dtype))
            q, k, v, dout = (x.detach() for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
            if q.ndim == 3:
                q, k, v, dout = (x[None] for x in (q, k, v, dout))
            rotary = inputs.rotary()
            call = AttentionCall(q, k, v, rotary, inputs.scale, inputs.cu_seqlens, None, inputs.seqlens)
            choice = tiles.prebuilt(FAMILY, dtype, case.dim, tiles.bucket(call.longest))
            forward = plan_forward(call, choice)
            launches = [*forward.launches, *plan_backward(call, *forward.results, dout, choice).launches]
            if rotary is not None:
                launches += plan_rotation([q, k], rotary).launches
                launches += plan_angles(q, k, q, k, rotary.cos.shape, rotary.pairing, inputs.seqlens).launches
            found |= {warm.specialised(x): x for x in launches}
    return found


# ------------------------------------------------------------------------------------------------------------ model
# there


def exact_seconds(size: list[int]) -> float:
    """Return the time of float64, forward and backward: seven products, a dozen passes over the scores, forty launches
    a sequence."""
    batch, heads, tokens, dim = size
    scores = batch * heads * tokens * tokens
    return 14 * scores * dim / DOUBLE_FLOPS + 12 * 16 * scores / DOUBLE_BYTES + 40 * batch * LAUNCH * 3


def check_seconds(backend: str) -> float:
    shapes = [work.shape for work in plan("table")]
    units = 4 if backend == "triton" else 2
    return START + sum(len(DTYPES) * (exact_seconds(x.size) + units * (0.1 + 3 * 0.05)) for x in shapes)


def measure_seconds(name: str) -> float:
    total = START + (6.0 if name == "small" else 0.0)  # the host's part
    for work in plan(name):
        total += 0.3 + 2 * exact_seconds(work.shape.size)
        for direction in work.directions:
            for variant in ("kernel", "eager", "copy") if direction == "rotary" else work.variants:
                ms = model.milliseconds(variant, work.shape.size, direction) or 1.0
                total += (10 * ms + work.rounds * (max(2.0, ms) + 2.0)) / 1e3 + 0.06
                total += CUDNN_PLAN if "cudnn" in variant and variant != "compiled-cudnn" else 0.0
                total += INDUCTOR_AGAIN if variant in ("compiled", "compiled-cudnn", "flex") else 0.0
    return total


def estimates(here: Mapping[str, Compiled], nvcc: float | None) -> dict[tuple[int, str], tuple[float, str]]:
    """Return (step, phase) -> seconds on the target machine, and the source of the estimate."""
    from spatial_pe import tuning

    workers = min(warm.MOST_PROCESSES, CORES - 2)

    def compiling(name: str, workers: int = workers) -> float:
        return SLOWER * max(here[name].total / workers, here[name].slowest)

    candidates = sum(len(tuning.candidates(unit, p, _base(p))) for p in tuning.QUICK for unit in tuning.CANDIDATES)
    tests = collected()
    return {
        (1, "build"): (
            PIP + CONFIGURE + 2 * SLOWER * (nvcc or 15.0),
            "one of 6 CUDA files compiled here" if nvcc else "no nvcc here: modelled",
        ),
        (1, "compile"): (COLD_START + compiling("measured"), str(here["measured"])),
        (1, "check triton"): (check_seconds("triton"), "modelled"),
        (1, "check cuda"): (check_seconds("cuda"), "modelled"),
        (1, "table"): (measure_seconds("table"), "modelled"),
        (1, "layers"): (START + TRANSFORMERS + 2 * 4.0, "modelled"),
        (2, "tests"): (
            START + compiling("tested", CORES - 1) + A_TEST * tests / (CORES - 1),
            f"{here['tested']}; {tests} tests, modelled",
        ),
        (2, "tune"): (
            2 * START + compiling("tuned") + CANDIDATE * candidates,
            f"{sum(here['tuned'].counts.values())} kernels, as long as the measured ones; {candidates} runs, modelled",
        ),
        (2, "small"): (measure_seconds("small"), "modelled"),
        (3, "sanitizer"): (SANITIZER, "modelled"),
        (3, "compile"): (START + INDUCTOR, "modelled: all at once"),
        (3, "compiled"): (measure_seconds("compiled"), "modelled"),
        (3, "profile"): (PROFILE, "modelled"),
    }


def _base(problem: Any) -> Any:
    from spatial_pe.backends.triton import tiles

    dtype, dim, longest = problem.regime()
    return tiles.prebuilt(FAMILY, dtype, dim, longest)


def collected() -> int:
    """Return how many tests need a GPU."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-q",
        "--collect-only",
        "-m",
        "gpu",
        "tests/backends/gpu",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return sum("::" in line for line in done.stdout.splitlines())


# -------------------------------------------------------------------------------------------------------------------
# plan


@dataclass(frozen=True)
class Planned:
    """Begin and end of a phase, its limit, and the source of the estimate."""

    step: int
    name: str
    begin: float
    end: float
    most: float
    how: str

    @property
    def fits(self) -> bool:
        return self.end - self.begin <= self.most


def timeline(
    number: int, step: Any, times: Mapping[tuple[int, str], tuple[float, str]], limit: Callable[..., float]
) -> list[Planned]:
    """Return the phases of a step as gpu_session.py runs them, if each takes the expected time."""
    now, beside, found = 0.0, {}, []
    for index, phase in enumerate(step.phases):
        for name in phase.after:
            now = max(now, beside.pop(name, now))
        seconds, how = times[number, phase.name]
        kept = sum(later.keeps for later in step.phases[index + 1 :])
        found.append(Planned(number, phase.name, now, now + seconds, limit(phase, step.seconds - now, kept), how))
        if phase.beside:
            beside[phase.name] = now + seconds
        else:
            now += seconds
    return found


def run(steps: Mapping[int, Any], out: Path) -> int:
    """Print the plan of all steps, and write it to out/plan.json. Return 1 if one does not fit."""
    from benchmarks.gpu_session import CLOSING_SECONDS, limit

    begin = time.monotonic()
    torch.manual_seed(0)
    for shape in (cases.shape(3, tokens, dim, heads=2) for dim in DIMS for tokens in (WINDOW, 37)):
        checked = agree(shape, compiled=shape.head_dim == 80)
        print(f"{shape!s:<32} agree: {', '.join(checked)}", flush=True)
    here, nvcc = compiled_here(), nvcc_seconds()
    for name in ("measured", "tested"):
        total, slowest = here[name].total, here[name].slowest
        print(f"{name}: {here[name]} for sm_90, the slowest in {slowest:.1f} CPU seconds; {total:.0f} for all of them")
    print(f"nvcc, one of 6 files: {f'{nvcc:.0f} CPU seconds' if nvcc else 'not here'}")
    print(f"{'step':<5}{'phase':<14}{'begins':>7}{'ends':>7}{'takes':>7}{'most':>7}   how that is known")
    times = estimates(here, nvcc)
    status, rows = 0, []
    for number, step in steps.items():
        planned = timeline(number, step, times, limit)
        for one in planned:
            fits = "" if one.fits else "  DOES NOT FIT"
            print(
                f"{number:<5}{one.name:<14}{one.begin:7.0f}{one.end:7.0f}{one.end - one.begin:7.0f}{one.most:7.0f}"
                f"   {one.how}{fits}"
            )
        end = max(one.end for one in planned) + CLOSING_SECONDS
        fits = end <= step.seconds and all(one.fits for one in planned)
        verdict = "fits" if fits else "DOES NOT FIT"
        print(f"{number:<5}{'all':<14}{0:7.0f}{end:7.0f}{end:7.0f}{step.seconds:7.0f}   {verdict}")
        status |= not fits
        rows += [vars(one) for one in planned]
    print(f"planned for {CORES} cores, each {SLOWER} times as slow as these: {time.monotonic() - begin:.0f} s")
    out.mkdir(parents=True, exist_ok=True)
    state.save(out / "plan.json", {"modelled": rows, "attention": list(ATTENTION)})
    return int(status)
