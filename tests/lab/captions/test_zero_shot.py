# SPDX-License-Identifier: Apache-2.0
"""Scores: against accuracies known by hand, against real CLIP and SigLIP classes, patched against unpatched."""

from __future__ import annotations

import argparse
import itertools
import json

import pytest
import torch
from caption_files import OBJECTS, RELATIONS, Oracle, controlled, qa, vsr
from PIL import Image
from torch import nn

import spatial_pe
from spatial_pe._utils.errors import UserError
from spatial_pe.lab.captions import zero_shot
from spatial_pe.lab.captions.loading import load, open_image
from spatial_pe.lab.captions.two_tower import ModelError, Scorer
from spatial_pe.lab.captions.zero_shot import best_threshold, compare, evaluate

# ------------------------------------------------------------------------------------------------- accuracies by hand


def oracle(folder, name, wrong=(), ties=()) -> Oracle:
    """A model that is right about ``controlled``'s images, but for those."""
    scores = {}
    for number, record in enumerate(controlled(folder, name)):
        right, other, *_ = record["caption_options"]
        scores[number, right] = 0.5
        scores[number, other] = {True: 0.6}.get(number in wrong, 0.5 if number in ties else 0.4)
    return Oracle(scores)


@pytest.mark.parametrize("name", RELATIONS)
@pytest.mark.parametrize(
    ("wrong", "items", "pairs", "sets"),
    [((), 8, 4, 2), ((6,), 7, 3, 1), ((6, 7), 6, 3, 1), ((0, 2), 6, 2, 1), ((0, 7), 6, 2, 0), (range(8), 0, 0, 0)],
)
def test_items_pairs_and_sets(tmp_path, name, wrong, items, pairs, sets):
    model = oracle(tmp_path, name, wrong)
    found = evaluate(model, model.processor, name, tmp_path)
    assert (found["n"], found["pairs"]["n"], found["sets"]["n"]) == (8, 4, 2)
    assert (found["accuracy"], found["pairs"]["accuracy"], found["sets"]["accuracy"]) == (
        items / 8,
        pairs / 4,
        sets / 2,
    )
    assert (found["chance"], found["pairs"]["chance"], found["sets"]["chance"]) == (1 / 4, 1 / 16, 1 / 256)
    for part in (found, found["pairs"], found["sets"]):
        low, high = part["interval"]
        assert 0 <= low <= part["accuracy"] <= high <= 1 and high - low > 0.2
    third, fourth = ("on", "under") if name == "whatsup_a" else ("front", "behind")
    for i, relation in enumerate((third, fourth, "left", "right")):
        right = (i not in wrong) + (i + 4 not in wrong)
        assert (found["relations"][relation]["n"], found["relations"][relation]["accuracy"]) == (2, right / 2)
    assert json.loads(json.dumps(found)) == found


def test_a_tie_is_wrong_and_counted(tmp_path):
    model = oracle(tmp_path, "whatsup_a", ties=(1, 4, 5))
    found = evaluate(model, model.processor, "whatsup_a", tmp_path)
    assert (found["accuracy"], found["ties"]) == (5 / 8, 3)


@pytest.mark.parametrize("name", ["coco_one", "vg_two"])
def test_two_captions(tmp_path, name):
    left, right = "A photo of a bench to the left", "A photo of a bench to the right"
    qa(tmp_path, name, [[101, left, right], [102, left, right], [103, right, left], [101, right, left]])
    model = Oracle({(1, left): 0.3, (1, right): 0.2, (2, left): 0.1, (2, right): 0.2, (3, left): 0.1, (3, right): 0.9})
    found = evaluate(model, model.processor, name, tmp_path)
    assert (found["n"], found["accuracy"], found["chance"]) == (4, 0.5, 0.5)
    assert "pairs" not in found and "threshold" not in found
    if name == "coco_one":
        assert {k: v["accuracy"] for k, v in found["relations"].items()} == {"left": 0.5, "right": 0.5}
    assert sorted(map(str, model.seen)) == sorted(["1", "2", "3", left, right])  # nothing twice


