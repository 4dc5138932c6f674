# SPDX-License-Identifier: Apache-2.0
"""Patched models in a directory: saved, loaded again bit for bit, and never without their rotation in silence."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from added_rope import encodings, shaken
from families import FAMILIES, GRIDS, HERE, outputs, to
from torch import nn

import spatial_pe
from spatial_pe import AxialRoPE, MixedRoPE, from_pretrained, patch, unpatch
from spatial_pe.towers.config_entry import MARK
from spatial_pe.towers.fused_attention import FusedAttention

transformers = pytest.importorskip("transformers")


def values(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(model, again, inputs):
    assert values(model).keys() == values(again).keys()
    for name, value in values(model).items():
        assert torch.equal(value, values(again)[name]) and value.dtype == values(again)[name].dtype, name
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(outputs(model, inputs), outputs(again, inputs), strict=True))


ROPES = {
    "axial": {"rope": "axial"},
    "mixed": {"rope": "mixed"},
    "full": {"rope": "axial", "start": "full"},
    "random": {"rope": "mixed", "start": "full"},
    "ours": {"rope": MixedRoPE(24, 2, pairing="half"), "start": "full"},
    "options": {"rope": AxialRoPE(24, theta=100.0, rotary_dim=16, normalize="min", strength=0.5), "start": "full"},
    "no absolute": {"rope": "axial", "start": "full", "keep_absolute": False},
    "nothing added": {},
}


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("name", ["clip", "dinov2_with_registers"])
def test_a_saved_tower_comes_back_bit_for_bit(name, kind, tmp_path):
    family = FAMILIES[name]
    model, inputs = family.make(), family.inputs()
    with torch.no_grad():
        unpatched = outputs(model, inputs)
    patch(model, **ROPES[kind])
    shaken(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["spatial_pe"]["start"] in ("identity", "full")
    again = from_pretrained(type(model), tmp_path)
    assert not again.training
    assert sum(isinstance(m, FusedAttention) for m in again.modules()) == family.layers
    assert_same(model, again, inputs)
    if kind != "nothing added":
        with torch.no_grad():
            assert not torch.equal(outputs(again, inputs)[0], unpatched[0])
    again.save_pretrained(tmp_path / "again")  # and once more
    assert_same(model, from_pretrained(type(model), tmp_path / "again"), inputs)


@pytest.mark.parametrize("name", [name for name in GRIDS if name not in ("clip", "dinov2_with_registers")])
def test_every_tower_with_an_added_rope_is_saved_and_loaded(name, tmp_path):
    family = FAMILIES[name]
    model, inputs = family.make(), family.inputs()
    patch(model, rope="mixed")
    shaken(model)
    model.save_pretrained(tmp_path)
    assert_same(model, from_pretrained(type(model), tmp_path), inputs)


@pytest.mark.parametrize("name", [n for n in ("qwen2_5_vl", "pixtral", "dinov3") if n in HERE])
def test_a_tower_with_a_rope_of_its_own_is_patched_again(name, tmp_path):
    model, inputs = FAMILIES[name].make(), FAMILIES[name].inputs()
    patch(model)
    model.save_pretrained(tmp_path)
    assert_same(model, from_pretrained(type(model), tmp_path), inputs)


def llava():
    from towers_without_rope import HOLDERS

    return HOLDERS["llava"].make(), HOLDERS["llava"].inputs()


@pytest.mark.parametrize("part", ["whole", "tower"])
def test_a_whole_vlm_through_an_auto_class(part, tmp_path):
    """Patched as a whole or only its tower; in shards; in bfloat16, with an encoding that stays float32."""
    model, inputs = llava()
    report = patch(model if part == "whole" else model.model.vision_tower, rope="mixed")
    assert len(report.patched) == 2
    shaken(model)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = from_pretrained(transformers.AutoModelForImageTextToText, tmp_path)
    assert type(again) is type(model)
    assert_same(model, again, inputs)
    half = from_pretrained(transformers.AutoModelForImageTextToText, tmp_path, torch_dtype=torch.bfloat16)
    for ours, theirs in zip(encodings(half), encodings(model), strict=True):
        assert torch.equal(ours.frequencies, theirs.frequencies)


@pytest.mark.parametrize("rope", ["axial", "mixed"])
def test_frequencies_keep_float32_from_training_in_bfloat16_to_loading(rope, tmp_path):
    """Cast, trained for a step, saved and loaded in bfloat16: what was learned is there bit for bit."""
    model, inputs = FAMILIES["clip"].make(), FAMILIES["clip"].inputs()
    patch(model, rope=rope)
    shaken(model)
    before = [parameter.detach().clone() for encoding in encodings(model) for parameter in encoding.parameters()]
    model.to(torch.bfloat16).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outputs(model, to(inputs, torch.bfloat16))[0].square().mean().backward()
    optimizer.step()
    learned = [parameter for encoding in encodings(model) for parameter in encoding.parameters()]
    for parameter, start in zip(learned, before, strict=True):
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        torch.testing.assert_close(parameter, start - 0.1 * parameter.grad, rtol=2e-7, atol=1e-8)
        assert not torch.equal(parameter, start)
        assert not torch.equal(parameter, parameter.bfloat16().float())
    model.save_pretrained(tmp_path)
    for options in ({}, {"torch_dtype": torch.bfloat16}, {"torch_dtype": torch.float16}, {"torch_dtype": "auto"}):
        again = from_pretrained(type(model), tmp_path, **options)
        for ours, theirs in zip(encodings(again), encodings(model), strict=True):
            for name, value in theirs.named_parameters():
                assert torch.equal(ours.get_parameter(name), value) and ours.get_parameter(name).dtype == torch.float32


def test_frequencies_that_were_saved_in_half_precision_are_loaded_as_float32(tmp_path):
    """As by earlier versions."""
    model, inputs = FAMILIES["clip"].make(), FAMILIES["clip"].inputs()
    patch(model, rope="mixed")
    shaken(model)
    model.config.save_pretrained(tmp_path)
    saved = {name: value.bfloat16() if "rope" in name else value for name, value in model.state_dict().items()}
    torch.save(saved, tmp_path / "pytorch_model.bin")
    again = from_pretrained(type(model), tmp_path)
    for ours, theirs in zip(encodings(again), encodings(model), strict=True):
        assert ours.frequencies.dtype == torch.float32
        assert torch.equal(ours.frequencies, theirs.frequencies.bfloat16().float())
    with torch.no_grad():
        outputs(again, inputs)


def test_old_torch_files(tmp_path):
    model, inputs = FAMILIES["clip"].make(), FAMILIES["clip"].inputs()
    patch(model, rope="axial")
    shaken(model)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert_same(model, from_pretrained(type(model), tmp_path), inputs)


class Swirl(nn.Module):
    """An encoding of the user's own."""

    def __init__(self):
        super().__init__()
        self.inner = AxialRoPE(24, strength=0.3)

    def forward(self, grid):
        return self.inner(grid)


