# SPDX-License-Identifier: Apache-2.0
"""Attend over images of different size in one call, without padding.

Three images lie behind each other in one sequence; ``cu_seqlens`` says where each starts, and each gets its own grid of
positions. The result is that of one call per image. The same with attention windows, as in Qwen2.5-VL. Random tensors
here; with a model of your own, q, k and v come from its projections.
"""

import torch

from spatial_pe import AxialRoPE, PatchGrid, rope_attention

torch.manual_seed(0)
heads, head_dim = 4, 64
sizes = [(12, 20), (16, 16), (3, 7)]  # (height, width) in patches; prefix=1 would put a CLS token before each image
grid = PatchGrid.packed(sizes)
rotary = AxialRoPE(head_dim)(grid)  # a row of angles for each token of all images
q, k, v = torch.randn(3, grid.num_tokens, heads, head_dim).unbind(0)  # (total_tokens, heads, head_dim)

out = rope_attention(q, k, v, rotary, cu_seqlens=grid.cu_seqlens, max_seqlen=grid.max_seqlen)
print(f"{len(sizes)} images, {grid.num_tokens} tokens, cu_seqlens {grid.cu_seqlens.tolist()}")

worst = 0.0
for (height, width), start, stop in zip(sizes, grid.cu_seqlens[:-1], grid.cu_seqlens[1:], strict=True):
    image = AxialRoPE(head_dim)(PatchGrid(height, width))
    alone = rope_attention(q[None, start:stop], k[None, start:stop], v[None, start:stop], image)
    worst = max(worst, (out[start:stop] - alone[0]).abs().max().item())
print(f"packed against one call per image: largest difference {worst:.1e}")

padded = len(sizes) * max(height * width for height, width in sizes)
print(f"tokens computed: {grid.num_tokens} packed, {padded} padded to the largest")

# Windows of 8 x 8 patches: another order of the tokens, and of their angles, and shorter sequences
windows = grid.windows(8)
packed = windows.pack(q, k, v, rotary)
local = rope_attention(*packed, cu_seqlens=windows.cu_seqlens, max_seqlen=windows.max_seqlen)
back = windows.unpack(local)
print(f"in {len(windows.cu_seqlens) - 1} windows: {tuple(back.shape)}")
