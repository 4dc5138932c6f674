# SPDX-License-Identifier: Apache-2.0
"""Small files in the published formats of VSR, TallyQA, TopViewRS and CV-Bench."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from spatial_pe.integrations.lmms_eval import TASKS

VSR = "ignoreandfly/vsr_zeroshot_tsv/vsr_zeroshot_dataset_yn_strict.tsv"
PLACES = ["top left", "top right", "bottom left", "bottom right"]
ROOMS = ["None", "a large living room", "hall", "living room"]


def picture(colour: str, kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(data, kind)
    return data.getvalue()


def write_published(folder: Path) -> None:
    """Each data set under the name of its repository, where lmms-eval finds it when it is run in ``folder``."""
    red, green, blue, white = (base64.b64encode(picture(name)).decode() for name in ("red", "green", "blue", "white"))
    tables = {
        VSR: [
            ["index", "image", "question", "answer"],
            [0, red, "Is the cat left of the dog? Answer Yes or No.", "Yes"],
            [1, 0, "Is the dog left of the cat? Answer Yes or No.", "No"],  # the image of row 0
            [2, blue, "Is the cup on the table? Answer Yes or No.", "Yes"],
            [3, white, "Is the table on the cup? Answer Yes or No.", "No"],
            [4, green, "Is the car near the tree? Answer Yes or No.", "Yes"],
        ],
        "moondream/TallyQA-VLMEvalKit/tallyqa_data.tsv": [
            ["index", "image", "question", "answer"],
            [0, red, "How many red chairs?", 3],
            [1, green, "How many green chairs?", 0],
            [2, blue, "How many blue chairs?", 3],
            [3, white, "How many white chairs?", 13],
        ],
        "TopViewRS.tsv": [
            ["index", "question", *"ABCD", "answer", "category", "image"],
            [0, "Where is the sofa?", *PLACES, "B", "localization", red],
            [1, "Where is the bed?", *PLACES, "A", "localization", green],
            [2, "Which room is it?", *ROOMS, "D", "recognition", blue],
        ],
    }
    for name, rows in tables.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    _write_cv_bench(folder / "nyu-visionx/CV-Bench/test.parquet")
    # TopViewRS is at an address, not in a repository: a user's own copy is a task that includes ours
    (folder / "mine.yaml").write_text(
        f"include: {TASKS / 'topviewrs.yaml'}\ntask: topviewrs_mine\n"
        'dataset_kwargs: {data_files: {test: TopViewRS.tsv}, sep: "\\t", keep_default_na: false}\n'
    )


def _write_cv_bench(path: Path) -> None:
    import datasets

    rows = [("ADE20K", "(B)"), *[("ADE20K", "(A)")] * 3, ("COCO", "(B)"), ("COCO", "(A)"), ("Omni3D", "(B)")]
    common = {
        "task": "Relation",
        "image": Image.new("RGB", (40, 30)),
        "question": "Where?",
        "choices": ["above", "below"],
        "prompt": "Where?\n(A) above\n(B) below",
    }
    path.parent.mkdir(parents=True)
    datasets.Dataset.from_list(
        [
            {"idx": i, "type": "3D" if source == "Omni3D" else "2D", "source": source, "answer": answer} | common
            for i, (source, answer) in enumerate(rows)
        ]
    ).to_parquet(path)
