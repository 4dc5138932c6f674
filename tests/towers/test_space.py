# SPDX-License-Identifier: Apache-2.0
"""Towers that rotate by a callable of their own, attend to other tokens, or use torch's attention: what their forms add
to what test_families asks of every tower."""

from __future__ import annotations

import copy

import own_code
import pytest
import torch
from families import FAMILIES, randn
from family import distance
from own_code import WIDTH, AxisRope, Clip, Croco, FlashInside, OtherViewAttention, Plain, ViewAttention, places
from torch import nn

from spatial_pe.towers import fused_attention, inspect, patch, unpatch


def cross(rope=None):
    """CroCo's attention to another view, and a call of it."""
    module = FAMILIES["croco"].make().decoder
    if rope is not None:
        module.rope = rope
    call = (randn(2, 12, WIDTH), randn(2, 20, WIDTH, seed=2), randn(2, 20, WIDTH, seed=3))
    return module, (*call, places((3, 4), 2), places((4, 5), 2))


def attention(rope=None):
    module = FAMILIES["croco"].make().blocks[0]
    if rope is not None:
        module.rope = rope
    return module


# ------------------------------------------------------------------------------------- a rotation that is read off


def test_the_callable_is_asked_once_for_all_layers(calls):
    """CroCo's own forward asks it twice in each layer, and waits for the device each time."""
    family = FAMILIES["croco"]
    model, inputs = family.make(), family.inputs()
    patch(model)
    rope, asked = model.blocks[0].rope, []
    rope.register_forward_hook(lambda *args: asked.append(1))
    calls.clear()
    model(**inputs)
    assert len(asked) == 2  # of two views
    tables = {id(args[3].cos) for args, _ in calls} | {id(c["rotary_k"].cos) for _, c in calls if c["rotary_k"]}
    assert len(tables) == 2


def test_another_callable_on_the_same_positions_is_another_table():
    module, where, x = attention(), places((3, 4), 1), randn(1, 12, WIDTH)
    other = copy.deepcopy(module)
    other.rope = AxisRope(10.0)
    expected = [module(x, where), other(x, where)]
    patch(module)
    patch(other)
    for got, theirs in zip([module(x, where), other(x, where)], expected, strict=True):
        assert distance(got, theirs) < 1e-6
    module.rope.base = 10.0  # its cached table is of 100
    assert distance(module(x, where), expected[1]) < 1e-6


def test_positions_that_are_written_to_are_read_again():
    module, where, x = attention(), places((3, 4), 1), randn(1, 12, WIDTH)
    own = copy.deepcopy(module)
    patch(module)
    module(x, where)
    where += 5 * torch.arange(12)[:, None]
    assert distance(module(x, where), own(x, where)) < 1e-6


@pytest.mark.parametrize("batch", [1, 3])
def test_positions_for_all_samples_or_for_each(batch):
    module, x = attention(), randn(3, 12, WIDTH)
    where = torch.cat([places((3, 4), 1), places((4, 3), 1), places((2, 6), 1)])[:batch]
    theirs = module(x, where)
    patch(module)
    assert distance(module(x, where), theirs) < 1e-6


def test_a_callable_that_learns_gets_its_gradient():
    class Learned(AxisRope):
        def __init__(self):
            super().__init__()
            self.speed = nn.Parameter(torch.tensor(1.3))

        def forward(self, tokens, positions):
            return super().forward(tokens, positions * self.speed)

    ours, where, x = attention(Learned()), places((3, 4), 1), randn(1, 12, WIDTH)
    theirs = copy.deepcopy(ours)
    patch(ours)
    for module in (ours, theirs):
        module(x, where).square().sum().backward()
    assert theirs.rope.speed.grad.abs() > 1e-3
    torch.testing.assert_close(ours.rope.speed.grad, theirs.rope.speed.grad, rtol=1e-4, atol=1e-4)


def test_a_callable_that_is_no_rotation_is_applied_as_it_is():
    class Mixing(AxisRope):
        def forward(self, tokens, positions):
            return super().forward(tokens, positions) + 0.3 * tokens.roll(1, -1)

    module, where, x = attention(Mixing()), places((3, 4), 2), randn(2, 12, WIDTH)
    theirs = module(x, where)
    report = patch(module)
    assert report.patched[0].convention == "own encoding, no rotation"
    assert any("not a rotation of pairs" in note for note in report.notes) and report.patched[0].error < 1e-6
    assert distance(module(x, where), theirs) < 1e-6


