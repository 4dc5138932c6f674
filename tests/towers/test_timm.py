# SPDX-License-Identifier: Apache-2.0
"""timm's models, patched against unpatched: every kind of attention, RoPE added to plain ViTs, NaFlex and its padding,
the calls that fall back, and timm inside transformers."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from families import outputs, randn, randomize, to
from test_families import assert_error_rule, run
from timm_path import import_timm
from torch import Tensor, nn

from spatial_pe.towers import from_pretrained, inspect, patch, unpatch
from spatial_pe.towers.forms import TESTED
from spatial_pe.towers.fused_attention import FusedAttention

timm = import_timm()

from timm.layers import AttentionRope, DiffAttention, PatchEmbed, RotaryEmbeddingCat  # noqa: E402
from timm.models import eva, naflexvit  # noqa: E402
from timm.models.vision_transformer import (  # noqa: E402
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
HEADS, DIM = 2, 16  # heads, and channels of each
SMALL: dict[str, Any] = {"patch_size": 8, "embed_dim": HEADS * DIM, "depth": 2, "num_heads": HEADS}
HEIGHT, WIDTH = 3, 4  # patches of an image
IMAGES: dict[str, Any] = {**SMALL, "img_size": (8 * HEIGHT, 8 * WIDTH), "num_classes": 5}


def images(height: int = HEIGHT, width: int = WIDTH, batch: int = 2) -> dict[str, Any]:
    return {"x": randn(batch, 3, 8 * height, 8 * width)}


@dataclass(frozen=True)
class Case:
    """One timm model. ``prefix``: tokens before the patches; ``valid(inputs)``: which tokens are compared."""

    make: Callable[..., nn.Module]
    attention: str
    prefix: int = 1
    layers: int = 2
    inputs: Callable[[], dict[str, Any]] = images
    valid: Callable[[dict[str, Any]], Tensor] | None = None

    def build(self, **options: Any) -> nn.Module:
        torch.manual_seed(0)
        return randomize(self.make(**options)).eval()

    def outputs(self, model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
        """The tokens of the last layer, and what the head makes of them."""
        (x, *_), rest = inputs.values(), {k: v for k, v in inputs.items() if k != "x"}
        features = model.forward_features(x, **rest)
        if isinstance(features, dict):
            tokens, pooled = features["patches"], model.forward_head(**features)
        else:
            tokens, pooled = features, model.forward_head(features)
        return [tokens[self.valid(inputs)] if self.valid else tokens, pooled]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def named(name: str, **options: Any) -> Callable[..., nn.Module]:
    return partial(timm.create_model, name, **{**IMAGES, **options})


def grouped(**options: Any) -> nn.Module:
    """Sapiens 2: grouped keys and values in the middle layer only."""
    args = eva._sapiens2_args(embed_dim=64, depth=3, num_heads=4, num_kv_heads=2, num_full_attn_blocks=1)
    return eva.Eva(**{**args, "img_size": IMAGES["img_size"], "patch_size": 8, "num_classes": 5, **options})


def bias_beside(**options: Any) -> nn.Module:
    model = named("eva02_tiny_patch14_224", scale_attn_inner=True)(**options)
    for block in model.blocks:
        block.attn.qkv_bias_separate = True
    return model


def gated(attention: str, **flex: Any) -> Callable[..., nn.Module]:
    return partial(
        naflexvit.NaFlexVit, **IMAGES, class_token=True, pos_embed="none", rope_type="axial", global_pool="avg",
        attn_type=attention, attn_gated=True, embed_proj_type="conv", **flex,
    )  # fmt: skip


OWN_ROPE = {
    # EvaAttention: fused qkv with biases of q and v beside it, or three projections
    "eva_giant, no rope": Case(named("eva_giant_patch14_224"), "EvaAttention"),
    "eva02_tiny": Case(named("eva02_tiny_patch14_224"), "EvaAttention"),
    "eva02_base, separate q k v": Case(named("eva02_base_patch14_224"), "EvaAttention"),
    "eva02_clip, scale norm": Case(named("eva02_base_patch16_clip_224"), "EvaAttention"),
    "eva02_enormous, post-norm, no rope": Case(named("eva02_enormous_patch14_clip_224"), "EvaAttention"),
    "eva02, qkv_bias_separate": Case(bias_beside, "EvaAttention"),
    "eva, no bias": Case(named("vit_mediumd_patch16_rope_reg1_gap_256"), "EvaAttention"),
    "eva, qk_norm": Case(named("eva02_base_patch14_224", qk_norm=True), "EvaAttention"),
    "eva, gated": Case(gated("eva", qk_norm=True), "EvaAttention"),
    "sbb, registers": Case(named("vit_medium_patch16_rope_reg1_gap_256"), "EvaAttention"),
    # rotate_half
    "dinov3": Case(named("vit_small_patch16_dinov3"), "EvaAttention", 5),
    "dinov3, biases": Case(named("vit_small_patch16_dinov3_qkvb"), "EvaAttention", 5),
    "dinov3 7B, swiglu": Case(named("vit_7b_patch16_dinov3"), "EvaAttention", 5),
    "mrope": Case(named("eva02_tiny_patch14_224", rope_type="mrope", rope_mrope_section=(2, 3, 3)), "EvaAttention"),
    # AttentionRope
    "pe_core": Case(named("vit_pe_core_tiny_patch16_384"), "AttentionRope"),
    "pe_core, no cls": Case(named("vit_pe_core_gigantic_patch14_448"), "AttentionRope", 0),
    "pe_lang": Case(named("vit_pe_lang_large_patch14_448"), "AttentionRope"),
    "pe_spatial": Case(named("vit_pe_spatial_tiny_patch16_512"), "AttentionRope"),
    "rope-vit axial": Case(named("vit_small_patch16_rope_224"), "AttentionRope"),
    "rope-vit mixed": Case(named("vit_small_patch16_rope_mixed_224"), "AttentionRope"),
    "rope-vit mixed ape": Case(named("vit_small_patch16_rope_mixed_ape_224", num_reg_tokens=2), "AttentionRope", 3),
    "rope, separate q k v, norms": Case(
        named("vit_small_patch16_rope_224", qk_norm=True, scale_attn_inner=True, qkv_fused=False), "AttentionRope"
    ),
    "rope, gated": Case(gated("rope", qk_norm=True, scale_attn_inner_norm=True), "AttentionRope"),
    "rope, grouped": Case(gated("rope", qkv_fused=False, num_kv_heads=1, reg_tokens=1), "AttentionRope", 2),
    "sapiens2": Case(grouped, "AttentionRope", 9, layers=3),
    "qwen3_vit": Case(
        named("qwen3_vit_88m"), "AttentionRope", 0, inputs=partial(images, 4, 6)
    ),
    "deepseek_vit": Case(named("deepseek_vit_412m"), "AttentionRope", 0),
}  # fmt: skip
PLAIN = {
    "vit": Case(named("vit_tiny_patch16_224"), "Attention"),
    "dinov2, registers": Case(named("vit_small_patch14_reg4_dinov2"), "Attention", 5),
    "clip": Case(named("vit_base_patch16_clip_224"), "Attention"),
    "siglip": Case(named("vit_base_patch16_siglip_224"), "Attention", 0),
    "deit, distilled": Case(named("deit_tiny_distilled_patch16_224"), "Attention", 2),
    "vit, norms": Case(partial(VisionTransformer, **IMAGES, qk_norm=True, scale_attn_norm=True), "Attention"),
    "vit, post-norm": Case(partial(VisionTransformer, **IMAGES, block_fn=ResPostBlock, init_values=1.0), "Attention"),
    "vit, parallel": Case(
        partial(VisionTransformer, **IMAGES, block_fn=ParallelThingsBlock, no_embed_class=True), "Attention", layers=4
    ),
    "vit, registers, no cls": Case(
        partial(VisionTransformer, **IMAGES, class_token=False, reg_tokens=3, global_pool="avg", pos_embed="none"),
        "Attention", 3,
    ),
    "naflex, convolution": Case(
        partial(naflexvit.NaFlexVit, **IMAGES, class_token=True, reg_tokens=1, embed_proj_type="conv",
                global_pool="avg", pos_embed_grid_size=(4, 4)),
        "Attention", 2,
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------- NaFlex and its padding

GRIDS = [(HEIGHT, WIDTH), (2, 3), (1, 5)]  # of three images, padded to 12 patches


def padded(scattered: bool = False) -> dict[str, Any]:
    """What NaFlexVit takes: flattened patches, their rows and columns, which exist. Padding is noise, not zeros."""
    most = max(h * w for h, w in GRIDS)
    coord, valid = torch.zeros(len(GRIDS), most, 2, dtype=torch.long), torch.zeros(len(GRIDS), most, dtype=torch.bool)
    for i, (h, w) in enumerate(GRIDS):
        coord[i, : h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w))
        valid[i, : h * w] = True
    if scattered:
        valid[0, 1:9:3] = False
    return {"x": randn(len(GRIDS), most, 3 * 64), "patch_coord": coord, "patch_valid": valid}


def flex(attention: str, prefix: int = 0, scattered: bool = False, **options: Any) -> Case:
    def valid(inputs: dict[str, Any]) -> Tensor:
        found = inputs["patch_valid"]
        return torch.cat([found.new_ones(len(found), prefix), found], dim=1)

    tokens = {"class_token": prefix > 0, "reg_tokens": max(prefix - 1, 0)}
    chosen = {"pos_embed": "none", "global_pool": "avg", **SMALL, **tokens, **options}
    make = partial(naflexvit.NaFlexVit, **chosen, num_classes=5, embed_proj_type="linear")
    return Case(make, attention, prefix, inputs=partial(padded, scattered), valid=valid)


FLEX = {
    "plain, learned": flex("Attention", pos_embed="learned", pos_embed_grid_size=(4, 4), global_pool="map"),
    "plain, factorized, tokens": flex("Attention", 2, pos_embed="factorized", pos_embed_grid_size=(4, 4)),
    "plain, key mask": flex("Attention", 1, use_key_only_attn_mask=True, global_pool="token"),
    "axial": flex("AttentionRope", rope_type="axial"),
    "axial, tokens": flex("AttentionRope", 3, rope_type="axial", rope_ref_feat_shape=(4, 4), qk_norm=True),
    "axial, eva": flex("EvaAttention", 1, rope_type="axial", attn_type="eva", global_pool="token"),
    "axial, key mask": flex("AttentionRope", 1, rope_type="axial", use_key_only_attn_mask=True),
    "axial, scattered": flex("AttentionRope", 1, scattered=True, rope_type="axial"),
    "dinov3": flex("EvaAttention", 2, rope_type="dinov3", rope_rotate_half=True, attn_type="eva"),
    "mrope, gated": flex("AttentionRope", 1, rope_type="mrope", rope_mrope_section=(2, 3, 3), attn_gated=True),
    "mixed": flex("AttentionRope", rope_type="mixed"),
    "mixed, tokens": flex("AttentionRope", 2, rope_type="mixed", global_pool="token"),
    "mixed, scattered": flex("AttentionRope", 1, scattered=True, rope_type="mixed"),
    "grouped": flex("AttentionRope", rope_type="axial", num_kv_heads=(1, 2), qkv_fused=False),
}
CASES = {**OWN_ROPE, **PLAIN, **{f"naflex, {name}": case for name, case in FLEX.items()}}
ADDED = [*PLAIN, *(f"naflex, {name}" for name in FLEX if name.startswith("plain"))]  # to which RoPE can be added


# ------------------------------------------------------------------------------------ outputs and gradients, all models


def attentions(model: nn.Module, case: Case) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__ in (case.attention, f"Patched{case.attention}")]


@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_follow_the_error_rule(name, dtype, calls):
    case = CASES[name]
    inputs = case.inputs()
    exact, exact_grads = run(case.build().double(), case, inputs, torch.float64)
    model = case.build().to(dtype)
    assert model.num_prefix_tokens == case.prefix
    theirs, their_grads = run(model, case, inputs, dtype)
    report = patch(model)
    calls.clear()  # those of the proof
    assert [row.attention for row in report.patched] == [case.attention] * case.layers
    assert all(row.error is not None for row in report.patched)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours, our_grads = run(model, case, inputs, dtype)
    assert len(calls) == case.layers
    for i, triple in enumerate(zip(ours, theirs, exact, strict=True)):
        assert_error_rule(*triple, dtype, f"output {i}")
    assert our_grads.keys() == exact_grads.keys() and len(our_grads) > 5 * case.layers
    everything = torch.stack([g.norm() for g in exact_grads.values()]).norm()
    for key, gradient in exact_grads.items():
        learned = key == "rope.freqs"
        assert not learned or gradient.norm() > 1e-2 * everything
        assert_error_rule(
            our_grads[key], their_grads[key], gradient, dtype, key, floor=0.0 if learned else 0.03 * everything
        )


def test_the_table_of_tested_classes_is_what_is_run():
    found = set()
    for case in CASES.values():
        model = case.build()
        patch(model, verify=False)
        originals = [m.original for m in model.modules() if isinstance(m, FusedAttention)]
        assert len(originals) == case.layers
        found |= {f"{cls.__module__}.{cls.__qualname__}" for cls in originals}
    assert found == {path for path in TESTED if path.startswith("timm.")}


@pytest.mark.parametrize("name", CASES)
def test_in_float64_nothing_is_left_but_what_timm_computes_in_float32(name):
    """Some tables and norms."""
    case = CASES[name]
    model = case.build().double()
    theirs, their_grads = run(model, case, case.inputs(), torch.float64)
    patch(model, backend="reference")
    ours, our_grads = run(model, case, case.inputs(), torch.float64)
    everything = torch.stack([g.norm() for g in their_grads.values()]).norm()
    for a, b in zip(ours, theirs, strict=True):
        assert distance(a, b) <= 1e-6
    for key, gradient in their_grads.items():
        assert (our_grads[key] - gradient).norm() <= 1e-6 * everything, key


@pytest.mark.parametrize("name", CASES)
def test_unpatched_is_what_it_was_bit_for_bit(name):
    case = CASES[name]
    model, inputs = case.build(), case.inputs()
    classes = [type(m) for m in model.modules()]
    with torch.no_grad():
        before = case.outputs(model, inputs)
        rope = None if name not in PLAIN else "mixed"
        patch(model, rope=rope)
        case.outputs(model, inputs)
        unpatch(model)
        after = case.outputs(model, inputs)
    assert [type(m) for m in model.modules()] == classes
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any("_spatial_pe" in str(key) for m in model.modules() for key in m.__dict__)
    assert not any("spatial_pe" in type(hook).__module__ for m in model.modules() for hook in m._forward_hooks.values())


@pytest.mark.parametrize(
    ("name", "convention"),
    [
        ("eva02_tiny", "own RoPE (interleaved)"),
        ("dinov3", "own RoPE (half)"),
        ("mrope", "own RoPE (half)"),
        ("pe_core", "own RoPE (interleaved)"),
        ("qwen3_vit", "own RoPE (half)"),
        ("naflex, dinov3", "own RoPE (half)"),
        ("vit", "no RoPE"),
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_the_pairing_is_the_modules_own_also_where_nothing_is_proven(name, convention, verify):
    case = CASES[name]
    model, inputs = case.build(), case.inputs()
    with torch.no_grad():
        before = case.outputs(model, inputs)
        report = patch(model, verify=verify)
        after = case.outputs(model, inputs)
    assert {row.convention for row in report.patched} == {convention}
    assert all((row.error is None) != verify for row in report.patched)
    for a, b in zip(after, before, strict=True):
        assert distance(a, b) <= 1e-5


def test_two_towers_that_differ_in_nothing_but_the_pairing():
    towers = [OWN_ROPE["eva02_tiny"].build(rope_rotate_half=half) for half in (False, True)]
    x = images()["x"]
    with torch.no_grad():
        before = [tower(x) for tower in towers]
        report = patch(nn.ModuleList(towers))
        after = [tower(x) for tower in towers]
    assert [row.convention for row in report.patched] == ["own RoPE (interleaved)"] * 2 + ["own RoPE (half)"] * 2
    for a, b in zip(after, before, strict=True):
        assert distance(a, b) <= 1e-5


@pytest.mark.parametrize("name", ["dinov3", "rope-vit axial", "eva02_tiny", "naflex, axial"])
def test_the_rotation_is_made_once_and_the_fused_projection_read_in_place(name, calls):
    case = CASES[name]
    model = case.build()
    patch(model)
    calls.clear()
    with torch.no_grad():
        case.outputs(model, case.inputs())
    assert len({id(args[3]) for args, _ in calls}) == 1 and calls[0][0][3] is not None
    for (q, k, v, _), _ in calls:
        assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()


def test_padding_reaches_the_kernel_as_lengths(calls):
    for name, key in (("axial", "seqlens"), ("axial, scattered", "cu_seqlens")):
        case = FLEX[name]
        model = case.build()
        patch(model)
        calls.clear()
        case.outputs(model, case.inputs())
        expected = [12, 6, 5] if key == "seqlens" else [0, 10, 17, 23]
        assert [kwargs[key].tolist() for _, kwargs in calls] == [expected] * 2


@pytest.mark.parametrize("name", ["eva02_tiny", "rope-vit mixed", "dinov3"])
def test_another_resolution_after_patching(name, calls):
    """set_input_size makes new tables; a dynamic size makes them in every forward."""
    case = OWN_ROPE[name]
    models = [case.build(), case.build()]
    patch(models[1])
    for side in ((2, 5), (4, 1), (HEIGHT, WIDTH)):
        x = images(*side)["x"]
        found = []
        for model in models:
            if name != "dinov3":
                model.set_input_size((8 * side[0], 8 * side[1]))
            with torch.no_grad():
                found.append(model(x))
        assert distance(found[1], found[0]) <= 1e-5


def test_calls_of_the_attention_alone(calls):
    """With no rope, with one, with one per head and per sample: rows of the rope are the last tokens."""
    for name in ("eva02_tiny", "rope-vit mixed", "dinov3"):
        case = OWN_ROPE[name]
        model = case.build()
        own = attentions(copy.deepcopy(model), case)[0]
        patch(model)
        fused = attentions(model, case)[0]
        tokens = own.num_prefix_tokens + 6
        x, angles = randn(2, tokens, HEADS * DIM), randn(2, HEADS, 6, DIM // 2, seed=4)
        double = angles.repeat(1, 1, 1, 2) if own.rotate_half else angles.repeat_interleave(2, dim=-1)
        rope = torch.cat([double.sin(), double.cos()], dim=-1)
        calls.clear()
        forms = [None, rope[0, 0], rope[0, :1], rope[0], rope[:, :1], rope]
        for given in forms:
            expected = own(x, rope=given)
            for found in (fused(x, rope=given), fused(x, given)):
                assert distance(found, expected) <= 1e-5
        assert len(calls) == 2 * len(forms) and not torch.allclose(fused(x), fused(x, rope))


# ---------------------------------------------------------------------------------------------------------- added RoPE


def shaken(model: nn.Module, case: Case) -> nn.Module:
    """Its encodings moved away from where they started."""
    for i, module in enumerate(attentions(model, case)):
        for parameter in module.rope.parameters():
            parameter.data.copy_(0.3 * randn(*parameter.shape, seed=20 + i))
    return model


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
    """The unpatched model, q and k of its patches turned by row and column, written out here with complex numbers.

    places: (B, N, 2), of a padded batch.
    """
    if places is None:
        places = torch.cartesian_prod(*map(torch.arange, sides))[None]
    rows, columns = places.unbind(-1)

    def turned(x: Tensor, layer: int) -> Tensor:
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
        return torch.stack([turned(q, layer), turned(k, layer), v], dim=2).flatten(2)

    def after_norm(module: nn.Module, args: Any, output: Tensor, layer: int) -> Tensor:
        return turned(output.transpose(1, 2), layer).transpose(1, 2)  # (B, H, N, D)

    for layer, module in enumerate(attentions(model, case)):
        if isinstance(module.q_norm, nn.Identity):
            module.qkv.register_forward_hook(partial(after_projection, layer=layer))
        else:
            for norm in (module.q_norm, module.k_norm):
                norm.register_forward_hook(partial(after_norm, layer=layer))
    return model


def ladder(layer: int) -> Tensor:
    """Axial: the first D/4 pairs turn with the row, the others with the column."""
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
    """Those of its frequencies included, against the unpatched model turned by hand with the same ones."""
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
        ("dinov3", "2 EvaAttention: has RoPE of its own"),
        ("rope-vit mixed", "2 AttentionRope: has RoPE of its own"),
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
    with pytest.raises(ValueError, match="has RoPE of its own"):
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


# -------------------------------------------------------------------------------------------------------------- masks

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


# ----------------------------------------------------------------------------------------------------------- training


def trained(model: nn.Module, x: Tensor, seed: int = 5) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    found = model(x)
    (found * randn(*found.shape, seed=6)).sum().backward()
    return found.detach(), {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


RATES: dict[str, Any] = {"drop_rate": 0.2, "pos_drop_rate": 0.2, "proj_drop_rate": 0.3, "drop_path_rate": 0.3}
AUGMENTED: dict[str, Any] = {"rope_shift_coords": 0.5, "rope_jitter_coords": 1.5, "rope_rescale_coords": 2.0}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit", {}),
        ("vit", {"patch_drop_rate": 0.4}),
        ("eva02_clip, scale norm", {"patch_drop_rate": 0.4}),
        ("dinov3", {"patch_drop_rate": 0.4, **AUGMENTED}),
        ("rope-vit axial", AUGMENTED),
        ("rope-vit mixed", {"patch_drop_rate": 0.4, **AUGMENTED}),
    ],
)
def test_training_drops_what_it_drops_unpatched(name, options, calls):
    """The same seed, the same dropout after the projection, the same patches, paths and coordinates."""
    case = CASES[name]
    model = case.build(**RATES, **options).train()
    x = images()["x"]
    expected, other = trained(model, x), trained(model, x, seed=6)
    assert distance(other[0], expected[0]) > 1e-2
    patch(model)
    assert model.training
    calls.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = trained(model, x)
    assert len(calls) == case.layers
    assert distance(found[0], expected[0]) <= 1e-5
    everything = torch.stack([g.norm() for g in expected[1].values()]).norm()
    for key, gradient in expected[1].items():
        assert (found[1][key] - gradient).norm() <= 1e-5 * everything, key


@pytest.mark.parametrize("name", ["vit", "eva02_tiny", "dinov3", "rope-vit mixed"])
def test_attention_dropout_in_training_is_timms_own(name, calls):
    case = CASES[name]
    model, x = case.build(attn_drop_rate=0.4).train(), images()["x"]
    expected = trained(model, x)
    patch(model)
    calls.clear()
    with pytest.warns(UserWarning, match="attention dropout is active"):
        found = trained(model, x)
    assert not calls and torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][key], gradient) for key, gradient in expected[1].items())
    with torch.no_grad():
        model.eval()(x)
    assert len(calls) == case.layers


def test_attention_dropout_keeps_an_added_rope():
    """The model's own forward would leave the rotation out; drop none of the weights and only the rotation is left."""
    case = PLAIN["vit"]
    model, x = case.build(attn_drop_rate=1e-9), images()["x"]
    patch(model, rope="mixed", start="full")
    with torch.no_grad():
        expected = model(x)
        with pytest.warns(UserWarning, match="attention dropout is active"):
            found = model.train()(x)
    assert distance(found, expected) <= 1e-5


