# SPDX-License-Identifier: Apache-2.0
"""docs/adding.md: its backend, encoding and tower, from their text, held to what the package's own are held to."""

from __future__ import annotations

import sys
import types

import families
import oracles
import pytest
import test_families
import torch
import towers_without_rope
from pages import story

import spatial_pe
from spatial_pe.conventions import CONVENTIONS
from spatial_pe.ops import select
from spatial_pe.towers import forms

# ----------------------------------------------------------------------------------------------------------- a backend

FLOAT64 = torch.float64
CASES = [
    oracles.Case(batch=2, tokens=37, dim=72, dtype=FLOAT64, prefix=1),
    oracles.Case(tokens=20, heads=6, kv_heads=2, dim=64, dtype=FLOAT64, layout="fused", pairing="interleaved"),
    oracles.Case(lengths=(0, 5, 1, 30), dim=24, dtype=FLOAT64, table="head"),
    oracles.Case(batch=3, tokens=20, seqlens=(20, 0, 7), dim=64, dtype=FLOAT64, table="sample"),
]


@pytest.fixture
def registered(monkeypatch):
    """Add the backend of the page, or code like it, as the page says."""

    def add(code: str) -> types.ModuleType:
        module = types.ModuleType("spatial_pe.backends.float64")
        exec(code, module.__dict__)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(select.BACKENDS, "float64", None)  # the story sets it, and the fixture removes it
        exec(story("register"), {})
        assert select.BACKENDS["float64"] is module
        return module

    return add


def compare_with_the_oracle(case: oracles.Case) -> None:
    inputs = oracles.make(case)
    oracles.check_bound(oracles.run(inputs, "float64"), oracles.exact(inputs), inputs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_backend_computes_what_the_oracle_does(case, registered):
    registered(story("backend"))
    compare_with_the_oracle(case)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("reference.forward(call)", "reference.forward(dataclasses.replace(call, rotary=None))"),
        ("reference.backward(call, out, lse, dout)", "reference.backward(call, out, lse, dout * (1 + 1e-9))"),
    ],
)
def test_a_backend_that_is_wrong_is_noticed(right, wrong, registered):
    code = story("backend")
    assert code.count(right) == 1
    registered("import dataclasses\n" + code.replace(right, wrong))
    with pytest.raises(AssertionError, match=r"error .* > "):
        compare_with_the_oracle(CASES[0])


def test_the_backend_is_listed_selected_and_refuses(registered, monkeypatch):
    registered(story("backend"))
    assert ("float64", None) in list(spatial_pe.backends())
    monkeypatch.setattr(select, "AUTO", ("float64", *select.AUTO))
    asked = []
    forward = select.BACKENDS["float64"].forward
    monkeypatch.setattr(select.BACKENDS["float64"], "forward", lambda call: asked.append(call) or forward(call))
    for dtype in (FLOAT64, torch.float32):
        q = torch.randn(1, 4, 2, 16, dtype=dtype)
        spatial_pe.rope_attention(q, q, q)
    assert [call.q.dtype for call in asked] == [FLOAT64]
    with pytest.raises(ValueError, match=r'backend="float64" cannot serve this call: float64 on the CPU only'):
        spatial_pe.rope_attention(q, q, q, backend="float64")


# --------------------------------------------------------------------------------------------------------- an encoding


def test_the_convention_is_a_row(monkeypatch):
    monkeypatch.setitem(CONVENTIONS, "my_vit", None)
    exec(story("convention"), {})
    grid = spatial_pe.PatchGrid(3, 5, prefix=1)
    rotary = spatial_pe.convention("my_vit", head_dim=16)(grid)
    row, column = grid.coordinates().unbind(-1)
    ladder = 100.0 ** -(torch.arange(4) / 4)  # RoFormer's, for the column first ("wh"), then the row
    angles = torch.cat([column[:, None] * ladder, row[:, None] * ladder], dim=1)
    torch.testing.assert_close(rotary.cos[0, :, 0], angles.cos())
    torch.testing.assert_close(rotary.sin[0, :, 0], angles.sin())
    assert rotary.pairing == "interleaved"


def diagonal(head_dim: int):
    names: dict = {}
    exec(story("encoding"), names)
    return names["DiagonalRoPE"](head_dim)


