# SPDX-License-Identifier: Apache-2.0
"""What the LLaVA recipe starts from, in small: towers of each family, a language model, conversations, pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 200, 30)}
SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
SIZE |= {"image_size": 32, "patch_size": 8}
TOWERS: dict[str, Any] = {
    "clip": (CLIPVisionModel, CLIPVisionConfig, CLIPImageProcessor),
    "siglip": (SiglipVisionModel, SiglipVisionConfig, SiglipImageProcessor),
    "siglip2": (SiglipVisionModel, SiglipVisionConfig, SiglipImageProcessor),
    "aimv2": (Aimv2VisionModel, Aimv2VisionConfig, CLIPImageProcessor),
}


def tower(family: str, path: Path) -> Path:
    torch.manual_seed(0)
    model, config, processor = TOWERS[family]
    model(config(**SIZE)).save_pretrained(path)
    how = {"size": {"height": 32, "width": 32}}
    if processor is CLIPImageProcessor:
        how = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor(**how).save_pretrained(path)
    return path


def language_model(path: Path) -> Path:
    """A Llama and a byte-level tokenizer with Llama's special tokens."""
    torch.manual_seed(0)
    coder = Tokenizer(models.BPE())
    coder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    coder.decoder = decoders.ByteLevel()
    texts = ["USER: ASSISTANT: which colour is left of the red square? blue it is on the right"] * 4
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    coder.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=320, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=coder, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(path)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def conversations(folder: Path, count: int = 24, text_only: bool = False) -> tuple[Path, Path]:
    """LLaVA's JSON and its pictures: two coloured halves; one in four without a picture, if asked for."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = []
    for index in range(count):
        left, right = rng.choice(list(COLOURS), 2, replace=False)
        turns = [("human", "<image>\nwhich colour is left?"), ("gpt", left)]
        turns += [("human", f"what is right of the {left} square?"), ("gpt", f"{right} it is")]
        row: dict[str, Any] = {"id": f"e{index}"}
        if text_only and index % 4 == 0:
            turns[0] = ("human", "which colour is left?")
        else:
            pixels = np.zeros((40, 60, 3), np.uint8)
            pixels[:, :30], pixels[:, 30:] = COLOURS[left], COLOURS[right]
            Image.fromarray(pixels).save(images / f"{index}.png")
            row["image"] = f"{index}.png"
        rows.append(row | {"conversations": [{"from": who, "value": text} for who, text in turns]})
    path = folder / "conversations.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path, images