@pytest.mark.parametrize(
    ("name", "rope"),
    [("dinov3", None), ("rope-vit mixed", None), ("vit", None), ("vit", "axial"), ("vit", "mixed")],
)
def test_gradient_checkpointing(name, rope, calls):
    case = CASES[name]
    model, x = case.build().train(), images()["x"]
    patch(model, rope=rope, start="full")
    if rope:
        shaken(model, case)
    expected = trained(model, x)
    model.set_grad_checkpointing()
    calls.clear()
    found = trained(model, x)
    assert len(calls) == 2 * case.layers  # once more in backward
    assert torch.equal(found[0], expected[0]) and found[1].keys() == expected[1].keys()
    assert all(torch.equal(found[1][key], gradient) for key, gradient in expected[1].items())


@pytest.mark.parametrize("name", ["naflex, axial, tokens", "naflex, mixed"])
def test_gradient_checkpointing_of_padded_batches(name, calls):
    case = CASES[name]
    model = case.build()
    patch(model)
    expected = run(model, case, case.inputs(), torch.float32)
    model.set_grad_checkpointing()
    calls.clear()
    found = run(model, case, case.inputs(), torch.float32)
    assert len(calls) == 2 * case.layers
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))
    assert all(torch.equal(found[1][key], gradient) for key, gradient in expected[1].items())