def test_no_positions_no_rotation():
    """VGGT's last layers get none; CroCo's own forward raises."""
    model = FAMILIES["vggt"].make()
    late, x = model.blocks[3], randn(2, 5, WIDTH)
    theirs = late(x, pos=None)
    patch(model)
    assert distance(late(x, pos=None), theirs) < 1e-6
    module = attention()
    patch(module)
    with pytest.warns(UserWarning, match="xpos is None: falling back"), pytest.raises(AttributeError):
        module(x, None)


@pytest.mark.parametrize("shape", [(12, 2), (2, 11, 2), (3, 12, 2)], ids=str)
def test_positions_of_another_shape_are_left_to_the_tower(shape):
    class Lenient(AxisRope):
        def forward(self, tokens, positions):
            return super().forward(tokens, places((3, 4), len(tokens)))

    module, x = attention(Lenient()), randn(2, 12, WIDTH)
    where = torch.zeros(shape, dtype=torch.long)
    theirs = module(x, where)
    module.rope = AxisRope()
    patch(module)
    module.rope = Lenient()
    with pytest.warns(UserWarning, match="its positions are .*: falling back to the original attention"):
        assert torch.equal(module(x, where), theirs)


@pytest.mark.parametrize("name", ["croco", "vggt", "sam2", "step3", "vit_pytorch, rotary", "keye", "moonvit"])
@pytest.mark.parametrize("fault", ["inverse rotation", "not rotated", "keys as queries"])
def test_a_wrong_attention_is_noticed(name, fault, monkeypatch):
    original = fused_attention.rope_attention
    cross_alone = fault == "keys as queries"  # of attention to other tokens

    def wrong(q, k, v, rotary, **kwargs):
        given = kwargs.get("rotary_k")
        if fault == "inverse rotation" and rotary is not None:
            rotary, kwargs["rotary_k"] = rotary.inverse(), given and given.inverse()
        elif fault == "not rotated":
            rotary = kwargs["rotary_k"] = None
        elif given is not None:
            again = torch.arange(given.num_tokens) % rotary.num_tokens
            kwargs["rotary_k"] = rotary.index_tokens(again)
        return original(q, k, v, rotary, **kwargs)

    family = FAMILIES[name]
    model, inputs = family.make(), family.inputs()
    if cross_alone and name not in ("croco", "sam2"):
        pytest.skip("all its tokens are queries")
    before = family.outputs(model, inputs)
    monkeypatch.setattr(fused_attention, "rope_attention", wrong)
    try:
        report = patch(model)
    except ValueError as refused:
        assert "relative error" in str(refused)
    else:  # at last a callable is tried as it is, without a table: right in spite of the fault
        rotated = [row for row in report.patched if row.convention not in ("own encoding, no rotation", "no RoPE")]
        assert all(cross_alone and row.attention in ("ViewAttention", "MemoryRope") for row in rotated), report
    for ours, theirs in zip(family.outputs(model, inputs), before, strict=True):
        assert distance(ours, theirs) < 1e-5


def test_a_part_that_is_not_served_is_named():
    model = FAMILIES["croco"].make()
    model.decoder.relative_bias = nn.Parameter(torch.zeros(3))
    report = patch(model)
    assert [row.attention for row in report.patched] == ["ViewAttention", "ViewAttention"]
    (row,) = report.skipped
    assert row.attention == "OtherViewAttention" and "relative_bias" in row.reason and row.name in str(report)


# ------------------------------------------------------------------------------------------------------- other tokens


def test_attention_to_another_view_alone():
    module, call = cross()
    theirs = module(*call)
    report = patch(module)  # it is its own tower
    assert [row.convention for row in report.patched] == ["own RoPE (axis_half)"]
    assert distance(module(*call), theirs) < 1e-6
    unpatch(module)
    assert torch.equal(module(*call), theirs) and type(module) is OtherViewAttention


def test_dropout_in_training_is_the_modules_own():
    module, call = cross()
    module.attn_drop.p = 0.5
    patch(module)
    with pytest.warns(UserWarning, match="attention dropout is active: falling back"):
        module.train()(*call)


def test_a_mask_is_left_to_the_tower():
    model = FAMILIES["vggt"].make()
    module, x, where = model.blocks[1], randn(2, 12, WIDTH), places((3, 4), 2)
    mask = torch.ones(2, 12, 12, dtype=torch.bool).tril()
    theirs = module(x, pos=where, attn_mask=mask)
    patch(model)
    with pytest.warns(UserWarning, match="attn_mask is given: falling back"):
        assert torch.equal(module(x, pos=where, attn_mask=mask), theirs)


