# SPDX-License-Identifier: Apache-2.0
"""Patch embeddings computed as the matrix product that they are."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from families import FAMILIES, HERE
from family import distance, randn, randomize
from test_families import assert_error_rule
from torch import nn

from spatial_pe import from_pretrained
from spatial_pe.towers import inspect, patch, unpatch
from spatial_pe.towers.patch_product import PatchProduct

CUT = [
    name
    for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen2_5_omni", "glm4v", "glm_ocr", "exaone4_5")
    if name in HERE
]


def embedding(model):
    (module,) = [m for m in model.modules() if isinstance(m, nn.Conv3d)]
    return module


def patches(module, number=7, seed=1):
    return randn(number, module.in_channels, *module.kernel_size, seed=seed)


@pytest.mark.parametrize("name", CUT)
def test_towers_that_embed_patches_that_are_cut(name):
    family = FAMILIES[name]
    model, inputs = family.make(), family.inputs()
    before = family.outputs(model, inputs)
    keys = {key: value.shape for key, value in model.state_dict().items()}
    (row,) = inspect(model).embeddings
    assert not isinstance(embedding(model), PatchProduct)
    report = patch(model)
    assert report.embeddings == [row] and (row.attention, row.convention) == ("Conv3d", "patch embedding")
    assert row.error < 1e-6 and row.own_error < 1e-6 and "patch embedding" in str(report)
    assert isinstance(embedding(model), PatchProduct)
    assert {key: value.shape for key, value in model.state_dict().items()} == keys
    for ours, theirs in zip(family.outputs(model, inputs), before, strict=True):
        assert distance(ours, theirs) < 1e-5
    unpatch(model)
    assert type(embedding(model)) is nn.Conv3d
    for again, theirs in zip(family.outputs(model, inputs), before, strict=True):
        assert torch.equal(again, theirs)


def tower(**options):
    """Qwen2-VL's, and its patch embedding: patched, and a copy that is not."""
    model = FAMILIES["qwen2_vl"].make()
    own = copy.deepcopy(embedding(model))
    patch(model, **options)
    return model, embedding(model), own


