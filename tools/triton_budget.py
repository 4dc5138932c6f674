# SPDX-License-Identifier: Apache-2.0
"""Compile launches for GPUs that are not present, and analyse the compiler's output.

    python -m tools.triton_budget --out report.json [--only "bf16 D=64 N=576"] [--targets sm_90]
    python -m tools.triton_budget --markdown docs/triton_budget.md --budget tests/backends/triton/budget.json

In a separate process: the other tests run the kernels in Triton's interpreter, which replaces the compiler, and a
second Triton needs a second process anyway (selected by PYTHONPATH).
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spatial_pe import Rotary
from spatial_pe.backends.base import AttentionCall, Keys
from spatial_pe.backends.triton import tiles
from spatial_pe.backends.triton.launch import Launch
from spatial_pe.backends.triton.plan import plan_angles, plan_backward, plan_forward, plan_rotation
from spatial_pe.backends.triton.tiles import Family
from tools.sass import TENSOR_CORE, Instruction, cuobjdump, instructions, kind
from tools.triton_hazards import hazards

# name -> (Triton's target, family of its tiles)
TARGETS: dict[str, tuple[GPUTarget, Family]] = {
    "sm_80": (GPUTarget("cuda", 80, 32), "ampere"),
    "sm_89": (GPUTarget("cuda", 89, 32), "ada"),
    "sm_90": (GPUTarget("cuda", 90, 32), "hopper"),
    "sm_100": (GPUTarget("cuda", 100, 32), "blackwell"),
    "sm_120": (GPUTarget("cuda", 120, 32), "ada"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), "cdna"),
}
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Built:
    """Result of compiling a launch. Zeros where a target does not report (gfx942: its main loop)."""

    regime: str
    launch: str
    target: str
    registers: int
    spills: int  # bytes of local memory
    shared: int  # bytes
    tensor_core: dict[str, int]  # instructions by name
    loop: dict[str, int]  # instructions of the main loop by kind, "all" together
    per_score: float  # instructions that a lane of the main loop issues, for each score of the tile
    hazards: int = 0  # registers touched while a product uses them, see triton_hazards.py


def cases(family: Family) -> dict[str, list[Launch]]:
    """Return launches by regime, those of real calls: forward, backward, rotation and gradient of the angles."""
    found: dict[str, list[Launch]] = {}
    for name, dtype in DTYPES.items():
        # every head_dim in bfloat16; float16 has the same tiles, float32 others for D <= 64 and above
        dims = (16, 24, 32, 64, 72, 80, 88, 96, 104, 112, 128) if name == "bf16" else (64, 80, 128)
        for dim in dims:
            for tokens in (64, 128, 256, 576):  # a window, a larger one, k rotated in the loop, and before
                found[f"{name} D={dim} N={tokens}"] = launches(family, dtype, dim, tokens)
    bf16 = torch.bfloat16
    for dim in (64, 72, 80, 88, 96, 104, 112, 128):  # tiles for a single image; windows with one head a program
        for tokens in (64, 256, 576):
            found[f"bf16 D={dim} N={tokens}, one image"] = launches(family, bf16, dim, tokens, few=True)
    found["bf16 D=80 windows of 64, packed"] = launches(family, bf16, 80, 640, windows=64)
    found["bf16 D=80 windows of 16, packed"] = launches(family, bf16, 80, 640, windows=16)
    found["bf16 D=80 packed, lengths unknown"] = launches(family, bf16, 80, 640, windows=64, hint=False)
    found["bf16 D=64 packed, lengths unknown"] = launches(family, bf16, 64, 640, windows=64, hint=False)
    found["bf16 D=64 padded"] = launches(family, bf16, 64, 576, padded=True)
    found["bf16 D=64 GQA"] = launches(family, bf16, 64, 576, kv_heads=2)
    for tokens in (64, 256, 576):
        found[f"bf16 D=64 N={tokens} interleaved"] = launches(family, bf16, 64, tokens, pairing="interleaved")
        found[f"bf16 D=72 N={tokens} axis_half"] = launches(family, bf16, 72, tokens, pairing="axis_half")
        found[f"bf16 D=80 N={tokens}, 40 of them rotated"] = launches(family, bf16, 80, tokens, rotary_dim=40)
        found[f"bf16 D=64 N={tokens} no rotary"] = launches(family, bf16, 64, tokens, rotary_dim=0)
    for dim in (64, 80):
        found[f"bf16 D={dim} N=576 other keys"] = launches(family, bf16, dim, 576, keys=1024)
        found[f"bf16 D={dim} other keys, packed"] = launches(family, bf16, dim, 640, windows=64, keys=1024)
    found["bf16 D=64 N=576 other keys, padded"] = launches(family, bf16, 64, 576, padded=True, keys=1024)
    found["bf16 D=64 N=576 other keys, no rotary"] = launches(family, bf16, 64, 576, rotary_dim=0, keys=1024)
    return found


def launches(
    family, dtype, dim, tokens, *,
    heads=4, kv_heads=4, rotary_dim=None, pairing="half", windows=0, hint=True, padded=False, few=False, keys=0,
) -> list[Launch]:  # fmt: skip
    """Return the launches of a call on views of a fused projection, four heads wide. keys: so many, of other tokens.
    Tensors without memory: none is read."""
    batch = 1 if windows or few else 300
    tokens *= 300 if windows else 1
    with torch.device("meta"):
        qkv = torch.empty(batch, tokens, heads + 2 * kv_heads, dim, dtype=dtype)
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=2)
        rotary_dim = dim if rotary_dim is None else rotary_dim
        rotary = Rotary.from_angles(torch.empty(tokens, rotary_dim // 2), pairing) if rotary_dim else None
        bounds = torch.empty(tokens // windows + 1, dtype=torch.int32) if windows else None
        lengths = torch.empty(batch, dtype=torch.int32) if padded else None
        own = None
        if keys:
            k, v = torch.empty(batch, keys, 2 * kv_heads, dim, dtype=dtype).split(kv_heads, dim=2)
            table = Rotary.from_angles(torch.empty(keys, rotary_dim // 2), pairing) if rotary_dim else None
            own = Keys(table, bounds, None, lengths)
    longest = windows if windows and hint else None
    call = AttentionCall(q, k, v, rotary, dim**-0.5, bounds, longest, lengths, own)
    choice = tiles.prebuilt(family, dtype, dim, tiles.LONG if keys else tiles.bucket(call.longest), few)
    assert few == tiles.few_programs(call)
    forward = plan_forward(call, choice)
    out, lse = forward.results
    backward = plan_backward(call, out, lse, torch.empty_like(out), choice)
    found = [*forward.launches, *backward.launches]
    if rotary is not None and not keys:
        dq, dk, _ = backward.results
        found += plan_rotation([q, k], rotary).launches
        found += plan_rotation([q, k], rotary, inplace=True).launches
        found += plan_angles(q, k, dq, dk, rotary.cos.shape, rotary.pairing, lengths).launches
    return found


def build(regime: str, launch: Launch, name: str) -> Built:
    target, _ = TARGETS[name]
    kernel = triton.compile(source(launch), target=target, options=launch.options(hip=target.backend == "hip"))
    shared = int(kernel.metadata.shared)
    if target.backend == "hip":
        text = kernel.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        spills = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1])
        mfma = len(re.findall(r"\bv_mfma", text))
        return Built(regime, str(launch), name, registers, spills, shared, {"v_mfma": mfma} if mfma else {}, {}, 0.0)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, listing = (cuobjdump(flag, file.name) for flag in ("--dump-resource-usage", "--dump-sass"))
    registers, stack, local = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL"))
    code = instructions(listing)
    spills = max(stack, local, 4 * sum(kind(one.name) == "local" for one in code))
    tensor_core = Counter(short for one in code if (short := one.name.split(".")[0]) in TENSOR_CORE)
    loop = main_loop(code)
    mix = Counter(kind(name) for name in loop)
    return Built(
        regime, str(launch), name, registers, spills, shared,
        dict(tensor_core), {"all": len(loop), **dict(mix.most_common())} if loop else {},
        round(len(loop) * 32 * launch.num_warps / scores(launch), 1) if loop else 0.0,
        len(hazards(code)),
    )  # fmt: skip


def scores(launch: Launch) -> int:
    """Return the scores of a tile of the main loop."""
    constants = launch.constants
    return constants["BM"] * constants["BN"] if "BM" in constants else constants.get("BLOCK", 1) ** 2


def main_loop(code: list[Instruction]) -> list[str]:
    """Return names of the innermost loop that multiplies on tensor cores and copies ahead, the first of several."""
    loops = []
    for address, name, operands, _ in code:
        if name.startswith("BRA") and (target := re.search(r"0x([0-9a-f]+)", operands)):
            begin = int(target[1], 16)
            body = [one.name for one in code if begin <= one.address <= address] if begin < address else []
            if any(kind(n) == "tensor core" for n in body):
                loops.append(body)
    ahead = [body for body in loops if any(n.startswith("LDGSTS") for n in body)]
    return min(ahead or loops, key=len, default=[])


def source(launch: Launch) -> ASTSource:
    """Return the source specialised as the just-in-time compiler would: integers of 1, and multiples of 16. Addresses
    are aligned."""
    names = launch.kernel.arg_names
    signature, constants, attributes = {}, {}, {}
    for i, (name, value) in enumerate(zip(names, launch.arguments, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:
            signature[name] = "constexpr"
            constants[(i,)] = 1
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    for name, value in launch.constants.items():
        signature[name] = "constexpr"
        constants[(names.index(name),)] = value
    return ASTSource(launch.kernel, {name: signature[name] for name in names}, constants, attributes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--reports", type=Path, nargs="+", help="JSON files of earlier runs, instead of compiling")
    parser.add_argument("--only", nargs="+", help="regimes, as cases() names them")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--markdown", type=Path, help="table to write")
    parser.add_argument("--budget", type=Path, help="limits to write: the results and a tenth more")
    arguments = parser.parse_args()
    if arguments.reports:
        reports = [json.loads(path.read_text()) for path in arguments.reports]
        rows = {(row["target"], row["launch"]): row for found in reversed(reports) for row in reversed(found["rows"])}
        report = {"triton": reports[0]["triton"], "rows": list(reversed(rows.values()))}
    else:
        report = {"triton": triton.__version__, "rows": compile_all(arguments.targets, arguments.only)}
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1))
    if arguments.markdown:
        arguments.markdown.write_text(markdown(report))
    if arguments.budget:
        arguments.budget.write_text(json.dumps(budget(report), indent=1) + "\n")


def compile_all(targets: list[str], only: list[str] | None) -> list[dict]:
    rows = []
    for target in targets:
        done = set()
        for regime, found in cases(TARGETS[target][1]).items():
            for launch in found if only is None or regime in only else ():
                key = (source(launch).hash(), str(launch))
                if key in done:  # lengths alone do not make another kernel
                    continue
                done.add(key)
                rows.append(asdict(build(regime, launch, target)))
                print(*rows[-1].values(), file=sys.stderr, flush=True)
    return rows


def unit(row: dict) -> str:
    """Return the key of a budget: a kernel on a GPU, by dtype and head_dim, the forward also by where k is rotated."""
    kernel, dtype, *options = row["launch"].split()
    shown = [option for option in options if option.startswith(("D=", "OTHER=", "ROTATE_K=", "BLOCK="))]
    return " ".join([row["target"], kernel, dtype, *shown])


def budget(report: dict) -> dict[str, dict[str, float]]:
    """Return limits by unit: registers for the same number of programs per SM, and a tenth more instructions."""
    limits: dict[str, dict[str, float]] = {}
    for row in report["rows"]:
        threads = 32 * int(re.search(r"warps=(\d+)", row["launch"])[1])
        allocated = max(24, -(-row["registers"] // 8) * 8)  # in units of 8
        together = 65536 // (threads * allocated)
        found = limits.setdefault(unit(row), {"registers": 0, "shared": 0, "per_score": 0})
        most = 512 if row["target"] == "gfx942" else min(255, 65536 // threads // together // 8 * 8)
        found["registers"] = max(found["registers"], most)
        found["shared"] = max(found["shared"], row["shared"])
        found["per_score"] = max(found["per_score"], math.ceil(row["per_score"] * 11) / 10)
    return dict(sorted(limits.items()))


def exceeded(report: dict, limits: dict[str, dict[str, float]]) -> list[str]:
    """Return what exceeds its budget, including kernels without one."""
    found = []
    for row in report["rows"]:
        limit = limits.get(unit(row))
        if limit is None:
            found.append(f"{unit(row)}: no budget (make triton-budget)")
            continue
        found += [f"{row['target']} {row['launch']}: {name} is {row[name]}, budget {most}"
                  for name, most in limit.items() if row[name] > most]  # fmt: skip
    return found


def markdown(report: dict) -> str:
    lines = [
        "# What the compiler makes of the Triton kernels",
        "",
        f"Written by `make triton-budget` with Triton {report['triton']}, compiled offline: no GPU was involved, and",
        "nothing here is a measurement of speed. A launch is listed once, where it first occurs. Registers are per",
        "thread; spills and shared memory are bytes; tensor core: instructions in the code; loop: instructions in the",
        "main loop, by kind; per score: what a lane issues there for each score of its tile (without rotation and",
        "running maximum, the arithmetic of the softmax alone is 3.5).",
        "",
        "`tests/backends/triton/test_budget.py` fails if anything spills, exceeds its `budget.json`, needs more shared",
        "memory than the chip has, or uses no tensor core (except float32).",
        "",
    ]
    for target in TARGETS:
        rows = [row for row in report["rows"] if row["target"] == target]
        if not rows:
            continue
        lines += [f"## {target}: {len(rows)} kernels", ""]
        lines += [
            "| call | kernel | options | registers | spills | shared | tensor core | loop | per score |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            kernel, _, *options = row["launch"].split()
            shown = " ".join(o for o in options if o.split("=")[0] not in ("D", "R", "PAIRING", "ALIGN", "TABLE_ALIGN"))
            cells = [row["regime"], kernel.removesuffix("_kernel"), shown]
            cells += [row[name] for name in ("registers", "spills", "shared")]
            cells += [
                ", ".join(f"{count} {name}" for name, count in row[key].items()) for key in ("tensor_core", "loop")
            ]
            cells.append(row["per_score"] or "")
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
