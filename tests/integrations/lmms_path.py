# SPDX-License-Identifier: Apache-2.0
"""lmms-eval from ``.venv/lmms-eval`` (see the Makefile) where it is not installed, and a tiny LLaVA for it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch

BESIDE = Path(__file__).parents[2] / ".venv" / "lmms-eval"

# text as lmms-eval's simple path gives it, or parts as its chat path does
TEMPLATE = (
    "{% for message in messages %}USER: {% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %} {% endfor %}ASSISTANT:"
)


@contextmanager
def importable(cache: Path) -> Iterator[ModuleType]:
    """lmms_eval, or skip. What it makes of data is kept in ``cache``, one thread computes, and no traces stay."""
    if importlib.util.find_spec("lmms_eval") is None and not BESIDE.exists():
        pytest.skip("lmms-eval is not installed: make .venv/lmms-eval")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patched:
        if importlib.util.find_spec("lmms_eval") is None:
            patched.setattr(sys, "path", [*sys.path, str(BESIDE)])
        import datasets
        import lmms_eval.evaluator

        patched.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
        if importlib.util.find_spec("filelock._api") is None:
            # it changes filelock < 4.3 from inside, for many processes; a newer one may have been imported before
            patched.setattr(lmms_eval.evaluator, "_enable_reentrant_filelocks", lambda: None)
        yield lmms_eval
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)


def save_llava(folder: Path, answer: tuple[str, ...] = ()) -> Path:
    """A random LLaVA of 2 + 2 layers and its processor. With ``answer`` it gives these words, whatever it is asked."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(0)
    words = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "USER:", "ASSISTANT:", *answer]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(image_size=24, patch_size=8, projection_dim=32, **sizes),
            text_config=LlamaConfig(vocab_size=len(words), max_position_embeddings=512, **sizes),
            image_token_index=words.index("<image>"),
        )
    )
    if answer:
        _say(model, [words.index(word) for word in ("ASSISTANT:", *answer, "</s>")])
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def _say(model, tokens: list[int]) -> None:
    """Each of these tokens calls for the next one: the layers of the decoder add nothing to what is read."""
    for name, parameter in model.model.language_model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.zero_()
    for row, (token, following) in enumerate(pairwise(tokens)):
        model.get_input_embeddings().weight[token] = torch.eye(32)[row]
        model.lm_head.weight[following] = 100 * torch.eye(32)[row]