@pytest.mark.parametrize(
    "name",
    ["vit", "vit, norms", "eva02_tiny", "eva02, qkv_bias_separate", "eva, qk_norm", "pe_core", "rope-vit mixed"],
)
def test_autocast(name, calls):
    """Attention runs in bfloat16, as timm's does: no tensor of its own precision is made on the way."""
    case = CASES[name]
    inputs = case.inputs()
    with torch.no_grad():
        exact = case.outputs(case.build().double(), to(inputs, torch.float64))
        model = case.build()
        with torch.autocast("cpu", torch.bfloat16):
            theirs = case.outputs(model, inputs)
            patch(model)
            calls.clear()
            ours = case.outputs(model, inputs)
    assert len(calls) == case.layers
    assert {args[2].dtype for args, _ in calls} == {torch.bfloat16}  # v, as it comes from the projection
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        assert_error_rule(a.double(), b.double(), c, torch.bfloat16, "output")


# ------------------------------------------------------------------------------------------------- copies and compiling

COPIED = [
    ("eva02_tiny", None),
    ("rope-vit mixed", None),
    ("naflex, axial, tokens", None),
    ("vit", "axial"),
    ("vit", "mixed"),
]


@pytest.mark.parametrize(("name", "rope"), COPIED)
@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_compute_the_same_and_share_nothing(name, rope, way, calls):
    case = CASES[name]
    model, inputs = case.build(), case.inputs()
    patch(model, rope=rope, start="full")
    with torch.no_grad():
        expected = case.outputs(model, inputs)
        again = way(model)
        for parameter in model.parameters():
            parameter.zero_()
        calls.clear()
        found = case.outputs(again, inputs)
    assert len(calls) == case.layers
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    unpatch(again)
    with torch.no_grad():
        plain = case.outputs(case.build(), inputs)
        assert all(torch.equal(a, b) for a, b in zip(case.outputs(again, inputs), plain, strict=True))