def test_true_or_false(tmp_path):
    """By the negated caption 3 of 5 are right; above the threshold that dev gives, 4 of 5."""
    caption = {n: f"The cat is on the box {n}." for n in range(1, 9)}
    truth = {1: 1, 2: 1, 3: 0, 4: 0, 5: 1}
    vsr(tmp_path, "test", [(n, caption[n], "on", t) for n, t in truth.items()])
    vsr(tmp_path, "dev", [(6, caption[6], "on", 1), (7, caption[7], "on", 0), (8, caption[8], "on", 0)])
    scores = {1: 0.7, 2: 0.3, 3: 0.45, 4: 0.1, 5: 0.9, 6: 0.6, 7: 0.4, 8: 0.2}
    negated = {1: 0.6, 2: 0.2, 3: 0.4, 4: 0.0, 5: 0.4}  # "higher than its negation" says true five times
    table = {(n, caption[n]): s for n, s in scores.items()}
    table |= {(n, caption[n].replace(" on ", " not on ")): s for n, s in negated.items()}
    model = Oracle(table)
    found = evaluate(model, model.processor, "vsr_random", tmp_path)
    assert (found["n"], found["accuracy"], found["chance"], found["majority"]) == (5, 3 / 5, 0.5, 3 / 5)
    threshold = found["threshold"]
    assert threshold["value"] == pytest.approx(0.5) and (threshold["dev_n"], threshold["dev_accuracy"]) == (3, 1)
    assert threshold["accuracy"] == 4 / 5  # 2 is true, and scores 0.3
    assert found["relations"] == {"on": {"n": 5, "accuracy": 3 / 5, "interval": found["interval"]}}


def test_a_caption_that_ties_with_its_negation_is_not_true(tmp_path):
    for part in ("test", "dev"):
        vsr(tmp_path, part, [(n, "The cat is on it.", "on", label) for n, label in ((1, 1), (2, 1), (3, 0))])
    model = Oracle({(1, "The cat is on it."): 0.3, (1, "The cat is not on it."): 0.3})
    found = evaluate(model, model.processor, "vsr_random", tmp_path)
    assert (found["accuracy"], found["ties"]) == (1 / 3, 3)


def test_best_threshold_is_the_best_of_all():
    generator = torch.Generator().manual_seed(0)
    for n in (1, 2, 5, 40):
        for _ in range(20):
            scores = (torch.randint(8, (n,), generator=generator) / 8).tolist()  # with equal ones
            labels = (torch.rand(n, generator=generator) < 0.5).tolist()
            value, accuracy = best_threshold(scores, labels)

            def right(t, scores=scores, labels=labels):
                return sum((s > t) == label for s, label in zip(scores, labels, strict=True))

            assert (
                accuracy * n == pytest.approx(right(value)) == pytest.approx(max(right(t / 16) for t in range(-9, 25)))
            )


# ------------------------------------------------------------------------------------------------------- real classes

WORDS = ("[PAD]", "[BOS]", "[EOS]", "[UNK]", "A", "a", "on", "under", "to", "the", "left", "right", "of")


