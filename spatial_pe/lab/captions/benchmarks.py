# SPDX-License-Identifier: Apache-2.0
"""Table of caption benchmarks: their files, the relation of a caption, and the commands that download the data."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..._utils.errors import UserError


@dataclass(frozen=True)
class Benchmark:
    """``annotations``, ``images``: possible paths in the data folder. ``split``: its name in whatsup_all.

    ``opposites``: pairs of relations in a set of images of the same two objects. ``get``: commands, DIR for the folder.
    """

    about: str
    annotations: tuple[str, ...]
    images: tuple[str, ...]
    get: tuple[str, ...]
    captions: int = 2
    split: str = ""
    relation: Callable[[str], str] = str
    opposites: tuple[tuple[str, str], ...] = ()
    image_name: Callable[[Any], str] = str

    @property
    def chance(self) -> float:
        return 1 / self.captions


def missing(name: str, folder: Path, what: str) -> UserError:
    """Return the error for missing data: the searched paths, and the commands that download it."""
    benchmark = BENCHMARKS[name]
    looked = [place.format(part=part) for place in benchmark.annotations for part in benchmark_parts(name)]
    if benchmark.split:
        looked.append(f"**/{benchmark.split}-*.parquet")
    return UserError(
        f"no data of {name} ({benchmark.about}) in {folder}: {what}. Looked for {', '.join(looked)}; for images in "
        f"{', '.join(benchmark.images)}{how_to_get(name, folder)}"
    )


def how_to_get(name: str, folder: Path) -> str:
    """Return the end of a message: the commands, with the folder in them."""
    lines = "\n  ".join(BENCHMARKS[name].get).replace("DIR", shlex.quote(str(folder)))
    return f".\nGet it with\n  {lines}"


def benchmark_parts(name: str) -> tuple[str, ...]:
    """Return the files of one benchmark: for VSR the splits, of which dev is for choosing a threshold."""
    return ("test", "dev") if name.startswith("vsr") else ("",)


# ----------------------------------------------------------------------------------------------------------- relations


def _last_word(caption: str) -> str:
    return caption.rstrip(" .").rsplit(" ", 1)[-1].lower()


def _said(phrases: tuple[tuple[str, str], ...], caption: str) -> str:
    """Return the first phrase that is in the caption; "" is in all."""
    return next((name for phrase, name in phrases if phrase in caption.lower()), "other")


_TWO = (("left of", "left"), ("right of", "right"))
_ON_UNDER = ((" on ", "on"), (" under ", "under"))
_FRONT_BEHIND = (("in front of", "front"), (" behind ", "behind"))

# --------------------------------------------------------------------------------------------------------------- files

_IMAGES = {  # folder: its archive, the archive's id
    "controlled_images": ("controlled_images.tar.gz", "19KGYVQjrV3syb00GgcavB2nZTW5NXX0H"),
    "controlled_clevr": ("controlled_clevr.tar.gz", "13jdBpg8t3NqW3jrL6FK8HO93vwsUjDxG"),
    "val2017": ("val2017.zip", "1zp5vBRRM4_nSik6o9PeVspDvOsHgPT4l"),
    "vg_images": ("vg_images.tar.gz", "1idW7Buoz7fQm4-670n-oERw9U-2JLJvE"),
}


def _released(about: str, file: str, file_id: str, images: str, split: str, **rest: Any) -> Benchmark:
    """Return a benchmark of What'sUp's own files, by the ids in its authors' code; or the same as Parquet."""
    archive, archive_id = _IMAGES[images]
    unpack = "unzip -d DIR" if archive.endswith(".zip") else "tar -C DIR -xf"
    get = (
        f"mkdir -p DIR && gdown {file_id} -O DIR/{file}",
        f"gdown {archive_id} -O DIR/{archive} && {unpack} DIR/{archive}",
        "or with",
        f'hf download ServiceNow/whatsup_all --repo-type dataset --include "data/{split}-*.parquet" --local-dir DIR',
    )
    return Benchmark(about, (file, f"data/{file}"), (images, f"data/{images}"), get, split=split, **rest)


