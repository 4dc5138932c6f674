# SPDX-License-Identifier: Apache-2.0
"""An added RoPE rotates by the grid of its forward: recomputation, threads, other resolutions."""

from __future__ import annotations

import copy
import functools
import threading

import pytest
import torch
from added_rope import forward_on, hidden, shaken
from families import FAMILIES, HERE, randn
from torch import nn

from spatial_pe import AxialRoPE, MixedRoPE, PatchGrid, Rotary
from spatial_pe.towers import patch, unpatch


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
    with pytest.raises(RuntimeError, match="its patch grid is unknown"):
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


class Tables(nn.Module):
    """An encoding of a user: what ``make`` returns for a grid."""

    def __init__(self, make) -> None:
        super().__init__()
        self.make = make

    def forward(self, grid):
        return self.make(grid)


def half_a_grid(grid):
    return AxialRoPE(24)(PatchGrid(max(1, grid.num_tokens // 2), 1))


def a_table_for_two_images(grid):
    table = AxialRoPE(24)(grid)
    return Rotary(table.cos.expand(2, -1, -1, -1), table.sin.expand(2, -1, -1, -1))


def fails_beside_a_column(grid):
    if grid.images[0][1] > 1:
        raise IndexError("no such column")
    return AxialRoPE(24)(grid)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (
            lambda grid: torch.ones(grid.num_tokens, 24),
            TypeError,
            "rope must return a spatial_pe.Rotary, but Tables retur",
        ),
        (
            half_a_grid,
            ValueError,
            "rope=Tables must return a row for each token, 16 for 3 x 5 patches and 1",
        ),
        (a_table_for_two_images, ValueError, "cannot run in CLIPAttention: ValueError: rotary has batch 2, q has 1"),
        (lambda grid: grid.no_such_thing, ValueError, "rope=Tables fails on a grid of . x . patches: AttributeError"),
        (fails_beside_a_column, ValueError, "rope=Tables fails on a grid of 3 x 5 patches: IndexError: no such column"),
    ],
)
@pytest.mark.parametrize("start", ["identity", "full"])
def test_an_encoding_that_cannot_run_raises_at_patch(make, error, match, start):
    model = FAMILIES["clip"].make()
    if start == "identity" and make in (half_a_grid, a_table_for_two_images):
        pytest.skip("the identity is asked for first")
    with pytest.raises(error, match=match):
        patch(model, rope=Tables(make), start=start)
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
    with pytest.raises(ValueError, match="has RoPE already"):
        patch(FAMILIES[name].make(), rope="axial")


def test_the_prefix_is_where_the_model_has_it():
    """CLS and registers, then patches: the rows of the table that do not rotate."""
    model = FAMILIES["dinov2_with_registers"].make()
    patch(model, rope="axial", start="full")
    hidden(model, FAMILIES["dinov2_with_registers"].inputs())
    module = next(m for m in model.modules() if getattr(m, "rope", None) is not None)
    bound = module._spatial_pe
    with forward_on(module, (5, 3)):
        rotary = bound.grids.rotary(module, torch.zeros(1, 18, 48), bound.prefix)
    assert torch.equal(rotary.cos, AxialRoPE(24)(PatchGrid(5, 3, prefix=3)).cos)