def processor_of(model):
    """As transformers makes it from a checkpoint, with a vocabulary of a few words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = [*WORDS, *itertools.chain(*OBJECTS)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 2)]
    )
    special = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **special)
    side = {"height": 32, "width": 32}
    if model.config.model_type == "siglip2":  # NaFlex: as many patches as fit, in the image's own shape
        images = transformers.Siglip2ImageProcessor(patch_size=16, max_num_patches=256)
        return transformers.Siglip2Processor(image_processor=images, tokenizer=fast)
    if model.config.model_type == "siglip":
        return transformers.SiglipProcessor(transformers.SiglipImageProcessor(size=side), fast)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=side)
    return transformers.CLIPProcessor(image_processor=images, tokenizer=fast)


FAMILIES = {  # what is not alike: (configuration, model, of the text tower, of the vision tower, of both)
    "clip": ("CLIPConfig", "CLIPModel", {}, {}, {"projection_dim": 24}),
    "siglip": ("SiglipConfig", "SiglipModel", {}, {}, {}),
    "siglip2": ("Siglip2Config", "Siglip2Model", {"max_position_embeddings": 64}, {"patch_size": 16}, {}),
    "altclip": ("AltCLIPConfig", "AltCLIPModel", {"project_dim": 24, "type_vocab_size": 1}, {}, {"projection_dim": 24}),
    "aimv2": ("Aimv2Config", "Aimv2Model", {}, {}, {"projection_dim": 24}),
}


def tiny(family: str):
    """A random model of two layers a tower; 16 patches, but for SigLIP 2."""
    import transformers

    torch.manual_seed(0)
    config, model, text, vision, both = FAMILIES[family]
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {"vocab_size": 32, "max_position_embeddings": 24, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    towers = {
        "text_config": {**tower, **words, **text},
        "vision_config": {**tower, "image_size": 32, "patch_size": 8, **vision},
    }
    built = getattr(transformers, model)(getattr(transformers, config)(**towers, **both)).eval()
    with torch.no_grad():  # as initialised, all captions are as good
        for parameter in built.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return built


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whatsup")
    controlled(folder, "whatsup_a", sets=3)
    for number, file in enumerate(sorted((folder / "controlled_images").iterdir())):  # textured, no two alike
        noise = torch.randint(256, (24, 30, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        Image.fromarray(noise.numpy()).save(file, "JPEG")
    return folder


@pytest.fixture(scope="module", params=["clip", "siglip"])
def pair(request):
    pytest.importorskip("transformers")
    model = tiny(request.param)
    return model, processor_of(model)


def as_trained(model, processor, captions, **images):
    """What the model was trained on: SigLIP on plain text of full length, without a mask."""
    pad, drop = {"padding": True}, ["token_type_ids"]
    if model.config.model_type.startswith("siglip"):
        captions = ["".join(c for c in caption.lower() if c.isalnum() or c == " ") for caption in captions]
        pad = {"padding": "max_length", "max_length": model.config.text_config.max_position_embeddings}
        drop.append("attention_mask")
    inputs = processor(text=captions, return_tensors="pt", **pad, **images)
    return {name: value for name, value in inputs.items() if name not in drop}


def own_scores(model, processor, items):
    """What the model itself says of one image and its captions at a time."""
    for item in items:
        inputs = as_trained(model, processor, list(item.captions), images=[open_image(item)])
        with torch.no_grad():
            out = model(**inputs)
        yield (out.image_embeds @ out.text_embeds.T)[0], out.logits_per_image[0]


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_scores_are_the_models_own(pair, files, batch_size):
    model, processor = pair
    task = load("whatsup_a", files)
    found = Scorer(model, processor, batch_size).scores(task.items)
    right = []
    for scores, (cosines, logits) in zip(found, own_scores(model, processor, task.items), strict=True):
        torch.testing.assert_close(torch.tensor(scores), cosines, rtol=1e-5, atol=1e-5)
        right.append(int(logits.argmax()) == 0)
    result = evaluate(model, processor, "whatsup_a", files, batch_size=batch_size)
    assert result["accuracy"] == sum(right) / 12
    assert 0 < sum(right) < 12  # neither trivial


@pytest.mark.parametrize("family", ["siglip2", "altclip", "aimv2"])
def test_other_families(files, family):
    model = tiny(family)
    processor = processor_of(model)
    items = load("whatsup_a", files).items
    if family == "aimv2":  # under sdpa its text tower is not causal where nothing is padded
        model.set_attn_implementation("eager")
    expected = torch.stack([cosines for cosines, _ in own_scores(model, processor, items)])
    if family == "aimv2":
        model.set_attn_implementation("sdpa")
    torch.testing.assert_close(torch.tensor(Scorer(model, processor, 5).scores(items)), expected, rtol=1e-5, atol=1e-5)
    found = compare(model, processor, "whatsup_a", files, rope="axial", start="full", batch_size=5)
    assert found["patch"]["modules"] == 2 and found["before"] == evaluate(model, processor, "whatsup_a", files)


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_are_given_as_in_training(family):
    model = tiny(family)
    processor, captions = processor_of(model), ["A mug, on the (left).", "a cap to the right of a book"]
    found, expected = Scorer(model, processor, 64)._text(captions), as_trained(model, processor, captions)
    length = expected["input_ids"].shape[1]
    assert found["input_ids"][:, :length].equal(expected["input_ids"]) and not found["input_ids"][:, length:].any()
    assert ("attention_mask" in found) == ("attention_mask" in expected)
    assert (3 in found["input_ids"]) != ("siglip" in family)  # [UNK], for the comma and the brackets


def test_mode_and_progress(pair, files):
    model, processor = pair
    seen, modes = [], []
    hook = model.vision_model.register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    model.train()
    evaluate(model, processor, "whatsup_a", files, batch_size=5, progress=lambda *done: seen.append(done))
    assert model.training and modes == [False] * 3
    assert seen == [(5, 12), (10, 12), (12, 12)]
    model.eval()
    hook.remove()


class Strict(Oracle):
    def get_image_features(self, pixel_values):
        assert pixel_values.dtype == self.weight.dtype == torch.float64
        return super().get_image_features(pixel_values)

    def processor(self, **inputs):
        """As tokenizers and image processors do, it says more than the towers take."""
        return {**super().processor(**inputs), "token_type_ids": torch.zeros(1), "original_sizes": torch.zeros(1)}


def test_towers_get_what_they_take_in_their_dtype(tmp_path):
    plain = oracle(tmp_path, "whatsup_a", wrong=(3,))
    model = Strict({(0, "-"): 0.0}).double()
    model.captions, model.table = plain.captions, plain.table
    assert evaluate(model, model.processor, "whatsup_a", tmp_path)["accuracy"] == 7 / 8


def test_bfloat16_runs_in_its_dtype(pair, files):
    model, processor = pair
    exact = Scorer(model, processor, 64).scores(load("whatsup_a", files).items)
    model.bfloat16()
    try:
        low = Scorer(model, processor, 64).scores(load("whatsup_a", files).items)
    finally:
        model.float()
    assert not torch.equal(torch.tensor(low), torch.tensor(exact))
    torch.testing.assert_close(torch.tensor(low), torch.tensor(exact), atol=0.03, rtol=0)


class OneCall(nn.Module):
    """A model that has no features to give, only logits_per_image."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids=None, pixel_values=None, attention_mask=None):
        return self.model(input_ids=input_ids, pixel_values=pixel_values, attention_mask=attention_mask)


