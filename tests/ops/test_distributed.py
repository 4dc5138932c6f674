# SPDX-License-Identifier: Apache-2.0
"""Data parallel training: two processes with half of the batch each learn what one process learns from all of it.

For DistributedDataParallel, fully_shard (FSDP2), and fully_shard around activation checkpointing: the losses, the
gradient of every parameter in every step and the parameters after three steps are equal, those of the learnable
rotary frequencies among them. One block makes its rotary table inside, from parameters that FSDP shards with it; the
other is given the table that the root made, so that its gradient leaves the block beside that of x.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from oracles import threads
from processes import join
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import spatial_pe
from spatial_pe import AxialRoPE, MixedRoPE, PatchGrid, RoPE2DAttention, Rotary
from spatial_pe.backends import cpu
from spatial_pe.backends.triton import backend as triton

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")

BACKENDS = [
    "reference",
    *([] if cpu.unavailable() else ["cpu"]),
    *([] if triton.unavailable() or not triton.INTERPRETED else [pytest.param("triton", marks=pytest.mark.slow)]),
]
RANKS, STEPS, BATCH = 2, 3, 4
GRID = PatchGrid(2, 3)  # Triton's interpreter is slow
FEATURES, WIDTH, HEADS = 5, 32, 2  # 5 rows of the head's weight: FSDP's shards are uneven


class Block(nn.Module):
    def __init__(self, rope: str | None, backend: str) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.attention = RoPE2DAttention(WIDTH, HEADS, rope=rope, backend=backend)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.checkpointed, self.runs = False, 0

    def forward(self, x: Tensor, where: PatchGrid | Rotary) -> Tensor:
        return checkpoint(self.body, x, where, use_reentrant=False) if self.checkpointed else self.body(x, where)

    def body(self, x: Tensor, where: PatchGrid | Rotary) -> Tensor:
        self.runs += 1
        x = x + self.attention(self.norms[0](x), where)
        return x + self.mlp(self.norms[1](x))


class Tower(nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, FEATURES)
        self.blocks = nn.ModuleList([Block("mixed", backend), Block(None, backend)])
        self.rope = MixedRoPE(WIDTH // HEADS, HEADS)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.blocks[0](self.embed(x), GRID)
        x = self.blocks[1](x, self.rope(GRID))
        return nn.functional.mse_loss(self.head(x), y)


def ddp(tower: Tower) -> nn.Module:
    return DistributedDataParallel(tower)


def fsdp2(tower: Tower) -> nn.Module:
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in tower.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(tower, mesh=mesh)


def fsdp2_checkpointed(tower: Tower) -> nn.Module:
    for block in tower.blocks:
        block.checkpointed = True
    return fsdp2(tower)


def alone(tower: Tower) -> nn.Module:
    return tower


WRAPPERS = {f.__name__: f for f in (ddp, fsdp2, fsdp2_checkpointed, alone)}


def train(backend: str, wrapper: str, rank: int = 0, ranks: int = 1) -> dict[str, Tensor]:
    """Losses and gradients (one row per step), parameters afterwards, and how often the last block ran."""
    torch.manual_seed(0)
    tower = Tower(backend)
    # (steps, B, N, features), of which this rank sees its share of B
    x, y = (part.chunk(ranks, dim=1)[rank] for part in torch.randn(2, STEPS, BATCH, GRID.num_tokens, FEATURES))
    model = WRAPPERS[wrapper](tower)
    optimizer = torch.optim.SGD(tower.parameters(), lr=0.3, momentum=0.9)
    seen = []
    for step in range(STEPS):
        loss = model(x[step], y[step])
        optimizer.zero_grad()
        loss.backward()
        seen.append({"loss": loss.detach()} | {f"d {n}": whole(p.grad) for n, p in tower.named_parameters()})
        optimizer.step()
    result = {name: torch.stack([row[name] for row in seen]) for name in seen[0]}
    result |= {name: whole(p.detach()) for name, p in tower.named_parameters()}
    return result | {"runs": torch.tensor(tower.blocks[1].runs)}


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).clone()


# -------------------------------------------------------------------------------------------------------- two processes


def work(rank: int, backend: str, folder: Path) -> None:
    """What a process does: train with every wrapper, and leave the results in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    results = {wrapper: train(backend, wrapper, rank, RANKS) for wrapper in WRAPPERS}
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=BACKENDS)
def runs(request, tmp_path_factory) -> tuple[dict, list[dict]]:
    """What one process gets from the whole batch, and for each rank what it gets, by wrapper.

    A spawned process inherits sys.path, where pytest put this folder, and the environment, where conftest.py put
    TRITON_INTERPRET: both are there before it imports this file and with it spatial_pe.
    """
    backend, folder = request.param, tmp_path_factory.mktemp("ranks")
    context = spawn(work, (backend, folder), nprocs=RANKS, join=False)
    try:
        with threads(1):
            expected = train(backend, "alone")
    finally:
        join(context)
    return expected, [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def distances(expected: dict[str, Tensor], ranks: list[dict[str, Tensor]]) -> dict[str, float]:
    """Largest difference by name, in float32 epsilons of the tensor's largest element."""
    mean_loss = torch.stack([got["loss"] for got in ranks]).mean(0)
    far = {}
    for name in expected.keys() - {"runs"}:
        got = torch.stack([mean_loss if name == "loss" else got[name] for got in ranks])
        unit = torch.finfo(torch.float32).eps * expected[name].abs().max().item()
        assert unit > 0, f"{name} is 0"
        far[name] = (got - expected[name]).abs().max().item() / unit
    return far


# A sum over the batch is now two sums, rounded apart, and later steps start from what they gave: 5 epsilons on every
# backend. Without the exchange of gradients it is 36 000 or more for every tensor.
TOLERANCE = 64


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "fsdp2_checkpointed"])
def test_two_processes_learn_what_one_learns(wrapper, runs):
    expected, ranks = runs
    far = distances(expected, [got[wrapper] for got in ranks])
    assert {"loss", "d rope.frequencies", "blocks.0.attention.rope.frequencies"} <= far.keys()
    assert not {name: distance for name, distance in far.items() if not distance < TOLERANCE}
    runs_per_step = 2 if wrapper == "fsdp2_checkpointed" else 1
    assert [got[wrapper]["runs"] for got in ranks] == [runs_per_step * STEPS] * RANKS


