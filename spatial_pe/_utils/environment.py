# SPDX-License-Identifier: Apache-2.0
"""Description of the environment of a result: versions, the CPU and its features, threads."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from .._version import __version__

# Packages whose version can change a result or a timing; those that are not installed are left out.
PACKAGES = (
    *("torch", "transformers", "triton", "flash-attn", "flash-attn-3", "flash-attn-4"),
    *("numpy", "onnx", "onnxruntime", "openvino"),
)


def versions() -> dict[str, str]:
    """Return the versions of this package, Python, and the installed ones of PACKAGES."""
    found = {"spatial_pe": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """Return the processor's name with family and model: a virtual machine may report only "AMD EPYC"."""
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
    """Return how many cores this process may use: fewer than the machine has in a container or under taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe() -> dict:
    """Return the machine and the software as plain data, to store beside the numbers in a JSON file."""
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