def test_keys_that_fit_no_table_are_left_to_the_tower():
    model = FAMILIES["sam2"].make()
    module, x, keys = model.cross_attn_image, randn(1, 16, WIDTH), randn(1, 33, 16)
    patch(model)
    with pytest.warns(UserWarning, match="16 rows for 33 keys"), pytest.raises(RuntimeError):
        module(x, keys, keys)
    with pytest.warns(UserWarning, match="falling back"), pytest.raises(AssertionError):
        model.self_attn(x, x[:, :8], x[:, :8])


def test_memories_of_several_numbers():
    model = FAMILIES["sam2"].make()
    own = copy.deepcopy(model)
    patch(model)
    for tokens, frames, pointers in ((16, 1, 0), (16, 1, 3), (9, 7, 0), (16, 2, 5), (25, 1, 1)):
        x, memory = randn(2, tokens, WIDTH), randn(2, frames * tokens + pointers, 16, seed=2)
        assert distance(model(x, memory, pointers), own(x, memory, pointers)) < 1e-6


def test_the_table_of_the_keys_is_made_once(calls):
    model, inputs = FAMILIES["sam2"].make(), FAMILIES["sam2"].inputs()
    patch(model)
    model(**inputs)
    calls.clear()
    model(**inputs)
    model(**inputs)
    tables = {id(kwargs["rotary_k"].cos) for _, kwargs in calls if kwargs["rotary_k"] is not None}
    assert len(calls) == 4 and len(tables) == 1


# --------------------------------------------------------------------------------------- torch.nn.MultiheadAttention


def clip(batch_first=True):
    model = own_code.randomize(Clip(batch_first)).eval()
    return model, own_code.images()()


def test_pooling_and_torchs_own_layers_are_left_alone():
    model, _ = clip()
    model.blocks.append(nn.TransformerEncoderLayer(WIDTH, 2, batch_first=True))
    reasons = {row.name: row.reason for row in inspect(model).skipped}
    assert "its queries are parameters" in reasons["attn_pool.attn"]
    assert "reads its weights and does not call it" in reasons["blocks.2.self_attn"]


@pytest.mark.parametrize(
    "option", [{"bias": False}, {"add_zero_attn": True}, {"add_bias_kv": True}, {"kdim": 24}], ids=str
)
def test_options_of_torchs_attention(option):
    model, inputs = clip()
    for block in model.blocks:
        block.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True, **option)
    if "kdim" not in option:
        theirs = model(**inputs)
    if option == {"bias": False}:
        patch(model)
        assert distance(model(**inputs), theirs) < 1e-6
    else:
        with pytest.raises(ValueError, match="nothing to patch"):
            patch(model)


@pytest.mark.parametrize("batch_first", [True, False])
def test_weights_masks_and_other_tokens(batch_first):
    """Weights are what torch returns by default; a call to other tokens is fused too."""
    model, _ = clip(batch_first)
    module = model.blocks[0].attn
    x, y = (randn(2, n, WIDTH, seed=n) for n in (7, 5))
    if not batch_first:
        x, y = x.transpose(0, 1), y.transpose(0, 1)
    hidden = torch.zeros(2, 7, dtype=torch.bool)
    hidden[0, 4:] = True
    asked = {
        "weights": ((x, x, x), {}),
        "of each head": ((x, x, x), {"average_attn_weights": False}),
        "padding": ((x, x, x), {"need_weights": False, "key_padding_mask": hidden}),
        "mask": ((x, x, x), {"need_weights": False, "attn_mask": torch.ones(7, 7, dtype=torch.bool).triu(1)}),
        "one sample": ((x[0] if batch_first else x[:, 0],) * 3, {"need_weights": False}),
        "other tokens": ((x, y, y), {"need_weights": False}),
        "fused": ((x, x, x), {"need_weights": False}),
    }
    theirs = {name: module(*args, **kwargs) for name, (args, kwargs) in asked.items()}
    patch(model)
    for name, (args, kwargs) in asked.items():
        fused_attention._warned.clear()
        if name in ("fused", "other tokens"):
            got = module(*args, **kwargs)
        else:
            with pytest.warns(UserWarning, match="falling back"):
                got = module(*args, **kwargs)
        assert distance(got[0], theirs[name][0]) < 1e-6, name
        assert (got[1] is None) == (theirs[name][1] is None)
        if got[1] is not None:
            torch.testing.assert_close(got[1], theirs[name][1])


