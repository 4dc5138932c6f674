# SPDX-License-Identifier: Apache-2.0
"""Measure one layer of real towers at their width, before and after spatial_pe.patch, called as users call them.

    python -m benchmarks.throughput.gpu.layers --out step1.json --until SECONDS --now FILE

transformers' own classes with random weights, on which speed does not depend: the whole tower, but one layer of it,
on a batch of images. Nothing is passed by hand that a user would not: the lengths of the windows are found by the
patched layer, as in a model. Reports which kernels ran.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import spatial_pe
from spatial_pe._utils import clock
from spatial_pe.backends.triton import backend as triton

from . import state

DEVICE = "cuda"
DTYPE = torch.bfloat16
ROUNDS = 5
Built = tuple[nn.Module, Callable[[nn.Module], Tensor], str]


def qwen2_5_vl(scale: int = 8, width: int = 1280) -> Built:
    """Build a layer with windows: `scale` images of 896 x 896 pixels, 4,096 tokens each in windows of 64."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    config = Qwen2_5_VLVisionConfig(
        hidden_size=width, num_heads=16, intermediate_size=3420, depth=1, fullatt_block_indexes=[], out_hidden_size=2048
    )
    side = 64 if scale > 1 else 16
    patches = torch.randn(scale * side * side, 3 * 2 * 14 * 14, device=DEVICE, dtype=DTYPE)
    grid = torch.tensor([[1, side, side]] * scale, device=DEVICE)
    model = Qwen2_5_VisionTransformerPretrainedModel._from_config(config)
    what = f"Qwen2.5-VL's vision tower, one layer with windows, {len(patches):,} tokens"
    return model, lambda tower: first(tower(patches, grid_thw=grid)), what


def siglip(scale: int = 48, width: int = 1152) -> Built:
    """Build SigLIP-so400m at 384 pixels: 729 tokens an image, 16 heads of 72, no rotation."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=width, num_attention_heads=16, intermediate_size=4304, num_hidden_layers=1, image_size=384,
        patch_size=14, vision_use_head=False,
    )  # fmt: skip
    pixels = torch.randn(scale, 3, 384, 384, device=DEVICE, dtype=DTYPE)
    model = SiglipVisionModel._from_config(config)
    return model, lambda tower: first(tower(pixels)), f"SigLIP-so400m's vision tower, one layer, {scale} images of 729"


TOWERS = {"qwen2_5_vl": qwen2_5_vl, "siglip": siglip}


def first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def measure(name: str, build: Callable[[], Built]) -> dict[str, Any]:
    """Return milliseconds of a forward, and of a forward with its backward; and the difference of the outputs."""
    with torch.device(DEVICE):
        model, forward, what = build()
    before = model.eval().to(DTYPE)
    after = copy.deepcopy(before)
    report = spatial_pe.patch(after)
    towers = {"unpatched": before, "patched": after}
    with torch.no_grad():
        outs = [forward(tower).float() for tower in towers.values()]
    found: dict[str, Any] = {
        "name": name,
        "what": what,
        "patched": len(report.patched),
        "kernels": kept_kernels(lambda: forward(after)),
        "differs_by": ((outs[1] - outs[0]).norm() / outs[0].norm()).item(),
        "median_ms": {},
    }
    for direction, run in (("forward", inference), ("forward+backward", training)):
        calls = {key: run(forward, tower) for key, tower in towers.items()}
        samplings = {key: clock.calibrate(call) for key, call in calls.items()}
        samples: dict[str, list[float]] = {key: [] for key in calls}
        for index in range(ROUNDS):
            for key in clock.in_turn(calls, index):
                samples[key].append(clock.gpu_milliseconds(calls[key], samplings[key]))
        found["median_ms"][direction] = {key: statistics.median(times) for key, times in samples.items()}
    return found


def inference(forward: Callable[[nn.Module], Tensor], tower: nn.Module) -> clock.Call:
    def call() -> Tensor:
        with torch.no_grad():
            return forward(tower)

    return call


def training(forward: Callable[[nn.Module], Tensor], tower: nn.Module) -> clock.Call:
    parameters = [x for x in tower.parameters() if x.requires_grad]
    return lambda: torch.autograd.grad(forward(tower).float().square().mean(), parameters, allow_unused=True)


def kept_kernels(call: Callable[[], Any]) -> list[str]:
    """Return the Triton kernels of a call: windows, or tiles for any length."""
    if triton.unavailable() is not None:
        return []
    from spatial_pe.backends.triton import launch_cache

    launch_cache.clear_cache()
    with torch.no_grad():
        call()
    names = {step.kernel.name for kept in launch_cache._KEPT.values() for step in kept.steps}
    return sorted(names)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("--now", type=Path, required=True)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    status = 0
    for name, build in TOWERS.items():
        content = state.load(options.out)
        broke = state.why_not(content["broken"], [], "layer", name)
        if any(row["name"] == name for row in content["layers"]) or time.time() > options.until:
            continue
        state.mark(options.now, [], "layer", name)
        try:
            row = {"name": name, "refused": broke} if broke else measure(name, build)
        except Exception as error:  # no transformers, no memory, a tower that cannot be patched
            row = {"name": name, "refused": f"{type(error).__name__}: {error}"[:300]}
        status = 1 if "refused" in row else status
        content["layers"].append(row)
        state.save(options.out, content)
        print(row, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
