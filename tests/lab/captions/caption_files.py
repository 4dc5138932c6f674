# SPDX-License-Identifier: Apache-2.0
"""Small files in the formats of the published caption benchmarks, and models whose scores are known."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from torch import nn

RELATIONS = {
    "whatsup_a": ("on", "under", "to the left of", "to the right of"),
    "whatsup_b": ("in front of", "behind", "to the left of", "to the right of"),
}
FILES = {
    "whatsup_a": ("controlled_images_dataset.json", "controlled_images"),
    "whatsup_b": ("controlled_clevr_dataset.json", "controlled_clevr"),
    "coco_one": ("coco_qa_one_obj.json", "val2017"),
    "coco_two": ("coco_qa_two_obj.json", "val2017"),
    "vg_one": ("vg_qa_one_obj.json", "vg_images"),
    "vg_two": ("vg_qa_two_obj.json", "vg_images"),
}
SHORT = {"to the left of": "left_of", "to the right of": "right_of", "in front of": "in-front_of"}
OBJECTS = (("mug", "plate"), ("cap", "table"), ("book", "chair"))


def picture(path: Path, number: int) -> Path:
    """A JPEG that ``Oracle`` knows as image ``number`` (below 32) by its red."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 16), (8 * number, 90, 40)).save(path, "JPEG", quality=95)
    return path


def controlled(folder: Path, name: str, sets: int = 2) -> list[dict]:
    """What'sUp's Controlled_Images A or B: four images of each pair of objects, image n is record n."""
    file, images = FILES[name]
    records = []
    for a, b in OBJECTS[:sets]:
        captions = [f"A {a} {relation} a {b}" for relation in RELATIONS[name]]
        for i, relation in enumerate(RELATIONS[name]):
            path = f"{images}/{a}_{SHORT.get(relation, relation)}_{b}.jpeg"
            picture(folder / path, len(records))
            rest = captions[:i] + captions[i + 1 :]
            records.append({"image_path": f"data/{path}", "caption_options": [captions[i], *rest]})
    (folder / file).write_text(json.dumps(records))
    return records


def qa(folder: Path, name: str, records: list[list]) -> list[list]:
    """COCO's or Visual Genome's captions: [image id, right, wrong]; an id's last two digits are its image's number."""
    file, images = FILES[name]
    for image_id, *_ in records:
        stem = str(image_id).zfill(12) if name.startswith("coco") else image_id
        picture(folder / images / f"{stem}.jpg", image_id % 100)
    (folder / file).write_text(json.dumps(records))
    return records


def vsr(folder: Path, part: str, rows: list[tuple[int, str, str, int]], split: str = "random") -> None:
    """VSR as its repository has it; rows are (image number, caption, relation, label)."""
    lines = []
    for number, caption, relation, label in rows:
        name = f"{number:012}.jpg"
        picture(folder / "data/images" / name, number)
        link = f"http://images.cocodataset.org/train2017/{name}"
        record = {"image": name, "image_link": link, "caption": caption, "label": label, "relation": relation}
        lines.append(json.dumps({**record, "annotator_id": 1, "vote_true_validator_id": "[2]"}))
    file = folder / f"data/splits/{split}/{part}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")


class Oracle(nn.Module):
    """A two-tower model with given scores: ``scores[image number, caption]``, 0 for what is not there."""

    def __init__(self, scores: dict[tuple[int, str], float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.captions = {c: i for i, c in enumerate(dict.fromkeys(c for _, c in scores))}
        self.table = torch.zeros(32, len(self.captions) + 2)  # what no caption claims: another caption; the rest
        for (number, caption), score in scores.items():
            self.table[number, self.captions[caption]] = score
        self.table[:, -1] = (1 - self.table.square().sum(1)).clamp(min=0).sqrt()
        self.seen: list = []  # what was computed, to see that nothing is twice

    def processor(self, images=None, text=None, **_):
        if text is not None:
            self.seen += text
            return {"input_ids": torch.tensor([[self.captions.get(c, len(self.captions))] for c in text])}
        numbers = [round(image.getpixel((5, 5))[0] / 8) for image in images]
        self.seen += numbers
        return {"pixel_values": torch.tensor(numbers, dtype=torch.float32)[:, None]}

    def get_image_features(self, pixel_values):
        return self.table[pixel_values[:, 0].long()] * 3

    def get_text_features(self, input_ids):
        return torch.eye(self.table.shape[1])[input_ids[:, 0]] * 0.5
