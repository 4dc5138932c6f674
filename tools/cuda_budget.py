# SPDX-License-Identifier: Apache-2.0
"""Compile the CUDA kernels for GPUs that are not present, and analyse nvcc's output.

    python -m tools.cuda_budget --targets sm_80 sm_90 --dims 64 80 --out report.json
    python -m tools.cuda_budget --extension spatial_pe/_cuda.*.so --out report.json
    python -m tools.cuda_budget --reports a.json b.json --markdown docs/cuda_budget.md \\
        --budget tests/backends/cuda/budget.json

Compiling takes 9 seconds for a target and head_dim; --extension reads a compiled extension instead.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

from tools.sass import Flow, Instruction, Loop, cuobjdump, functions, kind

ROOT = Path(__file__).parents[1]
CMAKE = ROOT / "csrc/CMakeLists.txt"
KERNELS = ROOT / "csrc/cuda/kernels.cu"


@dataclass(frozen=True)
class Gpu:
    """Properties of a GPU that a plan depends on: bytes of shared memory."""

    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int


# the largest of each kind
TARGETS = {
    "sm_80": Gpu(108, 163 << 10, 164 << 10),
    "sm_86": Gpu(84, 99 << 10, 100 << 10),
    "sm_89": Gpu(142, 99 << 10, 100 << 10),
    "sm_90": Gpu(132, 227 << 10, 228 << 10),
    "sm_100": Gpu(148, 227 << 10, 228 << 10),
    "sm_120": Gpu(188, 99 << 10, 100 << 10),
}
# Shapes for the launches: (sequences, heads, tokens)
SHAPES = [(768, 16, 64), (256, 16, 128), (64, 16, 196), (64, 16, 256), (64, 16, 576), (64, 16, 1024), (9, 16, 4096)]
# Products over head_dim for each score, by the first word of a kernel's name; and columns of 8 more, for sums
PRODUCTS = {"windows": 2, "forward": 2, "queries": 3, "keys": 4}
SUMS = {"windows": 1, "forward": 1}
# Markers of the main loop's usual path: it copies the next tile, rotates vectors of 4 pairs, and tests whether a weight
# has become too large (forward, but not after a retry). PLAIN: where q and k were rotated before.
PLAIN = {"HMMA": 1000, "LDGSTS": 100}
WORTH = PLAIN | {"STS.64": 10, "VOTE": 1}
NAMES = {"attention": "forward"}  # namespace -> name in kernels.cu, where they differ


@dataclass
class Part:
    """A repeated part of a kernel, for one warp: instructions by kind, "all" together."""

    mix: dict[str, int]
    tensor: float  # products of 16 x 8 x 16
    shared_bytes: int  # read and written by a warp
    units: float  # work of one run for a lane; see parts()

    @property
    def per_unit(self) -> float:
        return round(self.mix["all"] / self.units, 2)


@dataclass
class Built:
    target: str
    kernel: str
    dtype: str
    dim: int
    registers: int
    spills: int  # bytes of local memory
    threads: int  # at most, in a block
    instructions: int
    tensor_core: dict[str, int]  # instructions of the code by name
    shared: int  # bytes, the maximum over SHAPES; 0: none of them launches it on such a GPU, or no planner
    per_score: float  # instructions that a lane issues in the main loop for each score
    parts: dict[str, Part]


# --------------------------------------------------------------------------------------------------------- compiling


def flags() -> list[str]:
    """Return the compiler flags of CMakeLists.txt."""
    text = CMAKE.read_text()
    patterns = r'CXX_FLAGS_RELEASE "(-O\d)"', r"CUDA_STANDARD (\d+)", r"COMPILE_LANGUAGE:CUDA>:([^>]+)>"
    found = [re.search(pattern, text) for pattern in patterns]
    optimize, standard, others = (one[1] for one in found if one)
    return [optimize, f"-std=c++{standard}", *others.split(";")]


def head_dims() -> list[int]:
    found = re.search(r"set\(HEAD_DIMS ([\d ]+)\)", CMAKE.read_text())
    assert found
    return [int(dim) for dim in found[1].split()]


def compiler() -> str | None:
    """Return nvcc and its version, or None."""
    if shutil.which("nvcc") is None:
        return None
    text = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"release \S+ V([\d.]+)", text)
    return f"nvcc {found[1] if found else '?'}"


def compile_for(target: str, dim: int) -> list[Built]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        options = [*flags(), f"-arch={target}", f"-DSPE_HEAD_DIM={dim}", "-cubin"]
        subprocess.run(["nvcc", *options, str(KERNELS), "-o", str(cubin)], check=True)
        return read(cubin, target, [dim])


def architectures(extension: Path) -> list[str]:
    """Return the architectures of an extension."""
    return sorted(set(re.findall(r"\.(sm_\w+)\.cubin", cuobjdump("-lelf", extension))), key=lambda name: int(name[3:]))


def read_extension(extension: Path, targets: Collection[str], dims: Collection[int]) -> list[Built]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        cuobjdump("-xelf", "all", extension.resolve(), folder=Path(folder))
        for cubin in sorted(Path(folder).glob("*.cubin")):
            target = cubin.suffixes[-2][1:]
            if target in targets:
                rows += read(cubin, target, dims)
    return sorted(rows, key=lambda row: (int(row.target[3:]), row.dim))


# ----------------------------------------------------------------------------------------------------------- reading


def read(cubin: Path, target: str, wanted: Collection[int]) -> list[Built]:
    """Return the kernels of one head_dim, if it is wanted."""
    elf = cuobjdump("-elf", cubin)
    attribute = r"\n\.nv\.info\.(_Z\w*ParamsE)\n.*?EIATTR_MAX_THREADS.*?Value:\s+(0x\w+)"
    threads = dict(re.findall(attribute, elf, re.DOTALL))
    dim = max((signature(name)[2] for name in threads), default=0)
    if dim not in wanted:
        return []
    usage = cuobjdump("--dump-resource-usage", cubin)
    listing = functions(cuobjdump("--dump-sass", cubin))
    rows = []
    for name, most_threads in threads.items():
        kernel, dtype, _ = signature(name)
        instructions = listing[name]
        line = re.search(rf"Function {name}:\s+(.*)", usage)
        assert line, name
        registers, stack, local = (int(re.findall(rf"{what}:(\d+)", line[1])[0]) for what in ("REG", "STACK", "LOCAL"))
        pieces = parts(Flow(instructions), kernel, dim)
        short = [one.name.split(".")[0] for one in instructions]
        row = Built(
            target=target,
            kernel=kernel,
            dtype=dtype,
            dim=dim,
            registers=registers,
            spills=max(stack, local, 4 * sum(kind(name) == "local" for name in short)),
            threads=int(most_threads, 16),
            instructions=sum(name != "NOP" for name in short),
            tensor_core=dict(Counter(name for name in short if kind(name) == "tensor core")),
            shared=0,
            per_score=pieces["main"].per_unit if "main" in pieces else 0.0,
            parts=pieces,
        )
        rows.append(row)
    return sorted(rows, key=lambda row: (row.dtype, row.kernel))


def signature(name: str) -> tuple[str, str, int]:
    """Return for a mangled name the kernel as named in kernels.cu, its dtype, and its head_dim, 0 for any."""
    found = re.fullmatch(r"_ZN3spe4cuda\d+([a-z_]+)\d+[a-z_]+INS0_\d+(B?Float16)E((?:L[ib]\d+E)*)EEvNS0_6ParamsE", name)
    if not found:
        raise ValueError(f"{name}: an unknown kernel")
    numbers = [int(number) for number in re.findall(r"L[ib](\d+)E", found[3])]
    kernel = "_".join([NAMES.get(found[1], found[1]), *map(str, numbers[1:])])
    return kernel, {"BFloat16": "bf16", "Float16": "fp16"}[found[2]], numbers[0] if numbers else 0


def parts(flow: Flow, kernel: str, dim: int) -> dict[str, Part]:
    """Return the parts of a kernel. A unit of
      main       the main loop: a score (of all lanes: 32)
      once       around it, for each item (forward: and pass) or block
      produce    forward, filling shared memory: a tile
      whole      keys_N, the main loop of a block that has all keys, without the part for dq: a score
      dq         keys_N, the innermost loop of that: 16 x 16 x 16 products
      dq once    around it, for each 16 x 16 of dq
      rotate     rotation in shared memory: a vector of 4 pairs, for a lane
      inverse    inverse rotation of gradients: the same
      delta      rowsum(dout out): 8 channels
      copy       global to shared memory: 16 bytes
    The last four are loops inside of the others, which are counted without them.

    The main loop is the outermost of those that multiply outside of the loops in them. Counted is its path with the
    most multiplications, among equals the one with the most of WORTH, and then the shortest."""
    found = {}
    for name, needs, counted, each in (
        ("rotate", ("LDS.64", "STS.64", "F2FP"), "STS.64", 2),
        ("inverse", ("LDS.128", "STG.E.64"), "STG.E.64", 2),
        ("delta", ("LDS.128", "LDG.E.128", "STS"), "LDG.E.128", 1),
        ("copy", ("LDGSTS",), "LDGSTS", 1),
    ):
        if side := side_loop(flow, needs, counted, each):
            found[name] = side
    loop = main_loop(flow)
    if loop is None:
        return found
    first = kernel.split("_")[0]
    writing = blocks_of(inner for inner in flow.inside(loop) if writes(flow, inner) and not multiplies(flow, inner))

    def add(name: str, worth: dict[str, int], avoid: set[int]) -> None:
        way = flow.path(loop, worth_of(flow, worth), avoid)
        instructions = code(flow, (block for block in way if block not in writing | nested))
        # 16 x 16 scores, 8 a lane, take that many products of 16 x 8 x 16
        each = PRODUCTS[first] * dim / 8 + SUMS.get(first, 0)
        found[name] = part(instructions, 8 * tensor(instructions) / each)

    nested: set[int] = set()
    if first == "forward":  # a maximum, which raises the reference, is rare
        add("main", WORTH, {block for block in loop.blocks if count(flow, block, "FMNMX")})
        producer = next(one for one in flow.loops if has(flow, one.blocks, "LDGSTS") and not multiplies(flow, one))
        inside = blocks_of(inner for inner in flow.inside(producer) if writes(flow, inner))
        way = flow.path(producer, worth_of(flow, WORTH))
        found["produce"] = part(code(flow, [block for block in way if block not in inside]), 1)
    elif first == "windows":  # blocks that have one window at a time copy after the products
        late = flow.after_any(block for block in loop.blocks if count(flow, block, "HMMA"))
        # one of all windows checks whether cu_seqlens decrease
        seldom = {block for block in loop.blocks if count(flow, block, "VOTE")}
        add("main", WORTH, seldom | {block for block in late if count(flow, block, "LDGSTS")})
    elif first == "keys" and (inner := [one for one in flow.inside(loop) if multiplies(flow, one)]):
        nested = blocks_of(inner)
        add("whole", WORTH | {"STS": 1}, set())
        add("main", PLAIN, nested)
        outer = max(inner, key=lambda one: len(one.blocks))
        innermost = max((one for one in inner if not any(multiplies(flow, other) for other in flow.inside(one))),
                        key=lambda one: tensor(code(flow, one.blocks)))  # fmt: skip
        products = code(flow, flow.path(innermost, worth_of(flow, WORTH)))
        found["dq"] = part(products, tensor(products) / 2)
        way = flow.path(outer, lambda block: block in innermost.blocks)
        found["dq once"] = part(code(flow, [block for block in way if block not in innermost.blocks]), 1)
    else:
        add("main", PLAIN, set())

    around = min((outer for outer in flow.loops if loop.blocks < outer.blocks), key=lambda outer: len(outer.blocks),
                 default=flow.everything)  # fmt: skip
    others = blocks_of(inner for inner in flow.inside(around) if multiplies(flow, inner) or writes(flow, inner))
    way = flow.path(around, worth_of(flow, {"HMMA": 1000, "STG": 1}))
    found["once"] = part(code(flow, [block for block in way if block not in others]), 1)
    return found


def main_loop(flow: Flow) -> Loop | None:
    owners = [loop for loop in flow.loops
              if has(flow, loop.blocks - blocks_of(flow.inside(loop)), "HMMA")]  # fmt: skip
    outermost = [loop for loop in owners if not any(loop.blocks < other.blocks for other in owners)]
    ways = {loop: flow.path(loop, lambda block: count(flow, block, "HMMA")) for loop in outermost}
    return max(outermost, key=lambda loop: tensor(code(flow, ways[loop])), default=None)


def side_loop(flow: Flow, needs: tuple[str, ...], counted: str, each: int) -> Part | None:
    """Return the loop that has all these instructions and does not multiply, `each` of one of them for a unit: among
    several the one with most units, which is unrolled, not the scalar tail; among those the cheapest. A loop around two
    copying loops is not one that copies two at a time."""
    found = []
    for loop in flow.loops:
        others = () if "LDGSTS" in needs else ("LDGSTS",)
        if not all(has(flow, loop.blocks, name) for name in needs) or has(flow, loop.blocks, "HMMA", *others):
            continue
        if counted == "LDGSTS" and any(has(flow, inner.blocks, counted) for inner in flow.inside(loop)):
            continue
        way = flow.path(loop, lambda block: count(flow, block, counted))
        found.append(part(code(flow, way), sum(count(flow, block, counted) for block in way) / each))
    return max(found, key=lambda one: (one.units, -one.per_unit), default=None)


def part(instructions: list[Instruction], units: float) -> Part:
    mix = Counter(kind_of(one) for one in instructions)
    return Part({"all": len(instructions), **dict(mix.most_common())}, tensor(instructions),
                sum(map(shared_bytes, instructions)), units)  # fmt: skip


def kind_of(one: Instruction) -> str:
    """Return the kind: shared memory by instruction; dead code (sm_80 puts such loads before copies) as integer."""
    if one.predicate == "!PT":
        return "integer"
    return one.name.split(".")[0] if kind(one.name) == "shared" else kind(one.name)


def shared_bytes(one: Instruction) -> int:
    """Return the bytes of a warp; 16 bytes a lane for copies from global memory."""
    if one.predicate == "!PT":
        return 0
    base, *options = one.name.split(".")
    if base == "LDSM":
        return 128 * int(options[-1]) if options[-1].isdigit() else 128
    if base == "LDGSTS":
        return 512
    if base in ("LDS", "STS"):
        return 32 * next((int(size) // 8 for size in ("128", "64") if size in options), 4)
    return 0


def tensor(instructions: Iterable[Instruction]) -> float:
    """Return the number of products of 16 x 8 x 16; m16n8k8 is half of one."""
    return sum(0.5 if ".1688" in one.name else 1.0 for one in instructions if one.name.startswith("HMMA"))


def worth_of(flow: Flow, worth: dict[str, int]) -> Callable[[int], int]:
    return lambda block: sum(much * count(flow, block, name) for name, much in worth.items())


def count(flow: Flow, block: int, *names: str) -> int:
    return sum(one.name.startswith(names) for one in flow.blocks[block])


def has(flow: Flow, blocks: Iterable[int], *names: str) -> bool:
    return any(count(flow, block, *names) for block in blocks)


def multiplies(flow: Flow, loop: Loop) -> bool:
    return has(flow, loop.blocks, "HMMA")


def writes(flow: Flow, loop: Loop) -> bool:
    return has(flow, loop.blocks, "STS", "STG", "LDGSTS")


def blocks_of(loops: Iterable[Loop]) -> set[int]:
    return {block for loop in loops for block in loop.blocks}


def code(flow: Flow, blocks: Iterable[int]) -> list[Instruction]:
    return [one for block in blocks for one in flow.blocks[block]]


# ---------------------------------------------------------------------------------------------------------- launches


def extension() -> Path | None:
    """Return the installed extension."""
    package = importlib.util.find_spec("spatial_pe")
    folders = package.submodule_search_locations if package else None
    return next((path for folder in folders or [] for path in Path(folder).glob("_cuda.*")), None)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.name.split(".")[0], path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def planner() -> ModuleType | None:
    """Return the extension, or the emulator's: both plan the same launches, also for absent GPUs."""
    for path in (extension(), *(ROOT / "build/emulator").glob("_cuda_emulated.*")):
        if path is not None and hasattr(module := load(path), "plan"):
            return module
    return None


