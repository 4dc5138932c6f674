# SPDX-License-Identifier: Apache-2.0
"""What backend="auto" takes on GPUs that are not here: fake tensors and "meta" have all that it looks at."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from spatial_pe.backends.base import AttentionCall
from spatial_pe.backends.triton import backend as triton
from spatial_pe.cli import doctor
from spatial_pe.ops import flash, select


def call_of(
    batch=1, tokens=576, dim=64, dtype=torch.bfloat16, device="meta", bounds=None, longest=None
) -> AttentionCall:
    q = torch.empty(batch, tokens, 16, dim, dtype=dtype, device=device)
    return AttentionCall(q, q, q, None, dim**-0.5, bounds, longest, None)


# ----------------------------------------------------------------------------------------------- datacenter Blackwell


@pytest.mark.parametrize(
    ("capability", "version", "wanted"),
    [
        ((10, 0), "3.6.0", "3.7"),
        ((10, 0), "3.7.0", None),
        ((10, 3), "3.7.1+git", "3.8"),
        ((10, 3), "3.8.0", None),
        ((11, 0), "3.6.0", "3.7"),
        ((12, 0), "3.6.0", None),
        ((9, 0), "3.5.1", None),
        ((10, 0), "of unknown version", None),
    ],
)
def test_triton_is_refused_where_its_products_differ_from_run_to_run(capability, version, wanted, monkeypatch):
    monkeypatch.setattr(triton, "capability", lambda index: capability)
    monkeypatch.setattr(triton, "VERSION", version)
    with FakeTensorMode():
        call = call_of(device="cuda")
    why = triton.cannot_serve(call)
    if wanted is None:
        assert why is None
    else:
        assert why.endswith(f"(triton#9871, #10590): needs {wanted} or newer") and f"triton {version}" in why
    assert triton._cannot_compute(call) is None, "the rotation has no products"


@pytest.mark.parametrize(("tokens", "dim"), [(64, 64), (576, 64), (4096, 72)])
def test_blackwell_takes_the_composed_path_unless_tuned(tokens, dim, monkeypatch):
    call = call_of(tokens=tokens, dim=dim)
    assert select._slower("triton", call) is None
    monkeypatch.setattr(select, "family_of", lambda device: "blackwell")
    assert "2 to 3.5 times as fast" in select._slower("triton", call)
    monkeypatch.setattr(triton, "faster", lambda call: "triton")
    assert select._slower("triton", call) is None


# ---------------------------------------------------------------------------------------------------------- flash-attn


ROWS = {(row.packed, row.majors, row.provider): row for row in flash.ROWS}
HOPPER_DENSE, HOPPER_PACKED = ROWS[False, (9,), flash.FA3], ROWS[True, (9,), flash.FA3]
BLACKWELL_PACKED, TORCH_PACKED = ROWS[True, (10, 11), flash.FA4], ROWS[True, (8, 9, 10, 11, 12), flash.VARLEN]


@pytest.mark.parametrize(
    ("row", "packed", "tokens", "longest", "name"),
    [
        (HOPPER_DENSE, False, 4096, None, "flash-attn 3"),
        (HOPPER_PACKED, True, 8192, 4096, "flash-attn 3"),
        (HOPPER_PACKED, True, 8192, 64, None),
        (HOPPER_PACKED, True, 8192, None, None),  # windows of 64, for all that is known
        (BLACKWELL_PACKED, True, 8192, None, "flash-attn 4"),
        (TORCH_PACKED, True, 8192, 4096, None),
        (None, True, 8192, 4096, None),
    ],
)
def test_flash_attn_comes_before_triton_where_it_is_ahead(row, packed, tokens, longest, name, monkeypatch):
    monkeypatch.setattr(flash, "choose", lambda call: (row, ""))
    bounds = torch.empty(3, dtype=torch.int32, device="meta") if packed else None
    why = select._slower("triton", call_of(tokens=tokens, bounds=bounds, longest=longest))
    assert why is None if name is None else why.startswith(f"{name} behind a rotation is likely faster")


@pytest.mark.parametrize("row", [TORCH_PACKED, None])
def test_packed_calls_go_where_it_was_measured_to_be_faster_and_nobody_waits(row, monkeypatch):
    monkeypatch.setattr(triton, "faster", lambda call: "composed")
    monkeypatch.setattr(flash, "choose", lambda call: (row, ""))
    why = select._slower("triton", call_of(bounds=torch.empty(3, dtype=torch.int32, device="meta")))
    assert why == ("composed was measured to be faster" if row else None)


def test_doctor_says_which_attention_is_behind_the_rotation(monkeypatch):
    """On a GPU for each form, and without one what is installed."""
    monkeypatch.setattr(flash, "unusable", lambda provider: None if provider is flash.FA2 else "is not installed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor._behind_the_rotation() == ["  composed   has, for GPUs: flash-attn 2"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(flash, "choose", lambda call: (HOPPER_PACKED if call.max_seqlen else None, "because"))
    monkeypatch.setattr(flash, "DEVICE", "cpu")
    lines = doctor._behind_the_rotation()
    assert lines[0] == "  composed   dense bfloat16, 576 tokens, on the GPU: torch's own attention (because)"
    assert lines[2] == "  composed   packed bfloat16, 4096 tokens, on the GPU: flash-attn 3 (because)"


# --------------------------------------------------------------------------------------------------------- one image


def test_what_a_large_batch_has_shown_says_nothing_of_one_image(monkeypatch):
    """16 heads x 2 blocks of 128 queries leave 100 of 132 SMs idle."""
    monkeypatch.setattr(triton.tuning_store, "any_rows", lambda device: True)
    monkeypatch.setattr(triton.tuning_store, "faster", lambda *args: "composed")
    monkeypatch.setattr(select, "family_of", lambda device: "hopper")
    with FakeTensorMode():
        one, many = call_of(tokens=196, device="cuda"), call_of(batch=188, tokens=196, device="cuda")
    assert triton.faster(one) is None and triton.faster(many) == "composed"
    assert select._triton_slower(one) is None and "measured" in select._triton_slower(many)
    assert "not measured" in select._cuda_slower(one)
