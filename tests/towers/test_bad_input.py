# SPDX-License-Identifier: Apache-2.0
"""Models and calls that are not what ``patch`` is for: each is served, left to the model, or told why not."""

from __future__ import annotations

import copy
import sysconfig
import warnings
from pathlib import Path

import pytest
import torch
from families import FAMILIES, HERE, OF_TRANSFORMERS, outputs, randn
from torch import nn

from spatial_pe import patch
from spatial_pe.towers import inspect
from spatial_pe.towers.forms import NO_GRID, TESTED
from spatial_pe.towers.fused_attention import FusedAttention

MIN = torch.finfo(torch.float32).min


def attention_of(model):
    return next(m for m in model.modules() if isinstance(m, FusedAttention))


# ------------------------------------------------------------------------------------------------------------ the table


@pytest.mark.parametrize("name", HERE)
def test_what_is_trusted_is_what_is_proven(name):
    """verify=False takes pairing and return value from a table: the proof finds the same."""
    found = []
    for verify in (True, False):
        model = FAMILIES[name].make()
        patch(model, verify=verify)
        bound = [m._spatial_pe for m in model.modules() if isinstance(m, FusedAttention)]
        found.append([(b.pairing, b.returns, b.pads, b.masks or not b.pads) for b in bound])
    assert found[0] == found[1]


def declared():
    """The classes that the families name, of all versions of transformers."""
    return {
        f"transformers.models.{family.module}.modeling_{family.module}.{name}"
        for family in OF_TRANSFORMERS.values()
        for name in family.attention
    }


def path_of(cls):
    return f"{cls.__module__}.{cls.__qualname__}"


@pytest.mark.parametrize("name", HERE)
def test_every_family_is_in_the_table(name):
    model = FAMILIES[name].make()
    patch(model, verify=False)
    found = {path_of(m.original) for m in model.modules() if isinstance(m, FusedAttention)}
    assert found and found <= set(TESTED) & declared()


def test_everything_in_the_table_is_run_by_a_family():
    """timm's part: test_timm."""
    assert {path for path in TESTED if path.startswith("transformers.")} == declared()


OLD, NEW = Path(__file__).parents[2] / ".venv" / "transformers-4.57", Path(sysconfig.get_paths()["purelib"])


@pytest.mark.skipif(not ((OLD / "transformers").exists() and (NEW / "transformers").exists()), reason="needs both")
def test_everything_in_the_table_exists_in_a_supported_version():
    for path in declared():
        file, _, name = path.rpartition(".")
        sources = [folder / f"{file.replace('.', '/')}.py" for folder in (OLD, NEW)]
        assert any(f"\nclass {name}(" in source.read_text() for source in sources if source.exists()), path


@pytest.mark.parametrize(
    ("family", "module"),
    [
        ("siglip2", "transformers_modules.AIDC-AI.Ovis2_5.modeling_ovis2_5"),
        ("siglip2", "transformers.models.ovis2_5.modeling_ovis2_5"),
        ("clip", "transformers.models.openai.modeling_openai"),
    ],
)
def test_a_class_of_a_tested_name_that_is_elsewhere_is_not_trusted(family, module):
    model = FAMILIES[family].make()
    for layer in model.modules():
        if path_of(type(layer)) in TESTED:
            name = "Attention" if family == "clip" else type(layer).__name__
            layer.__class__ = type(name, (type(layer),), {"__module__": module})
    with pytest.raises(ValueError, match="needs verify=True"):
        patch(model, verify=False)
    assert len(patch(model).patched) == 2  # it is right, and proven
    assert not any(m._spatial_pe.pads for m in model.modules() if isinstance(m, FusedAttention))


def test_a_class_whose_name_begins_like_one_without_a_grid_has_one():
    model = FAMILIES["clip"].make()
    for layer in model.modules():
        if path_of(type(layer)) in TESTED:
            layer.__class__ = type("XCLIPAttentionOfAnother", (type(layer),), {})
    assert len(patch(model, rope="axial").patched) == 2


# ---------------------------------------------------------------------------------------------------------- its weights


