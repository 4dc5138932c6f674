# SPDX-License-Identifier: Apache-2.0
"""What a result depends on besides the code: versions, the CPU and what it can do, threads."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from .. import __version__

# Packages whose version can change a result or a timing; those that are not installed are left out.
PACKAGES = (
    *("torch", "transformers", "triton", "flash-attn", "flash-attn-3", "flash-attn-4"),
    *("numpy", "onnx", "onnxruntime", "openvino"),
)


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
    """The processor as it names itself, with family and model: a virtual machine may say no more than "AMD EPYC"."""
    fields: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                fields.setdefault(key.strip().lower(), value.strip())
    except OSError:
        pass  # not Linux
    name = fields.get("model name") or platform.processor() or platform.machine()
    return f"{name} (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else name


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