def test_logits_do_where_there_are_no_features(files):
    model = tiny("clip")
    processor = processor_of(model)
    task = load("whatsup_a", files)
    ours = torch.tensor(Scorer(OneCall(model), processor, 5).scores(task.items))
    scale = model.logit_scale.exp().item()
    torch.testing.assert_close(ours, scale * torch.tensor(Scorer(model, processor, 5).scores(task.items)))
    assert evaluate(OneCall(model), processor, "whatsup_a", files) == evaluate(model, processor, "whatsup_a", files)


# ----------------------------------------------------------------------------------------------------------- compare


@pytest.mark.parametrize("rope", ["axial", "mixed"])
def test_identity_start_changes_nothing(pair, files, rope):
    model, processor = pair
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    alone = evaluate(model, processor, "whatsup_a", files)
    found = compare(model, processor, "whatsup_a", files, rope=rope, start="identity")
    assert found["before"] == found["after"] == alone
    assert found["patch"] == {"rope": rope, "start": "identity", "legacy": None, "seed": 0, "modules": 2}
    assert set(found["difference"]) == {"accuracy", "pairs", "sets"}
    for part in found["difference"].values():
        assert part == {"difference": 0, "interval": [0, 0], "p": 1, "gained": 0, "lost": 0}
    assert list(model.state_dict()) == keys and [type(module) for module in model.modules()] == classes
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("how", [{"rope": "axial"}, {"rope": "mixed"}, {"legacy": "2601.09954"}], ids=str)
@pytest.mark.filterwarnings("ignore:.*2601.09954")
def test_after_is_the_patched_model(pair, files, how):
    model, processor = pair
    start = {} if "legacy" in how else {"start": "full"}
    found = compare(model, processor, "whatsup_a", files, **how, **start, seed=3)
    assert found == compare(model, processor, "whatsup_a", files, **how, **start, seed=3)
    assert found["before"] == evaluate(model, processor, "whatsup_a", files)
    plain = Scorer(model, processor, 64).scores(load("whatsup_a", files).items)
    torch.manual_seed(3)
    spatial_pe.patch(model, **how, **start)
    try:
        assert Scorer(model, processor, 64).scores(load("whatsup_a", files).items) != plain
        assert found["after"] == evaluate(model, processor, "whatsup_a", files)
        with pytest.raises(ValueError, match="patched already"):
            compare(model, processor, "whatsup_a", files)
    finally:
        spatial_pe.unpatch(model)
    difference = found["after"]["accuracy"] - found["before"]["accuracy"]
    assert found["difference"]["accuracy"]["difference"] == pytest.approx(difference)


