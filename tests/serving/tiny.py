# SPDX-License-Identifier: Apache-2.0
"""A tiny Qwen2.5-VL on disk, for a server: its configuration, a tokenizer of bytes and a processor, all made here. Its
weights are the server's (``--load-format dummy``)."""

from __future__ import annotations

import sys
from pathlib import Path

SPECIAL = ["endoftext", "im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"]
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}" + IMAGE + "{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write(path: Path) -> None:
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    by_bytes = Tokenizer(models.BPE(vocab=letters, merges=[]))
    by_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    by_bytes.decoder = decoders.ByteLevel()
    make = getattr(transformers, "Qwen2TokenizerFast", transformers.PreTrainedTokenizerFast)
    tokenizer = make(tokenizer_object=by_bytes)
    names = [f"<|{name}|>" for name in SPECIAL]
    tokenizer.add_special_tokens({"eos_token": names[2], "pad_token": names[0], "additional_special_tokens": names})
    tokenizer.chat_template = TEMPLATE
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in SPECIAL}
    images = getattr(transformers, "Qwen2VLImageProcessorFast", None) or transformers.Qwen2VLImageProcessor
    processor = transformers.Qwen2_5_VLProcessor(
        image_processor=images(min_pixels=56 * 56, max_pixels=28 * 28 * 1200),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE,
    )
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 512,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6},
            "tie_word_embeddings": False,
        },
        vision_config={
            "hidden_size": 640,
            "intermediate_size": 1280,
            "depth": 4,
            "num_heads": 8,
            "out_hidden_size": 128,
            "fullatt_block_indexes": [3],
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        vision_token_id=ids["vision_pad"],
        tie_word_embeddings=False,
    )
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    for part in (processor, tokenizer, config):
        part.save_pretrained(path)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
