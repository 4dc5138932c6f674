# SPDX-License-Identifier: Apache-2.0
"""Whole vision towers, patched against unpatched: real classes of transformers at real widths, random weights (speed
does not depend on them), the default attention implementation (SDPA); or the tower of a checkpoint.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...towers import patch
from .. import random_towers
from ..checkpoints import checkpoint
from ..random_towers import Built
from . import timing, tower_peers


def dinov2_small_518() -> Built:
    """DINOv2-small, 518 px: 1,370 tokens, batch 4."""
    from transformers import Dinov2Config, Dinov2Model

    model = Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14))
    pixels = torch.randn(4, 3, 518, 518)
    return model, lambda m, dtype: m(pixels.to(dtype)).last_hidden_state


def qwen2_5_vl() -> Built:
    """Qwen2.5-VL's tower, 4 of its layers, one of them with full attention: 4,500 tokens of one 1260 x 700 image."""
    return random_towers.qwen2_5_vl(4, [(700, 1260)])


def qwen3_vl() -> Built:
    """Qwen3-VL's tower, 4 of its layers: 1,920 tokens of one 640 x 768 image."""
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    config = Qwen3VLVisionConfig(depth=4, deepstack_visual_indexes=[1], out_hidden_size=2048)
    patches, grid = torch.randn(40 * 48, 3 * 2 * 16 * 16), torch.tensor([[1, 40, 48]])
    return Qwen3VLVisionModel._from_config(config), lambda m, dtype: m(patches.to(dtype), grid_thw=grid)


def pixtral() -> Built:
    """Pixtral's tower, 4 of its layers: four images in one sequence, 2,816 tokens."""
    return random_towers.pixtral(4, [(512, 512), (512, 384), (384, 512), (256, 256)])


def dinov3_large() -> Built:
    """DINOv3-L, 4 of its layers, 512 px: 1,029 tokens, batch 2."""
    return random_towers.dinov3_large(4, [(512, 512)] * 2)


def siglip_so400m() -> Built:
    """SigLIP-so400m, 4 of its layers, 384 px: 729 tokens, batch 2."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=1152,
        num_attention_heads=16,
        intermediate_size=4304,
        num_hidden_layers=4,
        image_size=384,
        patch_size=14,
    )
    pixels = torch.randn(2, 3, 384, 384)
    return SiglipVisionModel._from_config(config), lambda m, dtype: m(pixels.to(dtype)).last_hidden_state


def clip_large_336() -> Built:
    """CLIP-L/14, 4 of its layers, 336 px: 577 tokens, batch 2."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=1024,
        num_attention_heads=16,
        intermediate_size=4096,
        num_hidden_layers=4,
        image_size=336,
        patch_size=14,
    )
    pixels = torch.randn(2, 3, 336, 336)
    return CLIPVisionModel._from_config(config), lambda m, dtype: m(pixels.to(dtype)).last_hidden_state


TOWERS = {
    "dinov2_small_518": dinov2_small_518,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "pixtral": pixtral,
    "dinov3_large": dinov3_large,
    "siglip_so400m": siglip_so400m,
    "clip_large_336": clip_large_336,
}


@torch.no_grad()
def run(forward: Callable, model: nn.Module, dtype: torch.dtype) -> Tensor:
    return forward(model, dtype)


def sdpa_share(run: Callable[[], object]) -> float:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    events = profile.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    return sum(e.cpu_time_total for e in events if e.key == "aten::scaled_dot_product_attention") / total


def measure(name: str, dtype: torch.dtype, rounds: int, device: str, peers: bool = False) -> dict:
    """Return seconds of a forward before and after; the number of patched modules; the kind of tower; and the share of
    the unpatched tower's time that torch's profiler finds in scaled_dot_product_attention: the upper limit of the gain.
    """
    with torch.device(device):
        module, forward, what = _built(name)
    before = module.eval().to(dtype)
    after = copy.deepcopy(before)
    report = patch(after)
    calls: dict[str, Callable[[], object]] = {
        "before": functools.partial(run, forward, before, dtype),
        "after": functools.partial(run, forward, after, dtype),
    }
    refused: dict[str, str] = {}
    if peers:
        others, refused = tower_peers.build(before, after, forward, dtype, torch.get_num_threads())
        calls |= others
    samples = timing.interleaved(calls, rounds, timing.SETTLE_SECONDS if peers else 0.0, device=device)
    found = {"what": what, "seconds": samples, "refused": refused, "patched": len(report.patched)}
    return found | {"sdpa_share": sdpa_share(calls["before"])}


def _built(name: str) -> tuple[nn.Module, Callable, str]:
    if name in TOWERS:
        return *TOWERS[name](), (TOWERS[name].__doc__ or "").strip()
    tower = checkpoint.load_tower(name)
    size = tower.sizes((448,))[0]
    images = torch.rand(2, 3, size, size)

    def forward(module: nn.Module, dtype: torch.dtype) -> Tensor:
        return replace(tower, module=module).call(images.to(dtype))

    return tower.module, forward, f"{tower.name}, {size} px, batch 2."
