# SPDX-License-Identifier: Apache-2.0
"""Tower tests: what they share."""

from __future__ import annotations

import pytest
import torch

from spatial_pe.towers import fused_attention, padding


@pytest.fixture(autouse=True)
def fresh_warnings():
    """The fallback warns once per class and reason: each test is a first time."""
    fused_attention._warned.clear()


@pytest.fixture
def calls(monkeypatch):
    """Every call of rope_attention by an adapter, as (positional, keyword) arguments."""
    seen: list[tuple[tuple, dict]] = []

    def spy(*args, **kwargs):
        seen.append((args, kwargs))
        return original(*args, **kwargs)

    original = fused_attention.rope_attention
    for module in (fused_attention, padding):
        monkeypatch.setattr(module, "rope_attention", spy)
    return seen


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Tensors here are tiny: a second thread costs more than it does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def convolutions_that_can_be_trusted(request):
    """oneDNN's strided bfloat16 convolution of a few pixels (step3p7's downsampler) returns memory that nobody wrote on
    a CPU with AMX (torch 2.13): errors of 1e20, and NaN, also of the tower that is not patched."""
    with torch.backends.mkldnn.flags(enabled="step3p7" not in request.node.name):
        yield
