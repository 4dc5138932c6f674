# SPDX-License-Identifier: Apache-2.0
"""A patched tower under accelerate's hooks."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, outputs
from stack import SMALL, attentions, equal, layer_names, tower

from spatial_pe.towers import patch, unpatch


def io_hooks(model, name, folder):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for module in attentions(model, name):
        add_hook_to_module(module, AlignDevicesHook(io_same_device=True))


def dispatched(model, name, folder):
    """The first layer's weights on disk, where they are read from in every forward, the others in memory."""
    from accelerate import dispatch_model

    dispatch_model(model, device_map(model, name), "cpu", offload_dir=str(folder), force_hooks=True)
    assert next(attentions(model, name)[0].parameters()).is_meta


def device_map(model, name):
    """The first layer on disk, all that is beside it or one of the modules around it in memory."""
    first, places = layer_names(model, name)[0], {}
    for key, module in model.named_modules():
        around = "" if key == "" else f"{key}."
        if f"{first}.".startswith(around):
            places |= {f"{around}{child}": "cpu" for child, _ in module.named_children() if key != first}
    return {key: place for key, place in places.items() if not f"{first}.".startswith(f"{key}.")} | {first: "disk"}


def offloaded(model, name, folder):
    from accelerate import cpu_offload

    cpu_offload(model, torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())


HOOKS = {f.__name__: f for f in (io_hooks, dispatched, offloaded)}


@pytest.mark.parametrize("order", ["hooked then patched", "patched then hooked"])
@pytest.mark.parametrize("way", HOOKS)
@pytest.mark.parametrize("name", SMALL)
def test_accelerate_hooks(name, way, order, calls, tmp_path):
    """accelerate replaces forward on the instances, and keeps the weights elsewhere. It changes no value: neither may
    the two together, whatever is undone first."""
    pytest.importorskip("accelerate")
    from accelerate.hooks import remove_hook_from_submodules

    family = FAMILIES[name]
    (model, inputs), (plain, _), (fused, _) = (tower(name) for _ in range(3))
    classes = [type(m) for m in model.modules()]
    patch(fused)
    with torch.no_grad():
        theirs, ours = outputs(plain, inputs), outputs(fused, inputs)
        steps = [lambda: HOOKS[way](model, name, tmp_path), lambda: patch(model)]
        for step in steps if order == "hooked then patched" else reversed(steps):
            step()
        calls.clear()
        assert equal(outputs(model, inputs), ours) and len(calls) == family.layers
        if order == "hooked then patched":  # the hooks go first
            remove_hook_from_submodules(model)
            assert equal(outputs(model, inputs), ours) and len(calls) == 2 * family.layers
            unpatch(model)
        else:
            unpatch(model)
            calls.clear()
            assert equal(outputs(model, inputs), theirs)
            remove_hook_from_submodules(model)
        calls.clear()
        assert equal(outputs(model, inputs), theirs) and not calls
    assert [type(m) for m in model.modules()] == classes
    assert not any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("order", ["hooked then patched", "patched then hooked"])
@pytest.mark.parametrize("rope", ["axial", "mixed"])
@pytest.mark.parametrize("way", HOOKS)
def test_accelerate_hooks_and_an_added_rope(way, rope, order, calls, tmp_path):
    """The weights of a hooked attention may be on the meta device: the encoding's own must be where it runs."""
    pytest.importorskip("accelerate")
    from accelerate.hooks import remove_hook_from_submodules

    family = FAMILIES["clip"]
    model, fused, inputs = family.make(), family.make(), family.inputs()
    patch(fused, rope=rope)
    steps = [lambda: HOOKS[way](model, "clip", tmp_path), lambda: patch(model, rope=rope)]
    with torch.no_grad():
        for step in steps if order == "hooked then patched" else reversed(steps):
            step()
        calls.clear()
        assert equal(outputs(model, inputs), outputs(fused, inputs)) and len(calls) == 2 * family.layers
        remove_hook_from_submodules(model)
        assert equal(outputs(model, inputs), outputs(fused, inputs))
    assert model.state_dict().keys() == fused.state_dict().keys()
    assert not any(x.is_meta for x in model.state_dict().values())


@pytest.mark.parametrize("name", SMALL)
def test_a_hooked_and_patched_tower_can_be_copied(name, calls):
    """deepcopy copies accelerate's wrapped forwards too: the copy must call its own attention."""
    pytest.importorskip("accelerate")
    family = FAMILIES[name]
    model, inputs = family.make(), family.inputs()
    io_hooks(model, name, None)
    patch(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        before = outputs(model, inputs)
        for module in attentions(model, name):
            next(module.parameters()).zero_()
        calls.clear()
        assert equal(outputs(twin, inputs), before) and len(calls) == family.layers
        unpatch(twin)
        calls.clear()
        assert equal(outputs(twin, inputs), outputs(family.make(), inputs)) and not calls


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("name", SMALL)
def test_a_tower_from_a_saved_directory(name, place, calls, tmp_path):
    """A patched tower saves what an unpatched one does, and one loaded with a device map can be patched."""
    pytest.importorskip("accelerate")
    family = FAMILIES[name]
    model, inputs = tower(name)
    patch(model)
    model.save_pretrained(tmp_path / "saved")
    loaded = type(model).from_pretrained(
        tmp_path / "saved",
        device_map="cpu" if place == "cpu" else device_map(model, name),
        offload_folder=str(tmp_path / "offloaded"),
    )
    patch(loaded)
    calls.clear()
    with torch.no_grad():
        assert equal(outputs(loaded, inputs), outputs(model, inputs)) and len(calls) == 2 * family.layers
        unpatch(loaded)
        assert equal(outputs(loaded, inputs), outputs(tower(name)[0], inputs))
