# SPDX-License-Identifier: Apache-2.0
"""The mechanics of patching: copies, pickles, hooks, undo, errors, the report. Attention itself: test_families."""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import subprocess
import sys
import types
import warnings

import pytest
import torch
from families import FAMILIES, outputs, randn, randomize
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from spatial_pe._utils import tensor_cache
from spatial_pe.towers import inspect, patch, rotary_inputs, unpatch
from spatial_pe.towers.report import SkippedRow

transformers = pytest.importorskip("transformers")


@pytest.fixture
def tower():
    return FAMILIES["dinov3"].make(), FAMILIES["dinov3"].inputs()


def clip():
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    text = {**sizes, "vocab_size": 20, "max_position_embeddings": 8, "eos_token_id": 19}
    return randomize(CLIPModel(CLIPConfig(text_config=text, vision_config=vision))).eval()


def attention_of(model, name="Attention"):
    return [m for m in model.modules() if type(m).__name__.endswith(name)]


# -------------------------------------------------------------------------------------- what stays of a patched model


def test_only_the_vision_tower_is_patched(calls):
    model = clip()
    inputs = {"input_ids": torch.tensor([[1, 2, 3, 19]]), "pixel_values": randn(1, 3, 32, 32)}
    before = model(**inputs)
    report = patch(model)
    assert [row.name.split(".")[0] for row in report.patched] == ["vision_model"] * 2
    assert {(row.name.split(".")[0], row.reason) for row in report.skipped} == {
        ("text_model", "not inside a vision tower")
    }
    calls.clear()
    after = model(**inputs)
    assert len(calls) == 2 and all(args[0].shape[1] == 17 for args, _ in calls)  # 16 patches + CLS, never text
    assert torch.equal(before.text_embeds, after.text_embeds)
    torch.testing.assert_close(before.image_embeds, after.image_embeds, rtol=1e-5, atol=1e-5)


def test_state_dict_isinstance_and_hooks_stay(tower):
    model, inputs = tower
    module = attention_of(model)[0]
    original, keys, seen = type(module), list(model.state_dict()), []
    module.register_forward_hook(lambda *_: seen.append("before"))
    patch(model)
    module.register_forward_hook(lambda *_: seen.append("after"))
    assert seen == []  # the proof does not run the model's hooks
    outputs(model, inputs)
    assert seen == ["before", "after"]
    assert isinstance(module, original) and type(module) is not original
    assert list(model.state_dict()) == keys
    assert type(attention_of(model)[1]) is type(module)  # one subclass, made once
    model.load_state_dict({k: torch.zeros_like(v) for k, v in model.state_dict().items()})
    assert all(bool((p == 0).all()) for p in model.parameters())


def test_patching_leaves_mode_gradients_and_random_state_alone(tower):
    model, inputs = tower
    model.train()
    sum(x.sum() for x in outputs(model, inputs)).backward()
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    patch(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules())
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert p.requires_grad and (p.grad is None if grad is None else torch.equal(p.grad, grad))


@pytest.mark.parametrize("family", ["pixtral", "dinov3", "clip"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_work_and_are_independent(way, family, calls):
    model, inputs = FAMILIES[family].make(), FAMILIES[family].inputs()
    patch(model)
    expected = outputs(model, inputs)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    unpatch(model)
    calls.clear()
    assert all(torch.equal(a, b) for a, b in zip(expected, outputs(twin, inputs), strict=True))
    assert len(calls) == 2  # the twin is still patched
    unpatch(twin)
    outputs(twin, inputs)
    assert len(calls) == 2
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]


def test_data_parallel_replicas_are_patched(tower, calls):
    model, _ = tower
    patch(model)
    module = attention_of(model)[0]
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = child
    x, angles = randn(1, 20, 64), randn(16, 16).repeat(1, 2)
    calls.clear()
    with torch.no_grad():
        expected = module(x, position_embeddings=(angles.cos(), angles.sin()))[0]
        assert torch.equal(replica(x, position_embeddings=(angles.cos(), angles.sin()))[0], expected)
    assert len(calls) == 2


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "pixtral", "dinov3", "clip"])
def test_gradient_checkpointing_gives_the_same_gradients(family, reentrant):
    model, inputs = FAMILIES[family].make().train(), FAMILIES[family].inputs()
    patch(model)
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        torch.manual_seed(3)  # DINOv3 jitters its coordinates in training
        floats = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in _tensors(inputs).items()}
        sum(x.square().sum() for x in outputs(model, {**inputs, **floats})).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=1e-4, atol=1e-4)


