# SPDX-License-Identifier: Apache-2.0
"""A patched tower under DDP and FSDP2."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from families import FAMILIES, outputs, randn
from processes import join
from stack import EPS, layer_names
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from spatial_pe.towers import patch

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
    warnings.filterwarnings("error", message=".*the original attention")
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


# as in tests/ops/test_distributed.py: sums over the batch are two sums, rounded apart
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
