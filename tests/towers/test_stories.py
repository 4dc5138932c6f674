# SPDX-License-Identifier: Apache-2.0
"""The stories of the README and the docs, run from their own text on small models; and the table of towers."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from families import randomize
from pages import story
from timm_path import import_timm
from towers_without_rope import HOLDERS

import spatial_pe
from tools import support_table as support

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")


def qwen(path):
    """A Qwen2.5-VL of two layers each, and a batch with one image of 4 x 4 patches."""
    text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text |= {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
    vision = {"depth": 2, "num_heads": 2, "hidden_size": 80, "intermediate_size": 64, "out_hidden_size": 64}
    vision |= {"patch_size": 4, "spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [1]}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=9, vision_start_token_id=7, vision_end_token_id=8
    )
    torch.manual_seed(0)
    randomize(transformers.Qwen2_5_VLForConditionalGeneration(config)).save_pretrained(path)
    tokens = torch.tensor([[1, 7, 9, 9, 9, 9, 8, 5]])
    pixels = torch.randn(16, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    batch = {"input_ids": tokens, "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]])}
    kinds = torch.where(tokens == 9, 1, 0)  # what the newest processors add
    return batch | ({"mm_token_type_ids": kinds} if int(transformers.__version__.split(".")[0]) >= 5 else {})


def test_patch_a_qwen_vl(tmp_path, capsys, calls):
    batch = qwen(tmp_path)
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        before = model(**batch).logits
        exact = model.float()(**batch).logits
    names = {"batch": batch}
    with torch.no_grad():
        exec(story("patch").replace("Qwen/Qwen2.5-VL-3B-Instruct", str(tmp_path)), names)
    assert "Qwen2_5_VLVisionAttention" in capsys.readouterr().out and len(calls) >= 2
    assert (names["logits"] - exact).norm() < 2 * (before - exact).norm()  # both round to bfloat16, elsewhere
    assert (names["logits"] - exact).norm() < 5e-2 * exact.norm()
    spatial_pe.unpatch(names["model"])
    with torch.no_grad():
        assert torch.equal(names["model"](**batch).logits, before)


def test_add_rope_to_a_llava_finetune_with_peft_save_and_load(tmp_path):
    holder = HOLDERS["llava"]
    pretrained = holder.make()
    pretrained.save_pretrained(tmp_path / "pretrained")
    inputs = holder.inputs()
    batch = {**inputs, "labels": inputs["input_ids"].clamp(max=pretrained.config.text_config.vocab_size - 1)}
    names = {"torch": torch, "spatial_pe": spatial_pe, "batches": [batch] * 4}
    names["AutoModelForImageTextToText"] = transformers.AutoModelForImageTextToText
    there = os.getcwd()
    os.chdir(tmp_path)
    try:
        exec(story("finetune").replace("llava-hf/llava-1.5-7b-hf", str(tmp_path / "pretrained")), names)
        trained = names["model"]
        ropes = {name: p for name, p in trained.named_parameters() if ".rope." in name and p.requires_grad}
        assert len(ropes) == 2 and all(p.any() for p in ropes.values())  # the encoding moved from its start
        with torch.no_grad():
            first, last = pretrained(**batch).loss, trained(**batch).loss
        assert last < first
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*keys: ")  # what was saved is what is there
            exec(story("save"), names)
    finally:
        os.chdir(there)
    with torch.no_grad():
        expected, found = names["model"].eval()(**inputs).logits, names["again"](**inputs).logits
    assert torch.equal(found, expected)
    assert not torch.equal(found, pretrained(**inputs).logits)


@pytest.mark.slow  # proves every family twice more, 35 s
def test_the_table_of_towers_is_what_is_proven():
    if not support.OLD.exists():
        pytest.skip("make .venv/transformers-4.57")
    import_timm()
    if transformers.__version__.startswith("4."):
        pytest.skip("written by the newest transformers")
    assert support.in_docs() == support.table()
