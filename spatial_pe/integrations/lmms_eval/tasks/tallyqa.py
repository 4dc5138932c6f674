# SPDX-License-Identifier: Apache-2.0
"""TallyQA, test split (Acharya et al., arXiv 1810.12440): counting objects in an image.

Scored as in VLMEvalKit, the harness of the seed paper: the first number from 0 to 20 in the answer, in digits or as a
word, must be the right one. The authors' file also says which questions are simple (an object's name alone) and which
are complex (attributes, relations): accuracy of each is given where that is known.
"""

from __future__ import annotations

import re
from typing import Any

import datasets

from spatial_pe.integrations.lmms_eval.tasks.images import from_folder, from_table, visual

HOW = """  wget https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip
  unzip -q images.zip -d tallyqa && unzip -q images2.zip -d tallyqa && export TALLYQA_IMAGES=$PWD/tallyqa"""

# fmt: off
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
         "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"]
# fmt: on
NUMBER = re.compile(rf"\b(?:1?[0-9]|20|{'|'.join(WORDS)})\b")

__all__ = ["extract", "process_docs", "process_results", "text", "visual"]


def process_docs(dataset: datasets.Dataset) -> datasets.Dataset:
    """Read VLMEvalKit's table (question, answer, image), or the authors' file (the same, image names, issimple)."""
    if "issimple" in dataset.column_names:
        return from_folder(dataset, "TALLYQA_IMAGES", HOW)
    return from_table(dataset)


def text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, str] | None = None) -> str:
    kwargs = lmms_eval_specific_kwargs or {}
    return kwargs.get("pre_prompt", "") + doc["question"] + kwargs.get("post_prompt", "")


def extract(answer: str) -> int | None:
    found = NUMBER.search(answer.lower())
    if found is None:
        return None
    return WORDS.index(found[0]) if found[0] in WORDS else int(found[0])


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    right = float(extract(results[0]) == int(doc["answer"]))
    kind = {True: "accuracy_simple", False: "accuracy_complex"}.get(doc.get("issimple"))  # type: ignore[arg-type]
    return {"accuracy": right} | ({kind: right} if kind else {})
