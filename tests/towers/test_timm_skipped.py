# SPDX-License-Identifier: Apache-2.0
"""timm's attention that is left alone, and a wrong one that verification notices."""

from __future__ import annotations

from functools import partial

import pytest
from timm_path import import_timm

from spatial_pe.towers import inspect, patch

timm = import_timm()
from timm.layers import DiffAttention  # noqa: E402
from timm.models.vision_transformer import (  # noqa: E402
    ParallelScalingBlock,
    VisionTransformer,
)
from timm_cases import CASES, IMAGES, SMALL, Case  # noqa: E402


@pytest.mark.parametrize(
    ("name", "pool", "reason"),
    [
        ("pe_core", "AttentionPoolLatent", "no query, key and value projections found, only q (Linear), kv (Linear)"),
        ("siglip", "AttentionPoolLatent", "no query, key and value projections found, only q (Linear), kv (Linear)"),
        ("naflex, plain, learned", "AttentionPoolLatent", "no query, key and value projections found, only q (Linear)"),
        ("vit, prr", "AttentionPoolPrr", "no query, key and value projections found"),
    ],
)
def test_pooling_attention_is_left_alone(name, pool, reason):
    prr = Case(partial(VisionTransformer, **IMAGES, global_pool="prr"), "Attention")
    case = {**CASES, "vit, prr": prr}[name]
    model = case.build()
    planned, report = inspect(model), patch(model)
    assert [row[:5] for row in report.patched] == [row[:5] for row in planned.patched]
    assert [(row.name, row.attention) for row in report.skipped] == [("attn_pool", pool)]
    assert report.skipped[0].reason.startswith(reason) and planned.skipped == report.skipped
    assert type(model.attn_pool).__name__ == pool
    assert [row.name for row in report.patched] == ["blocks.0.attn", "blocks.1.attn"]
    assert {row.tower for row in report.patched} == {f"model ({type(model).__name__})"}
    again = patch(model)
    assert not again.patched and {row.reason for row in again.skipped[:2]} == {"already patched"}


STEM = {"img_size": 32, "num_classes": 5}


OTHERS = {
    "beit": (partial(timm.create_model, "beit_base_patch16_224", **SMALL, **STEM),
             r"2 Attention: its forward takes \(x, shared_rel_pos_bias\)"),
    "swin": (partial(timm.create_model, "swin_tiny_patch4_window7_224", img_size=56, embed_dim=32, depths=(1, 1),
                     num_heads=(1, 2)), r"2 WindowAttention: its forward takes \(x, mask\)"),
    "sam": (partial(timm.create_model, "samvit_base_patch16", **SMALL, **STEM),
            "2 Attention: has rel_pos_h, rel_pos_w, which is not part of plain or rotary attention"),
    "relpos": (partial(timm.create_model, "vit_relpos_small_patch16_224", **SMALL, **STEM),
               r"2 RelPosAttention: its forward takes \(x, shared_rel_pos\)"),
    "gemma4": (partial(timm.create_model, "gemma4_vit_167m_enc", embed_dim=32, depth=2, num_heads=2),
               r"2 Gemma4Attention: its forward takes \(x, rope_cos, rope_sin, attn_mask\)"),
    "fastvit": (partial(timm.create_model, "fastvit_sa12", layers=(1, 1, 1, 1), embed_dims=(16, 16, 16, 32)),
                "1 Attention: it has the form of tokens alone attention, but its own forward fails on a test input"),
    "differential": (partial(VisionTransformer, **IMAGES, attn_layer=DiffAttention),
                     "2 DiffAttention: has lambda_q1, .*sub_norm, which is not part of plain or rotary attention"),
    "parallel scaling": (partial(VisionTransformer, **IMAGES, block_fn=ParallelScalingBlock),
                         "it has no attention modules"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_attention_is_skipped_with_the_reason(name):
    make, reason = OTHERS[name]
    model = make()
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=f"nothing to patch in {type(model).__name__}: .*{reason}"):
        patch(model)
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize("fault", ["inverse rotation", "not rotated", "scaled"])
@pytest.mark.parametrize("name", ["eva02_tiny", "rope-vit mixed", "dinov3", "vit"])
def test_verification_notices_a_wrong_attention(name, fault, monkeypatch):
    from spatial_pe.towers import fused_attention

    original = fused_attention.rope_attention

    def wrong(q, k, v, rotary, *, scale, **kwargs):
        if fault == "scaled":
            scale = 1.01 * scale
        elif rotary is not None:
            rotary = rotary.inverse() if "inverse" in fault else None
        return original(q, k, v, rotary, scale=scale, **kwargs)

    monkeypatch.setattr(fused_attention, "rope_attention", wrong)
    model = CASES[name].build()
    if name == "vit" and fault != "scaled":
        assert patch(model).patched  # there is nothing to rotate
        return
    with pytest.raises(RuntimeError, match="computes something else when patched"):
        patch(model)