def test_the_encoding_is_a_rotation_by_both_axes():
    grid = spatial_pe.PatchGrid(5, 6, prefix=2)
    report = spatial_pe.verify_rotary(diagonal(16)(grid), grid)
    assert report.is_rotation and report.is_relative and report.encodes_position and report.unrotated_is_identity
    assert set(report.axes.values()) == {"both"}
    with pytest.raises(ValueError, match="head_dim must be a multiple of 4, got 18"):
        diagonal(18)


def test_attention_with_the_encoding_is_what_the_oracle_computes():
    grid, case = spatial_pe.PatchGrid(4, 5, prefix=1), oracles.Case(batch=2, tokens=21, dim=24)
    inputs = oracles.make(case)
    row, column = grid.coordinates().unbind(-1)
    ladder = 100.0 ** -(torch.arange(6) / 5)
    inputs.angles = torch.cat([(row + column)[:, None] * ladder, (row - column)[:, None] * ladder], 1)[None, :, None]
    truth = oracles.exact(inputs).values["out"]

    def error(rotary) -> float:
        out = spatial_pe.rope_attention(inputs.q, inputs.k, inputs.v, rotary)
        return ((out - truth).norm() / truth.norm()).item()

    assert error(diagonal(24)(grid)) < 1e-5
    assert error(spatial_pe.AxialRoPE(24)(grid)) > 1e-2  # another encoding would be noticed


def test_modules_and_towers_take_the_encoding():
    grid = spatial_pe.PatchGrid(4, 4)
    layer = spatial_pe.RoPE2DAttention(48, 2, rope=diagonal(24))
    x = torch.randn(2, 16, 48)
    moved = spatial_pe.RoPE2DAttention(48, 2, rope=None)
    moved.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x, diagonal(24)(grid)), layer(x, grid))
    assert not torch.allclose(layer(x, grid), moved(x), rtol=1e-3)
    family = families.FAMILIES["clip"]
    model = family.make()
    report = spatial_pe.patch(model, rope=diagonal(24), start="full")
    assert len(report.patched) == family.layers
    rotated, plain = (family.outputs(tower, family.inputs())[0] for tower in (model, family.make()))
    assert not torch.allclose(rotated, plain)


# ------------------------------------------------------------------------------------------------------------- a tower

DPT = "transformers.models.dpt.modeling_dpt.DPTSelfAttention"


@pytest.fixture
def dpt(monkeypatch):
    """The tower of the page, and nothing left of it afterwards."""
    known = forms.TESTED.get(DPT)
    monkeypatch.setitem(forms.TESTED, DPT, known)
    monkeypatch.delitem(forms.TESTED, DPT)
    monkeypatch.setitem(towers_without_rope.WITHOUT_ROPE, "dpt", None)

    def add():
        exec(story("tower"), {})
        family = towers_without_rope.WITHOUT_ROPE["dpt"]
        monkeypatch.setitem(families.FAMILIES, "dpt", family)
        return family

    return add


def test_the_tower_is_trusted_once_it_is_tested(dpt):
    from transformers import DPTConfig, DPTModel

    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    model = DPTModel(DPTConfig(**sizes, image_size=32, patch_size=8))
    with pytest.raises(ValueError, match="its class is not part of the tests: needs verify=True"):
        spatial_pe.patch(model, verify=False)
    family = dpt()
    assert len(spatial_pe.patch(model, verify=False).patched) == 1
    assert family.available() and family.attention == ("DPTSelfAttention",)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_tower_passes_the_tests_of_towers(dtype, dpt, calls):
    dpt()
    test_families.test_outputs_and_gradients_follow_the_error_rule("dpt", dtype, "auto", calls)
    test_families.test_unpatched_is_what_it_was_bit_for_bit("dpt")


# -------------------------------------------------------------------------------------------- an attention of one's own


class MyTower(torch.nn.Module):
    """A ViT around the attention of the page, with 2D RoPE."""

    def __init__(self, attention: type[torch.nn.Module]) -> None:
        super().__init__()
        self.patch_embed = torch.nn.Conv2d(3, 48, 8, 8)
        self.layers = torch.nn.ModuleList([attention(48, 2) for _ in range(2)])

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        side = pixels.shape[-1] // 8
        row, column = spatial_pe.PatchGrid(side, side).coordinates().to(x).unbind(-1)
        ladder = 100.0 ** -(torch.arange(6, device=x.device) / 6)
        angles = torch.cat([row[:, None] * ladder, column[:, None] * ladder], dim=1)
        for layer in self.layers:
            x = x + layer(x, angles)
        return x


