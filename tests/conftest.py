# SPDX-License-Identifier: Apache-2.0
"""What must be set before spatial_pe is imported."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():
    # the Triton kernels run on the CPU then; an environment that says otherwise wins
    os.environ.setdefault("TRITON_INTERPRET", "1")


def patch_the_language_once():
    """Triton's interpreter replaces the builtins of the modules that a kernel sees for a launch, and again at each call
    of a device function, to no effect where it sees the same modules. Without that 13 tests take 22 s instead of 27:
    pytest tests/backends/triton/test_kernels.py -m "not slow" -k "extreme_scores or float16 or one_image"."""
    from triton import language
    from triton.runtime import interpreter

    patch, nothing = interpreter._patch_lang, getattr(interpreter, "_LangPatchScope", object)

    def once(fn):
        seen = [x for x in fn.__globals__.values() if x is language or x is language.core]
        return patch(fn) if any(language.core.is_builtin(x.load) for x in seen) else nothing()

    interpreter._patch_lang = once


if importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1":
    patch_the_language_once()


@pytest.fixture
def poisoned_memory():
    """torch.empty returns NaN: an output, or scratch, that nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def rounds_bfloat16(monkeypatch):
    """The interpreter, if Triton is there, converts float32 to bfloat16 as GPUs do: to the nearest, ties to even."""
    if importlib.util.find_spec("triton") is None:
        return
    import numpy
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        single = torch.from_numpy(numpy.array(data, numpy.float32, copy=True))
        return single.to(torch.bfloat16).view(torch.int16).numpy().view(numpy.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