def test_it_can_be_left_out():
    model, module, _ = tower(patch_embed=False)
    assert type(module) is nn.Conv3d and "PatchedVisionAttention" in {type(m).__name__ for m in model.modules()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_outputs_and_gradients(dtype):
    _, module, own = tower()
    found = []
    for m, wide in ((module, dtype), (own, dtype), (own, torch.float64)):
        m = copy.deepcopy(m).to(wide)
        x = patches(m).to(wide).requires_grad_()
        y = m(x)
        assert y.shape == (7, m.out_channels, 1, 1, 1) and y.dtype == wide
        y.backward(randn(*y.shape, seed=2).to(wide))
        found.append([y.detach(), x.grad, m.weight.grad])
    for triple in zip(*found, strict=True):
        assert_error_rule(*(t.double() for t in triple), dtype, "patch embedding")


def test_an_input_that_slides_is_left_to_the_convolution():
    _, module, own = tower()
    x = randn(2, module.in_channels, *(2 * size for size in module.kernel_size))
    assert torch.equal(module(x), own(x)) and module(x).shape[2:] == (2, 2, 2)
    assert torch.equal(module(x[0]), own(x[0]))
    with pytest.raises(RuntimeError):
        module(x[..., :-1, :3])


def test_a_bias_and_other_layouts():
    class Embed(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Conv3d(3, 48, (2, 4, 4), (2, 4, 4), bias=True)

        def forward(self, hidden_states):
            return self.proj(hidden_states.view(-1, 3, 2, 4, 4)).flatten(1)

    model = FAMILIES["qwen2_vl"].make()
    model.patch_embed = randomize(Embed())
    own = copy.deepcopy(model.patch_embed)
    patch(model)
    module = model.patch_embed.proj
    x = patches(module)
    assert distance(module(x), own.proj(x)) < 1e-6
    with torch.no_grad():
        module.weight.copy_(module.weight.contiguous(memory_format=torch.channels_last_3d))
        scattered = torch.full((7, 6, 2, 4, 4), torch.nan)[:, ::2]
        scattered.copy_(x)
    assert distance(module(scattered), own.proj(x)) < 1e-6
    assert module(x[:0]).shape == (0, 48, 1, 1, 1)


@pytest.mark.parametrize(
    "options", [{"padding": 1}, {"dilation": (1, 2, 1)}, {"groups": 3}, {"stride": 1}], ids=lambda o: next(iter(o))
)
def test_what_is_no_product_is_left_alone(options):
    model = FAMILIES["qwen2_vl"].make()
    given = {"stride": (2, 4, 4), **options}
    model.patch_embed.proj = nn.Conv3d(3, 48, (2, 4, 4), **given)
    report = inspect(model)
    assert report.patched and not report.embeddings


def test_videos_slide():
    from transformers import VideoMAEConfig, VideoMAEModel

    sizes = {"hidden_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    model = VideoMAEModel(VideoMAEConfig(**sizes, image_size=16, patch_size=8, num_frames=4))
    report = inspect(model)
    assert not report.embeddings


def test_hooks_copies_and_pickles():
    _, module, own = tower()
    seen = []
    module.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    x = patches(module)
    module(x)
    assert seen == [(7, own.out_channels, 1, 1, 1)]
    module._forward_hooks.clear()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert isinstance(twin, PatchProduct) and torch.equal(twin(x), module(x))


def test_a_wrapped_or_parametrized_one():
    model = FAMILIES["qwen2_vl"].make()
    nn.utils.parametrizations.weight_norm(embedding(model))
    x, theirs = patches(embedding(model)), None
    theirs = embedding(model)(x)
    assert not patch(model).embeddings
    assert torch.equal(embedding(model)(x), theirs)


def test_lora_on_the_embedding():
    peft = pytest.importorskip("peft")
    model = FAMILIES["qwen2_vl"].make()
    inputs = FAMILIES["qwen2_vl"].inputs()
    config = peft.LoraConfig(target_modules=["proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    theirs = FAMILIES["qwen2_vl"].outputs(wrapped, inputs)
    report = patch(wrapped)
    assert len(report.embeddings) == 1 and report.embeddings[0].name.endswith("base_layer")
    for ours, expected in zip(FAMILIES["qwen2_vl"].outputs(wrapped, inputs), theirs, strict=True):
        assert distance(ours, expected) < 1e-5


@pytest.mark.parametrize("how", ["compile", "export", "jit.trace", "make_fx", "vmap"])
def test_under_a_tracer(how):
    _, module, own = tower()
    x, more = patches(module), patches(module, number=11, seed=3)
    if how == "compile":
        torch._dynamo.reset()
        run = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    elif how == "export":
        batch = torch.export.Dim("batch", min=2)
        run = torch.export.export(module, (x,), dynamic_shapes=({0: batch},)).module()
    elif how == "jit.trace":
        run = torch.jit.trace(module, x)
    elif how == "make_fx":
        from torch.fx.experimental.proxy_tensor import make_fx

        run = make_fx(module, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x)
    else:
        run = torch.vmap(module)
        x, more = x[:, None], more[:, None]
    with torch.no_grad():
        for given in (x, more):
            assert distance(run(given).flatten(), own(given.flatten(0, -5)).flatten()) < 1e-6


def test_it_is_remembered_in_the_config(tmp_path):
    for patch_embed in (True, False):
        model = FAMILIES["qwen2_vl"].make()
        patch(model, patch_embed=patch_embed)
        model.save_pretrained(tmp_path / str(patch_embed))
        again = from_pretrained(type(model), tmp_path / str(patch_embed))
        assert isinstance(embedding(again), PatchProduct) is patch_embed
