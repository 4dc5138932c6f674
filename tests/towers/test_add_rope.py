# SPDX-License-Identifier: Apache-2.0
"""Adding a 2D RoPE to towers that have none."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import threading
from contextlib import contextmanager

import pytest
import torch
from families import FAMILIES, GRIDS, HERE, TOKENS_AROUND, outputs, randn, to
from torch import nn

from spatial_pe import AxialRoPE, MixedRoPE, PatchGrid, Rotary
from spatial_pe.towers import patch, unpatch
from spatial_pe.towers.config_entry import MARK

POSITION = ("position_embedding.weight", "position_embeddings")


def encodings(model) -> list[nn.Module]:
    return [m.rope for m in model.modules() if isinstance(getattr(m, "rope", None), nn.Module)]


def hidden(model, inputs):
    return model(**inputs).last_hidden_state


def shaken(model, seed=3):
    """The encodings moved away from where they started."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for rope in encodings(model):
            for parameter in rope.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


# -------------------------------------------------------------------------------------------------- start="identity"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["auto", "composed", "reference"])
@pytest.mark.parametrize("rope", ["axial", "mixed"])
@pytest.mark.parametrize("name", GRIDS)
def test_identity_start_is_exact_and_learns(name, rope, backend, dtype):
    """To the last bit what the backend computes without RoPE: cos = 1 and sin = 0 change neither value nor order."""
    family = FAMILIES[name]
    plain, model = family.make().to(dtype), family.make().to(dtype)
    inputs = to(family.inputs(), dtype)
    patch(plain, backend=backend)
    report = patch(model, rope=rope, backend=backend)
    assert len(report.patched) == family.layers and all(rope in row.convention for row in report.patched)
    expected, found = family.outputs(plain, inputs), family.outputs(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    learn(report, plain, model, expected, found)


def learn(report, plain, model, expected, found):
    """Each encoding gets a gradient, and the rest of the model the one that it had."""
    for result in (expected, found):
        sum(x.square().sum() for x in result).backward()
    added = list(report.parameters())
    assert len(added) == len(report.patched)  # one parameter per layer: strength, or frequencies
    for parameter in added:
        assert parameter.grad is not None and parameter.grad.abs().max() > 0
    everything = torch.stack([p.grad.norm() for p in plain.parameters() if p.grad is not None]).norm()
    for key, parameter in plain.named_parameters():
        if parameter.grad is not None:
            assert (parameter.grad - model.get_parameter(key).grad).norm() < 1e-5 * everything, key


@pytest.mark.parametrize("rope", ["axial", "mixed"])
def test_a_training_step_moves_the_encoding_and_the_output(rope):
    family = FAMILIES["dinov2"]
    model, inputs = family.make(), family.inputs()
    report = patch(model, rope=rope)
    target = randn(*hidden(model, inputs).shape, seed=9)
    optimizer = torch.optim.SGD(report.parameters(), lr=1e-3)
    before, start = [p.detach().clone() for p in report.parameters()], (hidden(model, inputs) - target).square().mean()
    for _ in range(5):
        optimizer.zero_grad()
        loss = (hidden(model, inputs) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, report.parameters(), strict=True))
    assert (hidden(model, inputs) - target).square().mean() < start
    named = dict(model.named_parameters())
    assert {id(p) for p in report.parameters()} <= {id(p) for p in named.values()}


# ------------------------------------------------------------------------------------------------------ start="full"


