# SPDX-License-Identifier: Apache-2.0
"""Measure how far scores grow along a row, on real weights: this decides whether softmax needs a running maximum.

    python -m tools.score_growth

DINOv2-small on photographs at 518 px, all layers, heads and rows, in nats: the row's maximum above that of its first
keys (the reference of forward.py), and above the row's own score (a reference that needs no tile). And the share of
blocks of 128 queries for which that reference does not suffice, so that the kernel computes them twice.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from spatial_pe.lab.checkpoints import assets

SIZE, FIRST, BLOCK = 518, 64, 128
ENOUGH = 1.5e26  # limit of a row's sum in spatial_pe/backends/triton/kernels/forward.py


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", nargs="+", default=assets.PHOTOS, choices=assets.PHOTOS)
    options = parser.parse_args()
    from transformers import AttentionInterface

    found: list[tuple[float, float, float]] = []  # for each layer and photograph: above first keys, above own, twice

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        scores = q @ k.transpose(-1, -2) * kwargs["scaling"]  # (B, H, N, N)
        top = scores.amax(-1)
        first, own = scores[..., :FIRST].amax(-1), scores.diagonal(dim1=-2, dim2=-1)
        outside = (scores.double() - first[..., None]).exp().sum(-1) > ENOUGH
        twice = torch.stack([rows.any(-1) for rows in outside.split(BLOCK, -1)]).double().mean()
        found.append(((top - first).max().item(), (top - own).max().item(), twice.item()))
        return (scores.softmax(-1) @ v).transpose(1, 2).contiguous(), None

    AttentionInterface.register("score_growth", attention)
    model = assets.dinov2_small(assets.onnx_file())
    model.set_attn_implementation("score_growth")
    with torch.no_grad():
        for name in options.photos:
            model(assets.normalised(assets.photo(name, SIZE)[None]))
    layers = len(found) // len(options.photos)
    print(f"layer  above the first {FIRST} keys  above its own score  blocks computed twice")
    for layer in range(layers):
        first, own, twice = zip(*found[layer::layers], strict=True)
        print(f"{layer:>5}  {max(first):>23.1f}  {max(own):>19.1f}  {sum(twice) / len(twice):>21.2%}")
    print(f"all: {sum(twice for *_, twice in found) / len(found):.3%} of the blocks are computed twice")


if __name__ == "__main__":
    main()
