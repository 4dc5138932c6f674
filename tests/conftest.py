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
    """Triton's interpreter replaces triton.language's builtins for a launch, and again, to no effect, at each call of a
    device function: a fifth of its time."""
    from triton import language
    from triton.runtime import interpreter

    patch, nothing = interpreter._patch_lang, getattr(interpreter, "_LangPatchScope", object)
    interpreter._patch_lang = lambda fn: patch(fn) if language.core.is_builtin(language.load) else nothing()


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
    """The interpreter converts float32 to bfloat16 as GPUs do: to the nearest, ties to even."""
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
