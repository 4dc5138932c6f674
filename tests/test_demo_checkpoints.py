# SPDX-License-Identifier: Apache-2.0
"""A vision tower of any checkpoint: its features, sizes, copies, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from demo_parts import SMALL, aimv2, as_tower, clip, dinov3, pixtral, qwen, vit

from spatial_pe._utils.errors import UserError
from spatial_pe.lab.checkpoints import assets, checkpoint

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("make", "sizes", "side"),
    [
        (vit, [112, 256], 16),
        (dinov3, [112, 256], 16),
        (pixtral, [112, 256], 16),
        (aimv2, [56], 4),  # takes only its own size
        (qwen, [112, 252], 9),  # blocks of 28 pixels
    ],
)
def test_features_stay_where_their_patches_are(make, sizes, side):
    """A change of one corner of the image changes the features of that corner most."""
    torch.manual_seed(0)
    tower = as_tower(make())
    assert tower.sizes((112, 255)) == sizes
    size = sizes[-1]
    images = torch.rand(1, 3, size, size).expand(2, -1, -1, -1).clone()
    images[1, :, : size // side, -(size // side) :] = 0  # the upper right
    a, b = tower.patch_grid(tower.features(images), size)
    assert a.shape[:2] == (side, side)
    change = (a - b).norm(dim=-1)
    assert change.argmax() == side - 1


def test_a_copy_shares_the_weights_but_not_the_modules():
    tower = as_tower(vit())
    twin = tower.sharing_copy()
    assert [id(p) for p in twin.module.parameters()] == [id(p) for p in tower.module.parameters()]
    assert not set(map(id, twin.module.modules())) & set(map(id, tower.module.modules()))
    low = tower.copy(torch.bfloat16)
    assert {p.dtype for p in low.module.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in tower.module.parameters()} == {torch.float32}


def test_loads_the_tower_of_a_language_model_with_its_normalisation(tmp_path):
    clip().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]})
    )
    tower = checkpoint.load_tower(str(tmp_path))
    assert "CLIPVision" in type(tower.module).__name__
    assert (tower.patch_size, tower.image_size) == (16, 64)
    assert (tower.mean, tower.std) == ((0.1, 0.2, 0.3), (1, 2, 3))
    (tmp_path / "preprocessor_config.json").unlink()
    assert checkpoint.load_tower(str(tmp_path)).mean == assets.IMAGENET_MEAN


def test_a_model_without_a_tower_is_refused(tmp_path):
    transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=50)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"BertModel without a vision tower: it holds embeddings"):
        checkpoint.load_tower(str(tmp_path))


def test_a_tower_that_refuses_all_sizes_says_why():
    config = transformers.Siglip2VisionConfig(**SMALL)
    with pytest.raises(UserError, match="spatial_shapes"):
        as_tower(transformers.Siglip2VisionModel(config)).sizes((64,))
