# SPDX-License-Identifier: Apache-2.0
"""Whole vision towers, patched against unpatched, forward on the CPU.

    python -m benchmarks.throughput.towers_cpu --out benchmarks/results/<device>/towers.json

Real classes of transformers at real widths, random weights (speed does not depend on them), the default attention
implementation (SDPA). Both models take turns in one process; ratios are of medians. ``sdpa_share`` is the part of the
unpatched model's time that torch's profiler finds in scaled_dot_product_attention, so what a patch can gain at most.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import spatial_pe
from benchmarks.timing import interleaved, medians
from spatial_pe.backends import cpu
from spatial_pe.environment import describe

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def dinov2_small_518() -> tuple[nn.Module, Callable[[nn.Module, torch.dtype], Tensor]]:
    """DINOv2-small, 518 px: 1,370 tokens, batch 4."""
    from transformers import Dinov2Config, Dinov2Model

    model = Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14))
    pixels = torch.randn(4, 3, 518, 518)
    return model, lambda m, dtype: m(pixels.to(dtype)).last_hidden_state


def qwen2_5_vl() -> tuple[nn.Module, Callable[[nn.Module, torch.dtype], Tensor]]:
    """Qwen2.5-VL's tower, 4 of its layers, one of them with full attention: 4,500 tokens of one 1260 x 700 image."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    config = Qwen2_5_VLVisionConfig(
        hidden_size=1280, num_heads=16, intermediate_size=3420, depth=4, fullatt_block_indexes=[3], out_hidden_size=2048
    )
    model = Qwen2_5_VisionTransformerPretrainedModel._from_config(config)
    patches, grid = torch.randn(50 * 90, 3 * 2 * 14 * 14), torch.tensor([[1, 50, 90]])
    return model, lambda m, dtype: m(patches.to(dtype), grid_thw=grid)


TOWERS = {"dinov2_small_518": dinov2_small_518, "qwen2_5_vl": qwen2_5_vl}


@torch.no_grad()
def run(forward: Callable, model: nn.Module, dtype: torch.dtype) -> Tensor:
    return forward(model, dtype)


def sdpa_share(run: Callable[[], object]) -> float:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    events = profile.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    return sum(e.cpu_time_total for e in events if e.key == "aten::scaled_dot_product_attention") / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--towers", nargs="+", default=list(TOWERS), choices=TOWERS)
    parser.add_argument("--threads", nargs="+", type=int, default=[2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.manual_seed(0)
    result = {"command": " ".join(["python -m benchmarks.throughput.towers_cpu", *sys.argv[1:]]), **describe()}
    result |= {"cpu_features": cpu.FEATURES, "rows": []}
    for threads in options.threads:
        torch.set_num_threads(threads)
        for name in options.towers:
            for dtype_name, dtype in DTYPES.items():
                model, forward = TOWERS[name]()
                before = model.eval().to(dtype)
                after = copy.deepcopy(before)
                report = spatial_pe.patch(after)

                calls = {
                    "before": functools.partial(run, forward, before, dtype),
                    "after": functools.partial(run, forward, after, dtype),
                }
                samples = interleaved(calls, options.rounds)
                median = medians(samples)
                row = {"tower": name, "what": TOWERS[name].__doc__, "dtype": dtype_name, "threads": threads}
                row |= {"speedup": median["before"] / median["after"], "sdpa_share": sdpa_share(calls["before"])}
                result["rows"].append(row | {"patched": len(report.patched), "seconds": samples})
                print({key: round(x, 3) if isinstance(x, float) else x for key, x in row.items()}, flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