class Int8Linear(nn.Module):
    """What bitsandbytes makes of a Linear: integer weights behind the same attributes, and a forward that unpacks."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale.detach())
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


@pytest.mark.parametrize("name", ["clip", "qwen2_5_vl", "dinov3"])
def test_quantised_projections_are_called_through(name, calls):
    model, inputs = FAMILIES[name].make(), FAMILIES[name].inputs()
    for module in list(model.modules()):
        for last, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, last, Int8Linear(child))
    before = outputs(model, inputs)
    report = patch(model)
    assert len(report.patched) == 2 and all(row.error < 1e-6 for row in report.patched)
    calls.clear()
    after = outputs(model, inputs)
    assert len(calls) == 2
    for a, b in zip(after, before, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


class Opaque(nn.Module):
    """A projection that does not say how wide it is."""

    def __init__(self, linear):
        super().__init__()
        self.packed = linear.weight.detach().flatten()

    def forward(self, x):
        return nn.functional.linear(x, self.packed.view(-1, x.shape[-1]))


def test_projections_that_say_nothing_are_skipped_with_the_reason():
    model = FAMILIES["clip"].make()
    for module in model.modules():
        if hasattr(module, "q_proj"):
            module.q_proj = Opaque(module.q_proj)
    with pytest.raises(ValueError, match="its projections are not linear layers but Opaque"):
        patch(model)


@pytest.mark.parametrize("options", [{}, {"rope": "mixed"}])
def test_weights_that_are_partly_elsewhere_are_patched_and_not_verified(options):
    """Offloading: one projection is in memory, the others are not."""
    model = FAMILIES["clip"].make()
    for module in model.modules():
        if hasattr(module, "q_proj"):
            module.k_proj.to("meta"), module.v_proj.to("meta")
    report = patch(model, **options)
    assert [row.note for row in report.patched] == ["its weights are not in memory"] * 2
    if options:
        assert all(p.device.type == "cpu" for p in report.parameters())


def test_a_tower_on_the_meta_device_gets_its_rope_on_the_cpu():
    model = FAMILIES["clip"].make().to("meta")
    report = patch(model, rope="mixed")
    assert len(report.patched) == 2 and all(p.device.type == "cpu" for p in report.parameters())


# ---------------------------------------------------------------------------------------------------------------- masks


def causal(tokens):
    return torch.full((1, 1, tokens, tokens), MIN).triu(1)


def per_head(tokens):
    mask = torch.zeros(1, 2, tokens, tokens)
    mask[:, 1, :, 5:] = MIN
    return mask


def block(tokens):
    mask = torch.full((1, 1, tokens, tokens), MIN)
    mask[..., :8, :8] = mask[..., 8:, 8:] = 0
    return mask


def padding(tokens):
    mask = torch.zeros(1, 1, tokens, tokens)
    mask[..., 9:] = MIN
    return mask


MASKS = {
    "causal": (causal, "attention_mask is not padding"),
    "per head": (per_head, "attention_mask differs between heads"),
    "block diagonal": (block, "attention_mask is not padding"),
    "a bias": (lambda n: randn(1, 1, n, n), "attention_mask adds a bias"),
    "odd shape": (lambda n: torch.zeros(1, n, n), "attention_mask of shape"),
    "padding of a tower that does not pad": (padding, "attention_mask masks padding"),
}


@pytest.mark.parametrize("name", ["clip", "dinov3", "siglip2"])
@pytest.mark.parametrize("kind", MASKS)
def test_masks_that_are_not_padding_are_the_models_own(kind, name, calls):
    make, message = MASKS[kind]
    model = FAMILIES[name].make()
    patch(model)
    module = attention_of(model)
    plain = copy.deepcopy(module)
    plain.__class__ = module.original
    width = FAMILIES[name].options["hidden_size"]
    arguments = {"hidden_states": randn(1, 17, width), "attention_mask": make(17)}
    if name == "dinov3":
        angles = randn(14, 16).repeat(1, 2)
        arguments["position_embeddings"] = (angles.cos(), angles.sin())
    calls.clear()
    if name == "siglip2" and "padding of" in kind:  # this one does pad
        found = module(**arguments)[0]
        assert len(calls) == 1 and calls[0][1]["seqlens"].tolist() == [9]
        assert (found[:, :9] - plain(**arguments)[0][:, :9]).norm() < 1e-5 * found.norm()
        return
    with pytest.warns(UserWarning, match=message):
        found = module(**arguments)[0]
    assert not calls and torch.equal(found, plain(**arguments)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(**arguments)  # it says so once


@pytest.mark.parametrize("form", ["bool", "added", "bool (B, N)", "1 and 0 (B, N)", "None where nothing is padded"])
def test_every_form_of_a_padding_mask(form, calls):
    model = FAMILIES["siglip2"].make()
    patch(model)
    module = attention_of(model)
    valid = torch.ones(2, 15, dtype=torch.bool)
    if "None" not in form:
        valid[0, 11:], valid[1, 4:9:2] = False, False  # one at the end, one scattered
    square = valid[:, None, None].expand(2, 1, 15, 15)
    mask = {
        "bool": square,
        "added": torch.zeros(2, 1, 15, 15).masked_fill(~square, MIN),
        "bool (B, N)": valid,
        "1 and 0 (B, N)": valid.long(),
    }.get(form, torch.zeros(2, 1, 15, 15))
    x = randn(2, 15, 48)
    plain = copy.deepcopy(module)
    plain.__class__ = module.original
    calls.clear()
    found = module(x, mask)[0]
    assert len(calls) == 1 and ("cu_seqlens" in calls[0][1]) == ("None" not in form)
    expected = plain(x, square)[0]
    assert (found - expected)[valid].norm() < 1e-5 * expected[valid].norm()
    if "None" not in form:
        assert not (found - module.out_proj.bias)[~valid].any()  # attention over nothing is 0


def test_a_mask_is_read_once_for_all_layers(calls, monkeypatch):
    from spatial_pe.towers import padding

    read = []
    original = padding._read
    monkeypatch.setattr(padding, "_read", lambda *args: read.append(1) or original(*args))
    family = FAMILIES["siglip2"]
    model = family.make()
    patch(model)
    read.clear()
    family.outputs(model, family.inputs())
    assert len(read) == 1


# ------------------------------------------------------------------------------------------ RoPE where there is no grid


@pytest.mark.parametrize("name", [n for n in ("vit_mae", "x_clip") if n in HERE])
def test_towers_whose_tokens_are_no_grid_get_no_rope(name):
    with pytest.raises(ValueError, match="|".join(NO_GRID.values())):
        patch(FAMILIES[name].make(), rope="axial")


@pytest.mark.parametrize("name", [n for n in ("glm_image", "cosmos3_edge", "radio") if n in HERE])
def test_packed_towers_without_rope_get_none_either(name):
    with pytest.raises(ValueError, match="its images are packed, and the grid of each is unknown"):
        patch(FAMILIES[name].make(), rope="axial")


def test_siglip2_without_spatial_shapes_says_so():
    model = FAMILIES["siglip2"].make()
    patch(model, rope="axial")
    grids = attention_of(model)._spatial_pe.grids
    grids.enter()
    grids.record(torch.tensor([[3, 5], [5, 3]]))
    with pytest.raises(ValueError, match="a batch of 3 images, but no spatial_shapes for that many"):
        attention_of(model)(randn(3, 15, 48))
    grids.leave()


# ------------------------------------------------------------------------------------------------------------ the costs


def test_inspect_counts_kernels_and_memory_before_and_after():
    rows = {name: inspect(FAMILIES[name].make()).patched[0] for name in ("qwen2_5_vl", "pixtral", "dinov3", "clip")}
    for name, row in rows.items():
        assert row.cost.kernels <= row.own_cost.kernels and row.cost.peak < row.own_cost.peak, name
    # a projection, the op, the output projection; before: 14 of the rotation, and a call for each of 15 windows
    assert rows["qwen2_5_vl"].cost.kernels == 3 and rows["qwen2_5_vl"].own_cost.kernels > 25
    # the mask of 960 x 960 float32 is what Pixtral's attention gets, and ours does not
    assert rows["pixtral"].own_cost.peak - rows["pixtral"].cost.peak > 960 * 960 * 4
    text = str(inspect(FAMILIES["clip"].make()))
    assert "kernels" in text and " -> " in text and "MiB" in text


class Waits(torch.overrides.TorchFunctionMode):
    """Everything that reads a tensor's values into Python, for which a GPU is waited for."""

    READS = (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__bool__, torch.Tensor.__int__, torch.equal)

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.READS:
            self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [n for n in ("qwen2_5_vl", "qwen3_vl", "pixtral", "lfm3_vl", "dinov3") if n in HERE])
