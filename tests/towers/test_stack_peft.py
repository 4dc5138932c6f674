# SPDX-License-Identifier: Apache-2.0
"""A patched tower under PEFT."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, outputs, randn, to
from stack import SMALL, assert_rule, equal, ropes
from test_families import run
from torch import nn

from spatial_pe.towers import patch, unpatch

TARGETS = {"qwen2_5_vl": ["qkv"]}  # else q and v


def lora(model: nn.Module, name: str, **options):
    """LoRA with matrices that are not zero, the same ones in every call."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    targets = TARGETS.get(name, ["q_proj", "v_proj"])
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **options)
    return get_peft_model(model, config).eval()


@pytest.mark.parametrize("order", ["patched then LoRA", "LoRA then patched"])
@pytest.mark.parametrize("name", SMALL)
def test_lora(name, order, calls):
    """LoRA replaces projections of the attention modules: outputs and gradients are those of the unpatched model, as
    they are after the matrices are merged into the weights."""
    pytest.importorskip("peft")
    family = FAMILIES[name]
    inputs = family.inputs()
    theirs, exact = lora(family.make(), name), lora(family.make(), name).double()
    ours = family.make()
    if order == "patched then LoRA":
        patch(ours)
        ours = lora(ours, name)
    else:
        ours = lora(ours, name)
        assert len(patch(ours).patched) == family.layers
    calls.clear()
    results = [run(model, family, inputs, model.dtype) for model in (ours, theirs, exact)]
    assert len(calls) == family.layers
    assert results[0][1] and all("lora_" in key for key in results[0][1])
    assert min(g.norm() for g in results[2][1].values()) > 0
    assert_rule(*results)

    merged = [model.merge_and_unload() for model in (ours, theirs, exact)]
    calls.clear()
    with torch.no_grad():
        found = [[x.double() for x in outputs(model, to(inputs, model.dtype))] for model in merged]
        assert len(calls) == family.layers
        assert_rule(*((x, {}) for x in found))
        without = outputs(family.make(), inputs)[0]
        assert (found[0][0] - without).norm() > 1e-2 * without.norm()  # LoRA does something
        unpatch(merged[0])
        calls.clear()
        assert equal(outputs(merged[0], inputs), outputs(merged[1], inputs)) and not calls


@pytest.mark.parametrize("name", SMALL)
def test_a_lora_adapter_is_saved_and_loaded(name, calls, tmp_path):
    """The file has the keys of an unpatched model's, and goes on either."""
    peft = pytest.importorskip("peft")
    family = FAMILIES[name]
    model, inputs = family.make(), family.inputs()
    patch(model)
    model = lora(model, name)
    model.save_pretrained(tmp_path)
    assert list(peft.get_peft_model_state_dict(model)) == list(
        peft.get_peft_model_state_dict(lora(family.make(), name))
    )
    base = family.make()
    patch(base)
    again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    later = peft.PeftModel.from_pretrained(family.make(), tmp_path).eval()
    with torch.no_grad():
        patch(later)
        calls.clear()
        expected = outputs(model, inputs)
        assert equal(outputs(again, inputs), expected) and equal(outputs(later, inputs), expected)
        assert len(calls) == 3 * family.layers
        with again.disable_adapter():
            fused = family.make()
            patch(fused)
            # the rest is SigLIP's pooling, which torch computes in another order where weights need gradients
            assert equal(outputs(again, inputs)[:1], outputs(fused, inputs)[:1])
        unpatch(again)
        assert equal(outputs(again, inputs), outputs(lora(family.make(), name), inputs))


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_an_encoding_is_trained_and_saved_with_the_adapter(name, tmp_path, calls):
    """LoRA freezes the model, the added encodings with it: modules_to_save is how PEFT trains and keeps them."""
    peft = pytest.importorskip("peft")
    safetensors = pytest.importorskip("safetensors.torch")
    family = FAMILIES[name]
    base, inputs = family.make(), family.inputs()
    patch(base, rope="mixed")
    model = lora(base, name, modules_to_save=["rope"])
    trained = {key: p for key, p in model.named_parameters() if "rope" in key and p.requires_grad}
    assert len(trained) == family.layers
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        sum((x - randn(*x.shape, seed=9)).square().mean() for x in outputs(model, inputs)).backward()
        optimizer.step()
    assert all(bool((p != 0).all()) for p in trained.values())  # they start at 0
    frozen = [p for key, p in model.named_parameters() if "rope" in key and not p.requires_grad]
    assert len(frozen) == family.layers and not any(p.any() for p in frozen)

    model.save_pretrained(tmp_path)
    saved = safetensors.load_file(tmp_path / "adapter_model.safetensors")
    saved = {key: value for key, value in saved.items() if "rope" in key}
    assert sorted(x.double().sum().item() for x in saved.values()) == sorted(
        x.double().sum().item() for x in trained.values()
    )
    fresh = family.make()
    patch(fresh, rope="mixed")
    again = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    calls.clear()
    with torch.no_grad():
        expected = outputs(model, inputs)
        assert equal(outputs(again, inputs), expected) and len(calls) == 2 * family.layers
        merged = again.merge_and_unload()
        for rope, value in zip(ropes(merged), trained.values(), strict=True):
            assert torch.equal(rope.frequencies, value)
        found = outputs(merged, inputs)
        for a, b in zip(found, expected, strict=True):  # W + BA is rounded once more
            assert (a - b).norm() < 1e-5 * b.norm()
        unpatch(merged)
        assert not ropes(merged) and set(merged.state_dict()) == set(family.make().state_dict())