@pytest.mark.parametrize(
    ("name", "rope"), [("eva02_tiny", None), ("rope-vit mixed", None), ("vit, norms", None), ("vit", "mixed")]
)
def test_compiles_without_a_graph_break(name, rope):
    case = CASES[name]
    model, x = case.build(), images()["x"]
    patch(model, rope=rope, start="full")
    expected = trained(model, x)
    torch._dynamo.reset()
    found = trained(torch.compile(model, backend="eager", fullgraph=True), x)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    for key, gradient in expected[1].items():
        torch.testing.assert_close(found[1][f"_orig_mod.{key}"], gradient, rtol=1e-4, atol=1e-4 * float(gradient.max()))


def test_inference_mode_and_a_table_that_changes_in_place(calls):
    """The table of a fixed size is one buffer for all forwards: a Rotary made from it is made again when it changes."""
    case = OWN_ROPE["rope-vit axial"]
    models, x = [case.build(), case.build()], images()["x"]
    patch(models[1])
    for factor in (1.0, -1.0, 1.0):
        for model in models:
            model.rope.pos_embed[:, :DIM].mul_(factor)  # its sines
        for context in (torch.inference_mode, torch.no_grad):
            with context():
                expected, found = (model(x) for model in models)
            assert distance(found, expected) <= 1e-5