def test_no_layer_waits_for_the_device(name, monkeypatch):
    """In the layers that follow the first one; the op itself is replaced, since on a CPU it may read what it likes."""
    from spatial_pe.towers import fused_attention

    model = FAMILIES[name].make()
    patch(model)
    monkeypatch.setattr(fused_attention, "rope_attention", lambda q, k, v, *args, **kwargs: q.contiguous())
    layers = [m for m in model.modules() if isinstance(m, FusedAttention)]
    recorded = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda m, args, kwargs: recorded.append((m, args, kwargs)), with_kwargs=True)
    outputs(model, FAMILIES[name].inputs())
    module, args, kwargs = recorded[-1]
    module.forward(*args, **kwargs)
    with Waits() as waits:
        module.forward(*args, **kwargs)
    assert not waits.seen


def test_the_models_own_attention_waits():
    """So that the test above can fail."""
    recorded = []
    model = FAMILIES["qwen3_vl"].make()
    layer = next(m for m in model.modules() if type(m).__name__ == "Qwen3VLVisionAttention")
    layer.register_forward_pre_hook(lambda m, args, kwargs: recorded.append((args, kwargs)), with_kwargs=True)
    outputs(model, FAMILIES["qwen3_vl"].inputs())
    args, kwargs = recorded[0]
    with Waits() as waits:
        layer.forward(*args, **kwargs)
    assert waits.seen


