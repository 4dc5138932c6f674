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
