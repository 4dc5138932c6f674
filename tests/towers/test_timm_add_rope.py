# SPDX-License-Identifier: Apache-2.0
"""RoPE added to timm's plain ViTs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from families import randn, randomize
from test_families import assert_error_rule, run
from timm_path import import_timm
from torch import Tensor, nn

from spatial_pe.towers import inspect, patch, unpatch

timm = import_timm()
from timm.layers import AttentionRope, PatchEmbed, RotaryEmbeddingCat  # noqa: E402
from timm.models.vision_transformer import (  # noqa: E402
    VisionTransformer,
)
from timm_cases import (  # noqa: E402
    ADDED,
    CASES,
    DIM,
    DTYPES,
    HEADS,
    HEIGHT,
    IMAGES,
    OWN_ROPE,
    PLAIN,
    WIDTH,
    Case,
    attentions,
    distance,
    images,
    shaken,
)


@pytest.mark.parametrize("rope", ["axial", "mixed"])
@pytest.mark.parametrize("name", ADDED)
def test_identity_start_is_exact_and_learns(name, rope, calls):
    case = CASES[name]
    plain, model, inputs = case.build(), case.build(), case.inputs()
    patch(plain, backend="composed")
    report = patch(model, rope=rope, backend="composed")
    assert [row.convention for row in report.patched] == [f"{rope} RoPE added, start=identity"] * case.layers
    calls.clear()
    expected, found = case.outputs(plain, inputs), case.outputs(model, inputs)
    assert len(calls) == 2 * case.layers
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    sum((x * randn(*x.shape, seed=7)).sum() for x in found).backward()
    added = list(report.parameters())
    assert len(added) == case.layers and all(p.grad is not None and p.grad.abs().max() > 0 for p in added)
    optimizer = torch.optim.SGD(added, lr=1e-2)
    optimizer.step()
    moved = case.outputs(model, inputs)
    assert distance(moved[0], found[0]) > 1e-4


Frequencies = Callable[[int], Tensor]  # of a layer: (2, heads or 1, D/2), radians per row and per column


def turn_by_hand(
    model: nn.Module,
    case: Case,
    frequencies: Frequencies,
    half: bool,
    sides: tuple[int, int] = (HEIGHT, WIDTH),
    places: Tensor | None = None,
) -> nn.Module:
    """The unpatched model, q and k of its patches rotated by row and column, written out here with complex numbers.

    places: (B, N, 2), of a padded batch.
    """
    if places is None:
        places = torch.cartesian_prod(*map(torch.arange, sides))[None]
    rows, columns = places.unbind(-1)

    def rotated(x: Tensor, layer: int) -> Tensor:
        """(B, N, H, D)"""
        wide = torch.promote_types(x.dtype, torch.float32)
        row, column = frequencies(layer).to(wide)
        angles = rows[..., None, None] * row + columns[..., None, None] * column
        angles = torch.cat([angles.new_zeros(len(angles), case.prefix, *angles.shape[2:]), angles], dim=1)
        first, second = x.to(wide).chunk(2, dim=-1) if half else (x.to(wide)[..., i::2] for i in (0, 1))
        pairs = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
        parts = (pairs.real, pairs.imag)
        return (torch.cat(parts, dim=-1) if half else torch.stack(parts, dim=-1).flatten(-2)).to(x.dtype)

    def after_projection(module: nn.Module, args: Any, output: Tensor, layer: int) -> Tensor:
        q, k, v = output.unflatten(-1, (3, HEADS, DIM)).unbind(2)
        return torch.stack([rotated(q, layer), rotated(k, layer), v], dim=2).flatten(2)

    def after_norm(module: nn.Module, args: Any, output: Tensor, layer: int) -> Tensor:
        return rotated(output.transpose(1, 2), layer).transpose(1, 2)  # (B, H, N, D)

    for layer, module in enumerate(attentions(model, case)):
        if isinstance(module.q_norm, nn.Identity):
            module.qkv.register_forward_hook(partial(after_projection, layer=layer))
        else:
            for norm in (module.q_norm, module.k_norm):
                norm.register_forward_hook(partial(after_norm, layer=layer))
    return model


def ladder(layer: int) -> Tensor:
    """Axial: the first D/4 pairs rotate with the row, the others with the column."""
    powers = 10000.0 ** (-torch.arange(DIM // 4) / (DIM // 4))
    none = torch.zeros_like(powers)
    return torch.stack([torch.cat([powers, none]), torch.cat([none, powers])])[:, None]


@pytest.mark.parametrize("rope", ["axial", "mixed", "mixed, shaken"])
@pytest.mark.parametrize("name", ADDED)
def test_full_start_is_the_rotation_written_by_hand(name, rope):
    case = CASES[name]
    model, inputs = case.build(), case.inputs()
    report = patch(model, rope=rope[:5], start="full")
    if "shaken" in rope:
        shaken(model, case)
    layers = attentions(model, case)
    assert len(list(report.parameters())) == (0 if rope == "axial" else case.layers)

    def learned(layer: int) -> Tensor:
        return layers[layer].rope.frequencies.detach()

    hand = turn_by_hand(
        case.build(), case, ladder if rope == "axial" else learned, rope == "axial", places=inputs.get("patch_coord")
    )
    with torch.no_grad():
        ours, expected, without = (case.outputs(m, inputs) for m in (model, hand, case.build()))
    assert distance(ours[0], without[0]) > 1e-2
    for a, b in zip(ours, expected, strict=True):
        assert distance(a, b) <= 1e-5


@DTYPES
@pytest.mark.parametrize("name", ["vit, norms", "dinov2, registers", "vit, parallel"])
def test_gradients_of_an_added_rope_follow_the_error_rule(name, dtype, calls):
    """Those of its frequencies included, against the unpatched model rotated by hand with the same ones."""
    case = PLAIN[name]
    inputs = case.inputs()
    model = case.build()
    patch(model, rope="mixed", start="full")
    frequencies = [m.rope.frequencies.detach().clone() for m in attentions(model, case)]

    def by_hand(precision: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
        own = [f.to(precision).requires_grad_() for f in frequencies]
        hand = turn_by_hand(case.build().to(precision), case, lambda layer: own[layer], half=False)
        names = [key for key, m in hand.named_modules() if type(m).__name__ == case.attention]
        found, gradients = run(hand, case, inputs, precision)
        return found, gradients | {f"{key}.rope.frequencies": f.grad for key, f in zip(names, own, strict=True)}

    exact, theirs = by_hand(torch.float64), by_hand(dtype)
    calls.clear()
    ours = run(model.to(dtype), case, inputs, dtype)
    assert len(calls) == case.layers and ours[1].keys() == exact[1].keys()
    for i, triple in enumerate(zip(ours[0], theirs[0], exact[0], strict=True)):
        assert_error_rule(*triple, dtype, f"output {i}")
    everything = torch.stack([g.norm() for g in exact[1].values()]).norm()
    for key, gradient in exact[1].items():
        added = key.endswith("frequencies")
        assert not added or gradient.norm() > 1e-2 * everything
        floor = 0.0 if added else 0.03 * everything
        assert_error_rule(ours[1][key], theirs[1][key], gradient, dtype, f"gradient of {key}", floor)


SIDES = [(HEIGHT, WIDTH), (2, 6), (5, 2), (1, 1)]


@pytest.mark.parametrize("options", [{}, {"no_embed_class": True, "reg_tokens": 2}, {"dynamic_img_pad": True}])
def test_an_added_rope_at_any_size(options):
    """(3, 4) and (2, 6) have as many patches: the grid is the one of this forward."""
    make = partial(VisionTransformer, **IMAGES, dynamic_img_size=True)
    case = Case(make, "Attention", 1 + options.get("reg_tokens", 0))
    model, other = case.build(**options), case.build(**options)
    patch(model, rope="axial", start="full")
    for height, width in SIDES:
        less = 3 if "dynamic_img_pad" in options else 0  # pixels short of the last patch
        x = randn(2, 3, 8 * height - less, 8 * width - less)
        hand = turn_by_hand(copy.deepcopy(other), case, ladder, half=True, sides=(height, width))
        with torch.no_grad():
            expected = hand(x)
            assert distance(model(x), expected) <= 1e-5


@pytest.mark.parametrize("name", PLAIN)
def test_without_the_absolute_position_embedding(name):
    case = PLAIN[name]
    model, inputs = case.build(), case.inputs()
    keys = [key for key, _ in model.named_parameters() if key.endswith("pos_embed")]
    if not keys:
        with pytest.raises(ValueError, match="has no absolute position embedding"):
            patch(model, rope="axial", keep_absolute=False)
        return
    before = case.outputs(model, inputs)
    patch(model, rope="axial", start="full", keep_absolute=False)
    assert not any(model.get_parameter(key).any() or model.get_parameter(key).requires_grad for key in keys)
    hand = case.build()
    for key in keys:
        hand.get_parameter(key).data.zero_()
    turn_by_hand(hand, case, ladder, half=True)
    for a, b in zip(case.outputs(model, inputs), case.outputs(hand, inputs), strict=True):
        assert distance(a, b) <= 1e-5
    unpatch(model)
    assert all(torch.equal(a, b) for a, b in zip(before, case.outputs(model, inputs), strict=True))


def test_without_a_factorized_position_embedding():
    case = PLAIN["naflex, convolution"]
    model = case.build(pos_embed="factorized")
    patch(model, rope="axial", keep_absolute=False)
    assert not model.embeds.pos_embed_y.any() and not model.embeds.pos_embed_x.any()


@pytest.mark.parametrize("name", ["eva_giant, no rope", "eva02_enormous, post-norm, no rope"])
def test_a_rope_is_added_to_an_eva_without_one(name, calls):
    case = OWN_ROPE[name]
    assert {row.convention for row in inspect(case.build()).patched} == {"no RoPE"}
    plain, model, inputs = case.build(), case.build(), case.inputs()
    patch(plain, backend="composed")
    report = patch(model, rope="axial", backend="composed")
    assert len(report.patched) == len(list(report.parameters())) == case.layers
    for a, b in zip(case.outputs(model, inputs), case.outputs(plain, inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("dinov3", "2 EvaAttention: has RoPE already"),
        ("rope-vit mixed", "2 AttentionRope: has RoPE already"),
    ],
)
def test_a_rope_that_cannot_be_added_is_refused_and_nothing_changed(name, reason):
    model = CASES[name].build()
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=reason):
        patch(model, rope="axial")
    assert [type(m) for m in model.modules()] == classes


def test_naflex_with_a_linear_embedding_also_takes_images():
    """Then it makes the patches itself, and tells their grid."""
    case = CASES["naflex, plain, learned"]
    plain, model, pixels = case.build(), case.build(), images()["x"]
    patch(model, rope="axial", start="full")
    hand = turn_by_hand(plain, case, ladder, half=True)
    with torch.no_grad():
        assert distance(model.forward_features(pixels), hand.forward_features(pixels)) <= 1e-5
        model(**case.inputs())  # a padded batch between
        assert distance(model(pixels), hand(pixels)) <= 1e-5
    layer = attentions(model, case)[0]
    with pytest.raises(ValueError, match=r"the patch grid of this forward is not of 7 patches \(it is 3 x 4\)"):
        layer(randn(2, 7, HEADS * DIM))


def test_no_rope_is_added_to_a_tower_that_keeps_its_own_under_another_name():
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embed, self.rotary = PatchEmbed(32, 8, 3, 32), RotaryEmbeddingCat(16, feat_shape=[4, 4])
            self.attn = AttentionRope(32, num_heads=2, num_prefix_tokens=0)

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(self.patch_embed(x), rope=self.rotary.get_embed())

    model, x = randomize(Tower()), images(4, 4)["x"]
    before = model(x)
    with pytest.raises(ValueError, match="has RoPE already"):
        patch(model, rope="axial")
    assert {row.convention for row in patch(model).patched} == {"own RoPE (interleaved)"}
    assert distance(model(x), before) <= 1e-5


def test_dropped_patches_are_not_rotated_as_if_they_were_a_grid():
    """PatchDropout leaves some patches, which have no grid; half of 3 x 4 are as many as the whole of 2 x 3."""
    case = PLAIN["vit"]
    model = case.build(patch_drop_rate=0.5, dynamic_img_size=True)
    patch(model, rope="axial", start="full")
    with torch.no_grad():
        model(images()["x"])  # in eval mode none are dropped
        with pytest.raises(ValueError, match="RoPE needs every patch of the image"):
            model.train()(images()["x"])
        model.eval()(images(2, 3)["x"])
        with pytest.raises(ValueError, match="RoPE needs every patch of the image"):
            model.train()(images()["x"])
