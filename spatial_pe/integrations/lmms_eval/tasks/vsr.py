# SPDX-License-Identifier: Apache-2.0
"""VSR, zero-shot split (Liu et al., arXiv 2205.00363): verification of a statement on the place of two objects.

Scored as in VLMEvalKit, the harness of the seed paper: "yes" or "no" as a word, and not both; anything else is wrong,
and counts as "no" for precision, recall and F1 of "yes". All are fractions of 1.
"""

from __future__ import annotations

import re
from typing import Any

import datasets

from spatial_pe.integrations.lmms_eval.tasks.images import from_folder, from_table, visual

HOW = """  hf download --repo-type dataset cambridgeltl/vsr_zeroshot test.jsonl --local-dir vsr
  python -c "import json; [print(json.loads(r)['image_link']) for r in open('vsr/test.jsonl')]" | sort -u > vsr/links
  wget -nc -P vsr/images -i vsr/links && export VSR_IMAGES=$PWD/vsr/images"""

__all__ = ["accuracy", "extract", "f1", "precision", "process_docs", "process_results", "recall", "text", "visual"]


def process_docs(dataset: datasets.Dataset) -> datasets.Dataset:
    """Read VLMEvalKit's table (question, answer Yes/No, image), or the authors' lines (caption, label 0/1, image
    name)."""
    if "caption" not in dataset.column_names:
        return from_table(dataset)
    return from_folder(dataset, "VSR_IMAGES", HOW).map(
        lambda row: {
            "question": f'Is this statement about the image true? "{row["caption"]}" Answer with yes or no only.',
            "answer": "Yes" if int(row["label"]) else "No",
        }
    )


def text(doc: dict[str, Any]) -> str:
    return doc["question"]


def extract(answer: str) -> str | None:
    """Return "Yes", "No", or None where it is neither or both."""
    words = set(re.findall(r"[a-z]+", answer.lower()))
    found = [word for word in ("Yes", "No") if word.lower() in words]
    return found[0] if len(found) == 1 else None


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    pair = (doc["answer"], extract(results[0]))
    return {"accuracy": pair, "precision": pair, "recall": pair, "f1": pair}


Pairs = list[tuple[str, str | None]]  # (expected, answered)


def accuracy(pairs: Pairs) -> float:
    return sum(right == answered for right, answered in pairs) / len(pairs)


def precision(pairs: Pairs) -> float:
    return _ratio(pairs, [pair for pair in pairs if pair[1] == "Yes"])


def recall(pairs: Pairs) -> float:
    return _ratio(pairs, [pair for pair in pairs if pair[0] == "Yes"])


def f1(pairs: Pairs) -> float:
    p, r = precision(pairs), recall(pairs)
    return 2 * p * r / (p + r) if p + r else 0.0


def _ratio(pairs: Pairs, among: Pairs) -> float:
    return sum(tuple(pair) == ("Yes", "Yes") for pair in pairs) / len(among) if among else 0.0
