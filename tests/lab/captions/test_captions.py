# SPDX-License-Identifier: Apache-2.0
"""Loaders of the published formats: what they read, and what they say of data that is missing or broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from caption_files import FILES, RELATIONS, controlled, qa, vsr

from spatial_pe._utils.errors import UserError
from spatial_pe.lab.captions import loading
from spatial_pe.lab.captions.loading import load, open_image

COCO = [[139, "A photo of a bench on the left", "A photo of a bench on the right"]]
VSR = [(1, "The cat is behind the sink.", "behind", 1), (2, "The bowl contains the cake.", "contains", 0)]


@pytest.mark.parametrize("name", RELATIONS)
@pytest.mark.parametrize("root", ["", "data"])
def test_controlled_images(tmp_path, name, root):
    records = controlled(tmp_path / root, name)
    items = load(name, tmp_path).items
    assert [list(item.captions) for item in items] == [record["caption_options"] for record in records]
    assert all(item.image.is_file() and item.label for item in items)
    third = "on" if name == "whatsup_a" else "front"
    fourth = "under" if name == "whatsup_a" else "behind"
    assert [item.relation for item in items] == [third, fourth, "left", "right"] * 2
    assert len({item.group for item in items[:4]}) == 1 and items[0].group != items[4].group


@pytest.mark.parametrize(
    ("name", "caption", "relation", "file"),
    [
        ("coco_one", "A photo of a bench on the left", "left", "000000000139.jpg"),
        ("coco_one", "A photo of a left shoe on the top", "top", "000000000139.jpg"),
        ("coco_two", "A photo of a dog to the right of a bench", "right", "000000000139.jpg"),
        ("coco_two", "A photo of a dog above a bench", "above", "000000000139.jpg"),
        ("coco_two", "A photo of a dog below a bench", "below", "000000000139.jpg"),
        ("vg_one", "A photo of a lamp on the bottom", "bottom", "139.jpg"),
        ("vg_two", "A photo of a lamp in front of a wall", "front", "139.jpg"),
        ("vg_two", "A photo of a lamp behind a wall", "behind", "139.jpg"),
        ("vg_two", "A photo of a lamp on top of a wall", "top", "139.jpg"),
    ],
)
def test_two_captions(tmp_path, name, caption, relation, file):
    qa(tmp_path, name, [[139, caption, "A photo of something else"]])
    (item,) = load(name, tmp_path).items
    assert (item.captions[0], item.relation, item.image.name) == (caption, relation, file)


@pytest.mark.parametrize("layout", ["data/splits/random", "splits/random", "random", "."])
@pytest.mark.parametrize("images", ["data/images", "images", "trainval2017"])
def test_vsr(tmp_path, layout, images):
    vsr(tmp_path / "x", "test", VSR)
    vsr(tmp_path / "x", "dev", VSR[:1])
    (tmp_path / layout).mkdir(parents=True, exist_ok=True)
    (tmp_path / images).parent.mkdir(parents=True, exist_ok=True)
    for part in ("test", "dev"):
        (tmp_path / f"x/data/splits/random/{part}.jsonl").rename(tmp_path / layout / f"{part}.jsonl")
    (tmp_path / "x/data/images").rename(tmp_path / images)
    task = load("vsr_random", tmp_path)
    assert [(i.captions[0], i.relation, int(i.label)) for i in task.items] == [(c, r, t) for _, c, r, t in VSR]
    assert [item.captions[0] for item in task.dev] == [VSR[0][1]]


@pytest.mark.parametrize(
    ("caption", "relation", "negated"),
    [
        ("The cat is facing the dog.", "facing", "The cat is facing away from the dog."),
        ("The cat is facing away from the dog.", "facing away from", "The cat is facing the dog."),
        ("The cow is ahead of the dog.", "ahead of", "The cow is not ahead of the dog."),
        ("The cup is on the table.", "on", "The cup is not on the table."),
        ("The cup is left of the bottle.", "left of", "The cup is right of the bottle."),
        ("The oven contains the cake.", "contains", "The oven does not contain the cake."),
        ("The cake consists of the dog.", "consists of", "The cake does not consist of the dog."),
        ("The car has as a part the book.", "has as a part", "The car does not have as a part the book."),
    ],
)
def test_negations(tmp_path, caption, relation, negated):
    for part in ("test", "dev"):
        vsr(tmp_path, part, [(1, caption, relation, 1)])
    assert load("vsr_random", tmp_path).items[0].captions == (caption, negated)


def test_images_are_rgb_with_exif_ignored(tmp_path):
    from PIL import Image

    qa(tmp_path, "coco_one", COCO)
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: a quarter turn
    Image.new("L", (24, 16)).save(tmp_path / "val2017/000000000139.jpg", exif=turned)
    image = open_image(load("coco_one", tmp_path).items[0])
    assert (image.mode, image.size) == ("RGB", (24, 16))


@pytest.mark.parametrize(("limit", "count"), [(4, 4), (7, 4), (8, 8), (9, 8), (99, 12)])
def test_limit_keeps_whole_sets(tmp_path, limit, count):
    controlled(tmp_path, "whatsup_a", sets=3)
    assert len(load("whatsup_a", tmp_path, limit=limit).items) == count


def test_limit(tmp_path):
    vsr(tmp_path, "test", VSR)
    vsr(tmp_path, "dev", VSR)
    task = load("vsr_random", tmp_path, limit=1)
    assert (len(task.items), len(task.dev)) == (1, 1)
    with pytest.raises(ValueError, match="limit must be at least 4 for whatsup_a, got 3"):
        load("whatsup_a", tmp_path, limit=3)
    with pytest.raises(ValueError, match="limit must be at least 1 for vsr_random, got 0"):
        load("vsr_random", tmp_path, limit=0)
    with pytest.raises(ValueError, match=r"benchmark must be one of whatsup_a, .*, got 'whatsup'"):
        load("whatsup", tmp_path)


# ------------------------------------------------------------------------------------------------------- missing data


@pytest.mark.parametrize("name", loading.BENCHMARKS)
def test_no_data_says_what_is_expected_and_how_to_get_it(tmp_path, name):
    for folder, state in ((tmp_path, "none of its files|no test.jsonl"), (tmp_path / "not here", "it is no folder")):
        with pytest.raises(UserError, match=state) as error:
            load(name, folder)
        message = str(error.value)
        benchmark = loading.BENCHMARKS[name]
        assert benchmark.annotations[0].format(part="test") in message and benchmark.images[0] in message
        assert "DIR" not in message
        commands = message.split("Get it with\n")[1]
        assert str(folder) in commands
        if name.startswith("vsr"):
            assert "git clone https://github.com/cambridgeltl/visual-spatial-reasoning" in commands
        else:
            assert commands.count("gdown ") == 2
            assert "hf download ServiceNow/whatsup_all --repo-type dataset --include" in commands
            assert f"data/{benchmark.split}-*.parquet" in commands


def test_no_folder_of_images(tmp_path):
    qa(tmp_path, "coco_one", COCO)
    (tmp_path / "val2017").rename(tmp_path / "val2014")
    with pytest.raises(UserError, match=r"coco_qa_one_obj.json is there, but no folder val2017 beside it(.|\n)*gdown"):
        load("coco_one", tmp_path)


def test_vsr_without_its_dev_split_or_images(tmp_path):
    vsr(tmp_path, "test", VSR)
    with pytest.raises(UserError, match=r"no dev.jsonl(.|\n)*git clone"):
        load("vsr_random", tmp_path)
    vsr(tmp_path, "dev", VSR)
    with pytest.raises(UserError, match=r"no test.jsonl(.|\n)*git clone"):
        load("vsr_zeroshot", tmp_path)
    (tmp_path / "data/images").rename(tmp_path / "data/elsewhere")
    with pytest.raises(UserError, match=r"no folder of images(.|\n)*dropbox"):
        load("vsr_random", tmp_path)


# -------------------------------------------------------------------------------------------------------- broken data


def _edit(change):
    """A change of the parsed annotations of whatsup_a."""

    def edit(folder: Path) -> None:
        file = folder / FILES["whatsup_a"][0]
        records = json.loads(file.read_text())
        change(records)
        file.write_text(json.dumps(records))

    return edit


def _near(folder: Path) -> None:
    """Another word, in all captions: a set like the others, but of a relation that this benchmark does not have."""
    file = folder / FILES["whatsup_a"][0]
    file.write_text(file.read_text().replace(" under ", " near "))


def _write(content: bytes):
    return lambda folder: (folder / FILES["whatsup_a"][0]).write_bytes(content)


def _remove_image(folder: Path) -> None:
    (folder / "controlled_images/mug_under_plate.jpeg").unlink()


BROKEN = {
    "three captions": (_edit(lambda r: r[5]["caption_options"].pop()), "record 6: needs 4 captions, got"),
    "no captions": (_edit(lambda r: r[5].pop("caption_options")), "record 6: needs 4 captions"),
    "a caption that is no text": (
        _edit(lambda r: r[2]["caption_options"].__setitem__(1, 7)),
        "record 3: needs 4 captions",
    ),
    "an empty caption": (_edit(lambda r: r[2]["caption_options"].__setitem__(1, " ")), "record 3: needs 4 captions"),
    "a caption twice": (
        _edit(lambda r: r[0]["caption_options"].__setitem__(1, r[0]["caption_options"][0])),
        "record 1: the same caption twice",
    ),
    "no image path": (_edit(lambda r: r[1].pop("image_path")), 'record 2: needs "image_path"'),
    "a record that is a list": (_edit(lambda r: r.__setitem__(3, ["x"])), 'record 4: needs "image_path"'),
    "a set of three": (_edit(lambda r: r.pop()), "each caption, left/on/right/under, comes first once"),
    "another caption first": (_edit(lambda r: r[0]["caption_options"].reverse()), r"(?s)record 1: .*record 2: "),
    "another relation": (_near, "each caption, left/on/right/under, comes first once"),
    "no records": (_write(b"[]"), "controlled_images_dataset.json holds no records"),
    "cut off": (_write(b'[{"image_path": "a'), "controlled_images_dataset.json: no readable json"),
    "a number": (_write(b"7"), "controlled_images_dataset.json: no readable json"),
    "not text": (_write(b"\xff\xfe\x00"), "controlled_images_dataset.json: no readable json"),
    "no such image": (_remove_image, r"(?s)record 2: no image .*mug_under_plate.jpeg.*gdown"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_annotations_are_named(tmp_path, case):
    controlled(tmp_path, "whatsup_a")
    load("whatsup_a", tmp_path)
    change, message = BROKEN[case]
    change(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        load("whatsup_a", tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (["only one"], "record 1: needs 2 captions"),
        ([1, "a", "b", "c"], "record 1: needs 2 captions"),
        ([1, "a", None], "record 1: needs 2 captions"),
        ([None, "a", "b"], r"record 1: needs \[image id, caption, caption\]"),
        ({"image": 1}, r"record 1: needs \[image id, caption, caption\]"),
        ([1, "a", "a"], "record 1: the same caption twice"),
    ],
)
def test_broken_pairs_are_named(tmp_path, record, message):
    qa(tmp_path, "vg_one", [[1, "a left", "a right"]])
    qa(tmp_path, "vg_one", [])
    (tmp_path / "vg_images/only one.jpg").write_bytes((tmp_path / "vg_images/1.jpg").read_bytes())
    (tmp_path / "vg_qa_one_obj.json").write_text(json.dumps([record]))
    with pytest.raises(UserError, match=f"vg_qa_one_obj.json, {message}"):
        load("vg_one", tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"image": "000000000001.jpg", "caption": "The cat is on it.", "label": 2, "relation": "on"}',
            "a label of 0 or 1",
        ),
        ('{"image": "000000000001.jpg", "caption": "The cat is on it.", "label": 1}', "needs .'relation'."),
        ('{"image": "000000000001.jpg", "caption": "", "label": 1, "relation": "on"}', "needs .'caption'."),
        (
            '{"image": "000000000001.jpg", "caption": "The cat is on it.", "label": 1, "relation": "under"}',
            "does not say",
        ),
        (
            '{"image": "000000000009.jpg", "caption": "The cat is on it.", "label": 1, "relation": "on"}',
            "no image .*9.jpg",
        ),
        ("[]", "needs .'image', 'caption', 'relation'."),
        ("{", "no readable json"),
    ],
)
def test_broken_lines_are_named(tmp_path, line, message):
    vsr(tmp_path, "test", VSR)
    vsr(tmp_path, "dev", VSR)
    file = tmp_path / "data/splits/random/test.jsonl"
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(UserError, match=rf"test\.jsonl(, line 3)?: .*{message}"):
        load("vsr_random", tmp_path)


@pytest.mark.parametrize("content", [b"", b"not an image", "truncated"])
def test_broken_images_are_named(tmp_path, content):
    qa(tmp_path, "coco_one", COCO)
    file = tmp_path / "val2017/000000000139.jpg"
    file.write_bytes(file.read_bytes()[:-80] if content == "truncated" else content)
    (item,) = load("coco_one", tmp_path).items
    with pytest.raises(UserError, match=r"coco_qa_one_obj.json, record 1: cannot read .*000000000139.jpg"):
        open_image(item)


# ----------------------------------------------------------------------------------------------- ServiceNow/whatsup_all


def _pyarrow():
    reason = "whatsup_all is Parquet, which pyarrow reads"
    return pytest.importorskip("pyarrow", reason=reason), pytest.importorskip("pyarrow.parquet", reason=reason)


@pytest.fixture(params=["parquet", "parquet in parts", "parquet, lists of images", "save_to_disk", "hub"])
def hub_form(request, tmp_path, monkeypatch):
    """The same items as the authors' files in each form of whatsup_all -> what to give as ``data``."""
    pyarrow, parquet = _pyarrow()
    records = controlled(tmp_path / "files", "whatsup_a")
    images = [(tmp_path / "files" / r["image_path"].removeprefix("data/")).read_bytes() for r in records]
    options = [{"bytes": image, "path": None} for image in images]
    if "lists" in request.param:
        options = [[option] for option in options]
    rows = {"image_options": options, "caption_options": [r["caption_options"] for r in records]}
    folder = tmp_path / "whatsup_all"
    if request.param == "save_to_disk":
        datasets = pytest.importorskip("datasets", reason="it reads what its save_to_disk wrote")
        features = datasets.Features(
            image_options=datasets.Image(), caption_options=datasets.Sequence(datasets.Value("string"))
        )
        split = datasets.Dataset.from_dict(rows, features=features)
        datasets.DatasetDict({"Controlled_Images_A": split}).save_to_disk(str(folder))
        return folder
    (folder / "data").mkdir(parents=True)
    table = pyarrow.table(rows)
    parts = [table.slice(0, 5), table.slice(5)] if "parts" in request.param else [table]
    for i, part in enumerate(parts):
        name = f"Controlled_Images_A-{i:05}-of-{len(parts):05}.parquet"
        parquet.write_table(part, folder / "data" / name)
    if request.param != "hub":
        return folder
    asked = []

    def snapshot_download(*args, **kwargs):
        asked.append((args, kwargs))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path / "files")  # no folder ServiceNow here
    request.addfinalizer(lambda: _asked_for_one_split(asked))
    return "ServiceNow/whatsup_all"


