# SPDX-License-Identifier: Apache-2.0
"""A patched tower in the rest of a user's stack: accelerate, PEFT, Trainer, DDP and FSDP2, torch.compile, torch.export,
autocast, copies. That the fused attention is right is the matter of test_families; here it must stay so."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from families import FAMILIES, outputs, randn, to
from processes import join
from test_families import assert_error_rule, run
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from spatial_pe.towers import patch, unpatch

SMALL = ["qwen2_5_vl", "pixtral", "dinov3", "clip", "siglip"]
EPS = torch.finfo(torch.float32).eps


def attentions(model: nn.Module, name: str) -> list[nn.Module]:
    """The attention modules of a tower, patched or not."""
    return [m for m in model.modules() if type(m).__name__.removeprefix("Patched") in FAMILIES[name].attention]


def layer_names(model: nn.Module, name: str) -> list[str]:
    """The modules that hold one attention each."""
    own = attentions(model, name)
    return [key.rpartition(".")[0] for key, m in model.named_modules() if any(m is other for other in own)]


def ropes(model: nn.Module) -> list[nn.Module]:
    return [m.rope for m in model.modules() if isinstance(getattr(m, "rope", None), nn.Module)]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) > 0 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def assert_rule(ours, theirs, exact, dtype=torch.float32):
    """What test_families asks of outputs and gradients, each given as ``run`` returns them."""
    for i, triple in enumerate(zip(ours[0], theirs[0], exact[0], strict=True)):
        assert_error_rule(*triple, dtype, f"output {i}")
    assert ours[1].keys() == theirs[1].keys() == exact[1].keys()
    floor = 0.01 * torch.stack([g.norm() for g in exact[1].values()]).norm() if exact[1] else 0.0
    for key, gradient in exact[1].items():
        assert_error_rule(ours[1][key], theirs[1][key], gradient, dtype, f"gradient of {key}", floor)


def shaken(model: nn.Module) -> nn.Module:
    """Added encodings moved away from the identity, where nothing would show that they are there."""
    for i, rope in enumerate(ropes(model)):
        for parameter in rope.parameters():
            parameter.data.copy_(0.3 * randn(*parameter.shape, seed=20 + i))
    return model


# ----------------------------------------------------------------------------------------------------------- accelerate


def tower(name: str) -> tuple[nn.Module, dict]:
    """A tower that accelerate can offload: of SigLIP without the parts that read another module's weights themselves,
    which are the pooling head (a torch.nn.MultiheadAttention) and the interpolation of its positions."""
    if name == "siglip":
        return FAMILIES[name].make(vision_use_head=False), {"pixel_values": randn(2, 3, 32, 32)}
    return FAMILIES[name].make(), FAMILIES[name].inputs()


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


# ----------------------------------------------------------------------------------------------------------------- PEFT

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


# ------------------------------------------------------------------------------------------------------- loss curves
#
# Rounding differences grow as training goes on, by a factor that no one can know beforehand: it is measured. The
# unpatched model is trained again from weights that are one float32 epsilon off, in two random directions. That is
# less than what any other attention kernel changes in each step, so whatever moves the losses and weights not much
# further is rounding and no mistake.

FEW = 4
STEPS = 20


def nudge(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + EPS * (2 * torch.randint(2, p.shape, generator=generator) - 1))


def curve(name: str, prepare=lambda model: None) -> dict[str, Tensor]:
    """The loss of each step, and the parameters afterwards."""
    family = FAMILIES[name]
    model, inputs = family.make().train(), family.inputs()
    prepare(model)
    # eps: the gradient of a key bias without RoPE is 0 but for rounding, and Adam's default would make of its sign a
    # full step
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step)  # DINOv3 jitters its coordinates in training
        found = outputs(model, inputs)
        loss = sum((x - randn(*x.shape, seed=7 + i)).square().mean() for i, x in enumerate(found))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().double())
    return {"loss": torch.stack(losses)} | {key: p.detach().double() for key, p in model.named_parameters()}


def distances(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == expected.keys()
    return {key: (found[key] - value).norm().item() for key, value in expected.items()}


def allowed_by_rounding(make, expected: dict[str, Tensor]) -> dict[str, float]:
    """make(seed): the same training from nudged weights."""
    nudged = [distances(make(seed), expected) for seed in (1, 2)]
    return {key: FEW * max(row[key] for row in nudged) for key in expected}


@pytest.mark.parametrize("name", SMALL)
def test_loss_curves(name, calls):
    expected = curve(name)
    allowed = allowed_by_rounding(lambda seed: curve(name, lambda model: nudge(model, seed)), expected)
    assert not calls
    far = distances(curve(name, patch), expected)
    assert len(calls) >= STEPS * FAMILIES[name].layers
    assert expected["loss"][-1] < 0.7 * expected["loss"][0]  # it learns
    assert not {key: (far[key], allowed[key]) for key in far if not far[key] <= allowed[key]}


def test_loss_curves_notice_a_small_mistake():
    """A softmax scale that is wrong by 200 epsilons (2e-5) is seen in the losses and in most parameters."""

    def faulty(model):
        for module in attentions(model, "clip"):
            module.scale *= 1 + 200 * EPS

    expected = curve("clip")
    allowed = allowed_by_rounding(lambda seed: curve("clip", lambda model: nudge(model, seed)), expected)
    far = distances(curve("clip", faulty), expected)
    assert far["loss"] > allowed["loss"]
    assert sum(far[key] > allowed[key] for key in far) > len(far) / 2


# -------------------------------------------------------------------------------------------------------------- Trainer


class Classifier(nn.Module):
    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower, self.head = tower, nn.Linear(tower.config.hidden_size, 3)

    def gradient_checkpointing_enable(self, **kwargs) -> None:
        self.tower.gradient_checkpointing_enable(**kwargs)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.tower(pixel_values).last_hidden_state.mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def trained_by_trainer(name, folder, prepare=lambda model: None, checkpointing=True) -> dict[str, Tensor]:
    """The loss of each of three steps, and the parameters afterwards."""
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    model = Classifier(FAMILIES[name].make())
    prepare(model)
    data = [{"pixel_values": randn(3, 32, 32, seed=i), "labels": i % 3} for i in range(6)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        adam_epsilon=1e-4,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    losses = []
    model.register_forward_hook(lambda module, args, output: losses.append(output["loss"].detach().double()))
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    return {"loss": torch.stack(losses)} | {key: p.detach().double() for key, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["clip", "dinov3"])
def test_trainer_with_gradient_checkpointing(name, calls, tmp_path):
    pytest.importorskip("accelerate")
    expected = trained_by_trainer(name, tmp_path)
    allowed = allowed_by_rounding(
        lambda seed: trained_by_trainer(name, tmp_path, lambda model: nudge(model, seed)), expected
    )
    far = distances(trained_by_trainer(name, tmp_path, patch), expected)
    # three steps, forward and again in backward, besides the proof's calls
    assert len(calls) >= 2 * 3 * FAMILIES[name].layers and len(expected["loss"]) == 3
    assert not {key: (far[key], allowed[key]) for key in far if not far[key] <= allowed[key]}


def test_trainer_trains_and_saves_an_added_encoding(tmp_path):
    """With gradient checkpointing what is learned without it, and the file has it."""
    pytest.importorskip("accelerate")
    safetensors = pytest.importorskip("safetensors.torch")

    def with_rope(model):
        patch(model, rope="mixed")

    def with_rope_nudged(seed):
        def prepare(model):
            patch(model, rope="mixed")
            nudge(model, seed)

        return trained_by_trainer("clip", tmp_path, prepare, checkpointing=False)

    expected = trained_by_trainer("clip", tmp_path, with_rope, checkpointing=False)
    allowed = allowed_by_rounding(with_rope_nudged, expected)
    found = trained_by_trainer("clip", tmp_path, with_rope)
    far = distances(found, expected)
    assert not {key: (far[key], allowed[key]) for key in far if not far[key] <= allowed[key]}
    saved = safetensors.load_file(tmp_path / "saved" / "model.safetensors")
    encodings = [key for key in saved if ".rope." in key]
    assert len(encodings) == FAMILIES["clip"].layers
    assert all(saved[key].any() and torch.equal(saved[key].double(), found[key]) for key in encodings)


# ------------------------------------------------------------------------------------------------------ two processes

RANKS, TRAINED = 2, 3
CASES: dict[str, dict] = {"clip": {"rope": "mixed", "start": "full"}, "qwen2_5_vl": {}}


def ddp(model, name, change):
    change(model)
    return DistributedDataParallel(model)


def fsdp2(model, name, change):
    change(model)
    return shard(model, name)


def fsdp2_first(model, name, change):
    model = shard(model, name)
    change(model)
    return model


def shard(model, name):
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in layer_names(model, name):
        fully_shard(model.get_submodule(layer), mesh=mesh)
    return fully_shard(model, mesh=mesh)


def alone(model, name, change):
    change(model)
    return model


WRAPPERS = {f.__name__: f for f in (ddp, fsdp2, fsdp2_first, alone)}
# an encoding that is added to a sharded tower is not sharded, and FSDP knows nothing of it
TRAININGS = [
    (name, wrapper) for name in CASES for wrapper in WRAPPERS if not (CASES[name] and wrapper == "fsdp2_first")
]


def share(name: str, rank: int, step: int) -> dict[str, Tensor]:
    """What one process sees in a step: as many tokens as the other one."""
    seed = 100 + RANKS * step + rank
    if name == "clip":
        return {"pixel_values": randn(2, 3, 32, 32, seed=seed)}
    grid = torch.tensor([[1, 4, 6], [1, 2, 2]] if rank == 0 else [[1, 2, 2], [1, 6, 4]])
    return {"hidden_states": randn(28, 96, seed=seed), "grid_thw": grid}


def learn(name: str, wrapper: str, patched: bool, ranks: list[int]) -> dict[str, Tensor]:
    """Losses and parameters of a process that sees the shares of these ranks."""
    torch.manual_seed(0)  # the random start of the encoding
    tower = FAMILIES[name].make().train()
    model = WRAPPERS[wrapper](tower, name, lambda model: patch(model, **CASES[name]) if patched else None)
    optimizer = torch.optim.SGD(tower.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for step in range(TRAINED):
        shares = [share(name, rank, step) for rank in ranks]
        inputs = {key: torch.cat([part[key] for part in shares]) for key in shares[0]}
        # every token has the same target: no matter where it is in the batch
        loss = sum((x - randn(x.shape[-1], seed=7)).square().mean() for x in outputs(model, inputs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {"loss": torch.stack(losses)} | {key: whole(p.detach()) for key, p in tower.named_parameters()}


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).clone()


def work(rank: int, folder: Path) -> None:
    """What a process does: train every case with every wrapper, and leave the results in a file."""
    warnings.filterwarnings("error", message=".*the model's own attention")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    results = {(name, wrapper): learn(name, wrapper, True, [rank]) for name, wrapper in TRAININGS}
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each of two processes learns; they inherit sys.path, where pytest put this folder."""
    if not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    folder = tmp_path_factory.mktemp("ranks")
    join(spawn(work, (folder,), nprocs=RANKS, join=False))
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def epsilons(expected: dict[str, Tensor], found: list[dict[str, Tensor]]) -> dict[str, float]:
    """Largest difference by name, in float32 epsilons of the tensor's largest element."""
    mean_loss = torch.stack([got["loss"] for got in found]).mean(0)
    far = {}
    for key, value in expected.items():
        got = torch.stack([mean_loss if key == "loss" else got[key] for got in found])
        far[key] = ((got - value).abs().max() / (EPS * value.abs().max())).item()
    return far


