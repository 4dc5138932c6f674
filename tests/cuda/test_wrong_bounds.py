# SPDX-License-Identifier: Apache-2.0
"""Lengths that are wrong show as NaN, in the CUDA kernels on the emulator, which ends a launch that reads or writes
outside the tensors or leaves a result unwritten."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spatial_pe.backends import cuda
from spatial_pe.backends.call import Call

sys.path.append(str(Path(__file__).parents[1] / "triton"))
from wrong_bounds import call_of, check_lse, decreasing_cases, expected, wrong_cases

# Of the longest sequence that is right, the head_dim, and KB of shared memory: what each is computed by.
SHAPES = {
    "a window of 64": (40, 72, 227),
    "a window of 128": (100, 64, 227),
    "keys in shared memory": (150, 80, 227),
    "keys passing through, backward in parts": (270, 64, 64),
}


def results(call: Call, dout: Tensor, emulated) -> dict[str, Tensor]:
    with torch.no_grad():
        out, lse = cuda.forward(call)
        grads = cuda.backward(call, out, lse, dout)
    check_lse(lse, out)
    return dict(zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [str(wrong) for wrong in wrong_cases(9)])
def test_nan_where_the_lengths_are_wrong(name, shape, emulated):
    longest, dim, shared = SHAPES[shape]
    emulated.use_device(shared_per_block=shared * 1024)
    wrong = next(one for one in wrong_cases(longest) if str(one) == name)
    call, dout = call_of(wrong, dim, torch.float16)
    got = results(call, dout, emulated)
    for name, x in expected(wrong, call, dout).items():
        torch.testing.assert_close(got[name].float(), x, rtol=2e-2, atol=2e-2, equal_nan=True, msg=name)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [str(wrong) for wrong in decreasing_cases(9)])
def test_nan_where_cu_seqlens_decrease(name, shape, emulated):
    """At least for the first token, in head 0."""
    longest, dim, shared = SHAPES[shape]
    emulated.use_device(shared_per_block=shared * 1024)
    wrong = next(one for one in decreasing_cases(longest) if str(one) == name)
    call, dout = call_of(wrong, dim, torch.bfloat16)
    emulated.allow_rewrites(True)
    try:
        with torch.no_grad():
            out, lse = cuda.forward(call)
            grads = cuda.backward(call, out, lse, dout)
    finally:
        emulated.allow_rewrites(False)
    assert lse[:, 0, 0].isnan().all()
    assert all(x[:, 0, 0].isnan().all() for x in (out, *grads))