# ------------------------------------------------------------------------------------------------------ what is skipped


@pytest.mark.parametrize(
    ("name", "pool", "reason"),
    [
        ("pe_core", "AttentionPoolLatent", "no query, key and value projections found, only q (Linear), kv (Linear)"),
        ("siglip", "AttentionPoolLatent", "no query, key and value projections found, only q (Linear), kv (Linear)"),
        ("naflex, plain, learned", "AttentionPoolLatent", "no query, key and value projections found, only q (Linear)"),
        ("vit, prr", "AttentionPoolPrr", "its forward takes (x)"),
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
            r"2 Attention: its forward takes \(x\)"),
    "relpos": (partial(timm.create_model, "vit_relpos_small_patch16_224", **SMALL, **STEM),
               r"2 RelPosAttention: its forward takes \(x, shared_rel_pos\)"),
    "gemma4": (partial(timm.create_model, "gemma4_vit_167m_enc", embed_dim=32, depth=2, num_heads=2),
               r"2 Gemma4Attention: its forward takes \(x, rope_cos, rope_sin, attn_mask\)"),
    "fastvit": (partial(timm.create_model, "fastvit_sa12", layers=(1, 1, 1, 1), embed_dims=(16, 16, 16, 32)),
                r"1 Attention: its forward takes \(x\)"),
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


@pytest.mark.parametrize("fault", ["turned the other way", "not turned", "scaled"])
@pytest.mark.parametrize("name", ["eva02_tiny", "rope-vit mixed", "dinov3", "vit"])
def test_verification_notices_a_wrong_attention(name, fault, monkeypatch):
    from spatial_pe.towers import fused_attention

    original = fused_attention.rope_attention

    def wrong(q, k, v, rotary, *, scale, **kwargs):
        if fault == "scaled":
            scale = 1.01 * scale
        elif rotary is not None:
            rotary = rotary.inverse() if "other way" in fault else None
        return original(q, k, v, rotary, scale=scale, **kwargs)

    monkeypatch.setattr(fused_attention, "rope_attention", wrong)
    model = CASES[name].build()
    if name == "vit" and fault != "scaled":
        assert patch(model).patched  # there is nothing to turn
        return
    with pytest.raises(RuntimeError, match="computes something else when patched"):
        patch(model)


# ------------------------------------------------------------------------------------------------- inside other models


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
