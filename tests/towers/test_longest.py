# SPDX-License-Identifier: Apache-2.0
"""A tower that is called as users call it, without max_seqlen, reaches the kernels for windows."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES

import spatial_pe
from spatial_pe.backends import longest
from spatial_pe.backends.longest import longest_sequence
from spatial_pe.backends.triton import backend as triton
from spatial_pe.towers import fused_attention

pytestmark = pytest.mark.skipif(
    not triton.INTERPRETED, reason="a GPU is here: tests/backends/gpu runs the kernels on it"
)


@pytest.fixture
def reads(monkeypatch):
    """The bounds that were read: each is a wait for a GPU."""
    seen: list[torch.Tensor] = []
    original = longest._read

    def spy(cu_seqlens):
        seen.append(cu_seqlens)
        return original(cu_seqlens)

    monkeypatch.setattr(longest, "_read", spy)
    return seen


@pytest.mark.skipif(triton.unavailable() is not None, reason=f"triton: {triton.unavailable()}")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_windows_of_a_tower_are_windows_of_the_kernels(mode, reads, monkeypatch):
    from spatial_pe.backends.triton import plan

    launched: list[str] = []
    original = plan.plan_forward

    def spy(call, choice=None):
        planned = original(call, choice)
        launched.append(str(planned.launches[-1].kernel.fn.__name__))
        return planned

    monkeypatch.setattr(plan, "plan_forward", spy)
    family = FAMILIES["qwen2_5_vl"]
    model, inputs = family.make().half(), family.inputs()
    inputs["hidden_states"] = inputs["hidden_states"].half()
    assert "max_seqlen" not in inputs
    spatial_pe.patch(model, backend="triton", verify=False)
    for _ in range(2):
        reads.clear()
        launched.clear()
        with mode():
            model(**inputs)
        blocks = len(model.blocks)
        assert len(launched) == blocks and "window_forward_kernel" in launched
        assert len(reads) == len({id(x) for x in reads}) <= 2 < blocks + 1  # of windows, and of whole images


def test_bounds_are_read_once_and_again_when_they_change(reads):
    bounds = torch.tensor([0, 3, 10], dtype=torch.int32)
    assert [longest_sequence(bounds) for _ in range(3)] == [7, 7, 7] and len(reads) == 1
    bounds[1] = 9
    assert longest_sequence(bounds) == 9 and len(reads) == 2
    assert longest_sequence(torch.tensor([0], dtype=torch.int32)) == 0


def test_bounds_of_inference_mode_are_read_once_a_forward(reads):
    with torch.inference_mode():
        bounds = torch.tensor([0, 3, 10], dtype=torch.int32)
        for layer in range(3):
            assert longest_sequence(bounds, layer) == 7
        assert len(reads) == 1
        bounds[1] = 9  # before the next forward: nothing but the values says so
        for layer in range(3):
            assert longest_sequence(bounds, layer) == 9
        assert len(reads) == 2


def test_nothing_is_read_in_a_trace():
    class Layer(torch.nn.Module):
        def forward(self, x, bounds):
            return x + (longest_sequence(bounds) or 100)

    bounds = torch.tensor([0, 3, 10], dtype=torch.int32)
    program = torch.export.export(Layer(), (torch.zeros(1), bounds))
    assert program.module()(torch.zeros(1), bounds).item() == 100


@pytest.mark.parametrize("backend", ["auto", "cuda"])
def test_the_cuda_kernels_are_told_too(backend, monkeypatch):
    said: list[int | None] = []
    original = fused_attention.rope_attention

    def spy(*args, max_seqlen=None, backend, **kwargs):
        said.append(max_seqlen)
        return original(*args, max_seqlen=max_seqlen, **kwargs)

    family = FAMILIES["qwen2_5_vl"]
    model = family.make()
    spatial_pe.patch(model)
    monkeypatch.setattr(fused_attention, "rope_attention", spy)
    for block in model.blocks:
        block.attn._spatial_pe.backend = backend  # which is not here
    model(**family.inputs())
    # the kernels of the CPU read the bounds themselves
    assert all(x is None for x in said) if backend == "auto" else min(said) < max(said)
