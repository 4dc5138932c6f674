# SPDX-License-Identifier: Apache-2.0
"""timm's models inside others: feature extraction, transformers' wrappers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from families import outputs, randn, randomize
from test_families import assert_error_rule, run
from timm_path import import_timm
from torch import nn

from spatial_pe.towers import from_pretrained, patch, unpatch

timm = import_timm()
from timm_cases import (  # noqa: E402
    DIM,
    DTYPES,
    HEADS,
    HEIGHT,
    IMAGES,
    SMALL,
    WIDTH,
    distance,
    images,
    named,
)


def test_features_only_and_intermediates(calls):
    inner = named("vit_small_patch16_rope_mixed_224")()
    features = named("vit_small_patch16_rope_mixed_224", features_only=True, out_indices=(0, 1))()
    for model in (features, inner):
        randomize(model).eval()
        x = images()["x"]

        def hidden(model=model, x=x):
            return model(x) if model is not inner else model.forward_intermediates(x, norm=True)[1]

        with torch.no_grad():
            expected = hidden()
            patch(model)
            calls.clear()
            found = hidden()
        assert len(calls) == len(found) == 2
        for a, b in zip(found, expected, strict=True):
            assert distance(a, b) <= 1e-5


@pytest.fixture
def transformers(monkeypatch):
    """transformers, which may have looked for timm before it was on the path."""
    package = pytest.importorskip("transformers")
    from transformers.utils import import_utils

    for name in ("_is_package_available", "is_torchvision_available", "is_timm_available"):
        getattr(getattr(import_utils, name), "cache_clear", int)()
    if hasattr(import_utils, "_timm_available"):  # transformers 4
        monkeypatch.setattr(import_utils, "_timm_available", True)
    assert import_utils.is_timm_available()
    return package


WRAPPED: dict[str, Any] = {**SMALL, "img_size": IMAGES["img_size"]}


def wrapper(package: Any, architecture: str, **options: Any) -> nn.Module:
    config = package.TimmWrapperConfig(architecture=architecture, model_args={**WRAPPED, **options})
    return randomize(package.TimmWrapperModel(config)).eval()


WRAPPED_MODELS = ["vit_pe_core_tiny_patch16_384", "vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224",
                  "vit_small_patch14_reg4_dinov2", "eva02_tiny_patch14_224"]  # fmt: skip


@DTYPES
@pytest.mark.parametrize("name", WRAPPED_MODELS)
def test_timm_wrapper(name, dtype, transformers, calls):
    class Wrapped:
        outputs = staticmethod(outputs)

    inputs = {"pixel_values": images()["x"]}
    exact = run(wrapper(transformers, name).double(), Wrapped, inputs, torch.float64)
    model = wrapper(transformers, name).to(dtype)
    theirs = run(model, Wrapped, inputs, dtype)
    report = patch(model)
    assert {row.tower for row in report.patched} == {f"timm_model ({type(model.timm_model).__name__})"}
    calls.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = run(model, Wrapped, inputs, dtype)
    assert len(calls) == len(report.patched) == 2 and len(ours[0]) == 2  # tokens, pooled
    for i, triple in enumerate(zip(ours[0], theirs[0], exact[0], strict=True)):
        assert_error_rule(*triple, dtype, f"output {i}")
    floor = 0.03 * torch.stack([g.norm() for g in exact[1].values()]).norm()
    for key, gradient in exact[1].items():
        assert_error_rule(ours[1][key], theirs[1][key], gradient, dtype, key, floor)


@pytest.mark.parametrize("rope", [None, "mixed"])
def test_timm_wrapper_is_saved_and_loaded(rope, tmp_path, transformers):
    model = wrapper(transformers, "vit_small_patch14_reg4_dinov2")
    patch(model, rope=rope, start="full")
    x = images()["x"]
    with torch.no_grad():
        expected = model(x).last_hidden_state
        model.save_pretrained(tmp_path)
        again = from_pretrained(transformers.TimmWrapperModel, tmp_path)
        assert torch.equal(again(x).last_hidden_state, expected)
        unpatch(model)
        model.save_pretrained(tmp_path / "unpatched")
    with pytest.raises(ValueError, match="holds no patched model"):
        from_pretrained(transformers.TimmWrapperModel, tmp_path / "unpatched")


@pytest.mark.parametrize("rope", [None, "axial"])
def test_perception_lm(rope, transformers, calls):
    """The whole model: its vision tower is patched, its language model is not, also where weights are asked for."""
    name = "vit_pe_core_tiny_patch16_384" if rope is None else "vit_base_patch16_clip_224"
    image, columns = 60, HEADS * DIM
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.PerceptionLMConfig(
        vision_config={"model_type": "timm_wrapper", "architecture": name, "model_args": WRAPPED},
        text_config={**text, "model_type": "llama", "num_key_value_heads": 2, "vocab_size": 64},
        image_token_id=image, video_token_id=61,
    )  # fmt: skip
    model = randomize(transformers.PerceptionLMModel(config)).eval()
    assert model.multi_modal_projector.linear_1.in_features == columns
    inputs = {
        "input_ids": torch.tensor([[1, *[image] * (HEIGHT * WIDTH), 2, 3]]),
        "pixel_values": images(batch=1)["x"][None],
    }
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        report = patch(model, rope=rope)
        calls.clear()
        found = model(**inputs).last_hidden_state
        assert len(calls) == len(report.patched) == 2
        assert distance(found, expected) <= 1e-5
        weights = model(**inputs, output_attentions=True)  # of the language model
        assert len(calls) == 4 and distance(weights.last_hidden_state, expected) <= 1e-5
    assert {row.tower for row in report.patched} == {
        f"vision_tower.timm_model ({type(model.vision_tower.timm_model).__name__})"
    }
    assert {(row.attention, row.reason) for row in report.skipped} >= {("LlamaAttention", "not inside a vision tower")}


def test_pe_video(transformers, calls):
    """Attention within a frame, by timm, and over frames."""
    package = pytest.importorskip("transformers.models.pe_video.modeling_pe_video")
    configuration = pytest.importorskip("transformers.models.pe_video.configuration_pe_video")
    vision = {"architecture": "vit_pe_core_tiny_patch16_384", "num_classes": 24, "model_args": WRAPPED}
    config = configuration.PeVideoEncoderConfig(
        vision_config=vision, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        head_dim=16,
    )  # fmt: skip
    model = randomize(package.PeVideoEncoder(config)).eval()
    inputs = {"pixel_values_videos": randn(2, 5, 3, *IMAGES["img_size"])}
    with torch.no_grad():
        expected = outputs(model, inputs)
        report = patch(model)
        calls.clear()
        found = outputs(model, inputs)
    assert {row.name for row in report.patched} >= {
        f"embedder.vision_model.timm_model.blocks.{i}.attn" for i in range(2)
    }
    assert len(calls) == len(report.patched)
    for a, b in zip(found, expected, strict=True):
        assert distance(a, b) <= 1e-5
