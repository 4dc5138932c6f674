# SPDX-License-Identifier: Apache-2.0
"""Loaders of published caption-choice benchmarks, for the files as their authors released them.

What'sUp (arXiv 2310.19785; github.com/amitakamath/whatsup_vlms): Controlled_Images A and B, and the COCO and Visual
Genome (GQA) captions of one and two objects. Two forms are read:
- the authors' ``data`` folder: ``controlled_images_dataset.json`` and ``controlled_clevr_dataset.json`` are lists of
  ``{"image_path": "data/controlled_images/mug_left_of_plate.jpeg", "caption_options": [four captions]}``;
  ``coco_qa_{one,two}_obj.json`` and ``vg_qa_{one,two}_obj.json`` lists of ``[image id, caption, caption]``, the images
  in ``val2017/000000000139.jpg`` and ``vg_images/2370799.jpg``. The first caption is the right one.
- ServiceNow/whatsup_all (columns ``image_options`` and ``caption_options``, a split for each benchmark): its Parquet
  files in a folder, a folder written by ``datasets``' ``save_to_disk``, or the name on the hub.

VSR (arXiv 2205.00363; github.com/cambridgeltl/visual-spatial-reasoning): ``{train,dev,test}.jsonl``, one record a line
with ``image``, ``caption``, ``label`` (1 where the caption is true) and ``relation``, and a folder of COCO images.

Images are decoded as the authors' code does: to RGB, with the EXIF orientation ignored.
"""

from __future__ import annotations

import io
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._utils.errors import UserError
from . import hub
from .benchmarks import BENCHMARKS, Benchmark, benchmark_parts, how_to_get, missing

if TYPE_CHECKING:
    from PIL.Image import Image

Source = Path | Callable[[], bytes]


@dataclass(frozen=True)
class Item:
    """``captions``: the one asked about comes first. ``label``: whether it is true (always, except in VSR).

    ``record`` is its origin, for messages. Items with the same ``group`` are not independent: they show the same two
    objects (Controlled), or are about the same image.
    """

    record: str
    image: Source
    image_id: str
    captions: tuple[str, ...]
    relation: str
    group: str
    label: bool = True


@dataclass(frozen=True)
class Task:
    """Items of a benchmark; ``dev``: those for choosing a threshold, not scored (VSR)."""

    name: str
    benchmark: Benchmark
    items: list[Item]
    dev: list[Item] = field(default_factory=list)