def _tensors(inputs):
    return {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}


def test_tables_are_not_kept_between_forwards(tower):
    model, inputs = tower
    patch(model)
    with torch.no_grad():
        outputs(model, inputs)
        outputs(model, inputs)
    gc.collect()
    assert len(tensor_cache._ENTRIES.by_tensor) == 0


# ------------------------------------------------------------------------------------------------- wrapped forwards


def accelerate_like(module):
    """What accelerate's add_hook_to_module does to a module."""
    seen = []

    def new_forward(module, *args, **kwargs):
        seen.append(type(module).__name__)
        return module._old_forward(*args, **kwargs)

    module._old_forward = module.forward
    module.forward = functools.update_wrapper(functools.partial(new_forward, module), module._old_forward)
    return seen


def test_hooked_then_patched(tower, calls):
    model, inputs = tower
    module = attention_of(model)[0]
    seen = accelerate_like(module)
    before = outputs(model, inputs)
    assert len(patch(model).patched) == 2
    calls.clear()
    after = outputs(model, inputs)
    assert len(calls) == 2 and len(seen) == 2  # the hook runs, and what it wraps is ours
    torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-5)
    unpatch(model)
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(model, inputs), strict=True))
    assert len(calls) == 2 and len(seen) == 3


def test_patched_then_hooked_then_unpatched(tower, calls):
    model, inputs = tower
    before = outputs(model, inputs)
    patch(model)
    module = attention_of(model)[0]
    seen = accelerate_like(module)
    calls.clear()
    outputs(model, inputs)
    assert len(calls) == 2 and len(seen) == 1
    unpatch(model)
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(model, inputs), strict=True))
    assert len(calls) == 2 and len(seen) == 2


def test_hook_removed_while_patched(tower, calls):
    model, inputs = tower
    module = attention_of(model)[0]
    accelerate_like(module)
    patch(model)
    module.forward = module._old_forward  # accelerate's remove_hook_from_module
    del module._old_forward
    unpatch(model)
    calls.clear()
    outputs(model, inputs)
    assert not calls and "forward" not in module.__dict__


def test_a_forward_replaced_on_the_instance_is_skipped(tower):
    model, _ = tower
    module = attention_of(model)[0]
    module.forward = types.MethodType(lambda self, hidden_states, **_: (hidden_states, None), module)
    report = patch(model)
    assert len(report.patched) == 1 and len(report.skipped) == 1
    assert "replaced on the instance" in report.skipped[0].reason


# ------------------------------------------------------------------------------------------------ twice, errors, report


def test_twice_is_harmless(tower, calls):
    model, inputs = tower
    first = patch(model)
    classes = [type(m) for m in model.modules()]
    second = patch(model)
    assert len(first.patched) == 2 and not second.patched
    assert [row.reason for row in second.skipped] == ["already patched"] * 2
    assert [type(m) for m in model.modules()] == classes
    unpatch(model)
    unpatch(model)
    calls.clear()
    outputs(model, inputs)
    assert not calls


def test_another_way_of_patching_needs_unpatch_first():
    model = FAMILIES["clip"].make()
    patch(model)
    for other in ({"rope": "axial"}, {"backend": "reference"}):
        with pytest.raises(ValueError, match=r"already patched with rope=None.*call unpatch\(model\) first"):
            patch(model, **other)
    unpatch(model)
    assert len(patch(model, rope="axial").patched) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope": "diagonal"}, 'rope must be "axial", "mixed", a module or None'),
        ({"rope": 3}, 'rope must be "axial", "mixed", a module or None'),
        ({"start": "slowly"}, 'start must be "identity" or "full"'),
        ({"backend": "abacus"}, "backend"),
    ],
)
def test_wrong_arguments(options, message, tower):
    model, _ = tower
    classes = [type(m) for m in model.modules()]
    with pytest.raises((ValueError, RuntimeError), match=message):
        patch(model, **options)
    assert [type(m) for m in model.modules()] == classes