def test_a_users_own_encoding_is_named_and_asked_for(tmp_path):
    model, inputs = FAMILIES["clip"].make(), FAMILIES["clip"].inputs()
    patch(model, rope=Swirl(), start="full")
    shaken(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Swirl, which is not spatial_pe's|Swirl, which cannot be rebuilt"):
        from_pretrained(type(model), tmp_path)
    assert_same(model, from_pretrained(type(model), tmp_path, rope=Swirl()), inputs)


# -------------------------------------------------------------------------------------------------- without spatial_pe


@pytest.mark.parametrize("options", [{"rope": "mixed"}, {"rope": "axial", "start": "full"}], ids=["learned", "fixed"])
def test_transformers_alone_warns(options, tmp_path, caplog):
    """Even where the encoding has no parameters."""
    model = FAMILIES["clip"].make()
    patch(model, **options)
    model.save_pretrained(tmp_path)
    transformers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        plain, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    transformers.utils.logging.disable_propagation()
    unexpected = info["unexpected_keys"] if isinstance(info, dict) else info.unexpected_keys
    assert sum(key.endswith(MARK) for key in unexpected) == 2
    assert MARK in caplog.text
    assert not any(isinstance(m, FusedAttention) for m in plain.modules())


def test_loading_is_quiet_about_ours_and_not_about_others(tmp_path, recwarn):
    model = FAMILIES["clip"].make()
    patch(model, rope="axial")
    model.save_pretrained(tmp_path)
    from_pretrained(type(model), tmp_path)
    assert not [w for w in recwarn if "from" in str(w.message) and "keys" in str(w.message)]
    model.register_parameter("stray", nn.Parameter(torch.zeros(2)))
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="unexpected keys: stray"):
        from_pretrained(type(model), tmp_path)


# -------------------------------------------------------------------- loaded by transformers alone, and patched again


@pytest.fixture
def trained(tmp_path):
    """A folder with a model that was patched and trained, the model, and how it was patched."""

    def make(**options):
        model = FAMILIES["clip"].make()
        patch(model, **options)
        shaken(model)
        model.save_pretrained(tmp_path)
        return model

    return make


