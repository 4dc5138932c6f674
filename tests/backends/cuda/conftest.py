# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on the host: the same sources as C++, each thread of a block a fiber (csrc/cuda/emulator)."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from spatial_pe.backends import cuda

ROOT = Path(__file__).parents[3]
BUILD = ROOT / os.environ.get("SPATIAL_PE_EMULATOR_BUILD", "build/emulator")


@pytest.fixture(scope="session")
def extension():
    """The module _cuda_emulated."""
    path = next(BUILD.glob("_cuda_emulated*.so"), None)
    if path is None:
        pytest.skip("the emulated kernels are not built: make build/emulator/built")
    spec = importlib.util.spec_from_file_location("spatial_pe._cuda_emulated", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def emulated(extension, monkeypatch):
    """backend="cuda" on CPU tensors. An emulator of 2 SMs like those of an H100, threads in the plain order."""
    monkeypatch.setattr(cuda, "EXTENSION", extension)
    monkeypatch.setattr(cuda, "EMULATED", True)
    extension.use_device()
    extension.set_schedule(0)
    return extension
