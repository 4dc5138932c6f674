# SPDX-License-Identifier: Apache-2.0
"""LLaVA's conversations as training examples: read, tokenised as for inference, collated.

The format is that of LLaVA's own JSON files (blip_laion_cc_sbu_558k.json, llava_v1_5_mix665k.json): a list of
``{"id", "image": file (absent: text only), "conversations": [{"from": "human" | "gpt", "value": text}]}``, where
``<image>`` in a text stands for the picture.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

IGNORED = -100  # a label without loss
# Chat template of transformers' LLaVA-1.5 checkpoints, so that their evaluations apply. Pictures come first.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ ' ' if message['role'] == 'user' else eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


class DataError(ValueError):
    """Data that cannot be used for training; the message names the example."""


@dataclass(frozen=True)
class Example:
    id: str
    images: tuple[Path, ...]
    turns: tuple[tuple[str, str], ...]  # question, answer


def read(path: Path, images: Path) -> list[Example]:
    """Read the examples of a file and check them.

    Args:
        path: LLaVA's JSON.
        images: the folder that its "image" entries are relative to.

    Raises:
        DataError: the file is not LLaVA's JSON, human and gpt do not alternate, or the number of ``<image>`` in a
            text differs from that of pictures.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"--data {str(path)!r} cannot be read: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise DataError(f"--data {str(path)!r} must be a list of conversations, as llava_v1_5_mix665k.json is")
    return [_example(index, row, images) for index, row in enumerate(rows)]


def _example(index: int, row: Any, images: Path) -> Example:
    name = f"example {index}"
    try:
        name = f"example {row.get('id', index)!r}"
        said = [(turn["from"], turn["value"]) for turn in row["conversations"]]
        files = row.get("image") or []
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(f'{name} has no "conversations" of "from" and "value": {error}') from error
    if len(said) < 2 or [who for who, _ in said] != ["human", "gpt"] * (len(said) // 2):
        raise DataError(f"{name}: human and gpt must alternate, human first, got {[who for who, _ in said]}")
    files = [files] if isinstance(files, str) else list(files)
    held = sum(text.count("<image>") for _, text in said)
    if held != len(files):
        raise DataError(f"{name} has {len(files)} pictures and {held} <image> in its text")
    turns = tuple((said[i][1], said[i + 1][1]) for i in range(0, len(said), 2))
    return Example(str(row.get("id", index)), tuple(images / file for file in files), turns)


@dataclass(frozen=True)
class Encoder:
    """Converter of examples to tokens and pixels.

    ``tokens``: the length of a picture; ``longest``: of a sequence; ``plain``: captions only, as LLaVA's first stage,
    else the chat of CHAT_TEMPLATE.
    """

    tokenizer: Any
    image_processor: Any
    tokens: int
    longest: int
    plain: bool

    def __call__(self, example: Example) -> dict[str, Any]:
        """Return ``input_ids`` (L,) and ``labels`` (L,) int64, IGNORED outside of the answers; ``pixels`` (images, 3,
        H, W).

        Raises:
            DataError: a picture cannot be read, or would be cut at ``longest``; no answer is left before it.
        """
        text, answers = self.text(example)
        picture = self.tokenizer.convert_tokens_to_ids("<image>")
        coded = self.tokenizer(text, return_offsets_mapping=True)
        ids, spans = coded["input_ids"], coded["offset_mapping"]
        labels = [
            token if any(start < b and a < end for a, b in answers) else IGNORED
            for token, (start, end) in zip(ids, spans, strict=True)
        ]
        if picture in ids[self.longest :]:
            raise DataError(
                f"example {example.id!r} has {len(ids)} tokens, and a picture beyond --max-length {self.longest}: "
                "raise it, or leave the example out"
            )
        if all(label == IGNORED for label in labels[: self.longest]):
            raise DataError(f"example {example.id!r} has no answer within --max-length {self.longest}")
        pixels = [self.pixels(opened(file, example.id)) for file in example.images]
        return {
            "input_ids": torch.tensor(ids[: self.longest]),
            "labels": torch.tensor(labels[: self.longest]),
            "pixels": torch.stack(pixels) if pixels else None,
        }

    def text(self, example: Example) -> tuple[str, list[tuple[int, int]]]:
        """Return the model's input text, and the spans of the answers in it; they include the end token."""
        eos = self.tokenizer.eos_token
        text, answers = "", []
        for question, answer in example.turns:
            if self.plain:
                text += "<image>" * question.count("<image>")
                said = f"{answer.strip()}\n"
            else:
                text += f"USER: {_picture_first(question)} ASSISTANT:"
                said = f" {answer.strip()}{eos}"
            answers.append((len(text), len(text) + len(said)))
            text += said
        # the same offsets after each <image> has become as many tokens as a picture has
        more = len("<image>") * (self.tokens - 1)
        answers = [(a + more * text[:a].count("<image>"), b + more * text[:b].count("<image>")) for a, b in answers]
        return text.replace("<image>", "<image>" * self.tokens), answers

    def pixels(self, image: Image.Image) -> Tensor:
        """Return (3, H, W) float32; padded to a square with the processor's mean colour first, as LLaVA-1.5 does."""
        colour = tuple(int(255 * channel) for channel in self.image_processor.image_mean)
        return self.image_processor(squared(image, colour), return_tensors="pt")["pixel_values"][0]


def _picture_first(question: str) -> str:
    """Move <image> before the question, as in training and inference; LLaVA's files have it before or after."""
    count = question.count("<image>")
    return "<image>\n" * count + question.replace("<image>", "").strip()


def opened(file: Path, name: str) -> Image.Image:
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except OSError as error:
        raise DataError(f"example {name!r}: picture {str(file)!r} cannot be read: {error}") from error


def squared(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


class Conversations(Dataset):
    """Examples, encoded on access."""

    def __init__(self, examples: Sequence[Example], encoder: Encoder) -> None:
        self.examples, self.encoder = examples, encoder

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.encoder(self.examples[index])


class Collator:
    """Collate with padding on the right. A batch without a picture gets a grey one that is not attended to and has no
    loss: all processes of a step must run the tower and the projector, or they wait for each other's gradients
    forever."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        tokenizer = encoder.tokenizer
        self.pad, self.picture = tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<image>")
        self.grey = encoder.pixels(Image.new("RGB", (8, 8), (127, 127, 127)))

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        pixels = [row["pixels"] for row in rows if row["pixels"] is not None]
        spare = 0 if pixels else self.encoder.tokens
        longest = max(len(row["input_ids"]) for row in rows) + spare
        shape = (len(rows), longest)
        batch = {
            "input_ids": torch.full(shape, self.pad),
            "labels": torch.full(shape, IGNORED),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
        }
        for line, row in enumerate(rows):
            length = len(row["input_ids"])
            batch["input_ids"][line, :length] = row["input_ids"]
            batch["labels"][line, :length] = row["labels"]
            batch["attention_mask"][line, :length] = 1
        if spare:
            batch["input_ids"][0, longest - spare :] = self.picture
        batch["pixel_values"] = torch.cat(pixels) if pixels else self.grey[None]
        return batch
