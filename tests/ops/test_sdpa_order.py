# SPDX-License-Identifier: Apache-2.0
"""The order in which torch's SDPA asks its kernels."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from spatial_pe import rope_attention
from spatial_pe.ops import composed

pytestmark = pytest.mark.usefixtures("poisoned_memory")


FLASH_FIRST, CUDNN_FIRST = [1, 2, 0, 3, 4], [3, 1, 2, 0, 4]  # torch's own order, and what is asked for


@pytest.fixture
def orders(monkeypatch):
    """The order in force at each call of torch's attention."""
    seen = []

    def attention(*args, **kwargs):
        seen.append(torch._C._get_sdp_priority_order())
        return real(*args, **kwargs)

    real = composed.F.scaled_dot_product_attention
    monkeypatch.setattr(composed.F, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(composed, "_TORCH_DECIDED", False)
    monkeypatch.setattr(composed, "_cudnn", lambda: 91600)
    assert torch._C._get_sdp_priority_order() == FLASH_FIRST
    yield seen
    assert torch._C._get_sdp_priority_order() == FLASH_FIRST


@pytest.mark.parametrize(
    ("capability", "tokens", "cudnn", "order"),
    [
        ((9, 0), 256, 91002, CUDNN_FIRST),
        ((9, 0), 196, 91600, CUDNN_FIRST),
        ((9, 0), 196, 91500, FLASH_FIRST),
        ((9, 0), 196, 0, FLASH_FIRST),
        ((10, 0), 256, 91500, CUDNN_FIRST),
        ((10, 3), 196, 91600, CUDNN_FIRST),
        ((8, 0), 256, 91600, FLASH_FIRST),
        ((8, 9), 256, 91600, FLASH_FIRST),
        ((12, 0), 256, 91600, FLASH_FIRST),
    ],
)
def test_the_kernel_that_is_fastest_on_the_chip_is_asked_first(
    capability, tokens, cudnn, order, gpu, orders, monkeypatch
):
    gpu(capability)
    monkeypatch.setattr(composed, "_cudnn", lambda: cudnn)
    x = torch.zeros(1, tokens, 2, 64, dtype=torch.bfloat16)
    rope_attention(x, x, x, backend="composed")
    assert orders == [order]


@pytest.mark.parametrize(("queries", "keys"), [(256, 196), (196, 256)])
def test_both_lengths_of_attention_to_other_tokens_count(queries, keys, gpu, orders, monkeypatch):
    gpu((9, 0))
    monkeypatch.setattr(composed, "_cudnn", lambda: 91500)
    q, k = (torch.zeros(1, tokens, 2, 64, dtype=torch.bfloat16) for tokens in (queries, keys))
    rope_attention(q, k, k, backend="composed")
    assert orders == [FLASH_FIRST]


def test_the_order_changes_for_dense_calls_that_nobody_watches_only(gpu, orders, monkeypatch):
    x = torch.zeros(1, 128, 2, 64, dtype=torch.bfloat16)
    bounds = torch.tensor([0, 60, 128], dtype=torch.int32)
    rope_attention(x, x, x, backend="composed")  # on the CPU
    gpu((9, 0))
    rope_attention(x, x, x, seqlens=torch.tensor([60], dtype=torch.int32), backend="composed")
    rope_attention(x[0], x[0], x[0], cu_seqlens=bounds, backend="composed")
    assert orders and all(order == FLASH_FIRST for order in orders)


def test_a_compiled_graph_sets_no_order(gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setattr(composed, "_numbers", None)  # not callable
    x = torch.zeros(1, 128, 2, 64, dtype=torch.bfloat16)
    torch.compile(lambda x: rope_attention(x, x, x, backend="composed"), fullgraph=True, backend="eager")(x)


def test_the_order_of_the_user_and_what_is_switched_off_stay(gpu, orders, monkeypatch):
    gpu((9, 0))
    x = torch.zeros(1, 128, 2, 64, dtype=torch.bfloat16)
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION], set_priority=True):
        rope_attention(x, x, x, backend="composed")
    assert orders[0][:2] == [0, 3]
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]):
        rope_attention(x, x, x, backend="composed")
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(composed, "_DEPRIORITIZED", True)
    monkeypatch.setattr(composed, "_TORCH_DECIDED", False)
    rope_attention(x, x, x, backend="composed")
    assert orders[2] == FLASH_FIRST


def test_the_order_is_put_back_after_an_error(gpu, orders, monkeypatch):
    gpu((9, 0))

    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(composed, "_sdpa", fails)
    x = torch.zeros(1, 128, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="out of memory"):
        rope_attention(x, x, x, backend="composed")