@pytest.mark.parametrize("options", [{"rope": "axial"}, {"rope": "mixed"}, {"rope": "axial", "start": "full"}])
def test_patch_finds_the_saved_encoding(options, trained, tmp_path):
    model = trained(**options)
    plain = type(model).from_pretrained(tmp_path)
    report = patch(plain, **options)
    assert_same(model, plain, FAMILIES["clip"].inputs())
    assert f"the weights of the added RoPE are those in {tmp_path}" in " ".join(str(report).split())
    unpatch(plain)
    assert "spatial_pe" not in vars(plain.config)


def test_patch_finds_the_encoding_of_a_tower_inside(tmp_path):
    """Beside a head, as in CLIPForImageClassification."""
    clip = FAMILIES["clip"].make()
    model = transformers.CLIPForImageClassification(transformers.CLIPConfig(vision_config=clip.config.to_dict()))
    model.eval()
    patch(model, rope="axial")
    shaken(model)
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path)
    patch(plain, rope="axial")
    assert_same(model, plain, FAMILIES["clip"].inputs())


@pytest.mark.parametrize(
    "options", [{}, {"rope": "mixed"}, {"rope": "axial", "start": "full"}, {"legacy": "2601.09954"}]
)
def test_patch_refuses_to_lose_a_saved_encoding(options, trained, tmp_path):
    model = trained(rope="axial")
    plain = type(model).from_pretrained(tmp_path)
    loads = (
        rf"was saved with a RoPE added \(axial, start=identity\).*spatial_pe\.from_pretrained\({type(model).__name__}, "
    )
    with pytest.raises(ValueError, match=loads):
        patch(plain, **options)
    assert not any(isinstance(module, FusedAttention) for module in plain.modules())
    assert "was saved with a RoPE added" in str(spatial_pe.inspect(plain))
    unpatch(plain)  # the way to start anew
    if "legacy" not in options:
        patch(plain, **options)


def test_patch_refuses_where_the_saved_encoding_is_gone(trained, tmp_path):
    model = trained(rope="axial")
    plain = type(model).from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="was saved with a RoPE added"):
        patch(plain, rope="axial")


def test_a_saved_encoding_of_another_shape_leaves_the_model_as_it_was(trained, tmp_path):
    from safetensors.torch import load_file, save_file

    model = trained(rope="mixed")
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: x[:, :1].contiguous() if ".rope." in k else x for k, x in tensors.items()},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    plain = type(model).from_pretrained(tmp_path)
    for _ in range(2):
        with pytest.raises(ValueError, match="of shape"):
            patch(plain, rope="mixed")
        assert not any(isinstance(module, FusedAttention) for module in plain.modules())


def test_a_model_that_shares_a_config_has_lost_nothing(tmp_path):
    """Its folder holds no encoding: it was written before the other was patched."""
    FAMILIES["clip"].make().save_pretrained(tmp_path)
    cls = type(FAMILIES["clip"].make())
    model = cls.from_pretrained(tmp_path)
    patch(model, rope="axial")
    other = cls(model.config)
    assert not patch(other, rope="mixed").notes and not patch(cls(FAMILIES["clip"].make().config), rope="mixed").notes


# ------------------------------------------------------------------------------------------------------------ bad input


def test_a_directory_that_was_never_patched(tmp_path):
    model = FAMILIES["clip"].make()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds no patched model.*call spatial_pe\.patch"):
        from_pretrained(type(model), tmp_path)


def test_a_directory_without_the_weights_of_the_encoding(tmp_path):
    """As of a model that shares its config with a patched one."""
    model = FAMILIES["clip"].make()
    other = type(model)(model.config)
    patch(model, rope="axial")
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no weights for .*added_rope_requires_spatial_pe.*a RoPE was added"):
        from_pretrained(type(model), tmp_path)


def test_an_unpatched_model_says_nothing(tmp_path):
    model = FAMILIES["clip"].make()
    patch(model, rope="axial")
    unpatch(model)
    model.save_pretrained(tmp_path)
    assert "spatial_pe" not in (tmp_path / "config.json").read_text()
    assert not hasattr(model.config, "spatial_pe")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "written by another version of spatial_pe"),
        ({"rope": {"class": "os.system", "options": {}}}, "os.system, which is not spatial_pe's"),
        ({"rope": "diagonal"}, "rope must be"),
        ({"start": "slowly"}, "start must be"),
        ({"backend": "abacus"}, "backend"),
    ],
)
def test_a_config_that_says_nonsense(change, message, tmp_path):
    model = FAMILIES["clip"].make()
    patch(model, rope="axial")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["spatial_pe"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        from_pretrained(type(model), tmp_path)


def test_it_is_public():
    assert spatial_pe.from_pretrained is from_pretrained
