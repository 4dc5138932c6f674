# SPDX-License-Identifier: Apache-2.0
"""Patch a Qwen2.5-VL.

A vision-language model of two layers with random weights answers before ``patch``, after it, and after ``unpatch``. For
real weights, replace ``model`` and ``batch`` as the comments say; nothing else changes.
"""

import torch
import transformers

import spatial_pe


def small_model():
    vision = {"depth": 2, "num_heads": 2, "hidden_size": 80, "intermediate_size": 64, "out_hidden_size": 64}
    vision |= {"patch_size": 4, "spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [1]}
    text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text |= {"rope_scaling": rope, "rope_parameters": rope}  # by transformers 4 and 5
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=9, vision_start_token_id=7, vision_end_token_id=8
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


torch.manual_seed(0)
# Real weights: AutoModelForImageTextToText.from_pretrained("Qwen/Qwen2.5-VL-3B-Instruct", dtype=torch.bfloat16)
model = small_model()
# Real input: AutoProcessor.from_pretrained("Qwen/Qwen2.5-VL-3B-Instruct")(text=..., images=..., return_tensors="pt")
batch = {
    "input_ids": torch.tensor([[1, 7, 9, 9, 9, 9, 8, 5]]),  # text, four merged patches of an image, text
    "pixel_values": torch.randn(16, 2 * 3 * 4 * 4),  # 4 x 4 patches
    "image_grid_thw": torch.tensor([[1, 4, 4]]),
}
if int(transformers.__version__.split(".")[0]) >= 5:
    batch["mm_token_type_ids"] = (batch["input_ids"] == 9).int()

with torch.no_grad():
    before = model(**batch).logits
    print(spatial_pe.patch(model))  # raises, with everything restored, if a layer computed something else
    after = model(**batch).logits
    spatial_pe.unpatch(model)
    restored = model(**batch).logits

error = ((after - before).norm() / before.norm()).item()
print(f"\nlogits patched against unpatched: relative difference {error:.1e}")
print(f"unpatched again, bit for bit: {torch.equal(restored, before)}")
