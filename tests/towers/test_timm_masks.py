# SPDX-License-Identifier: Apache-2.0
"""Masks and padding mean to a patched model what they mean to timm."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from families import randn, randomize
from timm_path import import_timm
from torch import Tensor

from spatial_pe.towers import patch

timm = import_timm()
from timm.models import eva  # noqa: E402
from timm.models.vision_transformer import (  # noqa: E402
    VisionTransformer,
)
from timm_cases import FLEX, HEADS, HEIGHT, IMAGES, WIDTH, distance, images  # noqa: E402

TOKENS = 1 + HEIGHT * WIDTH


def masks() -> dict[str, Tensor]:
    valid = torch.ones(2, TOKENS, dtype=torch.bool)
    valid[0, -4:] = False
    return {
        "keys": valid[:, None, None],
        "keys, added": torch.zeros(2, 1, 1, TOKENS).masked_fill(~valid[:, None, None], -torch.inf),
        "pairs": valid[:, None, :, None] & valid[:, None, None, :],
        "pairs and themselves": valid[:, None, :, None] & valid[:, None, None, :] | torch.eye(TOKENS, dtype=torch.bool),
        "causal": torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(),
        "bias": randn(TOKENS, TOKENS),
        "bias of a row": torch.zeros(1, TOKENS),
        "bias of each sample": randn(2, 1, TOKENS, TOKENS),
        "differs between heads": randn(2, HEADS, TOKENS, TOKENS) > -0.5,
    }


MASKED = {
    "vit": partial(VisionTransformer, **IMAGES, global_pool="avg"),
    "eva": partial(eva.Eva, **IMAGES, use_rot_pos_emb=True),
    "rope": partial(eva.Eva, **IMAGES, use_rot_pos_emb=True, attn_type="rope"),
}


@pytest.mark.parametrize(
    ("kind", "batch"), [(k, b) for k, m in masks().items() for b in (2, TOKENS) if b == 2 or m.ndim == 2]
)
@pytest.mark.parametrize(("name", "rope"), [*((name, None) for name in MASKED), ("vit", "axial")])
def test_masks_mean_what_they_mean_to_timm(name, rope, kind, batch):
    """Eva and VisionTransformer take a mask and know nothing of padding: they pool what attention returns for it.

    A mask of two dimensions is (queries, keys), also where a batch has as many samples as an image tokens.
    """
    mask = masks()[kind]
    torch.manual_seed(0)
    model = randomize(MASKED[name]()).eval()
    other, x = copy.deepcopy(model), images(batch=batch)["x"]
    patch(other, rope=rope)
    with torch.no_grad():
        expected, found = model(x, attn_mask=mask), other(x, attn_mask=mask)
        if kind != "bias of a row":
            assert distance(model(x), expected) > 1e-3  # the mask does something
    assert distance(found, expected) <= 1e-5


def test_causal_calls_are_timms_own(calls):
    for make in MASKED.values():
        torch.manual_seed(0)
        model = randomize(make()).eval()
        x = images()["x"]
        with torch.no_grad():
            expected = model(x, is_causal=True)
            patch(model)
            calls.clear()
            with pytest.warns(UserWarning, match="is_causal=True"):
                found = model(x, is_causal=True)
        assert torch.equal(found, expected) and not calls


def test_masks_of_a_naflex_model_that_are_not_padding(calls):
    """The caller's own attn_mask takes the place of the one that NaFlexVit makes."""
    case = FLEX["axial"]
    model, inputs = case.build(), case.inputs()
    mask = torch.ones(12, 12, dtype=torch.bool).tril().expand(3, 1, 12, 12)
    inputs = {**inputs, "attn_mask": torch.zeros(3, 1, 12, 12).masked_fill(~mask, torch.finfo(torch.float32).min)}
    with torch.no_grad():
        expected = case.outputs(model, inputs)
        patch(model)
        calls.clear()
        with pytest.warns(UserWarning, match="is not padding"):
            found = case.outputs(model, inputs)
    assert not calls and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
