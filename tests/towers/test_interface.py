# SPDX-License-Identifier: Apache-2.0
"""attn_implementation="spatial_pe": plain use through transformers' attention interface."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, HERE, WITHOUT_ROPE, to
from test_families import assert_error_rule

from spatial_pe import register_attention_interface
from spatial_pe.towers import interface, padding

transformers = pytest.importorskip("transformers")


@pytest.fixture
def served(monkeypatch):
    """Calls of the fused op by the interface."""
    register_attention_interface()
    seen = []

    def spy(*args, **kwargs):
        seen.append(kwargs)
        return original(*args, **kwargs)

    original = interface.rope_attention
    monkeypatch.setattr(interface, "rope_attention", spy)
    monkeypatch.setattr(padding, "rope_attention", spy)
    return seen


# families whose attention asks the interface, in both versions
PLAIN = [
    n for n in ("clip", "siglip", "dinov2", "vit", "aimv2", "internvl", "siglip2", "idefics2") if n in WITHOUT_ROPE
]
ROTATED = [n for n in ("qwen2_5_vl", "pixtral", "dinov3", "llama4", "sam3", "gemma4") if n in HERE]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", PLAIN + ROTATED)
def test_outputs_follow_the_error_rule(name, dtype, served):
    family = FAMILIES[name]
    inputs = family.inputs()
    with torch.no_grad():
        exact = family.outputs(family.make().double(), to(inputs, torch.float64))
        theirs = family.outputs(family.make().to(dtype), to(inputs, dtype))
        model = family.make(implementation="spatial_pe").to(dtype)
        assert not served
        ours = family.outputs(model, to(inputs, dtype))
    assert len(served) >= family.layers or name == "pixtral"  # whose mask of images is no padding: transformers' sdpa
    for i, triple in enumerate(zip(ours, theirs, exact, strict=True)):
        assert_error_rule(*(x.double() for x in triple), dtype, f"output {i}")


def test_padding_is_masked(served):
    """A name that has no mask function would get no mask at all."""
    family = FAMILIES["siglip2"]
    model, inputs = family.make(implementation="spatial_pe"), family.inputs()
    with torch.no_grad():
        before = family.outputs(model, inputs)
        hidden = family.valid(inputs).logical_not()
        assert hidden.any()
        changed = {**inputs, "pixel_values": inputs["pixel_values"].masked_fill(hidden[..., None], 7.0)}
        after = family.outputs(model, changed)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert any(kwargs.get("seqlens") is not None for kwargs in served)


def test_a_causal_language_model_keeps_its_own(served):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, vocab_size=16)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    tokens = torch.arange(12)[None] % 16
    for mask in (None, torch.tensor([[0] * 3 + [1] * 9])):
        expected = model(tokens, attention_mask=mask).logits
        model.set_attn_implementation("spatial_pe")
        found = model(tokens, attention_mask=mask).logits
        model.set_attn_implementation("sdpa")
        assert torch.equal(found, expected)
    model.set_attn_implementation("spatial_pe")
    generated = model.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0)
    model.set_attn_implementation("sdpa")
    assert torch.equal(generated, model.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0))
    assert not served


def test_dropout_in_training_is_transformers_own(served):
    family = FAMILIES["clip"]
    model = family.make(implementation="spatial_pe", attention_dropout=0.5).train()
    family.outputs(model, family.inputs())
    assert not served
    family.outputs(model.eval(), family.inputs())
    assert len(served) == 2