def test_a_model_without_attention():
    with pytest.raises(ValueError, match="nothing to patch in Sequential: it has no attention modules"):
        patch(nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8)))


def test_inspect_changes_nothing_and_says_what_patch_does():
    model = clip()
    classes, state = [type(m) for m in model.modules()], list(vars(model.vision_model))
    seen = inspect(model)
    assert [type(m) for m in model.modules()] == classes and list(vars(model.vision_model)) == state
    patched = patch(model)
    assert patched.patched == [row._replace(own_cost=None, cost=None) for row in seen.patched]
    assert patched.skipped == seen.skipped


def test_the_report_is_one_row_per_kind_of_layer():
    report = patch(clip())
    lines = str(report).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("vision_model"))
    row = lines[at + 1]
    assert "CLIPAttention" in row and " 2 " in row and "no RoPE" in row and report.patched[0].backend in row
    assert f"{report.patched[0].error:.1e}" in row
    skipped = " ".join(" ".join(lines[lines.index("skipped") + 1 :]).split())
    assert skipped.startswith("2 CLIPAttention (text_model.") and skipped.endswith(": not inside a vision tower")
    assert 0 < report.patched[0].error < 1e-6
    assert list(report.parameters()) == []


@pytest.mark.parametrize("name", ["dinov2_with_registers", "qwen2_5_vl", "clip"])
def test_the_report_is_100_columns_wide(name):
    report = inspect(FAMILIES[name].make())
    report.skipped.append(SkippedRow("a.long.name." * 6, "a reason of many words " * 9, "SomeAttention"))
    report.notes.append("a note of many words " * 9)
    assert max(map(len, str(report).splitlines())) <= 100
    assert "a layer on 960 tokens: " in str(report) and "skipped\n  1 SomeAttention (a.long" in str(report)


def test_without_verification_the_report_says_so():
    report = patch(clip(), verify=False)
    assert report.patched[0].error is None
    assert "not verified" in str(report)


def test_weights_on_the_meta_device_cannot_be_verified():
    with torch.device("meta"):
        model = clip_on_meta()
    report = patch(model)
    assert len(report.patched) == 2 and report.patched[0].note == "its weights are not in memory"
    assert "not verified: its weights are not in memory" in str(report) and report.patched[0].backend == "auto"


def clip_on_meta():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8))


# ------------------------------------------------------------------------------ towers that this package has never seen


class Attention(nn.Module):
    """Plain attention of an unknown library; ``extra`` makes it compute something more."""

    def __init__(self, extra=None):
        super().__init__()
        self.num_heads, self.extra = 2, extra
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.sharpness = 2.0
        if extra == "sinks":
            self.sinks = nn.Parameter(torch.zeros(2))
        if extra == "causal":
            self.is_causal = True

    def forward(self, hidden_states, attention_mask=None):
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        scale = 16**-0.5 * (self.sharpness if self.extra == "hidden factor" else 1)
        scores = q @ k.transpose(-1, -2) * scale
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)), None


class Tower(nn.Module):
    def __init__(self, *extras):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 32, 8, 8)
        self.layers = nn.ModuleList(Attention(extra) for extra in extras)

    def forward(self, pixels):
        x = self.patch_embed(pixels).flatten(2).mT
        for layer in self.layers:
            x = x + layer(x)[0]
        return x


def test_an_unknown_class_is_patched_if_it_is_proven(calls):
    model, pixels = randomize(Tower(None, None)), randn(2, 3, 32, 24)
    before = model(pixels)
    assert len(patch(model).patched) == 2
    calls.clear()
    assert (model(pixels) - before).norm() < 1e-5 * before.norm()
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ("sinks", "has sinks, which is not part of plain or rotary attention"),
        ("causal", "is_causal is True"),
        ("hidden factor", r"has the form of plain attention, but relative error 0\.\d+"),
    ],
)
def test_an_unknown_class_that_computes_more_is_skipped(extra, reason):
    model = randomize(Tower(None, extra))
    report = patch(model)
    assert [row.name for row in report.patched] == ["layers.0"]
    (skipped,) = report.skipped
    assert skipped.name == "layers.1"
    with pytest.raises(ValueError, match=reason):
        patch(randomize(Tower(extra)))