def test_seed_decides_a_random_start(files, monkeypatch):
    model, drawn = tiny("clip"), []

    def recording(*args, **kwargs):
        report = spatial_pe.patch(*args, **kwargs)
        drawn.append(torch.cat([parameter.detach().flatten() for parameter in report.parameters()]))
        return report

    monkeypatch.setattr(zero_shot, "patch", recording)
    state = torch.get_rng_state()
    for seed in (0, 0, 1):
        compare(model, processor_of(model), "whatsup_a", files, rope="mixed", start="full", seed=seed)
        torch.rand(1)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    torch.set_rng_state(state)


def test_captions_are_computed_once_and_images_twice(files):
    model = tiny("clip")
    processor, calls = processor_of(model), []

    def counting(**inputs):
        calls.append({key: len(value) for key, value in inputs.items() if key in ("text", "images")})
        return processor(**inputs)

    compare(model, counting, "whatsup_a", files)
    assert sum(call.get("text", 0) for call in calls) == 12  # distinct captions
    assert sum(call.get("images", 0) for call in calls) == 24


def test_a_run_that_fails_leaves_the_model_as_it_was(files, tmp_path):
    model = tiny("clip")
    controlled(tmp_path, "whatsup_a")
    (tmp_path / "controlled_images/cap_on_table.jpeg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"record 5: cannot read .*cap_on_table\.jpeg"):
        compare(model, processor_of(model), "whatsup_a", tmp_path)
    assert not any("rope" in name for name, _ in model.named_modules())
    assert spatial_pe.patch(model).patched


# --------------------------------------------------------------------------------------------------- models that do not


def test_one_tower_models_are_refused(files):
    transformers = pytest.importorskip("transformers")
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    one = {"image_size": 32, "patch_size": 8}
    aim = transformers.Aimv2VisionModel(transformers.Aimv2VisionConfig(**tower, **one))
    clip = tiny("clip")
    writes = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9))
    for model, why in ((aim, "no text tower"), (clip.vision_model, "no text tower"), (writes, "lmms-eval measures")):
        with pytest.raises(ModelError, match=rf"{type(model).__name__} .*{why}.*needs a two-tower model"):
            evaluate(model, None, "whatsup_a", files)


class NoVectors(Oracle):
    def get_image_features(self, pixel_values):
        return super().get_image_features(pixel_values)[:, None].expand(-1, 3, -1)


class NoNumbers(Oracle):
    def get_text_features(self, input_ids):
        return super().get_text_features(input_ids) * float("nan")


class NoLogits(OneCall):
    def forward(self, input_ids=None, pixel_values=None, attention_mask=None):
        return {"loss": 0}


def test_models_without_scores_are_refused(tmp_path, files):
    scores = {(1, "a"): 0.5}
    controlled(tmp_path, "whatsup_a")
    for cls, why in (
        (NoVectors, r"one vector for each image, got Tensor of shape \(8, 3, 3\)"),
        (NoNumbers, "not finite|nan"),
    ):
        model = cls(scores)
        with pytest.raises(ModelError, match=why):
            evaluate(model, model.processor, "whatsup_a", tmp_path)
    clip = tiny("clip")
    with pytest.raises(ModelError, match=r"NoLogits .* returns no logits_per_image"):
        evaluate(NoLogits(clip), processor_of(clip), "whatsup_a", files)
    model = Oracle(scores)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        evaluate(model, model.processor, "whatsup_a", tmp_path, batch_size=0)
    with pytest.raises(ValueError, match="no attention modules"):
        compare(model, model.processor, "whatsup_a", tmp_path)


