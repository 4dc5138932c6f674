# SPDX-License-Identifier: Apache-2.0
"""Rows of ServiceNow/whatsup_all: from Parquet files, from a folder that ``save_to_disk`` wrote, or from the hub.

Columns: ``image_options`` (an image, stored as ``{"bytes", "path"}``; or a list with one) and ``caption_options`` (a
list of strings, the right one first, as in the authors' code that wrote it).
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..._utils.console import first_line
from ..._utils.errors import UserError

COLUMNS = ("image_options", "caption_options")
Row = tuple[str, Callable[[], bytes], str, Any]  # place, image, identity of the image, captions


def rows(data: str | Path, split: str) -> Iterator[Row] | None:
    """Yield the rows of one split; None if ``data`` has none of these forms.

    Raises:
        UserError: a file that cannot be read, a split or a column that is not there, a failed download.
    """
    folder = Path(data)
    if not folder.exists():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(data)):
            return None
        folder = _download(str(data), split)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _rows(folder, *_saved(folder, split))
    files = sorted(folder.rglob(f"{split}-*.parquet"))
    return _rows(folder, *_parquet(files)) if files else None


def _rows(folder: Path, columns: list[str], count: int, row: Callable[[int], dict]) -> Iterator[Row]:
    if missing := set(COLUMNS) - set(columns):
        raise UserError(f"{folder}: no column {', '.join(sorted(missing))}; it has {', '.join(columns)}")
    for n in range(count):
        where = f"{folder}, row {n}"
        values = row(n)
        digest = _digest(_image(where, values["image_options"]))
        yield where, partial(_read, where, row, n), digest, values["caption_options"]


def _read(where: str, row: Callable[[int], dict], n: int) -> bytes:
    """Return the image of a row, read from the table on access: a benchmark's images are hundreds of megabytes."""
    value = _image(where, row(n)["image_options"])
    return value.get("bytes") or Path(value["path"]).read_bytes()


def _image(where: str, value: Any) -> dict:
    """Return the image's bytes or path, as ``datasets`` stores them."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bytes):
        value = {"bytes": value}
    if not isinstance(value, dict) or not (value.get("bytes") or value.get("path")):
        raise UserError(f'{where}: image_options must hold one image ({{"bytes", "path"}}), got {type(value)}')
    return value


def _digest(value: dict) -> str:
    """Return a digest that is equal for the same image, which several rows may repeat."""
    return hashlib.sha1(value.get("bytes") or value["path"].encode(), usedforsecurity=False).hexdigest()


# --------------------------------------------------------------------------------------------------------------- forms


def _parquet(files: list[Path]) -> tuple[list[str], int, Callable[[int], dict]]:
    _need("pyarrow")
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.concat_tables([pyarrow.parquet.read_table(file) for file in files])
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {', '.join(map(str, files))}: {error}. Download it again") from error
    return table.column_names, len(table), lambda n: table.slice(n, 1).to_pylist()[0]


def _saved(folder: Path, split: str) -> tuple[list[str], int, Callable[[int], dict]]:
    _need("datasets")
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # datasets raises whatever json, Arrow or the file system raise
        raise UserError(f"cannot read {folder} with datasets: {error}. Save it again") from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise UserError(f"{folder} has no split {split!r}; it has {', '.join(found)}")
        found = found[split]
    arrow = found.with_format("arrow")
    return found.column_names, len(found), lambda n: arrow[n].to_pylist()[0]


def _download(name: str, split: str) -> Path:
    _need("huggingface_hub")
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(name, repo_type="dataset", allow_patterns=[f"**/{split}-*.parquet"])
        )
    except Exception as error:  # no network, no such data set, no permission: each has its own class
        raise UserError(f"{name!r} is no folder, and cannot be loaded from the hub: {first_line(error)}") from error


def _need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"this form of the data needs the package {package!r}: pip install datasets")