def test_an_unknown_class_is_not_patched_on_trust():
    with pytest.raises(ValueError, match="needs verify=True"):
        patch(Tower(None), verify=False)


class Rotating(nn.Module):
    """Attention of an unknown library that rotates neighbouring channels."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = 2, 16
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, hidden_states, position_embeddings):
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        q, k = (x * position_embeddings[0] + turned_by_90(x) * position_embeddings[1] for x in (q, k))
        return self.proj(((q @ k.mT / 4).softmax(-1) @ v).transpose(1, 2).flatten(2)), None


def turned_by_90(x):
    return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)


class RotatingTower(nn.Module):
    """Its tables are the ones of V-JEPA 2 if ``tiled``: [a, b, a, b], which is not a rotation of neighbours."""

    def __init__(self, tiled, learned=False):
        super().__init__()
        self.patch_embed, self.tiled = nn.Conv2d(3, 32, 8, 8), tiled
        self.ladder = nn.Parameter(10.0 ** -(torch.arange(8) / 8), requires_grad=learned)
        self.layers = nn.ModuleList(Rotating() for _ in range(2))

    def forward(self, pixels):
        x = self.patch_embed(pixels).flatten(2).mT
        angles = torch.arange(x.shape[1])[:, None] * self.ladder
        angles = angles.repeat(1, 2) if self.tiled else angles.repeat_interleave(2, dim=1)
        tables = angles.cos(), angles.sin()
        for layer in self.layers:
            x = x + layer(x, position_embeddings=tables)[0]
        return x


def rotating_tower(tiled, **options):
    """With the input and the output of its own forward."""
    tower, pixels = randomize(RotatingTower(tiled, **options)), randn(2, 3, 32, 24)
    with torch.no_grad():
        tower.ladder.copy_(10.0 ** -(torch.arange(8) / 8))
    before = tower(pixels).detach()
    report = patch(tower)
    assert [(row.error < 1e-6, "interleaved" in row.convention) for row in report.patched] == [(True, True)] * 2
    return tower, pixels, before


TRACERS = {
    "compile": lambda tower, pixels: torch.compile(tower, backend="eager", fullgraph=True),
    "inductor": lambda tower, pixels: torch.compile(tower, fullgraph=True),
    "dynamic": lambda tower, pixels: torch.compile(tower, backend="aot_eager", fullgraph=True, dynamic=True),
    "export": lambda tower, pixels: torch.export.export(tower, (pixels,)).module(),
    "jit.trace": lambda tower, pixels: torch.jit.trace(tower, pixels),
    "make_fx": lambda tower, pixels: make_fx(tower)(pixels),
}


# with inductor's code as well as with dynamic sizes: 5 s
@pytest.mark.parametrize("way", [pytest.param(w, marks=[pytest.mark.slow] * (w == "inductor")) for w in TRACERS])
def test_tables_that_nobody_looked_at_are_not_computed_wrong(way):
    """The proof has tables of its own, and a traced call none with values: those of the tower may be others."""
    torch._dynamo.reset()
    for tiled in (False, True):
        tower, pixels, before = rotating_tower(tiled)
        with torch.no_grad():
            found = TRACERS[way](tower, pixels)(pixels)
        if tiled:
            assert found.isnan().all()
        else:
            assert (found - before).norm() < 1e-5 * before.norm()


def test_tables_that_were_looked_at_are_left_to_the_model_when_traced():
    """One call before the first traced one is the way out."""
    torch._dynamo.reset()
    tower, pixels, before = rotating_tower(tiled=True)
    with pytest.warns(UserWarning, match="the two halves of cos and sin differ"), torch.no_grad():
        assert torch.equal(tower(pixels), before)
        found = torch.compile(tower, backend="eager", fullgraph=True)(pixels)
    assert (found - before).norm() < 1e-5 * before.norm()


@pytest.mark.parametrize("tiled", [False, True])
def test_tables_with_a_gradient_are_looked_at(tiled, calls):
    found = []
    for patched in (False, True):
        tower, pixels, _ = rotating_tower(tiled, learned=True)
        if not patched:
            unpatch(tower)
        calls.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tower(pixels).square().sum().backward()
        assert len(calls) == (2 if patched and not tiled else 0)
        found.append(tower.ladder.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_device_is_waited_for_once_per_module(monkeypatch):
    """Where looking is not free, what one module was given says nothing of another one of its class."""
    looks = []
    equal = torch.equal
    monkeypatch.setattr(rotary_inputs, "_free_to_look", lambda x: False)
    monkeypatch.setattr(torch, "equal", lambda a, b: looks.append(1) or equal(a, b))
    tower, pixels, before = rotating_tower(tiled=False)
    looks.clear()
    with torch.no_grad():
        for expected in (2, 2):  # cos and sin of the first forward
            assert (tower(pixels) - before).norm() < 1e-5 * before.norm()
            assert len(looks) == expected
        other, pixels, before = rotating_tower(tiled=True)
        with pytest.warns(UserWarning, match="the two halves of cos and sin differ"):
            assert equal(other(pixels), before)


# ----------------------------------------------------------------------------------------- calls of one patched module


def test_tables_changed_in_place_are_read_again(tower):
    """A static buffer (CUDA graphs) keeps its identity and changes its values."""
    model, _ = tower
    module, plain = attention_of(model)[0], copy.deepcopy(attention_of(model)[0])
    patch(model)
    x, angles = randn(1, 20, 64), randn(16, 16).repeat(1, 2)
    tables_ = (angles.cos(), angles.sin())
    for _ in range(2):
        expected = plain(x, position_embeddings=tables_)[0]
        torch.testing.assert_close(module(x, position_embeddings=tables_)[0], expected, rtol=1e-4, atol=1e-5)
        for table, new in zip(tables_, ((angles * 3).cos(), (angles * 3).sin()), strict=True):
            table.copy_(new)


def test_tables_that_are_not_two_equal_halves_are_left_to_the_model(tower, calls):
    model, _ = tower
    module, plain = attention_of(model)[0], copy.deepcopy(attention_of(model)[0])
    patch(model)
    x, angles = randn(1, 20, 64), randn(16, 32)
    calls.clear()
    with pytest.warns(UserWarning, match="the two halves of cos and sin differ"):
        found = module(x, position_embeddings=(angles.cos(), angles.sin()))[0]
    assert not calls and torch.equal(found, plain(x, position_embeddings=(angles.cos(), angles.sin()))[0])


def test_a_mask_is_left_to_the_model(calls):
    model = FAMILIES["clip"].make()
    module, plain = attention_of(model)[0], copy.deepcopy(attention_of(model)[0])
    patch(model)
    x, mask = randn(1, 17, 48), torch.zeros(1, 1, 17, 17)
    mask[..., 9:] = torch.finfo(torch.float32).min
    calls.clear()
    with pytest.warns(UserWarning, match="attention_mask masks padding"):
        found = module(x, mask)[0]
    assert not calls and torch.equal(found, plain(x, mask)[0])
    assert not torch.equal(found, module(x)[0])


def test_transformers_is_not_needed():
    code = """
import sys
sys.modules["transformers"] = None
import torch
from spatial_pe.towers import patch
class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.qkv, self.proj = 2, torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)
    def forward(self, hidden_states):
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return self.proj(((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)), None
tower = torch.nn.Sequential()
tower.add_module("patch_embed", torch.nn.Conv2d(3, 16, 4, 4))
tower.add_module("attention", Attention())
print(len(patch(tower).patched))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "1", result.stderr


@pytest.mark.parametrize("name", ["clip", "dinov3", "qwen2_5_vl", "pixtral"])
@pytest.mark.parametrize("rope", [None, "mixed"])
def test_patch_under_a_default_device(name, rope):
    """The model is where it is, whatever new tensors are made on."""
    if rope is not None and name != "clip":
        pytest.skip("has a RoPE of its own")
    family = FAMILIES[name]
    model, inputs = family.make(), family.inputs()
    before = outputs(model, inputs)
    with torch.device("meta"):
        patch(model, rope=rope)
    assert all(x.device.type == "cpu" for x in (*model.parameters(), *model.buffers()))
    torch.testing.assert_close(outputs(model, inputs), before, rtol=1e-4, atol=1e-5)
