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
    """Its only replacements are the name of the model and the width of a patch."""
    batch = qwen(tmp_path)
    code = story("patch").replace("Qwen/Qwen2.5-VL-3B-Instruct", str(tmp_path)).replace("1176", "96")
    names: dict = {}
    torch.manual_seed(0)
    with torch.no_grad():
        exec(code, names)
    assert "Qwen2_5_VLVisionAttention" in capsys.readouterr().out and len(calls) >= 2
    model, patches, grid = (names[name] for name in ("model", "patches", "grid"))

    def results() -> list[torch.Tensor]:
        with torch.no_grad():
            return [flat(model.get_image_features(patches, grid)), model(**batch).logits]

    patched = [flat(names["features"]), results()[1]]
    spatial_pe.unpatch(model)
    before = results()
    model.float()
    patches = patches.float()
    for found, own, truth in zip(patched, before, results(), strict=True):
        assert (found - truth).norm() < 2 * (own - truth).norm()  # both round to bfloat16, elsewhere
        assert (found - truth).norm() < 5e-2 * truth.norm()


def flat(features) -> torch.Tensor:
    """The features of all images: transformers 5 returns an output object, 4 a tuple of one tensor an image."""
    found = getattr(features, "pooler_output", features)
    return torch.cat(list(found)) if isinstance(found, tuple | list) else found


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
        assert all(strength > 0 for strength in names["report"].strength().values())  # of PEFT's copies
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


def test_a_trainer_turns_the_encoding_on(tmp_path, monkeypatch, capsys):
    """In 30 steps to what it would take 2,000 at the default rate."""
    monkeypatch.chdir(tmp_path)
    holder = HOLDERS["llava"]
    model = holder.make()
    item = {name: x[0] for name, x in holder.inputs().items() if isinstance(x, torch.Tensor)}
    item["labels"] = item["input_ids"].clamp(max=model.config.text_config.vocab_size - 1)
    names = {"torch": torch, "spatial_pe": spatial_pe, "model": model, "data": [item] * 8}
    code = story("trainer").replace("max_steps=1000", "max_steps=30").replace("warmup_steps=30", "warmup_steps=2")
    exec(code, names)
    strength = names["report"].strength()
    assert len(strength) == len(names["report"].patched) and str(strength) in capsys.readouterr().out
    assert all(0.03 < value < 0.5 for value in strength.values())


@pytest.mark.slow  # proves every family twice more, 35 s
def test_the_table_of_towers_is_what_is_proven():
    if not support.OLD.exists():
        pytest.skip("make .venv/transformers-4.57")
    import_timm()
    if transformers.__version__.startswith("4."):
        pytest.skip("written by the newest transformers")
    assert support.in_docs() == support.table()
