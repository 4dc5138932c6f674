# SPDX-License-Identifier: Apache-2.0
"""TopViewRS (Li et al., arXiv 2406.02537): multiple choice on top-view maps of rooms and houses.

The authors' two scores: exact match, the letter is right; partial match, the number of words that the chosen and the
right option share, over that of the longer one. No option chosen is 0 in both.
"""

from __future__ import annotations

import re
from typing import Any

from spatial_pe.integrations.lmms_eval.tasks.images import from_table, visual

LETTERS = "ABCD"
# in this order: the first match decides
FORMS = (
    re.compile(r"^\W*([A-D])\W*$", re.I),  # "b", "(B)", "B."
    re.compile(r"\b(?i:answer|option|choice)(?:\s+is|\s*:)?\s*\W?([A-D])\b"),  # "the answer is (B)"
    re.compile(r"[(\[]([A-D])[)\]]"),  # "it is [B] top right"
    re.compile(r"^\W*([A-D])[.):,]"),  # "B. top right"
)

__all__ = ["choose", "options", "process_docs", "process_results", "text", "visual"]

process_docs = from_table  # VLMEvalKit's table: question, A, B, C, D, answer (a letter), image


def options(doc: dict[str, Any]) -> dict[str, str]:
    return {letter: str(doc[letter]) for letter in LETTERS if doc.get(letter) not in (None, "")}


def text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, str] | None = None) -> str:
    kwargs = lmms_eval_specific_kwargs or {}
    lines = [doc["question"], *(f"{letter}. {option}" for letter, option in options(doc).items())]
    return kwargs.get("pre_prompt", "") + "\n".join(lines) + kwargs.get("post_prompt", "")


def choose(answer: str, doc: dict[str, Any]) -> str | None:
    """Return the letter of an answer, or that of the only option that it contains ("top left" does not contain
    "left")."""
    letters = [found[1].upper() for form in FORMS if (found := form.search(answer.strip()))]
    given = options(doc)
    if letters:
        return letters[0] if letters[0] in given else None
    for letter, option in sorted(given.items(), key=lambda item: -len(item[1])):
        answer, count = re.subn(rf"\b{re.escape(option)}\b", "", answer, flags=re.I)
        letters += [letter] if count else []
    return letters[0] if len(letters) == 1 else None


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    chosen = choose(results[0], doc)
    if chosen is None:
        return {"exact_match": 0.0, "partial_match": 0.0}
    right, answered = (set(options(doc)[letter].lower().split()) for letter in (doc["answer"], chosen))
    return {
        "exact_match": float(chosen == doc["answer"]),
        "partial_match": len(right & answered) / max(len(right), len(answered)),
    }