# as in tests/test_distributed.py: sums over the batch are two sums, rounded apart
TOLERANCE = 64


@pytest.mark.parametrize(("name", "wrapper"), [training for training in TRAININGS if training[1] != "alone"])
def test_two_processes_learn_what_one_learns(name, wrapper, ranks):
    """One process with the whole batch: unpatched, where that has the same attention."""
    expected = learn(name, "alone", patched=bool(CASES[name]), ranks=[0, 1])
    far = epsilons(expected, [got[name, wrapper] for got in ranks])
    assert any("rope.frequencies" in key for key in far) == bool(CASES[name])
    assert not {key: distance for key, distance in far.items() if not distance < TOLERANCE}
    # and it takes the exchange of gradients
    apart = epsilons(expected, [got[name, "alone"] for got in ranks])
    assert apart["loss"] > 100 * TOLERANCE


# ------------------------------------------------------------------------------------------------ compile and export


WHOLE = pytest.mark.parametrize(
    ("name", "options"), [("dinov3", {}), ("clip", {}), ("siglip", {}), ("clip", {"rope": "mixed"})]
)


def fused_calls(graph: torch.fx.Graph) -> int:
    return sum("spatial_pe.rope_attention" in str(node.target) for node in graph.nodes)


@WHOLE
def test_a_compiled_tower_learns_what_it_would(name, options):
    """The whole tower as one graph, forward and backward."""
    family = FAMILIES[name]
    inputs = family.inputs()
    theirs, exact, model = family.make(), family.make().double(), family.make()
    if options:  # the same model uncompiled is what there is to compare with
        for other in (theirs, exact):
            patch(other, **options)
            shaken(other)
    patch(model, **options)
    shaken(model)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(fused_calls(graph.graph))
        return aot_eager(graph, example_inputs)

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    found = run(compiled, family, inputs, torch.float32)
    assert graphs == [family.layers]
    found = found[0], {key.removeprefix("_orig_mod."): g for key, g in found[1].items()}
    assert_rule(found, run(theirs, family, inputs, torch.float32), run(exact, family, inputs, torch.float64))
    torch._dynamo.reset()