def launches(module: ModuleType, gpu: Gpu, shape: tuple[int, int, int], dim: int, direction: str) -> list[dict]:
    """Return the launches for a rotation of all channels, half pairing. Sequences of 64 tokens are windows, packed."""
    sequences, heads, tokens = shape
    packed = tokens == 64
    call = {
        "dtype": "bfloat16", "longest": tokens, "heads": heads, "kv_heads": heads, "head_dim": dim, "scale": dim**-0.5,
        "form": int(packed), "bounds": 0, "sequences": sequences, "tokens": sequences * tokens if packed else tokens,
        "vector": 4, "rotary_dim": dim, "pairing": "half", "cos": (0, 0, dim // 2, 0), "sin": 0,
    }  # fmt: skip
    return module.plan(call, direction, gpu.multiprocessors, gpu.shared_per_block, gpu.shared_per_multiprocessor)


def shared(module: ModuleType, target: str, dim: int) -> dict[str, int]:
    """Return the maximum shared memory of each kernel."""
    most: dict[str, int] = {}
    for shape in SHAPES:
        for direction in ("forward", "backward"):
            for row in launches(module, TARGETS[target], shape, dim, direction):
                most[row["kernel"]] = max(most.get(row["kernel"], 0), row["shared"])
    return most


# ----------------------------------------------------------------------------------------------------------- reports


def unit(row: dict) -> str:
    """Return the key of a budget."""
    return f"{row['target']} {row['kernel']} {row['dtype']} D={row['dim']}"


def budget(report: dict) -> dict[str, dict[str, float]]:
    """Return limits by unit: registers for the same number of warps per SM, and a tenth more instructions."""
    return {unit(row): {
        "registers": most_registers(row["registers"], row["threads"]),
        "shared": row["shared"],
        "per_score": math.ceil(row["per_score"] * 11) / 10,
    } for row in sorted(report["rows"], key=unit)}  # fmt: skip


def most_registers(registers: int, threads: int) -> int:
    """Return the limit, as registers are allocated in units of 8."""
    together = 65536 // (threads * max(24, -(-registers // 8) * 8))
    return min(255, 65536 // threads // together // 8 * 8)


def exceeded(report: dict, limits: dict[str, dict[str, float]]) -> list[str]:
    """Return what exceeds its budget, including kernels without one."""
    found = []
    for row in report["rows"]:
        limit = limits.get(unit(row))
        if limit is None:
            found.append(f"{unit(row)}: no budget (make cuda-budget)")
            continue
        found += [f"{unit(row)}: {name} is {row[name]}, budget {most}"
                  for name, most in limit.items() if row[name] > most]  # fmt: skip
    return found


def markdown(report: dict) -> str:
    lines = [
        "# What nvcc makes of the CUDA kernels",
        "",
        f"Written by `make cuda-budget` with {report['compiler']}, compiled offline: no GPU was involved, and nothing",
        "here is a measurement of speed. Registers are per thread; spills and shared memory are bytes, shared memory",
        "that of the largest of seven launches (64 to 4096 tokens); code: instructions of the kernel.",
        "",
        "Main loop: what a warp issues for nearly every tile, by kind. It is the way through the loop that has all",
        "tensor core instructions of a tile, and is short: without masks, and in `forward` without the blocks that",
        "raise the reference of the softmax. Per score: what a lane issues there for each score of the tile. Once:",
        "what a warp issues around it, for each item (a pass of `forward`) or block. Loops in them that copy or",
        "rotate are counted separately, in instructions of a warp: rotate for 32 vectors of 4 channel pairs in",
        "shared memory, inverse for as many on the way to global memory, copy for 32 x 16 bytes. A block of keys_N",
        "that has all keys of its sequence rotates q itself and also makes dq: whole is its main loop, for each",
        "score, dq for 16 x 16 x 16 products.",
        "",
        "float16 is listed where it differs in registers or in the main loop.",
        "",
        "`tests/backends/cuda/test_cuda_budget.py` fails if anything spills, exceeds its `budget.json`, needs more",
        "shared memory than the chip has, or does not use the tensor cores.",
        "",
    ]
    for target in TARGETS:
        rows = [row for row in report["rows"] if row["target"] == target]
        if not rows:
            continue
        lines += [
            f"## {target}: {len(rows)} kernels",
            "",
            "| head_dim | kernel | registers | spills | shared | code | tensor core | main loop | per score "
            "| once | produce | whole | dq | rotate | inverse | copy |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        same = {(row["dim"], row["kernel"]): row for row in rows if row["dtype"] == "bf16"}
        for row in sorted(rows, key=lambda row: (row["dim"], row["kernel"], row["dtype"])):
            bf16 = same.get((row["dim"], row["kernel"]))
            if bf16 and row is not bf16 and all(row[x] == bf16[x] for x in ("registers", "spills", "per_score")):
                continue
            name = row["kernel"] + (" fp16" if row["dtype"] == "fp16" else "")
            cells = [row["dim"], name, *(row[x] for x in ("registers", "spills", "shared", "instructions"))]
            cells.append(counts(row["tensor_core"]))
            cells.append(counts(row["parts"]["main"]["mix"]) if "main" in row["parts"] else "")
            cells.append(row["per_score"] or "")
            cells += [per_unit(row, name) for name in ("once", "produce", "whole", "dq", "rotate", "inverse", "copy")]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        lines.append("")
    return "\n".join(lines)


def counts(found: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in found.items())


def per_unit(row: dict, name: str) -> float | str:
    found = row["parts"].get(name)
    return round(found["mix"]["all"] / found["units"], 1) if found else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--dims", nargs="+", type=int, default=head_dims())
    parser.add_argument("--extension", type=Path, help="read this one for the targets that it has, compile nothing")
    parser.add_argument("--reports", type=Path, nargs="+", help="JSON files of earlier runs, instead of compiling")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--markdown", type=Path, help="table to write")
    parser.add_argument("--budget", type=Path, help="limits to write: the results and a tenth more")
    arguments = parser.parse_args()
    if arguments.reports:
        reports = [json.loads(path.read_text()) for path in arguments.reports]
        report = {"compiler": reports[0]["compiler"], "rows": [row for found in reports for row in found["rows"]]}
    elif arguments.extension:
        rows = read_extension(arguments.extension, arguments.targets, arguments.dims)
        report = report_of(rows, load(arguments.extension))
    else:
        report = report_of(compile_all(arguments.targets, arguments.dims), planner())
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1))
    if arguments.markdown:
        arguments.markdown.write_text(markdown(report))
    if arguments.budget:
        arguments.budget.write_text(json.dumps(budget(report), indent=1) + "\n")


def compile_all(targets: list[str], dims: list[int]) -> Iterable[Built]:
    for target in targets:
        for dim in dims:
            print(f"{target} D={dim}", file=sys.stderr, flush=True)
            yield from compile_for(target, dim)


def report_of(built: Iterable[Built], plans: ModuleType | None) -> dict:
    rows = []
    for one in built:
        if plans is not None and hasattr(plans, "plan"):
            one.shared = shared(plans, one.target, one.dim).get(one.kernel, 0)
        rows.append(asdict(one))
    return {"compiler": compiler() or "an unknown nvcc", "rows": rows}


if __name__ == "__main__":
    main()