@pytest.mark.parametrize("rope", ["axial", "mixed"])
def test_rope_is_added_to_torchs_attention(rope):
    """The same with the batch first and second; on, it changes the model; weights are of the rotated attention."""
    outputs = []
    for batch_first in (True, False):
        model, inputs = clip(batch_first)
        plain = model(**inputs)
        report = patch(model, rope=rope)
        assert distance(model(**inputs), plain) < 1e-6 and len(report.patched) == 2
        with torch.no_grad():
            for i, parameter in enumerate(report.parameters()):
                parameter.add_(0.3 * randn(*parameter.shape, seed=i))
        outputs.append(model(**inputs))
        assert distance(outputs[-1], plain) > 1e-3
    assert distance(outputs[0], outputs[1]) < 1e-6
    seen = {}
    attention = model.blocks[0].attn
    attention.register_forward_hook(lambda m, args, out: seen.update(fused=out[0], args=args))
    model(**inputs)

    own = type(model.blocks[0]).forward

    def forward(self, x):
        y = self.ln_1(x)
        out, seen["weights"] = self.attn(y, y, y)
        return x + out

    type(model.blocks[0]).forward = forward
    try:
        with pytest.warns(UserWarning, match="attention weights are requested"):
            again = model(**inputs)
    finally:
        type(model.blocks[0]).forward = own
    assert distance(again, outputs[-1]) < 1e-5
    weights = seen["weights"]
    assert weights.shape == (2, 13, 13)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 13))
    with pytest.raises(NotImplementedError, match="other tokens has no patch grid"):
        attention(seen["args"][0], seen["args"][0].clone(), seen["args"][0], need_weights=False)


def test_the_position_embedding_of_clip_is_left_out():
    model, _ = clip()
    patch(model, rope="axial", start="full", keep_absolute=False)
    assert not model.positional_embedding.any() and not model.positional_embedding.requires_grad
    bigger = {"pixel_values": randn(1, 3, 24, 24)}
    assert model(**bigger).shape == (1, 3, WIDTH)
    unpatch(model)
    assert model.positional_embedding.any()


# -------------------------------------------------------------------------------------------------------- other code


def test_flash_attention_inside_is_replaced():
    """InternVL's own code calls flash-attn, which is not here; it is proven against the module's other path."""
    model = own_code.randomize(Plain(FlashInside(), FlashInside())).eval()
    inputs = own_code.images()()
    other = copy.deepcopy(model)
    for block in other.blocks:
        block.use_flash_attn = False
    report = patch(model)
    assert all(row.error < 1e-6 for row in report.patched)
    assert distance(model(**inputs), other(**inputs)) < 1e-6


def test_a_layer_keeps_its_forward():
    """MoonViT's attention is a method of the layer."""
    model = FAMILIES["moonvit"].make()
    forward = type(model.blocks[0]).forward
    patch(model)
    assert type(model.blocks[0]).forward is forward


@pytest.mark.parametrize(
    "name",
    ["croco", "sam2", "open_clip, batch second"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("vggt", "open_clip", "onevision")],
)
def test_they_compile_without_a_graph_break(name):
    family = FAMILIES[name]
    model, inputs = family.make(), family.inputs()
    patch(model)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = family.outputs(model, inputs)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        got = family.outputs(compiled, inputs)
    for ours, theirs in zip(got, expected, strict=True):
        assert distance(ours, theirs) < 1e-6


@pytest.mark.parametrize("name", ["croco", "vggt", "sam2", "open_clip, batch second", "moonvit"])
def test_copies_and_state_dicts(name):
    family = FAMILIES[name]
    model, inputs = family.make(), family.inputs()
    keys = list(model.state_dict())
    patch(model)
    assert list(model.state_dict()) == keys
    twin = copy.deepcopy(model)
    for ours, theirs in zip(family.outputs(twin, inputs), family.outputs(model, inputs), strict=True):
        assert torch.equal(ours, theirs)
    assert str(patch(model)).startswith("nothing patched")


def test_classes_are_not_shared_by_other_forms():
    """A module of this class without its callable is attention without a rotation."""
    model = own_code.randomize(Croco(rope=False)).eval()
    assert {row.convention for row in patch(model).patched} == {"no RoPE"}
    assert {type(m).original for m in model.modules() if "Patched" in type(m).__name__} == {
        ViewAttention,
        OtherViewAttention,
    }