@pytest.mark.parametrize("options", [{}, {"rope": "mixed"}], ids=["plain", "rope"])
def test_a_compiled_tower_is_not_compiled_again(options):
    """The next batch of the same shape finds the graph: what hooks record must not be among its guards."""
    family = FAMILIES["clip"]
    model, inputs = family.make(), family.inputs()
    patch(model, **options)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            assert equal(outputs(compiled, inputs), outputs(model, inputs))
    assert len(graphs) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("options", [{}, {"rope": "mixed"}], ids=["plain", "rope"])
def test_a_compiled_tower_takes_other_resolutions(options):
    """torch.compile makes a size that changed symbolic: the unpatched tower compiles with it in one graph."""
    family = FAMILIES["siglip"]
    model, inputs = family.make(), family.inputs()
    patch(model, **options)
    shaken(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for sides in [(40, 24), (40, 32), (40, 24)]:
            given = {**inputs, "pixel_values": randn(2, 3, *sides)}
            assert equal(outputs(compiled, given), outputs(model, given))
    torch._dynamo.reset()


@WHOLE
def test_an_exported_tower_computes_the_same(name, options):
    """The program, written to a file and read again, has the tower's own outputs, for batches of any size, and the
    fused op in it. (Of Qwen's tower and Pixtral's not even the unpatched can be exported: their grids are data.)"""
    family = FAMILIES[name]
    model, inputs = family.make(), family.inputs()
    patch(model, **options)
    shaken(model)
    other = {**inputs, "pixel_values": randn(5, *inputs["pixel_values"].shape[1:], seed=2)}
    shapes = {**dict.fromkeys(inputs), "pixel_values": {0: torch.export.Dim("batch")}}
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)
        assert fused_calls(program.graph) == family.layers
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        again = torch.export.load(file).module()
        for given in (inputs, other):
            assert equal(outputs(again, given), outputs(model, given))