def test_it_takes_the_exchange_of_gradients(runs):
    """The comparison above can fail: for every parameter when each process learns from its own half."""
    expected, ranks = runs
    far = distances(expected, [got["alone"] for got in ranks])
    assert not {name: distance for name, distance in far.items() if not distance > 100 * TOLERANCE}


def test_mixed_precision_leaves_grids_and_angles_alone():
    """FSDP casts the tensors among a block's arguments, within dataclasses too: angles in bfloat16 are wrong angles."""
    from torch.distributed.utils import _apply_to_tensors

    grid, rotary = PatchGrid(3, 4, prefix=1), Rotary.from_angles(torch.randn(13, 8))
    x, same_grid, same_rotary = _apply_to_tensors(lambda t: t.bfloat16(), (torch.zeros(2), grid, rotary))
    assert x.dtype == torch.bfloat16 and same_grid is grid and same_rotary is rotary


# ------------------------------------------------------------------------------------------------------ mixed precision


class Encoded(nn.Module):
    """Attention with learned frequencies, with a learned strength and with fixed frequencies, all in one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        ropes = [MixedRoPE(WIDTH // HEADS, HEADS), AxialRoPE(WIDTH // HEADS, strength=1 / 3), AxialRoPE(WIDTH // HEADS)]
        self.layers = nn.ModuleList([RoPE2DAttention(WIDTH, HEADS, rope=rope, backend="reference") for rope in ropes])
        self.tables: list[Tensor] = []  # cos of the last forward
        self.dtypes: set[torch.dtype] = set()  # of the projections
        for layer in self.layers:
            layer.rope.register_forward_hook(lambda module, args, rotary: self.tables.append(rotary.cos.detach()))
            layer.qkv.register_forward_hook(lambda module, args, qkv: self.dtypes.add(qkv.dtype))

    def forward(self, x: Tensor) -> Tensor:
        self.tables = []
        for layer in self.layers:
            x = x + layer(x, GRID)
        return x.float().square().mean()

    def frequencies(self) -> list[nn.Parameter]:
        return [parameter for layer in self.layers for parameter in layer.rope.parameters()]


def inputs() -> Tensor:
    return torch.randn(BATCH, GRID.num_tokens, WIDTH, generator=torch.Generator().manual_seed(1))


def bfloat16_fully_shard(model: Encoded) -> nn.Module:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def bfloat16_fsdp1(model: Encoded) -> nn.Module:
    # with use_orig_params, as every trainer has it
    policy = MixedPrecision(param_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16)
    return FullyShardedDataParallel(model, mixed_precision=policy, use_orig_params=True, device_id=torch.device("cpu"))


def autocast_fsdp1(model: Encoded) -> nn.Module:
    policy = MixedPrecision(buffer_dtype=torch.bfloat16)
    return FullyShardedDataParallel(model, mixed_precision=policy, use_orig_params=True, device_id=torch.device("cpu"))


def followed(wrap: Callable[[Encoded], nn.Module], x: Tensor) -> tuple[Encoded, Tensor, list[str]]:
    """The model, its loss, and what its errors said to run, which was run, until there was none."""
    lines: list[str] = []
    while True:
        model = Encoded()
        for line in lines:
            names = {"fully_shard": fully_shard, "MixedPrecisionPolicy": MixedPrecisionPolicy, "spatial_pe": spatial_pe}
            exec(line, names | {"model": model})
        try:
            return model, wrap(model)(x), lines
        except TypeError as error:
            (line,) = re.findall("`(.*)`", str(error))
            assert line not in lines, f"no help: {error}"
            lines.append(line)


def work_in_bfloat16(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    x = inputs().chunk(RANKS)[rank]
    with pytest.raises(TypeError, match=r"spatial_pe: MixedRoPE\.frequencies is torch\.bfloat16.*use torch\.autocast"):
        bfloat16_fsdp1(Encoded())(x)
    for name, wrap in (("fsdp2", bfloat16_fully_shard), ("fsdp1", autocast_fsdp1)):
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "fsdp1"):
            model, loss, lines = followed(wrap, x)
        loss.backward()
        result = {"lines": lines, "dtypes": model.dtypes, "tables": model.tables}
        if name == "fsdp2":  # FSDP1 has flat shards
            result["grads"] = [whole(p.grad) for p in model.frequencies()]
            torch.optim.SGD(model.parameters(), lr=1.0).step()
            result["after"] = [whole(p.detach()) for p in model.frequencies()]
        torch.save(result, folder / f"{name}{rank}.pt")
    dist.destroy_process_group()


def test_mixed_precision_keeps_frequencies_or_says_how(tmp_path):
    """FSDP computes in bfloat16 with copies of the parameters: those of encodings stay float32, or forward refuses.

    The refusal of FSDP2 names a line to run, and with it the tables are those of the float32 frequencies, bit for bit.
    """
    join(spawn(work_in_bfloat16, (tmp_path,), nprocs=RANKS, join=False))
    alone = Encoded()
    alone(inputs()).backward()
    got = {f: torch.load(tmp_path / f"{f}.pt") for f in ("fsdp20", "fsdp21", "fsdp10", "fsdp11")}
    for result in got.values():
        assert result["dtypes"] == {torch.bfloat16}  # it is mixed precision
        for table, expected in zip(result["tables"], alone.tables, strict=True):
            assert torch.equal(table, expected)
    for rank in range(RANKS):
        result = got[f"fsdp2{rank}"]
        assert [re.search(r"spatial_pe\.(\w+)", line)[1] for line in result["lines"]] == ["MixedRoPE", "AxialRoPE"]
        for p, grad, after in zip(alone.frequencies(), result["grads"], result["after"], strict=True):
            assert grad.dtype == after.dtype == torch.float32 and torch.equal(after, p - grad)
            # of the whole batch, through attention in bfloat16
            assert (grad - p.grad).abs().max() < 0.03 * p.grad.abs().max()