@pytest.fixture
def own(monkeypatch):
    """The attention of the page, or code like it; nothing is left registered afterwards."""
    monkeypatch.setattr(forms, "FORMS", list(forms.FORMS))
    monkeypatch.setattr("spatial_pe.towers.discover.FORMS", forms.FORMS)

    def make(right: str = "", wrong: str = "") -> MyTower:
        code = story("own")
        assert code.count(right) >= 1
        names: dict = {}
        exec(code.replace(right, wrong) if right else code, names)
        torch.manual_seed(0)
        return MyTower(names["MyAttention"])

    return make


def test_an_attention_of_ones_own_is_patched_once_its_form_is_registered(own):
    model = own()
    with pytest.raises(ValueError, match=r"2 MyAttention: its forward takes \(tokens, angles\)"):
        spatial_pe.patch(model)
    exec(story("form"), {})
    exec(story("form"), {})  # again, as a notebook does
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(pixels)
    report = spatial_pe.patch(model)
    assert len(report.patched) == 2 and "own RoPE (half)" in str(report) and report.patched[0].error < 1e-6
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), before)


@pytest.mark.parametrize(
    ("right", "wrong", "reason"),
    [
        ("scaled_dot_product_attention(q, k, v)", "scaled_dot_product_attention(q, k, v * 1.001)", "relative error"),
        ("(3, self.n_heads, self.dim_per_head)).permute(2, 0, 3, 1, 4)",
         "(self.n_heads, 3, self.dim_per_head)).permute(3, 0, 2, 1, 4)", "relative error"),
        ("for x in (q, k))", "for x in (q, k)); q = q.relu()", "relative error"),
    ],
)  # fmt: skip
def test_what_computes_anything_else_is_left_alone(right, wrong, reason, own):
    model = own(right, wrong)
    exec(story("form"), {})
    with pytest.raises(ValueError, match=f"[12] MyAttention: it has the form of to_qkv attention, but {reason}"):
        spatial_pe.patch(model)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"name": "plain"}, ValueError, "a form named 'plain' exists already"),
        ({"needs": "angles"}, TypeError, "needs must be a frozenset of names, got 'angles'"),
        ({"tables": "degrees"}, ValueError, "tables must be one of"),
        ({"returns": "list"}, ValueError, "returns must be one of"),
        ({"rotation": "rope"}, ValueError, "rotation='rope' must be among the arguments in needs or takes"),
        ({"first": "angles"}, ValueError, "first='angles' must not be in needs or takes"),
        ({"qkv": ("to_q", "to_kv")}, ValueError, "qkv must name one fused projection or three"),
    ],
)
def test_a_form_that_does_not_fit_is_refused(changes, error, message, own):
    from spatial_pe.towers import ForwardForm, register_form

    fields = {"name": "mine", "first": "tokens", "needs": frozenset({"angles"}), "rotation": "angles"} | changes
    with pytest.raises(error, match=message):
        register_form(ForwardForm(**fields))
    with pytest.raises(TypeError, match=r"form must be a spatial_pe\.towers\.ForwardForm, got str"):
        register_form("mine")
    assert len(forms.FORMS) == len(set(forms.FORMS))


def test_a_form_is_replaced_by_one_of_its_name(own):
    from spatial_pe.towers import ForwardForm, register_form

    before = len(forms.FORMS)
    for first in ("x", "tokens"):
        register_form(ForwardForm("mine", first=first, needs=frozenset({"angles"})))
    assert len(forms.FORMS) == before + 1 and forms.FORMS[0].first == "tokens"


def test_tokens_alone():
    """The attention of the original DINO, MAE and many others: forward(x)."""

    class Attention(torch.nn.Module):
        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.num_heads, self.scale = heads, (width // heads) ** -0.5
            self.qkv, self.proj = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
            self.attn_drop, self.proj_drop = torch.nn.Dropout(0.0), torch.nn.Dropout(0.0)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            weights = self.attn_drop((q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1))
            return self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2)))

    class Tower(MyTower):
        def forward(self, pixels):
            x = self.patch_embed(pixels).flatten(2).transpose(1, 2)
            for layer in self.layers:
                x = x + layer(x)
            return x

    torch.manual_seed(0)
    model, pixels = Tower(Attention), torch.randn(2, 3, 32, 24)
    with torch.no_grad():
        before = model(pixels)
        assert len(spatial_pe.patch(model).patched) == 2
        torch.testing.assert_close(model(pixels), before)
        spatial_pe.unpatch(model)
        spatial_pe.patch(model, rope="axial", start="full")
        assert not torch.allclose(model(pixels), before, rtol=1e-2)
