# SPDX-License-Identifier: Apache-2.0
"""The lmms-eval plug-in: found, the tower patched, the tasks loaded and scored as published."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from lmms_files import VSR, picture, write_published
from lmms_path import BESIDE, importable, save_llava

import spatial_pe
from spatial_pe.integrations.lmms_eval import TASKS
from spatial_pe.towers.fused_attention import FusedAttention

pytest.importorskip("transformers")


@pytest.fixture(autouse=True, scope="module")
def lmms_eval(tmp_path_factory):
    with importable(tmp_path_factory.mktemp("cache")) as module:
        yield module


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return save_llava(tmp_path_factory.mktemp("llava"))


# ---------------------------------------------------------------------------------------------------------- the model


def load(arguments: str, force_simple: bool = False):
    """As lmms-eval does for --model llava_hf_spatial_pe --model_args ARGUMENTS --device cpu."""
    from lmms_eval import models

    return models.get_model("llava_hf_spatial_pe", force_simple).create_from_arg_string(arguments, {"device": "cpu"})


def unpatched(path):
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(path).eval()


def logits(model):
    """Of one image and a question."""
    torch.manual_seed(1)
    ids = torch.tensor([[5] + [4] * 9 + [0, 6]])
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=torch.randn(1, 3, 24, 24)).logits


def patched_modules(model):
    return [name for name, module in model.named_modules() if isinstance(module, FusedAttention)]


def test_lmms_eval_finds_the_plug_in_by_its_entry_point():
    from lmms_eval.models import MODEL_REGISTRY_V2 as REGISTRY
    from lmms_eval.models.chat.llava_hf import LlavaHf as LlavaHfChat
    from lmms_eval.models.simple.llava_hf import LlavaHf

    assert issubclass(REGISTRY.get_model_class("llava_hf_spatial_pe"), LlavaHfChat)  # as llava_hf resolves
    assert issubclass(REGISTRY.get_model_class("llava_hf_spatial_pe", force_simple=True), LlavaHf)
    assert REGISTRY.resolve("llava_hf").model_type == REGISTRY.resolve("llava_hf_spatial_pe").model_type == "chat"


@pytest.mark.parametrize("force_simple", [False, True])
def test_a_rope_is_added_to_the_tower_and_to_nothing_else(llava, force_simple):
    model = load(f"pretrained={llava},rope=axial,start=full", force_simple).model
    assert len(patched_modules(model)) == 2 and all("vision_tower" in name for name in patched_modules(model))
    expected = unpatched(llava)
    assert not torch.allclose(logits(model), logits(expected), atol=1e-3)
    spatial_pe.patch(expected, rope="axial", start="full")
    assert torch.equal(logits(model), logits(expected))


def test_without_a_rope_the_patched_tower_computes_the_same(llava):
    for arguments in ("", ",rope=none", ",rope=axial"):  # axial: start="identity"
        model = load(f"pretrained={llava}{arguments}").model
        assert len(patched_modules(model)) == 2
        torch.testing.assert_close(logits(model), logits(unpatched(llava)), atol=1e-5, rtol=1e-4)


def test_the_other_arguments_of_patch_arrive(llava):
    expected = unpatched(llava)
    spatial_pe.patch(expected, rope="mixed", start="identity", keep_absolute=False, backend="reference")
    model = load(f"pretrained={llava},rope=mixed,keep_absolute=False,backend=reference").model
    assert torch.equal(logits(model), logits(expected))
    with pytest.warns(UserWarning, match="2601.09954"):
        model = load(f"pretrained={llava},legacy=2601.09954").model  # which lmms-eval reads as a number
    assert model.config.vision_config.spatial_pe["legacy"] == "2601.09954"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("rope=foo", 'rope must be "axial", "mixed".*\'foo\''),
        ("rope=axial,start=now", "start must be .*\"full\", got 'now'"),
        ("rope=axial,keep_absolute=no", "keep_absolute must be True or False, got 'no'"),
        ("start=full", "pass rope=axial"),
        ("legacy=2600.1", "legacy must be one of.*2600.1"),
        ("backend=gpu", "backend must be .*'gpu'"),
        ("rope=axial,legacy=2601.09954", "leave rope out"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_loaded(arguments, message):
    with pytest.raises(ValueError, match=message):
        load(f"pretrained=no/such-model,{arguments}")


def test_a_model_that_was_saved_patched_is_loaded_as_it_was(llava, tmp_path):
    from transformers import AutoProcessor

    trained = unpatched(llava)
    report = spatial_pe.patch(trained, rope="axial", keep_absolute=False)
    with torch.no_grad():
        for parameter in report.parameters():
            parameter += 0.5
    trained.save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(llava).save_pretrained(tmp_path)
    loaded = load(f"pretrained={tmp_path}").model
    assert torch.equal(logits(loaded), logits(trained))
    assert not torch.allclose(logits(loaded), logits(unpatched(llava)), atol=1e-3)
    assert (
        load(f"pretrained={tmp_path},backend=reference").model.config.vision_config.spatial_pe["backend"] == "reference"
    )
    with pytest.raises(ValueError, match=r"was saved patched \(rope=axial, start=identity, keep_absolute=False\)"):
        load(f"pretrained={tmp_path},rope=axial,start=full")


# ------------------------------------------------------------------------------------------------ the tasks, from files

# what (B), Yes and 3 score. TopViewRS: words shared are 2 of 2; "top" of 2; "living room" of "a large living room"
EXPECTED = {
    "vsr": {"accuracy": 3 / 5, "precision": 3 / 5, "recall": 1, "f1": 0.75},
    "tallyqa": {"accuracy": 2 / 4},
    "topviewrs_mine": {"exact_match": 1 / 3, "partial_match": (1 + 1 / 2 + 2 / 4) / 3},
    "cv_bench_overall": {"cv_bench_acc": ((1 / 4 + 1 / 2) / 2 + 1) / 2},
}


def numbers(results: dict) -> dict[str, dict[str, float]]:
    """The metrics of each task; beside them stand "metric_stderr,none" and such."""
    return {
        task: {
            name.removesuffix(",none"): found[name] for name in found if name.endswith(",none") and "_std" not in name
        }
        for task, found in results["results"].items()
    }


@pytest.mark.parametrize("force_simple", [False, True])
def test_a_whole_evaluation_gives_the_scores_worked_out_by_hand(lmms_eval, tmp_path, monkeypatch, force_simple):
    model = save_llava(tmp_path / "llava", answer=("(B)", "Yes", "3"))
    write_published(tmp_path)
    monkeypatch.chdir(tmp_path)
    results = lmms_eval.evaluator.simple_evaluate(
        model="llava_hf_spatial_pe",
        model_args=f"pretrained={model},rope=axial,start=full",
        tasks=list(EXPECTED),
        task_manager=lmms_eval.tasks.TaskManager(include_path=[str(TASKS), str(tmp_path)], include_defaults=False),
        batch_size=1,
        device="cpu",
        force_simple=force_simple,
    )
    answers = {sample["resps"][0][0] for samples in results["samples"].values() for sample in samples}
    assert answers == {"(B) Yes 3"}
    found = numbers(results)
    assert found.keys() == EXPECTED.keys()
    for task, scores in found.items():
        assert scores == pytest.approx(EXPECTED[task]), task


@pytest.mark.slow
def test_the_command_line(tmp_path):
    save_llava(tmp_path / "llava", answer=("(B)", "Yes", "3"))
    write_published(tmp_path)
    command = (
        "-m lmms_eval --model llava_hf_spatial_pe --model_args pretrained=llava,rope=axial,start=full --device cpu"
    )
    tasks = ["--tasks", "vsr,tallyqa,cv_bench_overall", "--include_path", str(TASKS), "--output_path", "results"]
    path = os.pathsep.join(filter(None, [str(BESIDE) if BESIDE.exists() else "", os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    run = subprocess.run(
        [sys.executable, *command.split(), *tasks],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "axial RoPE added, full" in run.stdout + run.stderr  # the report of patch
    (written,) = (tmp_path / "results").rglob("*_results.json")
    for task, scores in numbers(json.loads(written.read_text())).items():
        assert scores == pytest.approx(EXPECTED[task]), task


def task_docs(lmms_eval, folder, name: str, **config):
    """A task's samples, loaded by lmms-eval."""
    (folder / "own.yaml").write_text(json.dumps({"include": str(TASKS / f"{name}.yaml"), "task": "own", **config}))
    manager = lmms_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    return manager.load_task_or_group("own")["own"].test_docs()


