# SPDX-License-Identifier: Apache-2.0
"""The LLaVA recipe: examples as the model reads them, and the script end to end with tiny models on the CPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers")
if int(transformers.__version__.split(".")[0]) < 5:
    pytest.skip("the recipe is for transformers 5", allow_module_level=True)

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "benchmarks" / "spatial")]
import llava_data  # noqa: E402
import llava_files  # noqa: E402
from llava_data import IGNORED, Collator, DataError, Encoder  # noqa: E402
from transformers import AutoTokenizer, CLIPImageProcessor, LlavaForConditionalGeneration, LlavaProcessor  # noqa: E402

import spatial_pe  # noqa: E402

TOKENS = 16  # of a picture


# ------------------------------------------------------------------------------------------------------------ examples


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llava")
    llava_files.language_model(path / "lm")
    for family in llava_files.TOWERS:
        llava_files.tower(family, path / family)
    llava_files.conversations(path, text_only=True)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    found = AutoTokenizer.from_pretrained(folder / "lm")
    found.add_special_tokens({"additional_special_tokens": ["<image>", "<pad>"]})
    found.pad_token = "<pad>"
    return found


@pytest.fixture
def encoder(tokenizer):
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return Encoder(tokenizer, images, TOKENS, 200, plain=False)


def examples(folder):
    return llava_data.read(folder / "conversations.json", folder / "images")


def test_only_answers_and_their_end_are_trained(folder, encoder):
    example = examples(folder)[1]
    row = encoder(example)
    kept = row["labels"] != IGNORED
    assert torch.equal(row["labels"][kept], row["input_ids"][kept])
    said = "".join(f" {answer}</s>" for _, answer in example.turns)
    assert encoder.tokenizer.decode(row["labels"][kept]) == said
    assert (row["input_ids"] == encoder.tokenizer.convert_tokens_to_ids("<image>")).sum() == TOKENS
    assert row["pixels"].shape == (1, 3, 32, 32)


def test_trained_on_what_the_saved_processor_makes_later(folder, encoder):
    """The same tokens up to the answer as apply_chat_template gives whoever asks the trained model."""
    example = examples(folder)[1]
    processor = LlavaProcessor(
        encoder.image_processor,
        encoder.tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=llava_data.CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )
    question = example.turns[0][0].replace("<image>\n", "")
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    picture = llava_data.squared(Image.open(example.images[0]), (122, 116, 104))
    asked = processor(images=picture, text=prompt, return_tensors="pt")
    row = encoder(example)
    first = int((row["labels"] != IGNORED).nonzero()[0])
    assert asked["input_ids"][0].tolist() == row["input_ids"][:first].tolist()
    assert torch.equal(asked["pixel_values"], row["pixels"])


def test_captions_are_read_without_their_question(folder, tokenizer, encoder):
    plain = Encoder(tokenizer, encoder.image_processor, TOKENS, 200, plain=True)
    example = examples(folder)[1]
    text = tokenizer.decode(plain(example)["input_ids"])
    assert text == "<image>" * TOKENS + "".join(f"{answer}\n" for _, answer in example.turns)


def test_pictures_become_squares_of_the_mean_colour():
    image = llava_data.squared(Image.new("RGB", (6, 2), (9, 9, 9)), (1, 2, 3))
    assert image.size == (6, 6)
    assert [image.getpixel((3, y)) for y in range(6)] == [(1, 2, 3)] * 2 + [(9, 9, 9)] * 2 + [(1, 2, 3)] * 2


def test_a_batch_without_pictures_runs_the_tower_and_changes_nothing(folder, encoder):
    """Else processes of data parallelism would wait for each other; the loss and all other gradients are the same."""
    row = encoder(next(example for example in examples(folder) if not example.images))
    model = tiny_llava(folder, encoder.tokenizer)
    batch = Collator(encoder)([row])
    loss = model(**batch).loss
    alone = model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss
    torch.testing.assert_close(loss, alone)
    loss.backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.model.multi_modal_projector.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": ["0.png", "1.png"]}, "has 2 pictures and 1 <image>"),
        ({"conversations": [{"from": "gpt", "value": "red"}]}, "human and gpt must alternate"),
        ({"conversations": None}, 'has no "conversations"'),
    ],
)
def test_wrong_conversations_are_named(folder, tmp_path, change, message):
    rows = json.loads((folder / "conversations.json").read_text())
    rows[1].update(change)
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(DataError, match=message) as error:
        llava_data.read(path, folder)
    assert "'e1'" in str(error.value)


def test_a_picture_is_never_cut(folder, encoder, tokenizer):
    example = examples(folder)[1]
    short = Encoder(tokenizer, encoder.image_processor, TOKENS, TOKENS, plain=False)
    with pytest.raises(DataError, match="a picture beyond --max-length 16"):
        short(example)
    with pytest.raises(DataError, match="has no answer within --max-length"):
        Encoder(tokenizer, encoder.image_processor, TOKENS, TOKENS + 8, plain=False)(example)


def tiny_llava(folder, tokenizer):
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**llava_files.SIZE),
        text_config=transformers.AutoConfig.from_pretrained(folder / "lm"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=TOKENS,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return model


# ---------------------------------------------------------------------------------------------------------- the script


def script(folder, *arguments: object, processes: int = 1, status: int = 0) -> str:
    """Runs it and returns what it wrote."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), ROOT / "benchmarks/spatial/llava.py", *arguments]
    command += ["--data", folder / "conversations.json", "--images", folder / "images", "--max-length", 200]
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == status, done.stderr[-3000:]
    return done.stdout + done.stderr