def _asked_for_one_split(asked) -> None:
    assert asked[0][0] == ("ServiceNow/whatsup_all",)
    assert asked[0][1] == {"repo_type": "dataset", "allow_patterns": ["**/Controlled_Images_A-*.parquet"]}


def test_forms_of_datasets_hold_the_same(tmp_path, hub_form):
    own, theirs = load("whatsup_a", tmp_path / "files").items, load("whatsup_a", hub_form).items
    for a, b in zip(own, theirs, strict=True):
        assert (a.captions, a.relation, a.group) == (b.captions, b.relation, b.group)
        assert open_image(a).tobytes() == open_image(b).tobytes()
    assert len({item.image_id for item in theirs}) == 8
    with pytest.raises(UserError, match="Controlled_Images_B"):
        load("whatsup_b", hub_form)


def test_equal_images_of_rows_are_one_image(tmp_path):
    pyarrow, parquet = _pyarrow()
    qa(tmp_path / "files", "coco_two", COCO)
    image = {"bytes": (tmp_path / "files/val2017/000000000139.jpg").read_bytes(), "path": None}
    rows = {"image_options": [image, image], "caption_options": [["a", "b"], ["c", "d"]]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "COCO_QA_two_obj-00000-of-00001.parquet")
    first, second = load("coco_two", tmp_path).items
    assert first.image_id == second.image_id == first.group


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"image": [b"x"], "caption_options": [["a", "b"]]}, "no column image_options; it has image, caption_options"),
        ({"image_options": [{"bytes": None, "path": None}], "caption_options": [["a", "b"]]}, "row 0: image_options"),
        ({"image_options": [b"x"], "caption_options": [["a"]]}, "row 0: needs 2 captions"),
        (None, "cannot read .*VG_QA_one_obj-0.parquet.*Download it again"),
    ],
)
def test_broken_parquet_is_named(tmp_path, rows, message):
    pyarrow, parquet = _pyarrow()
    file = tmp_path / "VG_QA_one_obj-0.parquet"
    parquet.write_table(pyarrow.table(rows), file) if rows else file.write_bytes(b"PAR1")
    with pytest.raises(UserError, match=message):
        load("vg_one", tmp_path)


def test_broken_image_of_a_row_is_named(tmp_path):
    pyarrow, parquet = _pyarrow()
    rows = {"image_options": [b"x"], "caption_options": [["a", "b"]]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "VG_QA_one_obj-0.parquet")
    with pytest.raises(UserError, match="row 0: cannot read its image"):
        open_image(load("vg_one", tmp_path).items[0])


def test_a_download_that_fails_says_so(monkeypatch):
    def snapshot_download(*args, **kwargs):
        raise OSError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(UserError, match=r"'no/where' is no folder, and cannot be loaded from the hub: no network$"):
        load("whatsup_a", "no/where")