def _controlled(
    about: str, file: str, file_id: str, images: str, split: str, phrases: tuple[tuple[str, str], ...]
) -> Benchmark:
    return _released(
        *(about, file, file_id, images, split),
        captions=4,
        relation=partial(_said, (*_TWO, *phrases)),
        opposites=(("left", "right"), (phrases[0][1], phrases[1][1])),
        image_name=lambda path: path.rsplit("/", 1)[-1],
    )


def _coco_file(image_id: Any) -> str:
    return f"{str(image_id).zfill(12)}.jpg"


def _vg_file(image_id: Any) -> str:
    return f"{image_id}.jpg"


def _vsr(split: str, about: str) -> Benchmark:
    folders = (f"data/splits/{split}/", f"splits/{split}/", f"{split}/", "")
    return Benchmark(
        about,
        tuple(f"{folder}{{part}}.jsonl" for folder in folders),
        ("data/images", "images", "data/trainval2017", "trainval2017"),
        (
            "git clone https://github.com/cambridgeltl/visual-spatial-reasoning DIR",
            'curl -L -o DIR/vsr_images.zip "https://www.dropbox.com/s/0s3bj25s62crjh2/vsr_images.zip?dl=1"',
            "unzip -j DIR/vsr_images.zip -d DIR/data/images",
            "or, with the images of COCO's train2017 and val2017 together in DIR/trainval2017, with",
            f"hf download cambridgeltl/vsr_{split} --repo-type dataset --local-dir DIR",
        ),
    )


# --------------------------------------------------------------------------------------------------------------- table

BENCHMARKS = {
    "whatsup_a": _controlled(
        "What'sUp, Controlled_Images A: 412 photographs, on/under/left/right",
        "controlled_images_dataset.json",
        "1ap8mmmpQjLIjPGuplkpBgc1hoEHCj4hm",
        "controlled_images",
        "Controlled_Images_A",
        _ON_UNDER,
    ),
    "whatsup_b": _controlled(
        "What'sUp, Controlled_Images B: 408 photographs, in front/behind/left/right",
        "controlled_clevr_dataset.json",
        "1unNNosLbdy9NDjgj4l8fsQP3WiAAGA6z",
        "controlled_clevr",
        "Controlled_Images_B",
        _FRONT_BEHIND,
    ),
    "coco_one": _released(
        "COCO-spatial, one object: 2,247 images",
        "coco_qa_one_obj.json",
        "1RsMdpE9mmwnK4zzMPpC1-wTU_hNis-dq",
        "val2017",
        "COCO_QA_one_obj",
        relation=_last_word,
        image_name=_coco_file,
    ),
    "coco_two": _released(
        "COCO-spatial, two objects: 440 images",
        "coco_qa_two_obj.json",
        "1TCEoM0mgFmz8T4cF7PQ3XJmO6JjtiQ-s",
        "val2017",
        "COCO_QA_two_obj",
        relation=partial(_said, (*_TWO, ("above", "above"), ("", "below"))),  # the authors' order, and what they do
        image_name=_coco_file,  # with the rest
    ),
    "vg_one": _released(
        "VG-spatial (GQA), one object: 1,160 images",
        "vg_qa_one_obj.json",
        "1ARMRzRdohs9QTr1gpIfzyUzvW20wYp_p",
        "vg_images",
        "VG_QA_one_obj",
        relation=_last_word,
        image_name=_vg_file,
    ),
    "vg_two": _released(
        "VG-spatial (GQA), two objects: 291 images",
        "vg_qa_two_obj.json",
        "1sjVG5O3QMY8s118k7kQM8zzDZH12i_95",
        "vg_images",
        "VG_QA_two_obj",
        relation=partial(_said, (*_TWO, ("front of", "front"), ("behind", "behind"), ("", "top"))),
        image_name=_vg_file,
    ),
    "vsr_random": _vsr("random", "VSR, random split: 2,195 captions, true or false"),
    "vsr_zeroshot": _vsr("zeroshot", "VSR, zero-shot split: 1,222 captions, true or false"),
}