def coordinates(name, inputs):
    """(B|1, N, 2): row and column of each token, and (B|1, N): which are rotated."""
    before, after = TOKENS_AROUND[name]
    if "spatial_shapes" in inputs:
        tokens = inputs["pixel_values"].shape[1]
        shapes = inputs["spatial_shapes"].tolist()
        places = [[(i // w, i % w) if i < h * w else (0, 0) for i in range(tokens)] for h, w in shapes]
        return torch.tensor(places), torch.ones(len(shapes), tokens, dtype=torch.bool)
    height, width = (side // 8 for side in inputs["pixel_values"].shape[2:])
    places = [(0, 0)] * before + [(i, j) for i in range(height) for j in range(width)] + [(0, 0)] * after
    rotated = torch.ones(1, len(places), dtype=torch.bool)
    rotated[:, :before] = False
    rotated[:, before + height * width :] = False
    return torch.tensor(places)[None], rotated


def by_hand(model, name, inputs):
    """The unpatched model, q and k of every layer turned by a rotation written out here, between its own projections.

    Axial: channels j and j + D/2 are a pair; the first D/4 pairs turn with the row, the others with the column, at
    10000^(-i / (D/4)) radians per patch.
    """
    family = FAMILIES[name]
    places, rotated = coordinates(name, inputs)
    dim = family.options["hidden_size"] // family.options["num_attention_heads"]
    ladder = 10000.0 ** (-torch.arange(dim // 4) / (dim // 4))
    angles = torch.cat([places[..., :1] * ladder, places[..., 1:] * ladder], dim=-1) * rotated[..., None]
    turn = torch.polar(torch.ones_like(angles), angles)[:, :, None]  # (B|1, N, 1, D/2) complex

    def rotate(module, args, output):
        heads = output.unflatten(-1, (-1, dim))
        pairs = torch.complex(*heads.chunk(2, dim=-1)) * turn
        return torch.cat([pairs.real, pairs.imag], dim=-1).flatten(-2)

    for module in model.modules():
        for names in (("q_proj", "k_proj"), ("query", "key")):
            if not all(isinstance(getattr(module, name, None), nn.Module) for name in names):
                continue  # a pooling head has keys, but no queries
            for name in names:
                norm = getattr(module, f"{name[0]}_norm", nn.Identity())  # which comes after its projection
                last = getattr(module, name) if isinstance(norm, nn.Identity) else norm
                last.register_forward_hook(rotate)
    return family.outputs(model, inputs)


@pytest.mark.parametrize("name", GRIDS)
def test_full_start_is_the_rotation_written_by_hand(name):
    family = FAMILIES[name]
    inputs = family.inputs()
    model = family.make()
    report = patch(model, rope="axial", start="full")
    assert list(report.parameters()) == [] and len(report.patched) == family.layers
    expected = by_hand(family.make(), name, inputs)
    plain = family.outputs(family.make(), inputs)
    for ours, theirs, without in zip(family.outputs(model, inputs), expected, plain, strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()
        assert (ours - without).norm() > 1e-2 * theirs.norm()  # the rotation does something


@pytest.mark.parametrize("sides", [(32, 32), (48, 16), (16, 48), (8, 64)])
def test_any_resolution(sides):
    family = FAMILIES["dinov2"]
    inputs = {"pixel_values": randn(1, 3, *sides)}
    model = family.make()
    patch(model, rope="axial", start="full")
    hidden(model, family.inputs())  # another resolution before
    expected = by_hand(family.make(), "dinov2", inputs)
    assert (hidden(model, inputs) - expected[0]).norm() < 1e-5 * expected[0].norm()


def test_mixed_full_start_is_random_and_differs_by_layer():
    model = FAMILIES["vit"].make()
    report = patch(model, rope="mixed", start="full")
    first, second = report.parameters()
    assert first.abs().max() > 0 and not torch.equal(first, second)


# -------------------------------------------------------------------------------------------------------- own modules


def test_a_module_is_copied_for_each_layer_and_left_alone():
    rope = MixedRoPE(24, 2)
    model = FAMILIES["clip"].make()
    report = patch(model, rope=rope, start="full")
    layers = encodings(model)
    assert len(layers) == 2 and rope not in layers and layers[0] is not layers[1]
    assert all(torch.equal(layer.frequencies, rope.frequencies) for layer in layers)
    assert {id(p) for p in report.parameters()} == {id(layer.frequencies) for layer in layers}
    patch(model, rope=rope, start="full")  # the same again: harmless
    with pytest.raises(ValueError, match="already patched with rope=MixedRoPE"):
        patch(model, rope=MixedRoPE(24, 2), start="full")


def test_an_encoding_without_parameters_is_shared_and_its_table_made_once(calls):
    model = FAMILIES["clip"].make()
    patch(model, rope=AxialRoPE(24, theta=100.0), start="full")
    first, second = encodings(model)
    assert first is second
    calls.clear()
    outputs(model, FAMILIES["clip"].inputs())
    assert calls[0][0][3] is calls[1][0][3]
    grids = next(m._spatial_pe.grids for m in model.modules() if getattr(m, "rope", None) is first)
    assert grids.kept is not None and copy.deepcopy(grids).kept is None
    assert [key.rpartition(".")[2] for key in model.state_dict() if "rope" in key] == [MARK] * 2


def test_identity_start_refuses_a_module_that_rotates():
    model = FAMILIES["clip"].make()
    with pytest.raises(ValueError, match='start="identity" needs an encoding that is the identity at initialisation'):
        patch(model, rope=AxialRoPE(24))
    patch(model, rope=AxialRoPE(24, strength=0.0))


# ------------------------------------------------------------------------------------- the absolute position embedding


@pytest.mark.parametrize("name", GRIDS)
def test_keep_absolute(name):
    family = FAMILIES[name]
    model, inputs = family.make(), family.inputs()
    before = outputs(model, inputs)
    keys = [k for k, _ in model.named_parameters() if k.endswith(POSITION)]
    if not keys:
        with pytest.raises(ValueError, match="has no absolute position embedding"):
            patch(model, rope="axial", keep_absolute=False)
        return
    parameters = [model.get_parameter(key) for key in keys]
    values = [parameter.detach().clone() for parameter in parameters]
    patch(model, rope="axial", start="full", keep_absolute=False)
    assert not any(parameter.any() or parameter.requires_grad for parameter in parameters)
    without = family.make()
    for key in keys:
        without.get_parameter(key).data.zero_()
    patch(without, rope="axial", start="full")
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, inputs), outputs(without, inputs), strict=True))
    unpatch(model)
    for parameter, value in zip(parameters, values, strict=True):
        assert torch.equal(parameter, value) and parameter.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(model, inputs), strict=True))


# --------------------------------------------------------------------------------------------------- saving and undoing


@pytest.mark.parametrize("rope", ["axial", "mixed"])
@pytest.mark.parametrize("name", ["clip", "dinov2_with_registers"])
def test_the_state_dict_carries_the_encoding(name, rope):
    family = FAMILIES[name]
    inputs = family.inputs()
    model = family.make()
    plain = set(model.state_dict())
    patch(model, rope=rope)
    shaken(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = family.make(seed=4)
    patch(again, rope=rope)
    again.load_state_dict(torch.load(file))
    assert len(set(model.state_dict()) - plain) == 2 * family.layers  # the parameter, and the mark
    expected = outputs(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(expected, outputs(again, inputs), strict=True))
    unpatched = outputs(family.make(), inputs)
    assert not torch.equal(expected[0], unpatched[0])
    unpatch(model)
    assert set(model.state_dict()) == plain
    assert all(torch.equal(a, b) for a, b in zip(unpatched, outputs(model, inputs), strict=True))


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("way", [copy.deepcopy, pickled])
def test_a_copy_has_its_own_encoding_and_grid(way):
    family = FAMILIES["dinov2"]
    model = family.make()
    patch(model, rope="mixed", keep_absolute=False)
    shaken(model)
    twin = way(model)
    wide, tall = {"pixel_values": randn(1, 3, 16, 32)}, {"pixel_values": randn(1, 3, 32, 16)}
    expected = hidden(model, wide)
    hidden(twin, tall)  # as many patches, another shape, in the other model
    assert torch.equal(hidden(twin, wide), expected)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    unpatch(twin)
    assert torch.equal(hidden(twin, wide), hidden(family.make(), wide))


# -------------------------------------------------------------------------------------- calls that cannot be fused


@pytest.mark.parametrize("name", ["clip", "dinov2", "siglip"])
def test_attention_weights_are_those_of_the_rotated_attention(name, calls):
    family = FAMILIES[name]
    model, inputs = family.make(implementation="eager"), family.inputs()
    patch(model, rope="mixed")
    expected = hidden(shaken(model), inputs)
    calls.clear()
    found = model(**inputs, output_attentions=True)
    assert not calls and len(found.attentions) == family.layers
    assert (found.last_hidden_state - expected).norm() < 1e-5 * expected.norm()
    torch.testing.assert_close(found.attentions[0].sum(-1), torch.ones_like(found.attentions[0][..., 0]))


@contextmanager
def forward_on(module, grid):
    """As inside of a forward of its tower on this grid."""
    grids = module._spatial_pe.grids
    grids.enter()
    grids.record(grid)
    yield
    grids.leave()


def test_masks_and_dropout_act_on_the_rotated_attention():
    family = FAMILIES["vit"]
    model = family.make(attention_probs_dropout_prob=0.5)
    patch(model, rope="mixed")
    shaken(model)
    inputs = family.inputs()
    hidden(model, inputs)
    module = next(m for m in model.modules() if getattr(m, "rope", None) is not None)
    x = randn(2, 17, 48)
    with forward_on(module, (4, 4)):
        expected = module(x)[0]
        module.train()
        assert not torch.equal(module(x)[0], module(x)[0])  # dropout acts
        samples = torch.stack([module(x)[0] for _ in range(300)]).mean(0)
        assert (samples - expected).norm() < 0.15 * expected.norm()  # and has the rotated attention as its mean
        if "attention_mask" in module.arguments:
            module.eval()
            mask = torch.zeros(1, 1, 17, 17)
            assert (module(x, mask)[0] - expected).norm() < 1e-5 * expected.norm()
            mask[..., 1:] = torch.finfo(torch.float32).min  # every token sees CLS alone
            alone = module(x, mask)[0]
            torch.testing.assert_close(alone, alone[:, :1].expand_as(alone))


# -------------------------------------------------------------------------------------------- the grid of the forward


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_with_the_grid_of_its_forward(reentrant):
    family = FAMILIES["dinov2"]
    big, small = {"pixel_values": randn(1, 3, 16, 40)}, {"pixel_values": randn(1, 3, 24, 16)}
    grads = []
    for checkpointed in (False, True):
        model = family.make().train()
        report = patch(model, rope="mixed")
        shaken(model)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        loss = sum(hidden(model, inputs).square().sum() for inputs in (big, small))  # two forwards, then backward
        loss.backward()
        grads.append([p.grad for p in report.parameters()])
    for a, b in zip(*grads, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


WIDE, TALL = {"pixel_values": randn(1, 3, 16, 32)}, {"pixel_values": randn(1, 3, 32, 16)}  # as many patches


def pipeline(model, hook=lambda: None):
    """Two forwards, backward of the first, another forward, backward of the second; gradients of the encodings."""
    first, second = (hidden(model, inputs).square().sum() for inputs in (WIDE, WIDE))
    first.backward()
    hidden(model, TALL)
    hook()
    second.backward()


def kept_graph(model):
    loss = hidden(model, WIDE).square().sum()
    loss.backward(retain_graph=True)
    hidden(model, TALL)
    loss.backward()


def both_at_once(model):
    (hidden(model, WIDE).square().sum() + hidden(model, TALL).square().sum()).backward()


def backward_in_another_thread(model):
    loss = hidden(model, WIDE).square().sum()
    hidden(model, TALL)
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()


@pytest.mark.parametrize("way", [pipeline, kept_graph, both_at_once, backward_in_another_thread])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["clip", "dinov2"])
def test_a_recomputation_has_the_grid_of_its_forward(name, reentrant, way):
    """Whatever came in between: forwards on another grid of as many patches, other backwards, another thread."""
    grads = []
    for checkpointed in (False, True):
        options = {"image_size": 32} if name == "clip" else {}
        model = FAMILIES[name].make(**options).train()
        report = patch(model, rope="mixed")
        shaken(model)
        if name == "clip":
            forward = model.forward
            model.forward = functools.partial(forward, interpolate_pos_encoding=True)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant and way is kept_graph and checkpointed:
            with pytest.raises(RuntimeError):  # torch's own: it frees what it recomputes
                way(model)
                raise RuntimeError("torch can do it by now")
            return
        way(model)
        grads.append([p.grad for p in report.parameters()])
    for a, b in zip(*grads, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_recomputation_from_an_input_that_moved_is_refused():
    """What was saved went through memory of another kind, and nothing tells whose it was."""
    model = FAMILIES["dinov2"].make().train()
    patch(model, rope="mixed")
    shaken(model)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x.clone()):
        loss = hidden(model, WIDE).sum()
    with pytest.raises(RuntimeError, match="nothing tells its patch grid"):
        loss.backward()


@pytest.mark.parametrize("rope", ["axial", "mixed"])
def test_threads_with_grids_of_their_own(rope):
    """A server: as many patches in another shape, at the same time."""
    model = FAMILIES["dinov2"].make()
    patch(model, rope=rope, start="full")
    expected = {key: hidden(model, x) for key, x in (("wide", WIDE), ("tall", TALL))}
    wrong = []

    def serve(key, inputs):
        for _ in range(60):
            if not torch.equal(hidden(model, inputs), expected[key]):
                wrong.append(key)

    threads = [threading.Thread(target=serve, args=pair) for pair in (("wide", WIDE), ("tall", TALL))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not torch.equal(expected["wide"], expected["tall"])


def test_compiled_layers_in_two_threads_are_refused():
    """Compiled code reads one attribute, which another thread would change between its guards and its reads."""
    model = FAMILIES["dinov2"].make()
    patch(model, rope="axial", start="full")
    expected = {key: hidden(model, x) for key, x in (("wide", WIDE), ("tall", TALL))}
    torch._dynamo.reset()
    layers = [m for m in model.modules() if type(m).__name__ == "Dinov2Layer"]
    for layer in layers:
        layer.compile(backend="eager")
    for key, x in (("wide", WIDE), ("tall", TALL), ("wide", WIDE)):  # one after another is right
        torch.testing.assert_close(hidden(model, x), expected[key], rtol=1e-4, atol=1e-5)
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        go_on.wait(20)

    handle = model.embeddings.register_forward_hook(wait)  # its grid is known, its layers have not begun
    found = []
    thread = threading.Thread(target=lambda: found.append(hidden(model, WIDE)))
    thread.start()
    try:
        assert inside.wait(20)
        handle.remove()
        with pytest.raises(RuntimeError, match=r"grids of \(2, 4\) and \(4, 2\) patches at once"):
            hidden(model, TALL)
    finally:
        go_on.set()
        thread.join()
    torch.testing.assert_close(found[0], expected["wide"], rtol=1e-4, atol=1e-5)


def test_a_layer_outside_of_a_forward_is_refused():
    model = FAMILIES["dinov2"].make()
    patch(model, rope="axial", start="full")
    hidden(model, WIDE)
    module = next(m for m in model.modules() if getattr(m, "rope", None) is not None)
    for layer in (module, copy.deepcopy(module)):
        with pytest.raises(RuntimeError, match=r"called outside of a forward of its tower.*Call the tower"):
            layer(randn(1, 9, 48))


def test_a_tower_that_shares_its_encoder_is_refused():
    """Its own embedding tells nobody its grid; the last one of the other tower is not it."""
    model, other = FAMILIES["dinov2"].make(), FAMILIES["dinov2"].make(seed=3)
    patch(model, rope="axial", start="full")
    other.encoder = model.encoder
    hidden(model, WIDE)
    with pytest.raises(RuntimeError, match="called outside of a forward of its tower"):
        hidden(other, TALL)


def test_a_forward_that_fails_leaves_nothing_behind():
    model = FAMILIES["dinov2"].make()
    patch(model, rope="axial", start="full")
    expected = hidden(model, WIDE)
    layer = next(m for m in model.modules() if type(m).__name__.endswith("MLP"))
    handle = layer.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hidden(model, TALL)
    handle.remove()
    grids = next(m._spatial_pe.grids for m in model.modules() if getattr(m, "rope", None) is not None)
    assert not grids.here.calls and not grids.here.inside and not grids.running
    assert torch.equal(hidden(model, WIDE), expected)


def test_inference_then_training():
    """Lightning's sanity check: what was made in inference mode must not be met by autograd."""
    model = FAMILIES["dinov2"].make()
    patch(model, rope=AxialRoPE(24), start="full")
    with torch.inference_mode():
        hidden(model, WIDE)
    hidden(model, WIDE).sum().backward()


@pytest.mark.parametrize(
    ("rope", "match"),
    [
        (MixedRoPE(24, 3), "rope has a table for each of 3 heads, the tower's attention has 2 heads"),
        (AxialRoPE(32), "rope rotates 32 channels, the tower's heads have 24: build AxialRoPE for head_dim=24"),
    ],
)
def test_a_rope_that_does_not_fit_raises_at_patch(rope, match):
    model = FAMILIES["clip"].make()
    with pytest.raises(ValueError, match=match):
        patch(model, rope=rope, start="full")
    assert untouched(model)


class OutOfMemory(AxialRoPE):
    """Raises when the second copy is moved."""

    moves = 0

    def to(self, *args, **kwargs):
        type(self).moves += 1
        if type(self).moves == 2:
            raise torch.OutOfMemoryError("no memory left")
        return super().to(*args, **kwargs)


def untouched(model):
    fresh = FAMILIES["clip"].make()
    return (
        [type(m) for m in model.modules()] == [type(m) for m in fresh.modules()]
        and set(model.state_dict()) == set(fresh.state_dict())
        and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        and torch.equal(hidden(model, FAMILIES["clip"].inputs()), hidden(fresh, FAMILIES["clip"].inputs()))
    )


def test_patch_that_runs_out_of_memory_leaves_the_model_as_it_was():
    model = FAMILIES["clip"].make()
    with pytest.raises(torch.OutOfMemoryError):
        patch(model, rope=OutOfMemory(24, strength=0.1), start="full")
    assert OutOfMemory.moves == 2 and untouched(model)


def test_patch_that_is_interrupted_leaves_the_model_as_it_was(monkeypatch):
    from spatial_pe.towers import patch as module

    swaps = []

    def interrupted(*args):
        swaps.append(args)
        if len(swaps) == 2:
            raise KeyboardInterrupt
        return original(*args)

    source = __import__("sys").modules["spatial_pe.towers.patch"]
    original = source.swap
    monkeypatch.setattr(source, "swap", interrupted)
    model = FAMILIES["clip"].make()
    with pytest.raises(KeyboardInterrupt):
        module(model, rope="mixed", keep_absolute=False)
    assert len(swaps) == 2 and untouched(model)


def test_a_checkpoint_loaded_since_stays_when_the_position_embedding_comes_back():
    model, other = FAMILIES["clip"].make(), FAMILIES["clip"].make(seed=5)
    patch(model, rope="axial", keep_absolute=False)
    model.load_state_dict(other.state_dict(), strict=False)
    unpatch(model)
    inputs = FAMILIES["clip"].inputs()
    assert torch.equal(hidden(model, inputs), hidden(other, inputs))


@pytest.mark.parametrize("rope", [None, "axial"])
def test_a_scale_that_is_changed_is_followed(rope):
    model, plain = FAMILIES["clip"].make(), FAMILIES["clip"].make()
    patch(model, rope=rope)
    for each in (model, plain):
        for module in each.modules():
            if "Attention" in type(module).__name__:
                module.scale = 0.5
    inputs = FAMILIES["clip"].inputs()
    torch.testing.assert_close(hidden(model, inputs), hidden(plain, inputs))


@pytest.mark.parametrize("rope", ["axial", "mixed"])
def test_an_encoding_that_no_checkpoint_fills_is_initialised(rope):
    """meta, patch, to_empty, load_state_dict(strict=False): a checkpoint of the tower without RoPE."""
    with torch.device("meta"):
        model = FAMILIES["clip"].load()[0](FAMILIES["clip"].load()[1](**FAMILIES["clip"].options))
    patch(model, rope=rope, verify=False)
    torch.use_deterministic_algorithms(True)  # what is not filled is NaN
    try:
        model.to_empty(device="cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    weights = FAMILIES["clip"].make()
    model.load_state_dict(weights.state_dict(), strict=False)
    for module in model.modules():
        if hasattr(module, "position_ids"):  # a buffer that checkpoints leave out
            module.position_ids = torch.arange(module.position_ids.shape[-1]).expand((1, -1))
    inputs = FAMILIES["clip"].inputs()
    torch.testing.assert_close(hidden(model.eval(), inputs), hidden(weights, inputs))


def test_an_encoding_whose_buffer_is_annealed():
    model = FAMILIES["dinov2"].make()
    rope = Annealed()
    patch(model, rope=rope, start="full")
    shared = next(m.rope for m in model.modules() if getattr(m, "rope", None) is not None)
    before = hidden(model, WIDE)
    shared.strength.fill_(0.5)
    assert not torch.equal(hidden(model, WIDE), before)
    shared.strength.fill_(1.0)
    assert torch.equal(hidden(model, WIDE), before)


class Annealed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.axial = AxialRoPE(24)
        self.register_buffer("strength", torch.ones(()), persistent=False)

    def forward(self, grid):
        table = self.axial(grid)
        return Rotary.from_angles(torch.atan2(table.sin, table.cos) * self.strength, table.pairing)


def test_tokens_that_are_not_the_grid_raise():
    model = FAMILIES["dinov2"].make()
    patch(model, rope="axial")
    inputs = FAMILIES["dinov2"].inputs()
    hidden(model, inputs)
    module = next(m for m in model.modules() if getattr(m, "rope", None) is not None)
    with (
        pytest.raises(ValueError, match=r"attention got 12 tokens, 1 of them not patches.*\(it is 5 x 3\)"),
        forward_on(module, (5, 3)),
    ):
        module(randn(1, 12, 48))


@pytest.mark.parametrize("name", [name for name in ("qwen2_5_vl", "pixtral", "dinov3") if name in HERE])
def test_a_tower_with_rope_gets_no_second_one(name):
    with pytest.raises(ValueError, match="has RoPE of its own"):
        patch(FAMILIES[name].make(), rope="axial")


def test_the_prefix_is_where_the_model_has_it():
    """CLS and registers, then patches: the rows of the table that do not turn."""
    model = FAMILIES["dinov2_with_registers"].make()
    patch(model, rope="axial", start="full")
    hidden(model, FAMILIES["dinov2_with_registers"].inputs())
    module = next(m for m in model.modules() if getattr(m, "rope", None) is not None)
    bound = module._spatial_pe
    with forward_on(module, (5, 3)):
        rotary = bound.grids.rotary(module, torch.zeros(1, 18, 48), bound.prefix)
    assert torch.equal(rotary.cos, AxialRoPE(24)(PatchGrid(5, 3, prefix=3)).cos)
