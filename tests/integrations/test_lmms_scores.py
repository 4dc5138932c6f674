# SPDX-License-Identifier: Apache-2.0
"""Scores of our lmms-eval tasks, and of those of lmms-eval that the README names, against ones worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lmms_path import importable

from spatial_pe.integrations.lmms_eval import TASKS

pytest.importorskip("transformers")

THEIRS = ["blink", "countbench", "countbenchqa", "cv_bench", "embspatial", "gqa", "mmvp", "realworldqa"]


@pytest.fixture(autouse=True, scope="module")
def lmms_eval(tmp_path_factory):
    with importable(tmp_path_factory.mktemp("cache")) as module:
        yield module


@pytest.fixture(scope="module")
def task_manager(lmms_eval):
    folder = Path(lmms_eval.tasks.__file__).parent  # of all its tasks, 10 seconds are saved by these few
    paths = [str(TASKS), *(str(folder / name) for name in THEIRS)]
    return lmms_eval.tasks.TaskManager(include_path=paths, include_defaults=False)


# --------------------------------------------------------------------------------------------------- scores, by hand


@pytest.mark.parametrize(
    "answer, extracted",
    [
        ("Yes", "Yes"),
        ("yes.", "Yes"),
        ("No, the cat is not on the mat.", "No"),
        ("The answer is: NO", "No"),
        ("Yes and no", None),
        ("The cat is nowhere near; I do not know", None),  # "no" is not a word here
        ("Yesterday", None),
        ("True", None),
        ("", None),
    ],
)
def test_yes_and_no_are_words(answer, extracted):
    from spatial_pe.integrations.lmms_eval.tasks import vsr

    assert vsr.extract(answer) == extracted


def test_vsr_counts_an_answer_that_is_neither_as_wrong_and_as_no():
    from spatial_pe.integrations.lmms_eval.tasks import vsr

    answers = [
        ("Yes", "Yes"),
        ("Yes", "no"),
        ("Yes", "maybe"),
        ("No", "Yes"),
        ("No", "No."),
        ("No", "hm"),
        ("Yes", "YES"),
    ]
    pairs = [vsr.process_results({"answer": right}, [answer])["f1"] for right, answer in answers]
    assert vsr.accuracy(pairs) == 3 / 7
    assert vsr.precision(pairs) == 2 / 3  # of 3 that said yes
    assert vsr.recall(pairs) == 2 / 4  # of 4 that are
    assert vsr.f1(pairs) == pytest.approx(4 / 7)
    assert vsr.f1([("Yes", "No")]) == vsr.precision([("Yes", None)]) == vsr.recall([("No", "No")]) == 0


@pytest.mark.parametrize(
    "answer, number",
    [
        ("12 apples", 12),
        ("twelve", 12),
        ("There are Twelve.", 12),
        ("**7**", 7),
        ("0", 0),
        ("zero", 0),
        ("sixteen", 16),  # not six
        ("seventy", None),
        ("25", None),
        ("120", None),
        ("20 or 21", 20),
        ("between 25 and 3", 3),
        ("none", None),
        ("someone", None),
        ("", None),
    ],
)
def test_the_first_number_up_to_twenty_counts(answer, number):
    from spatial_pe.integrations.lmms_eval.tasks import tallyqa

    assert tallyqa.extract(answer) == number
    assert tallyqa.process_results({"answer": 12}, [answer]) == {"accuracy": float(number == 12)}


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("[B]", "B"),
        ("B.", "B"),
        ("B. top right", "B"),
        ("(b) top right", "B"),
        ("The answer is (B).", "B"),
        ("Answer: B", "B"),
        ("It is not (A) but the answer is B", "B"),
        ("A sofa is in the top right", "B"),  # "A" is an article
        ("The correct answer is a place in the top right", "B"),
        ("the top right of the map", "B"),
        ("top left or top right", None),
        ("right", "D"),
        ("(E)", None),
        ("I cannot tell", None),
        ("", None),
    ],
)
def test_letters_in_every_form(answer, letter):
    from spatial_pe.integrations.lmms_eval.tasks import topviewrs

    doc = {"question": "Where?", "A": "top left", "B": "top right", "C": "bottom left", "D": "right", "answer": "B"}
    assert topviewrs.choose(answer, doc) == letter
    scores = topviewrs.process_results(doc, [answer])
    shared = {"A": 1 / 2, "B": 1, "C": 0, "D": 1 / 2}  # with "top right", over the longer one
    assert scores == {"exact_match": float(letter == "B"), "partial_match": shared.get(letter, 0)}


def test_the_prompts_ask_what_the_harness_of_the_paper_asks(task_manager):
    doc = {"question": "How many?", "answer": 1}
    config = task_manager._get_config("tallyqa")
    prompt = config["doc_to_text"](doc, config["lmms_eval_specific_kwargs"]["default"])
    assert prompt == "How many?\nAnswer the question using a single number."
    config = task_manager._get_config("topviewrs")
    doc = {"question": "Where?", "A": "left", "B": "right", "C": "", "D": None, "answer": "A"}
    prompt = config["doc_to_text"](doc, config["lmms_eval_specific_kwargs"]["default"])
    assert prompt.startswith("Where?\nA. left\nB. right\nAnswer with")


# ------------------------------------------------------------------------------------------- lmms-eval's own tasks


def aggregated(config: dict, metric: str, records: list[dict]) -> float:
    rule = next(m["aggregation"] for m in config["metric_list"] if m["metric"] == metric)
    return rule([record[metric] for record in records])


def test_mmvp_counts_single_answers_and_pairs(task_manager):
    config = task_manager._get_config("mmvp")
    # (right, answered) of three pairs: both right, one, none
    answers = [("(a)", "A"), ("(b)", "(b)"), ("(b)", "B."), ("(a)", "B"), ("(a)", "b"), ("(b)", "I cannot tell")]
    records = [
        config["process_results"]({"index": i, "answer": right, "question": "?", "options": "(a) x (b) y"}, [answer])
        for i, (right, answer) in enumerate(answers, start=1)
    ]
    assert aggregated(config, "mmvp_accuracy", records) == 3 / 6
    assert aggregated(config, "mmvp_pair_accuracy", records) == pytest.approx(1 / 3)


def test_cv_bench_of_lmms_eval_is_not_the_authors_score_and_ours_is(task_manager):
    sources = ["ADE20K"] * 4 + ["COCO"] * 2 + ["Omni3D"]
    doc = {"idx": 0, "type": "2D", "task": "Count", "answer": "(C)"}
    answers = ["C", "(A)", "(B)", "D", "(C) 3", "A", "(C)"]
    for name, expected in {"cv_bench": 3 / 7, "cv_bench_overall": ((1 / 4 + 1 / 2) / 2 + 1) / 2}.items():
        config = task_manager._get_config(name)
        records = [config["process_results"](doc | {"source": s}, [a]) for s, a in zip(sources, answers, strict=True)]
        assert aggregated(config, "cv_bench_acc", records) == pytest.approx(expected), name


def test_countbenchqa_of_lmms_eval_gives_the_answer_away_and_countbench_does_not(task_manager):
    """The column ``text`` is the caption that the number was taken from."""
    doc = {"text": "Five cups on a shelf", "question": "How many cups are there in the image?", "number": 5}
    prompts = {}
    for name in ("countbenchqa", "countbench"):
        config = task_manager._get_config(name)
        prompts[name] = config["doc_to_text"](doc, config["lmms_eval_specific_kwargs"]["default"])
    assert "Five cups" in prompts["countbenchqa"] and "Five" not in prompts["countbench"]
    config = task_manager._get_config("countbench")
    assert [config["process_results"](doc, [answer])["acc"] for answer in ("5", "Five", "15")] == [1, 1, 0]


def test_gqa_ignores_case_and_punctuation_and_nothing_else(lmms_eval, task_manager, tmp_path):
    theirs = Path(task_manager.task_index["gqa"]["yaml_path"])
    docs = [{"id": str(i), "imageId": "n1", "question": "Who is left of the bench?", "answer": "man"} for i in range(4)]
    (tmp_path / "testdev.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    source = {"dataset_path": "json", "dataset_name": None, "process_docs": None}
    files = {"dataset_kwargs": {"data_files": {"testdev": str(tmp_path / "testdev.jsonl")}}}
    (tmp_path / "own.yaml").write_text(json.dumps({"include": str(theirs), "task": "own_gqa"} | source | files))
    own = lmms_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    task = own.load_task_or_group("own_gqa")["own_gqa"]
    answers = ["man", "Man.", "the man", "woman"]
    scores = [task.process_results(doc, [answer]) for doc, answer in zip(task.test_docs(), answers, strict=True)]
    assert [float(score["exact_match"]) for score in scores] == [1, 1, 0, 0]


def test_blink_embspatial_and_realworldqa_match_letters(task_manager):
    blink = task_manager._get_config("blink_spatial_relation")
    doc = {"idx": "1", "answer": "(A)", "choices": ["yes", "no"], "sub_task": "Spatial_Relation"}
    records = [blink["process_results"](doc, [answer]) for answer in ("(A)", "A", "The answer is (B)", "no")]
    assert aggregated(blink, "blink_acc", records) == 2 / 4
    embspatial = task_manager._get_config("embspatial")
    doc = {"question_id": "1", "answer": 2, "relation": "left", "data_source": "mp3d"}
    records = [embspatial["process_results"](doc, [answer]) for answer in ("C", "(C)", "B) x", "")]
    assert aggregated(embspatial, "embspatial_acc", records) == 2 / 4
    real = task_manager._get_config("realworldqa")
    assert [real["process_results"]({"answer": "B"}, [a])["exact_match"] for a in ("B", "(B)", "A")] == [1, 1, 0]
