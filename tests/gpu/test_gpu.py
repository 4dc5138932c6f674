# SPDX-License-Identifier: Apache-2.0
"""The kernels on a GPU: the cases that every kernel is tested on, in every dtype, against float64 on the CPU.

python -m pytest -m gpu tests/gpu
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracles import Case, check, exact, make, run
from oracles.cases import GROUPS, HEAD_DIMS, LENGTHS, ROTATIONS, SCALES, SEQUENCES, VIEWS

import spatial_pe
from spatial_pe.backends import select
from spatial_pe.backends.call import Call

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CASES = [case for case in [*LENGTHS, *HEAD_DIMS, *ROTATIONS, *SEQUENCES, *VIEWS, *GROUPS, *SCALES] if case.dim <= 128]


def on_gpu(case: Case, backend: str) -> dict[str, torch.Tensor]:
    return {name: x.cpu() for name, x in run(make(case, "cuda"), backend).items()}


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_rule(case, dtype):
    case = replace(case, dtype=dtype)
    inputs = make(case)
    check(on_gpu(case, "triton"), on_gpu(case, "composed"), exact(inputs), inputs)


@pytest.mark.parametrize("tokens", [1025, 2304, 4096])
def test_long_sequences(tokens):
    case = Case(tokens=tokens, heads=2, dim=64, dtype=torch.bfloat16)
    inputs = make(case)
    check(on_gpu(case, "triton"), on_gpu(case, "composed"), exact(inputs), inputs)


def test_auto_takes_triton():
    inputs = make(Case(dtype=torch.bfloat16), "cuda")
    assert select.select(Call(inputs.q, inputs.k, inputs.v, None, 1.0, None, None, None), "auto") == "triton"


def test_gradients_are_the_same_every_time():
    case = Case(batch=4, tokens=577, heads=8, dtype=torch.bfloat16)
    first, second = on_gpu(case, "triton"), on_gpu(case, "triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_synchronisation():
    """Packed lengths stay on the device."""
    case = Case(lengths=(64,) * 20, dim=80, dtype=torch.bfloat16)
    inputs = make(case, "cuda")
    inputs.call("triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = inputs.call("triton")
        out.backward(inputs.dout)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_inside_a_cuda_graph():
    inputs = make(Case(batch=2, tokens=300, dtype=torch.bfloat16), "cuda")
    q, k, v = (x.detach() for x in (inputs.q, inputs.k, inputs.v))
    rotary = inputs.rotary()
    expected = spatial_pe.rope_attention(q, k, v, rotary, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        got = spatial_pe.rope_attention(q, k, v, rotary, backend="triton")
    graph.replay()
    assert torch.equal(got, expected)


def test_compiled_without_a_graph_break():
    inputs = make(Case(batch=2, tokens=300, dtype=torch.bfloat16), "cuda")
    q, k, v = (x.detach() for x in (inputs.q, inputs.k, inputs.v))
    attention = torch.compile(lambda q, k, v: spatial_pe.rope_attention(q, k, v, backend="triton"), fullgraph=True)
    assert torch.equal(attention(q, k, v), spatial_pe.rope_attention(q, k, v, backend="triton"))