# --------------------------------------------------------------------------------------------------------------- legacy


def test_legacy_is_the_papers_public_code_and_warns():
    """Written out again: angles [row, row, column, column] over the channels, rotate-half over the whole head."""
    family = FAMILIES["clip"]
    model, inputs = family.make(), family.inputs()
    with pytest.warns(UserWarning, match="not a rotation"):
        report = patch(model, legacy="2601.09954")
    assert "legacy 2601.09954, not a rotation" in report.patched[0].convention
    by_hand = family.make()
    key = next(k for k, _ in by_hand.named_parameters() if "position_embedding" in k)
    by_hand.get_parameter(key).data.zero_()  # as that code does
    dim = 24
    row, column = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    ladder = 1 / 10000 ** (torch.arange(0, dim // 2, 2) / (dim // 2))
    fh, fw = row.reshape(-1, 1) * ladder, column.reshape(-1, 1) * ladder
    angles = torch.cat([fh, fh, fw, fw], dim=-1)

    def rotate(module, args, output):
        heads = output.unflatten(-1, (2, dim))
        patches = heads[:, 1:]
        half = torch.cat([-patches[..., dim // 2 :], patches[..., : dim // 2]], dim=-1)
        rotated = patches * angles.cos()[:, None] + half * angles.sin()[:, None]
        return torch.cat([heads[:, :1], rotated], dim=1).flatten(-2)

    for name, module in by_hand.named_modules():
        if name.endswith(("q_proj", "k_proj")):
            module.register_forward_hook(rotate)
    for ours, theirs in zip(outputs(model, inputs), outputs(by_hand, inputs), strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"legacy": "1234.56789"}, "legacy must be one of"),
        ({"legacy": "2601.09954", "rope": "axial"}, "is an encoding itself: leave rope out"),
    ],
)
def test_wrong_legacy(options, message):
    with pytest.raises(ValueError, match=message):
        patch(FAMILIES["clip"].make(), **options)


def test_legacy_fails_the_check_of_a_rotation():
    from spatial_pe import PatchGrid, verify_rotary
    from spatial_pe.towers.legacy import Mismatched2DRoPE

    mismatched = Mismatched2DRoPE(64)(PatchGrid(16, 16))
    report = verify_rotary(lambda x: mismatched(x[None, :, None])[0, :, 0], PatchGrid(16, 16))
    assert not report.is_rotation and not report.is_relative


def test_a_proof_does_not_compare_a_module_with_itself(monkeypatch):
    """A call that falls back in the proof would prove that the module equals itself."""
    from spatial_pe.towers import fused_attention

    monkeypatch.setattr(fused_attention, "rotation_of", lambda *args: "unreadable")
    with pytest.raises(RuntimeError, match="not fused: unreadable"):
        patch(FAMILIES["dinov3"].make())


def test_a_norm_acts_on_what_it_is_named_after():
    """Of keys alone, say: the place of a norm among those that there are is not the place of its operand."""
    from spatial_pe.towers.forms import FORMS
    from spatial_pe.towers.layout import project, read_layout

    module = nn.Module()
    module.num_heads, module.qkv, module.proj = 2, nn.Linear(16, 48), nn.Linear(16, 16)
    module.q_norm, module.k_norm = nn.Identity(), nn.LayerNorm(8)
    x = randn(1, 3, 16)
    q, k, v = project(module, read_layout(module, FORMS[-1]), x)
    heads = module.qkv(x).view(1, 3, 6, 8)
    assert torch.equal(q, heads[:, :, :2]) and torch.equal(v, heads[:, :, 4:])
    assert torch.equal(k, module.k_norm(heads[:, :, 2:4]))