# ------------------------------------------------------------------------------------------------------ command line


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    model = tiny("clip")
    model.save_pretrained(folder)
    processor_of(model).save_pretrained(folder)
    return folder


def run(*arguments) -> int:
    parser = argparse.ArgumentParser()
    zero_shot.add_arguments(parser)
    return zero_shot.run_eval(parser.parse_args([str(argument) for argument in arguments]))


def test_command(checkpoint, files, tmp_path, capsys):
    out = tmp_path / "new/result.json"
    where = (checkpoint, "--benchmark", "whatsup_a", "--data", files, "--device", "cpu")
    assert run(*where, "--rope", "mixed", "--start", "full", "--limit", 8, "--out", out) == 0
    written, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert written["model"] == str(checkpoint) and written["environment"]["versions"]["torch"]
    assert written["before"]["n"] == written["after"]["n"] == 8 and written["patch"]["modules"] == 2
    for text in ("accuracy", "pairs", "sets", "difference", "chance 25.0", "patch(rope=mixed, start=full)", str(out)):
        assert text in printed
    assert f"{100 * written['before']['accuracy']:.1f} %" in printed
    assert run(*where) == 0
    assert "n 12" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*2601.09954")
def test_command_legacy(checkpoint, files, capsys):
    where = (checkpoint, "--benchmark", "whatsup_a", "--data", files, "--device", "cpu")
    assert run(*where, "--legacy") == 0
    assert "patch(legacy 2601.09954)" in capsys.readouterr().out


def test_command_measures_a_saved_patched_model_as_it_is(files, tmp_path, capsys):
    model = tiny("clip")
    processor = processor_of(model)
    spatial_pe.patch(model, rope="axial")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".rope." in name:
                parameter.fill_(1.0)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    where = (tmp_path, "--benchmark", "whatsup_a", "--data", files, "--device", "cpu")
    assert run(*where, "--out", tmp_path / "r.json") == 0
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["accuracy"] == evaluate(model, processor, "whatsup_a", files)["accuracy"]
    scores = Scorer(zero_shot._load_model(str(tmp_path), "cpu")[0], processor, 64).scores(
        load("whatsup_a", files).items
    )
    torch.testing.assert_close(
        torch.tensor(scores), torch.tensor(Scorer(model, processor, 64).scores(load("whatsup_a", files).items))
    )
    assert run(*where, "--rope", "axial") == 2
    assert "is a patched model" in capsys.readouterr().err


def test_command_says_what_is_wrong(checkpoint, files, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    where = ("--benchmark", "whatsup_a", "--data", files, "--device", "cpu")
    cases = [
        ((checkpoint, "--benchmark", "whatsup_b", "--data", files), 2, "no data of whatsup_b"),
        ((tmp_path / "no-model", *where), 2, "no model and processor could be loaded from"),
        ((checkpoint, *where, "--limit", 2), 2, "limit must be at least 4"),
        ((checkpoint, *where, "--batch", 0), 2, "batch_size must be at least 1"),
        ((checkpoint, *where, "--legacy", "--rope", "axial"), 2, "leave --rope out"),
        ((checkpoint, *where, "--start", "full"), 2, "pass --rope axial or --rope mixed"),
        ((checkpoint, *where, "--out", tmp_path), 2, "is a folder"),
        ((checkpoint, *where, "--out", checkpoint / "config.json/r.json"), 2, "cannot be written"),
    ]
    for arguments, code, message in cases:
        assert run(*arguments) == code
        error = capsys.readouterr().err
        assert "spatial-pe spatial eval: " in error and message in error and "Traceback" not in error
    vision = tmp_path / "vision"
    config = tiny("clip").config.vision_config
    transformers.CLIPVisionModel(config).save_pretrained(vision)
    processor_of(tiny("clip")).save_pretrained(vision)
    assert run(vision, *where) == 1
    assert "no text tower" in capsys.readouterr().err
