# SPDX-License-Identifier: Apache-2.0
"""Models of the study: a vision transformer without access to the question, and two kinds of heads that answer it.

``Probe``: a question is a few tokens that attend to the patches (an attentive probe). ``TinyLlava``: as LLaVA, a
projector and a causal language model that reads patches, then the question in words, and answers with a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .position_encodings import PositionEncoding, Shape, Where, attend
from .scenes import NAMES
from .tasks import ANSWERS, TASKS, Question

SLOTS = 3  # names in a question


@dataclass(frozen=True)
class Size:
    """Size of a tower: ``image`` and ``patch`` in pixels, at training."""

    image: int = 64
    patch: int = 8
    width: int = 64
    depth: int = 4
    heads: int = 2

    @property
    def grid(self) -> int:
        return self.image // self.patch


class Tower(nn.Module):
    """A plain pre-norm ViT without a class token: pixels (B, 3, S, S) -> patch features (B, N, C)."""

    def __init__(self, encoding: str, size: Size) -> None:
        super().__init__()
        self.size = size
        self.embed = nn.Conv2d(3, size.width, size.patch, size.patch)
        self.blocks = nn.ModuleList([Block(size.width, size.heads) for _ in range(size.depth)])
        self.norm = nn.LayerNorm(size.width)
        with torch.random.fork_rng(devices=[]):  # so that the rest has the same initial weights for all encodings
            self.position = PositionEncoding(encoding, Shape(size.width, size.heads, size.grid), size.depth)

    def forward(self, pixels: Tensor, stretch: bool = False) -> Tensor:
        x, hows = self.embedded(pixels, stretch)
        for block, how in zip(self.blocks, hows, strict=True):
            x = block(x, how)
        return self.norm(x)

    def embedded(self, pixels: Tensor, stretch: bool = False) -> tuple[Tensor, list[object]]:
        """Return the input of the first block (B, N, C), and the argument of each block's ``attend``."""
        x = self.embed(pixels)
        where = Where(x.shape[-2], x.shape[-1], self.size.grid, stretch, x.device)
        x = x.flatten(2).transpose(1, 2)
        table = self.position.table(where)
        return x if table is None else x + table, self.position.layers(where, self.size.depth)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, how: object) -> Tensor:
        x = x + self.proj(attend(self.heads_of(x), how).flatten(-2))
        return x + self.mlp(self.norm2(x))

    def heads_of(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return q, k, v: (B, N, H, D), views of one projection."""
        return self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)


# ------------------------------------------------------------------------------------------------------- questions


@dataclass(frozen=True)
class Batch:
    """Questions as numbers. ``image`` (Q,): index of the picture in the batch; ``task`` (Q,); ``names`` (Q, SLOTS), 0
    for none, else 1 + index in NAMES; ``answer`` (Q,): index in ANSWERS."""

    image: Tensor
    task: Tensor
    names: Tensor
    answer: Tensor

    @classmethod
    def of(cls, questions: Sequence[Question], place: dict[int, int]) -> Batch:
        """Build a batch. ``place``: from the number of a scene to its picture in the batch."""
        names = [[1 + NAMES.index(name) for name in q.names] + [0] * (SLOTS - len(q.names)) for q in questions]
        return cls(
            torch.tensor([place[q.scene] for q in questions]),
            torch.tensor([TASK_NAMES.index(q.task) for q in questions]),
            torch.tensor(names).reshape(-1, SLOTS),
            torch.tensor([ANSWERS.index(q.answer) for q in questions]),
        )

    def to(self, device: torch.device) -> Batch:
        return Batch(*(tensor.to(device) for tensor in (self.image, self.task, self.names, self.answer)))

    def choices(self) -> Tensor:
        """Return (Q, answers) bool: the answers that the task of each question has."""
        return CHOICES.to(self.task.device)[self.task]


TASK_NAMES = tuple(TASKS)
CHOICES = torch.tensor([[answer in task.answers for answer in ANSWERS] for task in TASKS.values()])


class Asked(nn.Module):
    """A tower and a head that answers questions about its features: logits (Q, len(ANSWERS)), -inf for answers that the
    question's task does not have."""

    tower: nn.Module

    def forward(self, pixels: Tensor, batch: Batch, stretch: bool = False) -> Tensor:
        return self.answer(self.tower(pixels, stretch), batch)

    def answer(self, features: Tensor, batch: Batch) -> Tensor:
        return self._logits(features, batch).masked_fill(~batch.choices(), -torch.inf)

    def _logits(self, features: Tensor, batch: Batch) -> Tensor:
        raise NotImplementedError


class Probe(Asked):
    """A probe on a tower: features (B, N, C) -> the output of ``head`` for each task."""

    def __init__(self, tower: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.tower, self.head = tower, head

    def _logits(self, features: Tensor, batch: Batch) -> Tensor:
        return self.head(features, batch.image, batch.task)


class Attentive(nn.Module):
    """Head with a learned query per task that attends to the features, an MLP, a linear layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(len(TASKS), width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.out = nn.Linear(width, len(ANSWERS))

    def forward(self, features: Tensor, image: Tensor, task: Tensor) -> Tensor:
        x, _ = self.attention(self.query.expand(len(features), -1, -1), features, features, need_weights=False)
        x = x[image, task]
        return self.out(x + self.mlp(self.norm(x)))


class Linear(nn.Module):
    """Head with a linear layer per task on the mean of the features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, len(TASKS) * len(ANSWERS))

    def forward(self, features: Tensor, image: Tensor, task: Tensor) -> Tensor:
        each = torch.arange(len(task), device=task.device)
        return self.out(features.mean(1))[image].unflatten(-1, (len(TASKS), -1))[each, task]


def probe(tower: Tower) -> Probe:
    return Probe(tower, Attentive(tower.size.width, tower.size.heads))


class TinyLlava(Asked):
    """Model like LLaVA: a projector (MLP), then a causal language model (transformers' Llama) that reads the patches as
    a 1D sequence, then the question in words, and answers with one word. It has a 1D rotary encoding over that
    sequence."""

    def __init__(self, tower: Tower, depth: int = 2) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        self.tower = tower
        width = tower.size.width
        self.projector = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.language = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(WORDS),
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=depth,
                num_attention_heads=tower.size.heads,
                pad_token_id=0,
                tie_word_embeddings=True,
                initializer_range=width**-0.5,
            )
        )

    def _logits(self, features: Tensor, batch: Batch) -> Tensor:
        words = question_words(batch)
        seen = self.projector(features)[batch.image]
        x = torch.cat([seen, self.language.get_input_embeddings()(words)], dim=1)
        patches = torch.ones(seen.shape[:2], dtype=torch.long, device=x.device)
        out = self.language(inputs_embeds=x, attention_mask=torch.cat([patches, (words > 0).long()], dim=1))
        last = seen.shape[1] + (words > 0).sum(1) - 1
        each = torch.arange(len(words), device=words.device)
        return out.logits[each, last][:, ANSWER_WORDS.to(words.device)]


WORDS = ("<pad>", *dict.fromkeys((*" ".join(t.question for t in TASKS.values()).split(), *NAMES, *ANSWERS, "?")))
ANSWER_WORDS = torch.tensor([WORDS.index(answer) for answer in ANSWERS])


def question_words(batch: Batch) -> Tensor:
    """Return the questions in words, as indices into WORDS, (Q, longest) int64, padded with 0 on the right."""
    rows = []
    for task, names in zip(batch.task.tolist(), batch.names.tolist(), strict=True):
        text = TASKS[TASK_NAMES[task]].question.format(*(NAMES[name - 1] for name in names if name))
        rows.append([WORDS.index(word) for word in (*text.split(), "?")])
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=batch.task.device)