def test_images_are_those_of_the_table_and_of_the_row_that_a_cell_names(lmms_eval, tmp_path):
    write_published(tmp_path)
    source = {"data_files": {"test": str(tmp_path / VSR)}, "sep": "\t"}
    docs = task_docs(lmms_eval, tmp_path, "vsr", dataset_path="csv", dataset_kwargs=source)
    colours = [doc["image"].convert("RGB").getpixel((0, 0)) for doc in docs]
    assert colours == [(255, 0, 0), (255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 128, 0)]


def test_the_authors_own_files_with_images_apart(lmms_eval, tmp_path, monkeypatch):
    from spatial_pe.integrations.lmms_eval.tasks import tallyqa, vsr

    monkeypatch.chdir(tmp_path)
    (tmp_path / "images/VG_100K_2").mkdir(parents=True)
    for name, colour in {"000000000142.jpg": "red", "VG_100K_2/2410408.jpg": "blue"}.items():
        (tmp_path / "images" / name).write_bytes(picture(colour, "JPEG"))
    monkeypatch.setenv("VSR_IMAGES", str(tmp_path / "images"))
    monkeypatch.setenv("TALLYQA_IMAGES", str(tmp_path / "images"))
    line = {
        "image": "000000000142.jpg",
        "image_link": "http://images.cocodataset.org/train2017/000000000142.jpg",
        "caption": "The sandwich is left of the banana.",
        "label": 0,
        "relation": "left of",
    }
    (tmp_path / "test.jsonl").write_text(json.dumps(line) + "\n")
    (doc,) = task_docs(lmms_eval, tmp_path, "vsr_original", dataset_path=str(tmp_path))
    assert doc["answer"] == "No" and '"The sandwich is left of the banana."' in vsr.text(doc)
    assert vsr.visual(doc)[0].getpixel((0, 0))[0] > 250
    entries = [
        {"answer": 4, "data_source": "imported_genome", "image": "VG_100K_2/2410408.jpg", "image_id": 92410408}
        | {"issimple": simple, "question": "How many headlights does the black bus have?", "question_id": i}
        for i, simple in enumerate([False, True])
    ]
    (tmp_path / "test.json").write_text(json.dumps(entries))
    docs = task_docs(lmms_eval, tmp_path, "tallyqa_original", dataset_kwargs={"data_files": {"test": "test.json"}})
    assert tallyqa.process_results(docs[0], ["4"]) == {"accuracy": 1, "accuracy_complex": 1}
    assert tallyqa.process_results(docs[1], ["five"]) == {"accuracy": 0, "accuracy_simple": 0}
    assert tallyqa.visual(docs[0])[0].getpixel((0, 0))[2] > 250


@pytest.mark.parametrize("folder, message", [(None, "is not set"), ("elsewhere", "has no 1.jpg")])
def test_missing_images_name_the_variable_and_the_command(folder, message, monkeypatch):
    import datasets

    from spatial_pe.integrations.lmms_eval.tasks import vsr

    monkeypatch.delenv("VSR_IMAGES", raising=False)
    if folder:
        monkeypatch.setenv("VSR_IMAGES", folder)
    rows = datasets.Dataset.from_list([{"image": "1.jpg", "caption": "The cat is on the mat.", "label": 1}])
    with pytest.raises(FileNotFoundError, match=rf"(?s)VSR_IMAGES .*{message}.*hf download .*vsr_zeroshot"):
        vsr.process_docs(rows)