def config(path: Path, **settings: object) -> Path:
    plain = (ROOT / "benchmarks/spatial/configs/cpu.yaml").read_text()
    path.write_text(plain + "".join(f"{name}: {value}\n" for name, value in settings.items()))
    return path


def pretrain(folder, out, *arguments: object, encoder: str = "clip", **how: int) -> str:
    made = ["--encoder", encoder, "--encoder-path", folder / encoder, "--lm", folder / "lm"]
    return script(folder, "--stage", "pretrain", *made, "--output", out, *arguments, **how)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


@pytest.mark.slow
def test_both_stages_on_two_processes_and_going_on(folder, tmp_path):
    four = config(tmp_path / "four.yaml", max_steps=4, save_steps=2, learning_rate=0.01)
    pretrain(folder, tmp_path / "one", "--rope", "axial", "--config", four, processes=2)
    tune = ["--stage", "finetune", "--model", tmp_path / "one", "--config", four, "--output", tmp_path / "two"]
    script(folder, *tune, processes=2)
    report = json.loads((tmp_path / "two" / "run.json").read_text())
    assert report["processes"] == 2 and report["steps"] == 4
    assert report["trained"] == ["vision_tower, encoding", "multi_modal_projector", "language_model", "lm_head"]
    assert report["verified"]["patched"]["rope"] == "axial"
    assert report["verified"]["logits_error"] == 0

    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    moved = {name for name in first if not torch.equal(first[name], second[name])}
    strengths = {
        f"vision_tower.encoder.layers.{layer}.self_attn.rope.strength" for layer in (0, 1)
    }  # the third is unread
    assert {name for name in moved if "vision_tower" in name} == strengths
    assert {name.split(".")[0] for name in moved} == {"vision_tower", "multi_modal_projector", "language_model"}

    # stopped after two steps, it goes on to the same weights
    unbroken = weights(tmp_path / "two")
    for path in (tmp_path / "two").glob("*.safetensors"):
        path.unlink()
    shutil.rmtree(tmp_path / "two" / "checkpoint-4")
    script(folder, *tune, "--resume", processes=2)
    resumed = weights(tmp_path / "two")
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)

    model = spatial_pe.from_pretrained(LlavaForConditionalGeneration, tmp_path / "two")
    assert model.model.vision_tower.config.spatial_pe["rope"] == "axial"


@pytest.mark.slow
@pytest.mark.parametrize("rope", ["none", "axial", "mixed", "2601.09954"])
@pytest.mark.parametrize("encoder", llava_files.TOWERS)
def test_every_encoder_with_every_encoding(folder, tmp_path, encoder, rope):
    two = config(tmp_path / "two.yaml", max_steps=2, learning_rate=0.01)
    pretrain(folder, tmp_path / "out", "--rope", rope, "--config", two, encoder=encoder)
    report = json.loads((tmp_path / "out" / "run.json").read_text())
    assert report["verified"]["logits_error"] == 0
    patched = report["verified"]["patched"]
    assert (patched["rope"], patched.get("legacy")) == {
        "none": (None, None),
        "2601.09954": (None, "2601.09954"),
    }.get(rope, (rope, None))


@pytest.mark.slow
def test_a_tower_that_is_tuned(folder, tmp_path):
    two = config(tmp_path / "two.yaml", max_steps=2, learning_rate=0.01)
    pretrain(folder, tmp_path / "out", "--tune-tower", "--config", two, encoder="siglip", processes=2)
    before, after = weights(folder / "siglip"), weights(tmp_path / "out")
    after = {name.split("vision_tower.")[-1]: value for name, value in after.items() if "vision_tower" in name}
    before = {name.removeprefix("vision_model."): value for name, value in before.items()}
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert any(".layers.0." in name for name in moved) and any(".layers.1." in name for name in moved)
    assert not any(".layers.2." in name or "head" in name for name in moved)  # after the layer that is read


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "finetune"], "--stage finetune needs --model"),
        (["--stage", "pretrain"], "--stage pretrain needs --encoder"),
        (["--stage", "pretrain", "--encoder", "clip", "--start", "full"], "--start is for --rope"),
        (["--stage", "finetune", "--model", "no"], "holds no model"),
    ],
)
def test_wrong_options_end_with_what_to_do(arguments, message, capsys, monkeypatch):
    import llava

    monkeypatch.setattr(sys, "argv", ["llava.py", *arguments, "--data", "d", "--images", "i", "--output", "o"])
    assert llava.main() == 2
    assert message in capsys.readouterr().err


def test_a_model_that_was_saved_otherwise_is_found_out(folder, tmp_path, monkeypatch, capsys):
    """The saved tower is not the trained one: exit status 1, and no run.json that says it was verified."""
    import llava

    def forget(self, path):
        save(self, path)
        saved = json.loads((Path(path) / "config.json").read_text())
        saved["vision_config"]["spatial_pe"]["start"] = "full"
        (Path(path) / "config.json").write_text(json.dumps(saved))

    save = llava.Trainer.save_model
    monkeypatch.setattr(llava.Trainer, "save_model", lambda self, path=None, **_: forget(self, path or tmp_path / "o"))
    made = ["--encoder", "clip", "--encoder-path", folder / "clip", "--lm", folder / "lm", "--rope", "mixed"]
    one = config(tmp_path / "one.yaml", max_steps=1, save_strategy='"no"')
    made += ["--stage", "pretrain", "--config", one, "--output", tmp_path / "o", "--max-length", 200]
    made += ["--data", folder / "conversations.json", "--images", folder / "images"]
    monkeypatch.setattr(sys, "argv", ["llava.py", *map(str, made)])
    assert llava.main() == 1
    assert "is not what was trained" in capsys.readouterr().err
    assert not (tmp_path / "o" / "run.json").exists()
