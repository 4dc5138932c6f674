# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402 (the extra's packages are imported after the check that they are there)
"""What the tests of the demo share: the weights, small towers, rows of measurements, the panels of a picture."""

from __future__ import annotations

import numpy as np
import pytest

for package in ("transformers", "onnx", "onnxruntime", "skimage", "matplotlib"):
    pytest.importorskip(package, reason="the demo needs spatial_pe[demo]")

import torch
import transformers
from matplotlib.colors import to_rgb

from spatial_pe.lab.checkpoints import assets, checkpoint
from spatial_pe.lab.demo import figure, measure, towers


def weights() -> bytes:
    """The ONNX graph of the default model."""
    try:
        return assets.onnx_file()
    except assets.MissingAssetError as error:
        pytest.skip(f"the default weights cannot be had: {error}")


# -------------------------------------------------------------------------------------------------------------- towers

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}


def vit():
    return transformers.ViTModel(transformers.ViTConfig(**SMALL, image_size=64, patch_size=16))


def dinov3():
    return transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**SMALL, num_register_tokens=2))


def clip():
    text = SMALL | {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.CLIPConfig(text_config=text, vision_config=SMALL | {"image_size": 64, "patch_size": 16})
    return transformers.CLIPModel(config)


def pixtral():
    return transformers.PixtralVisionModel(transformers.PixtralVisionConfig(**SMALL))


def aimv2():
    return transformers.Aimv2VisionModel(transformers.Aimv2VisionConfig(**SMALL, image_size=56, patch_size=14))


def qwen():
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    names = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 24}
    return Qwen2_5_VisionTransformerPretrainedModel(Qwen2_5_VLVisionConfig(**names, fullatt_block_indexes=[1]))


def as_tower(model) -> checkpoint.Tower:
    config = model.config
    merge, frames = getattr(config, "spatial_merge_size", 1), getattr(config, "temporal_patch_size", 1)
    image_size = getattr(config, "image_size", None)
    return checkpoint.Tower("t", model.eval(), config.patch_size, image_size, frames=frames, merge=merge)


def small_cases() -> tuple[towers.Case, ...]:
    """In place of the towers that rotate, with what is theirs: windows, images of two sizes, prefix tokens."""
    patches = torch.randn(64, 3 * 2 * 14 * 14)  # 112 px: one window
    images, sizes = torch.randn(2, 3, 64, 64), torch.tensor([[64, 64], [32, 64]])

    def small_qwen(layers, sizes):
        return qwen(), lambda m, dtype: m(patches.to(dtype), grid_thw=torch.tensor([[1, 8, 8]]))

    def small_pixtral(layers, _):
        return pixtral(), lambda m, dtype: m(images.to(dtype), sizes).last_hidden_state

    def small_dinov3(layers, sizes):
        return dinov3(), lambda m, dtype: m(images[:1].to(dtype)).last_hidden_state

    return (
        towers.Case("Qwen", "windows", small_qwen, 2, ((112, 112),)),
        towers.Case("Pixtral", "images of two sizes", small_pixtral, 2, ((64, 64), (32, 64))),
        towers.Case("DINOv3", "prefix tokens", small_dinov3, 2, ((64, 64),)),
    )


# ------------------------------------------------------------------------------------------- measurements and pictures


def row(dtype="fp32", size=224, relative=1e-6, rounding=None, before=(2.0,), after=(1.0,)) -> measure.Row:
    error = measure.Error(max=1e-5, relative=relative, cosine_mean=1.0, cosine_min=1.0)
    return measure.Row(dtype, size, 257, 4, error, rounding, measure.Timing(list(before), list(after)))


def panels(image: np.ndarray, lines: int) -> list[list[np.ndarray]]:
    """The four panels of each line: found as the areas that are not background, not by knowing the layout."""
    left = image[:, : int(0.63 * image.shape[1])]
    frame = np.all(np.abs(left - to_rgb(figure.FRAME)) < 0.02, axis=-1)
    columns, rows = (np.flatnonzero(frame.mean(axis) > part) for axis, part in ((0, 0.2), (1, 0.4)))
    columns, rows = (np.split(x, np.flatnonzero(np.diff(x) > 3) + 1) for x in (columns, rows))
    assert (len(columns), len(rows)) == (8, 2 * lines), "a left and a right, an upper and a lower edge of each panel"
    spans = [[(a[-1] + 3, b[0] - 3) for a, b in zip(edges[::2], edges[1::2], strict=True)] for edges in (rows, columns)]
    return [[left[top:bottom, a:b] for a, b in spans[1]] for top, bottom in spans[0]]


def cells(panel: np.ndarray, side: int) -> np.ndarray:
    """The colours of side x side patches, at their centres."""
    rows, columns = (((np.arange(side) + 0.5) / side * n).astype(int) for n in panel.shape[:2])
    return panel[np.ix_(rows, columns)]