def load(name: str, data: str | Path, *, limit: int | None = None) -> Task:
    """Load the items of a benchmark; check every record and that every image file exists. No image is decoded.

    Args:
        name: a key of ``BENCHMARKS``.
        data: a folder in one of the forms above, or "ServiceNow/whatsup_all", whose files of this benchmark are then
            downloaded.
        limit: only the first so many items; of Controlled_Images only whole sets of four, of VSR as many of each split.

    Raises:
        ValueError: no such benchmark, or a limit below 1 (below 4 for Controlled_Images).
        UserError: missing or unreadable data.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"benchmark must be one of {', '.join(BENCHMARKS)}, got {name!r}")
    benchmark = BENCHMARKS[name]
    least = benchmark.captions if benchmark.opposites else 1
    if limit is not None and limit < least:
        raise ValueError(f"limit must be at least {least} for {name}, got {limit}")
    if name.startswith("vsr"):
        test, dev = (_vsr(name, benchmark, Path(data), part)[:limit] for part in benchmark_parts(name))
        return Task(name, benchmark, test, dev)
    items = list(_whatsup(name, benchmark, data))
    if benchmark.opposites:
        items = _whole_sets(items, benchmark, limit)
    return Task(name, benchmark, items[:limit])


def open_image(item: Item) -> Image:
    """Return the image as RGB. Raise UserError with the file and the record if it cannot be decoded."""
    from PIL import Image

    try:
        source = item.image if isinstance(item.image, Path) else io.BytesIO(item.image())
        with Image.open(source) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # PIL's errors for a broken file
        file = f"{item.image}" if isinstance(item.image, Path) else "its image"
        raise UserError(f"{item.record}: cannot read {file}: {error}. Download it again") from error


# --------------------------------------------------------------------------------------------------- What'sUp: records


def _whatsup(name: str, benchmark: Benchmark, data: str | Path) -> Iterator[Item]:
    """Yield the items from whichever form ``data`` has."""
    folder = Path(data)
    if (file := _find(folder, benchmark.annotations)) is not None:
        images = _find(folder, benchmark.images)
        if images is None:
            raise missing(name, folder, f"{file} is there, but no folder {benchmark.images[0]} beside it")
        for where, record in _json_records(file):
            image_id, found = _fields(where, record, benchmark)
            path = images / benchmark.image_name(image_id)
            if not path.is_file():
                raise UserError(f"{where}: no image {path}{how_to_get(name, folder)}")
            yield _item(where, path, str(image_id), found, benchmark)
    elif (rows := hub.rows(data, benchmark.split)) is not None:
        for where, image, image_id, found in rows:
            yield _item(where, image, image_id, found, benchmark)
    else:
        raise missing(name, folder, "none of its files" if folder.is_dir() else "it is no folder")


def _fields(where: str, record: Any, benchmark: Benchmark) -> tuple[Any, list]:
    """Return the image and the captions of a json record: a dict with four captions, or a list with two."""
    if benchmark.opposites:
        if not isinstance(record, dict) or not isinstance(record.get("image_path"), str):
            raise UserError(f'{where}: needs "image_path" and "caption_options", got {_short(record)}')
        return record["image_path"], record.get("caption_options", [])
    if not isinstance(record, list) or not record or not isinstance(record[0], int | str):
        raise UserError(f"{where}: needs [image id, caption, caption], got {_short(record)}")
    return record[0], [field for field in record[1:] if isinstance(field, str)]


def _item(where: str, image: Source, image_id: str, found: Any, benchmark: Benchmark) -> Item:
    captions = tuple(found) if isinstance(found, list) else ()
    if len(captions) != benchmark.captions or not all(isinstance(c, str) and c.strip() for c in captions):
        raise UserError(f"{where}: needs {benchmark.captions} captions, got {_short(found)}")
    if len(set(captions)) != len(captions):
        raise UserError(f"{where}: the same caption twice, so none is right: {_short(found)}")
    group = " | ".join(sorted(captions)) if benchmark.opposites else image_id
    return Item(where, image, image_id, captions, benchmark.relation(captions[0]), group)


def _whole_sets(items: list[Item], benchmark: Benchmark, limit: int | None) -> list[Item]:
    """Check and order sets of items; a set shares four captions, each right once (so first captions are right ones)."""
    relations = sorted(relation for pair in benchmark.opposites for relation in pair)
    sets: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        sets[item.group].append(item)
    for members in sets.values():
        right = sorted(item.captions[0] for item in members)
        if right != sorted(members[0].captions) or sorted(item.relation for item in members) != relations:
            records = "; ".join(f"{item.record}: {item.captions[0]!r}" for item in members)
            raise UserError(
                f"four images share four captions, and each caption, {'/'.join(relations)}, comes first once. It does "
                f"not here: {records}. Download it again"
            )
    whole = [item for members in sets.values() for item in members]
    return whole if limit is None else whole[: limit - limit % 4]


# ----------------------------------------------------------------------------------------------------------------- VSR


def _vsr(name: str, benchmark: Benchmark, folder: Path, part: str) -> list[Item]:
    places = [place.format(part=part) for place in benchmark.annotations]
    file, images = _find(folder, places), _find(folder, benchmark.images)
    if file is None or images is None:
        what = f"{part}.jsonl" if file is None else "folder of images"
        raise missing(name, folder, f"no {what}" if folder.is_dir() else "it is no folder")
    items = []
    for where, record in _json_records(file, lines=True):
        wrong = [k for k in ("image", "caption", "relation") if not isinstance(_get(record, k), str) or not record[k]]
        if wrong or _get(record, "label") not in (0, 1):
            raise UserError(f"{where}: needs {wrong or 'a label of 0 or 1'}, got {_short(record)}")
        path = images / record["image"]
        if not path.is_file():
            raise UserError(f"{where}: no image {path}{how_to_get(name, folder)}")
        captions = (record["caption"], _negated(where, record["caption"], record["relation"]))
        items.append(
            Item(where, path, record["image"], captions, record["relation"], record["image"], bool(record["label"]))
        )
    return items


_OPPOSITE = {
    a: b
    for pair in (
        ("above", "below"),
        ("at the left side of", "at the right side of"),
        ("close to", "far from"),
        ("connected to", "detached from"),
        ("facing", "facing away from"),
        ("in front of", "behind"),
        ("inside", "outside"),
        ("left of", "right of"),
        ("over", "under"),
        ("parallel to", "perpendicular to"),
    )
    for a, b in (pair, pair[::-1])
}
_VERBS = {
    "contains": "does not contain",
    "consists of": "does not consist of",
    "has as a part": "does not have as a part",
}


def _negated(where: str, caption: str, relation: str) -> str:
    """Return the caption with its relation replaced by an opposite, where English has one, else by its negation.

    Every caption of the release has one of two forms: "The cat is <relation> the sink." and "The bowl contains ...".
    """
    pattern = rf"\b{re.escape(relation)}\b" if relation in _VERBS else rf"\bis {re.escape(relation)}\b"
    other = _VERBS.get(relation) or f"is {_OPPOSITE.get(relation, f'not {relation}')}"
    negated, count = re.subn(pattern, other, caption)
    if count != 1:
        raise UserError(f"{where}: the caption {caption!r} does not say its relation {relation!r} once")
    return negated


# -------------------------------------------------------------------------------------------------------------- shared


def _json_records(file: Path, lines: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield (where, record) of a json list or of json lines; records are counted from 1, as lines are."""
    word = "line" if lines else "record"
    try:
        text = file.read_text(encoding="utf-8")
        found = enumerate(text.splitlines(), 1) if lines else enumerate(json.loads(text), 1)
        parsed = [(n, json.loads(r) if lines else r) for n, r in found if not lines or str(r).strip()]
    except (OSError, UnicodeDecodeError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{file}: no readable json: {error}. Download it again") from error
    if not parsed:
        raise UserError(f"{file} holds no records. Download it again")
    yield from ((f"{file}, {word} {n}", record) for n, record in parsed)


def _find(folder: Path, places: tuple[str, ...] | list[str]) -> Path | None:
    return next((folder / place for place in places if (folder / place).exists()), None)


def _get(record: Any, key: str) -> Any:
    return record.get(key) if isinstance(record, dict) else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
