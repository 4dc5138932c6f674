# SPDX-License-Identifier: Apache-2.0
"""What a result depends on besides the code: versions, the CPU and what it can do, threads."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from . import __version__

# Packages whose version can change a result or a timing; those that are not installed are left out.
PACKAGES = ("torch", "transformers", "triton", "flash-attn", "numpy", "onnx", "onnxruntime")


def versions() -> dict[str, str]:
    """This package, Python, and what is installed of PACKAGES."""
    found = {"spatial_pe": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """The processor as it names itself, e.g. "AMD EPYC 9V74"; its architecture where it does not say."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.lower().startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on: fewer than the machine has in a container or under taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe() -> dict:
    """The machine and the software as plain data, to stand beside the numbers in a JSON file."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "versions": versions(),
        "system": platform.platform(terse=True),
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": gpu,
    }