# --------------------------------------------------------------------------------------------------- copies, precision


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("name", SMALL)
def test_copies_learn_the_same(name, way, calls):
    """The copy of a tower in training has the gradients of its own weights, and none of the original's."""
    family = FAMILIES[name]
    model, inputs = family.make(), family.inputs()
    patch(model)
    model.train()
    torch.manual_seed(1)
    expected = run(model, family, inputs, torch.float32)
    model.zero_grad(set_to_none=True)
    twin = way(model)
    assert all(m.training for m in twin.modules())
    calls.clear()
    torch.manual_seed(1)
    found = run(twin, family, inputs, torch.float32)
    assert len(calls) == family.layers
    assert equal(found[0], expected[0]) and found[1].keys() == expected[1].keys()
    assert all(torch.equal(found[1][key], gradient) for key, gradient in expected[1].items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", SMALL)
def test_a_tower_cast_after_patching(name, dtype, calls):
    """Proven in float32, then cast, as from_pretrained, patch, model.half() do; test_families patches what is cast."""
    family = FAMILIES[name]
    inputs, model = family.inputs(), family.make()
    patch(model)
    calls.clear()
    found = run(model.to(dtype), family, inputs, dtype)
    assert len(calls) == family.layers
    assert_rule(
        found,
        run(family.make().to(dtype), family, inputs, dtype),
        run(family.make().double(), family, inputs, torch.float64),
        dtype,
    )


@pytest.mark.parametrize("name", SMALL)
def test_autocast(name, calls):
    """Weights in float32, products in bfloat16: outputs and gradients as exact as those of the unpatched tower."""
    family = FAMILIES[name]
    inputs, model = family.inputs(), family.make()
    exact = run(family.make().double(), family, inputs, torch.float64)
    patch(model)
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        found = run(model, family, inputs, torch.float32)
        theirs = run(family.make(), family, inputs, torch.float32)
    assert {args[0].dtype for args, _ in calls} == {torch.bfloat16} and len(calls) == family.layers
    assert_rule(found, theirs, exact, torch.bfloat16)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_autocast_leaves_the_angles_alone(name, calls):
    """bfloat16 angles are wrong angles: the table of an added encoding is the same with and without autocast."""
    family = FAMILIES[name]
    inputs, model = family.inputs(), family.make()
    patch(model, rope="mixed")
    shaken(model)
    tables = []
    for enabled in (False, True):
        calls.clear()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs(model, inputs)
        tables.append([args[3].cos for args, _ in calls])
    assert equal(*tables) and tables[0][0].dtype == torch.float32


@pytest.mark.skipif(torch.backends.quantized.engine == "none", reason="torch was built without quantized kernels")
@pytest.mark.parametrize("order", ["patched then quantized", "quantized then patched"])
@pytest.mark.parametrize("name", ["clip", "qwen2_5_vl"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_projections_in_int8(name, order, calls):
    """A quantized projection has no parameters: nothing to read a dtype from, and nothing that we have to."""
    family = FAMILIES[name]
    inputs = family.inputs()

    def quantized(model):
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)

    if order == "patched then quantized":
        model = family.make()
        patch(model)
        model = quantized(model)
    else:
        model = quantized(family.make())
        patch(model)
    calls.clear()
    with torch.no_grad():
        found, expected = outputs(model, inputs), outputs(quantized(family.make()), inputs)
    assert len(calls) == family.layers
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() < b.norm() / 127  # a rounding to int8 may fall to the other side


# -------------------------------------------------------------------------------------- the model's own implementation


@pytest.mark.parametrize("order", ["set then patched", "patched then set"])
@pytest.mark.parametrize("name", SMALL)
def test_set_attn_implementation(name, order, calls):
    """Which attention the model would run without us: kept for unpatch, and no matter while it is patched."""
    family = FAMILIES[name]
    inputs = family.inputs()
    with torch.no_grad():
        theirs = {how: outputs(family.make(implementation=how), inputs) for how in ("eager", "sdpa")}
        fused = family.make()
        patch(fused)
        ours = outputs(fused, inputs)
        for how, before in (("eager", "sdpa"), ("sdpa", "eager")):
            model = family.make(implementation=before)
            steps = [lambda model=model, how=how: model.set_attn_implementation(how), lambda model=model: patch(model)]
            for step in steps if order == "set then patched" else reversed(steps):
                step()
            calls.clear()
            assert equal(outputs(model, inputs), ours) and len(calls) == family.layers
            assert model.config._attn_implementation == how
            unpatch(model)
            assert equal(outputs(model, inputs), theirs[how])


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in SMALL[1:]] + [(name, {"rope": "mixed"}) for name in ("clip", "siglip")],
)
def test_output_attentions_warns_once(name, options, calls):
    """A fallback costs what the patch was for, so it says so: once, not in each layer of each call."""
    family = FAMILIES[name]
    model, inputs = family.make(implementation="eager"), family.inputs()
    patch(model, **options)
    calls.clear()
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert len(model(**inputs, output_attentions=True).attentions) == family.layers
    assert not calls
    assert len([w for w in caught if w.category is UserWarning and "attention" in str(w.message)]) == 1
    outputs(model, inputs)
    assert len(calls) == family.layers
