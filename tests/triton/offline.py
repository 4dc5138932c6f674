# SPDX-License-Identifier: Apache-2.0
"""Compile launches for GPUs that are not there, and read what the compiler made of them.

    python tests/triton/offline.py --out budget.json [--only "bf16 D=64"] [--targets sm_90]
    python tests/triton/offline.py --markdown docs/triton_budget.md

In a process of its own: the other tests run the kernels in Triton's interpreter, which replaces the compiler, and a
second Triton needs a second process anyway (PYTHONPATH says which one).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spatial_pe import Rotary
from spatial_pe.backends.call import Call
from spatial_pe.backends.triton.configs import Family
from spatial_pe.backends.triton.launch import Launch
from spatial_pe.backends.triton.plan import plan_backward, plan_forward

# name -> (what Triton compiles for, whose tiles)
TARGETS: dict[str, tuple[GPUTarget, Family]] = {
    "sm_80": (GPUTarget("cuda", 80, 32), "ampere"),
    "sm_90": (GPUTarget("cuda", 90, 32), "hopper"),
    "sm_100": (GPUTarget("cuda", 100, 32), "blackwell"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), "cdna"),
}
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Built:
    """What a launch became. Zeros where a target does not say."""

    regime: str
    launch: str
    target: str
    registers: int
    spills: int  # bytes of local memory
    shared: int  # bytes
    tensor_core: int  # instructions


def cases(family: Family) -> dict[str, list[Launch]]:
    """Launches by regime, those of real calls: forward and backward."""
    found: dict[str, list[Launch]] = {}
    for name, dtype in DTYPES.items():
        # every head_dim in bfloat16; float16 and float32 have the same tiles for D <= 64 and above
        dims = (16, 32, 64, 72, 80, 88, 96, 104, 112, 128) if name == "bf16" else (64, 80, 128)
        for dim in dims:
            for tokens in (64, 128, 576, 2304):
                found[f"{name} D={dim} N={tokens}"] = launches(family, dtype, dim, tokens)
    bf16 = torch.bfloat16
    found["bf16 D=80 windows of 64, packed"] = launches(family, bf16, 80, 640, windows=64)
    found["bf16 D=80 packed, lengths unknown"] = launches(family, bf16, 80, 640, windows=64, hint=False)
    found["bf16 D=64 padded"] = launches(family, bf16, 64, 576, padded=True)
    found["bf16 D=64 GQA"] = launches(family, bf16, 64, 576, kv_heads=2)
    found["bf16 D=64 interleaved"] = launches(family, bf16, 64, 576, pairing="interleaved")
    found["bf16 D=72 axis_half"] = launches(family, bf16, 72, 576, pairing="axis_half")
    found["bf16 D=80, 40 of them turned"] = launches(family, bf16, 80, 576, rotary_dim=40)
    found["bf16 D=64 no rotary"] = launches(family, bf16, 64, 576, rotary_dim=0)
    return found


def launches(
    family,
    dtype,
    dim,
    tokens,
    *,
    heads=4,
    kv_heads=4,
    rotary_dim=None,
    pairing="half",
    windows=0,
    hint=True,
    padded=False,
) -> list[Launch]:
    """Those of the forward and of the backward of a call on 16 heads' worth of a fused projection's strides."""
    batch = 1 if windows else 2
    qkv = torch.empty(batch, tokens, heads + 2 * kv_heads, dim, dtype=dtype)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=2)
    rotary_dim = dim if rotary_dim is None else rotary_dim
    rotary = Rotary.from_angles(torch.zeros(tokens, rotary_dim // 2), pairing) if rotary_dim else None
    bounds = torch.arange(0, tokens + 1, windows, dtype=torch.int32) if windows else None
    lengths = torch.full((batch,), tokens, dtype=torch.int32) if padded else None
    call = Call(q, k, v, rotary, dim**-0.5, bounds, windows if windows and hint else None, lengths)
    forward = plan_forward(call, family)
    out, lse = forward.results
    return [*forward.launches, *plan_backward(call, out, lse, torch.empty_like(out), family).launches]


def build(regime: str, launch: Launch, name: str) -> Built:
    target, _ = TARGETS[name]
    kernel = triton.compile(source(launch), target=target, options=options(launch, target))
    built = Built(regime, str(launch), name, 0, 0, int(kernel.metadata.shared), 0)
    if target.backend == "hip":
        text = kernel.asm["amdgcn"]
        built.registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        built.spills = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1])
        built.tensor_core = len(re.findall(r"\bv_mfma", text))
        return built
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (_cuobjdump(flag, file.name) for flag in ("--dump-resource-usage", "--dump-sass"))
    built.registers = int(re.search(r"REG:(\d+)", usage)[1])
    stack, local = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("STACK", "LOCAL"))
    built.spills = max(stack, local, 4 * len(re.findall(r"\b(?:STL|LDL)\b", code)))
    built.tensor_core = len(re.findall(r"\b(?:HGMMA|HMMA|UTCHMMA|UTCMMA)\b", code))
    return built


def source(launch: Launch) -> ASTSource:
    """As the just-in-time compiler would specialise it: integers of 1, and what 16 divides. Addresses are aligned."""
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


def options(launch: Launch, target: GPUTarget) -> dict:
    # a wavefront of 64 lanes does the work of two warps
    warps = launch.num_warps if target.backend == "cuda" else max(1, launch.num_warps // 2)
    return {"num_warps": warps}


def _cuobjdump(flag: str, path: str) -> str:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    return subprocess.run([tools / "cuobjdump", flag, path], check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--only", default="", help="regimes that contain this")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--markdown", type=Path, help="table to write")
    parser.add_argument("--report", type=Path, nargs="+", help="JSON files to take instead of compiling")
    arguments = parser.parse_args()
    if arguments.report:
        reports = [json.loads(path.read_text()) for path in arguments.report]
        report = {"triton": reports[0]["triton"], "rows": [row for found in reports for row in found["rows"]]}
    else:
        report = {"triton": triton.__version__, "rows": compile_all(arguments.targets, arguments.only)}
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1))
    if arguments.markdown:
        arguments.markdown.write_text(markdown(report))


def compile_all(targets: list[str], only: str) -> list[dict]:
    rows = []
    for target in targets:
        done = set()
        for regime, found in cases(TARGETS[target][1]).items():
            for launch in found if only in regime else ():
                key = (source(launch).hash(), str(launch))
                if key in done:  # lengths alone do not make another kernel
                    continue
                done.add(key)
                rows.append(asdict(build(regime, launch, target)))
                print(*rows[-1].values(), file=sys.stderr, flush=True)
    return rows


def markdown(report: dict) -> str:
    lines = [
        "# What the compiler makes of the Triton kernels",
        "",
        f"Written by `make triton-budget` with Triton {report['triton']}, compiled offline: no GPU was involved, and",
        "nothing here is a measurement of speed. A launch is listed once, where it first occurs. Registers are per",
        "thread; spills and shared memory are bytes; tensor core: instructions in the code.",
        "`tests/triton/test_budget.py` fails if anything spills, needs more shared memory than the chip has, or uses",
        "no tensor core (float32, which runs on the ordinary units, and rotate excepted).",
        "",
    ]
    for target in TARGETS:
        rows = [row for row in report["rows"] if row["target"] == target]
        if not rows:
            continue
        lines += [f"## {target}: {len(rows)} kernels", ""]
        lines += [
            "| call | kernel | options | registers | spills | shared | tensor core |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            kernel, _, *options = row["launch"].split()
            shown = " ".join(o for o in options if o.split("=")[0] not in ("D", "R", "PAIRING", "ALIGN", "TABLE_ALIGN"))
            cells = [row["regime"], kernel.removesuffix("_kernel"), shown]
            cells += [row[name] for name in ("registers", "spills", "shared", "tensor_core")]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
