# SPDX-License-Identifier: Apache-2.0
"""The real flash-attn and varlen_attn behind the rotation, as far as they are installed.

python -m pytest -m gpu tests/backends/gpu/test_flash_gpu.py
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracles import Case, check, exact, make, run
from oracles.cases import GROUPS, SEQUENCES, VIEWS
from oracles.cross import CASES as OTHER_TOKENS
from torch.nn.attention import SDPBackend, sdpa_kernel

from spatial_pe import Rotary, rope_attention
from spatial_pe.ops import composed, flash

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CASES = [
    *(case for case in (*SEQUENCES, *VIEWS, *GROUPS) if case.seqlens is None and case.dim <= 128),
    Case(lengths=(1100, 3, 576), dim=72),
    Case(batch=2, tokens=2100, dim=64),
]


@pytest.fixture(params=flash.PROVIDERS, ids=lambda provider: provider.name)
def provider(request, monkeypatch):
    """The only one that is asked, for every form."""
    provider, major = request.param, torch.cuda.get_device_capability()[0]
    if (why := flash.unusable(provider)) is not None:
        pytest.skip(why)
    if not any(row.provider is provider and major in row.majors for row in flash.ROWS):
        pytest.skip(f"no row for a GPU of capability {major}")
    packed = flash.Row(True, (major,), provider, "for this test")
    monkeypatch.setattr(flash, "ROWS", (packed, replace(packed, packed=False)) if provider.dense else (packed,))
    monkeypatch.setattr(flash, "_FAILED", {})
    flash.clear_cache()
    yield provider
    assert flash._FAILED == {}
    monkeypatch.undo()
    flash.clear_cache()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_rule(case, dtype, provider):
    if case.lengths is None and provider.dense is None:
        pytest.skip("has no dense form")
    inputs = make(replace(case, dtype=dtype), "cuda")
    results = {name: x.cpu() for name, x in run(inputs, "composed").items()}
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        eager = {name: x.cpu() for name, x in run(inputs, "composed").items()}
    on_cpu = make(replace(case, dtype=dtype))
    check(results, eager, exact(on_cpu), on_cpu)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [case for case in OTHER_TOKENS if case.form != "padded"], ids=str)
def test_other_tokens(case, dtype, provider):
    """Sequences without keys among them, which are 0."""
    if (case.form == "dense" and provider.dense is None) or case.dim > provider.most_dim:
        pytest.skip("has no such form")
    case.make(dtype)
    found = case.run("composed", "cuda")
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        case.check(found, case.run("composed", "cuda"))


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize(
    "bounds", [[0, 20, 50], [0, 20, 70], [5, 60], [0, 40, 20, 60], [2**31 - 1, -(2**31), 7]], ids=str
)
def test_wrong_bounds_are_nan(bounds, rotated, provider):
    """All of out and of the gradients: that softmax of NaN is NaN in every kernel is what this stands on."""
    q, k, v = (torch.randn(60, 2, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(3))
    rotary = Rotary.from_angles(torch.rand(60, 32, device="cuda")) if rotated else None
    lengths = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    out = rope_attention(q, k, v, rotary, cu_seqlens=lengths, max_seqlen=60, backend="composed")
    assert all(x.isnan().all() for x in (out, *torch.autograd.grad(out.sum(), (q, k, v))))


def test_captured_in_a_graph_and_replayed_with_other_lengths(provider):
    q = torch.randn(60, 2, 64, dtype=torch.bfloat16, device="cuda")
    lengths = torch.tensor([0, 20, 60], dtype=torch.int32, device="cuda")

    def call():
        return rope_attention(q, q, q, cu_seqlens=lengths, backend="composed")

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        captured = call()
    lengths.copy_(torch.tensor([0, 50, 60]))
    graph.replay()
    torch.testing.assert_close(captured, call(), atol=0.01, rtol=0.01)


@pytest.mark.parametrize("tokens", [196, 256])
def test_the_order_of_torch_stays(tokens):
    before = torch._C._get_sdp_priority_order()
    x = torch.randn(2, tokens, 4, 64, dtype=torch.bfloat16, device="cuda")
    for _ in range(2):
        rope_attention(x, x, x, backend="composed")
    y = x.transpose(1, 2)
    torch.nn.functional.scaled_dot_product_attention(y, y, y)
    after = torch._C._get_sdp_priority_order()
    assert after in (before, composed._numbers((*composed._CUDNN_FIRST, SDPBackend.OVERRIDEABLE)))
