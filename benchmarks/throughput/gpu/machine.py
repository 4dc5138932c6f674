# SPDX-License-Identifier: Apache-2.0
"""Description of the machine without torch: importing it takes ten seconds on a machine that has just started."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "transformers", "timm", "flash-attn", "flash-attn-4", "nvidia-cudnn-frontend", "pytest")
TOOLS = ("nvidia-smi", "nvcc", "cmake", "ninja", "make", "compute-sanitizer", "ncu")


def describe() -> dict[str, Any]:
    query = "name,driver_version,compute_cap,memory.total,clocks.sm,temperature.gpu"
    smi = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits")
    fields = [field.strip() for field in (smi or "").splitlines()[0].split(",")] if smi else []
    release = re.compile(r"release \S+ V(\S+)")
    nvcc, ptxas = (release.search(_output(tool, "--version") or "") for tool in ("nvcc", _ptxas()))
    return {
        "gpu": dict(zip(query.split(","), fields, strict=False)),
        "cores": len(os.sched_getaffinity(0)),
        "nvcc": nvcc[1] if nvcc else None,
        "ptxas": ptxas[1] if ptxas else None,
        "tools": {name: shutil.which(name) for name in TOOLS},
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def architecture(machine: dict[str, Any]) -> str | None:
    """Return the architecture as for SPATIAL_PE_CUDA_ARCHS: "90" for sm_90."""
    found = re.fullmatch(r"(\d+)\.(\d)", machine["gpu"].get("compute_cap", ""))
    return f"{found[1]}{found[2]}" if found else None


def lines(machine: dict[str, Any]) -> list[str]:
    gpu = ", ".join(f"{name} {value}" for name, value in machine["gpu"].items()) or "no GPU that nvidia-smi knows"
    missing = [name for name, path in machine["tools"].items() if path is None]
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items())
    compilers = ", ".join(f"{name} {machine.get(name)}" for name in ("nvcc", "ptxas"))
    return [gpu, f"{versions}; {compilers}; {machine['cores']} cores", f"not there: {', '.join(missing) or '-'}"]


def _ptxas() -> str:
    """Return the version of Triton's ptxas: versions below 13.1 have had wrong results of wgmma (triton#11781)."""
    spec = importlib.util.find_spec("triton")
    own = Path(spec.origin).with_name("backends") / "nvidia/bin/ptxas" if spec and spec.origin else Path("ptxas")
    return os.environ.get("TRITON_PTXAS_PATH") or str(own)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
