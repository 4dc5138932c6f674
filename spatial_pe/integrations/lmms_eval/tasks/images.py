# SPDX-License-Identifier: Apache-2.0
"""Images of the two published forms of these benchmarks: inside a table, or in a folder beside it."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

import datasets


def from_table(dataset: datasets.Dataset) -> datasets.Dataset:
    """Decode images from base64, as in the tables of VLMEvalKit, when they are accessed.

    A cell of at most 64 characters is the ``index`` of the row that holds the image.
    """
    row_of = {str(index): row for row, index in enumerate(dataset["index"])}

    def decode(row: dict[str, Any]) -> dict[str, Any]:
        code = str(row["image"])
        if len(code) <= 64:
            code = dataset[row_of[code]]["image"]
        return {"image": {"bytes": base64.b64decode(code), "path": None}}

    return _as_images(dataset, decode)


def from_folder(dataset: datasets.Dataset, variable: str, how: str) -> datasets.Dataset:
    """Load images by name, from the folder that the environment variable names.

    Raises:
        FileNotFoundError: the variable is not set or the first image is not there; ``how`` says how to get them.
    """
    folder = Path(os.environ.get(variable, ""))
    first = folder / dataset[0]["image"]
    if variable not in os.environ or not first.is_file():
        state = f"is {str(folder)!r}, which has no {dataset[0]['image']}" if variable in os.environ else "is not set"
        raise FileNotFoundError(f"{variable} must be the folder of the images, and {state}. To get them:\n{how}")
    return _as_images(dataset, lambda row: {"image": {"bytes": None, "path": str(folder / row["image"])}})


def visual(doc: dict[str, Any]) -> list:
    """Return the image that a model sees of a sample: one PIL image, RGB."""
    return [doc["image"].convert("RGB")]


def _as_images(dataset: datasets.Dataset, convert: Any) -> datasets.Dataset:
    features = dataset.features.copy()
    features["image"] = datasets.Image()
    return dataset.map(convert, features=features)
