# SPDX-License-Identifier: Apache-2.0
"""Add 2D RoPE to CLIP and fine-tune it.

CLIP's vision tower has a learned position embedding and no RoPE. ``patch(..., rope="axial")`` adds one that starts as
the identity, so that the first step starts from what the pretrained tower computes. The task here: which quarter of the
picture is bright. The model is small and random; the comments say what to change for real weights.
"""

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

import spatial_pe

torch.manual_seed(0)
config = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
# Real weights: CLIPVisionModel.from_pretrained("openai/clip-vit-large-patch14-336")
model = CLIPVisionModel(CLIPVisionConfig(**config, image_size=32, patch_size=8))
head = nn.Linear(model.config.hidden_size, 4)


def pictures(count):
    """Noise of 32 x 32 pixels, one quarter of it brighter. Real data: a DataLoader of pixel_values and labels."""
    labels = torch.randint(4, (count,))
    pixels = torch.randn(count, 3, 32, 32)
    for picture, label in zip(pixels, labels.tolist(), strict=True):
        row, column = divmod(label, 2)
        picture[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] += 2
    return pixels, labels


def loss_of(pixels, labels):
    return nn.functional.cross_entropy(head(model(pixel_values=pixels).pooler_output), labels)


test = pictures(64)
with torch.no_grad():
    before = model(pixel_values=test[0]).pooler_output
report = spatial_pe.patch(model, rope="axial")  # rope="mixed": learned frequencies per head
print(report)
with torch.no_grad():
    after = model(pixel_values=test[0]).pooler_output
    difference = (after - before).norm() / before.norm()
    print(f"\nat the start, patched against unpatched: relative difference {difference:.1e}")
    print(f"loss before training: {loss_of(*test):.2f}")

# One strength per channel pair and layer, all 0: a group of their own, with a larger learning rate and no weight decay.
groups = report.parameter_groups(nn.ModuleList([model, head]), rope_lr=1e-2)
optimizer = torch.optim.AdamW(groups, lr=2e-3)
for step in range(1, 91):
    optimizer.zero_grad()
    loss = loss_of(*pictures(32))
    loss.backward()
    optimizer.step()
    if step % 15 == 0:
        print(f"step {step}: loss of this batch {loss.item():.2f}", flush=True)

with torch.no_grad():
    print(f"loss after 90 steps: {loss_of(*test):.2f}")
for name, strength in report.strength().items():  # 0 is the identity, 1 is fully on
    print(f"{name}: strength {strength:.2f}")
# To keep it: model.save_pretrained(folder), and spatial_pe.from_pretrained(CLIPVisionModel, folder) gives it back.
