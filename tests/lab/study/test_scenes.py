# SPDX-License-Identifier: Apache-2.0
"""Scenes, tasks and datasets of the accuracy study: what is drawn, what is asked, and that only places tell."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from rows import some

from spatial_pe.lab.study.scenes import DOMAINS, NAMES, ROLES, TRANSFORMS, Album, Scene, Sprite
from spatial_pe.lab.study.tasks import FAMILIES, TASKS, make_dataset
from spatial_pe.lab.study.train import Exam

SIZE = 64


@pytest.fixture(scope="module", params=FAMILIES)
def dataset(request):
    return make_dataset(600, request.param, "train", 0)


def at(name: str, x: float, y: float, side: float = 0.16) -> Sprite:
    return Sprite(name, 0, x, y, side)


def scene(*sprites: Sprite) -> Scene:
    return Scene(sprites, 0, "train")


# ------------------------------------------------------------------------------------------------------------ drawing


@pytest.mark.parametrize("size", [48, 64, 96, 128])
@pytest.mark.parametrize("name", [*NAMES, "goal"])
def test_a_sprite_is_drawn_at_its_place(name, size):
    """What differs from the same ground without it lies within the sprite's square, and its middle is the place."""
    x, y = 0.3125, 0.6875
    with_it, without = (
        Album([scene(at("wall", 0.0625, 0.0625, 0.125), *more)]).draw([0], size)[0].astype(int)
        for more in ([at(name, x, y)], [])
    )
    rows, columns = np.nonzero(abs(with_it - without).sum(0) > 20)
    assert len(rows) > 0.1 * (0.16 * size) ** 2
    half = 0.08 + 1 / size
    assert abs((rows + 0.5) / size - y).max() <= half and abs((columns + 0.5) / size - x).max() <= half
    if DOMAINS["photographs"].count(name):  # a full disc; the ink of a digit has its centre anywhere
        assert rows.mean() / size + 0.5 / size == pytest.approx(y, abs=0.02)


def test_another_size_shows_the_same_picture():
    scenes = make_dataset(20, "objects", "test", 3).scenes
    small, large = (torch.from_numpy(Album(scenes).draw(range(20), size)).float() for size in (64, 128))
    shrunk = torch.nn.functional.avg_pool2d(large, 2)
    assert (shrunk - small).abs().mean() < 6
    assert (shrunk.flip(-1) - small).abs().mean() > 12


def test_training_and_test_pictures_share_no_pixels():
    """The same scene in the other split has other handwriting and another part of the photograph."""
    one = scene(at("seven", 0.3, 0.3), at("fur", 0.7, 0.7))
    train, test = (Album([replace(one, split=split)]).draw([0], SIZE)[0] for split in ("train", "test"))
    assert (train != test).any(0)[14:26, 14:26].mean() > 0.3
    assert (train != test).any(0)[40:50, 40:50].mean() > 0.8


def test_pictures_do_not_depend_on_the_batch():
    album = Album(make_dataset(30, "map", "train", 1).scenes)
    everything = album.draw(range(30), SIZE)
    assert np.array_equal(album.draw([7, 3, 7], SIZE), everything[[7, 3, 7]])


def test_roles_name_what_lies_in_a_patch():
    album = Album(
        [scene(at("red", 3.5 / 8, 1.5 / 8), at("two", 6.5 / 8, 6.5 / 8)), scene(at("wall", 0.5 / 8, 7.5 / 8, 1 / 8))]
    )
    first, second = album.roles(8).reshape(2, 8, 8)
    assert first[1, 3] == 1 and first[6, 6] == 1 + list(DOMAINS["digits"]).index("two")
    assert first[3, 3] == 0 and second[7, 0] == 1 + ROLES + 2 and (second > 0).sum() == 1


# ------------------------------------------------------------------------------------------------------------ answers


GRID = [at("red", (column + 0.5) / 3, (row + 0.5) / 3) for row, column in np.ndindex(3, 3) if (row, column) != (2, 2)]


def mirrored_answer(answer: str) -> str:
    words = {"left": "right", "right": "left"}
    return "-".join(words.get(word, word) for word in answer.split("-"))


@pytest.mark.parametrize(
    ("task", "sprites", "answer"),
    [
        ("relation", [at("red", 0.2, 0.5), at("green", 0.8, 0.6)], "left"),
        ("relation", [at("red", 0.4, 0.9), at("green", 0.5, 0.2)], "below"),
        ("relation", [at("red", 0.2, 0.2), at("green", 0.7, 0.7)], None),  # on the diagonal: neither
        ("place", [at("red", 0.5, 0.1)], "top-centre"),
        ("place", [at("red", 0.34, 0.1)], None),  # on the border of two
        ("nearer", [at("red", 0.1, 0.1), at("green", 0.2, 0.3), at("blue", 0.9, 0.9)], "first"),
        ("nearer", [at("red", 0.5, 0.1), at("green", 0.9, 0.9), at("blue", 0.3, 0.2)], "second"),
        ("aligned", [at("red", 0.3, 0.25), at("green", 0.8, 0.25)], "row"),
        ("aligned", [at("red", 0.3, 0.25), at("green", 0.3, 0.75)], "column"),
        ("aligned", [at("red", 0.3, 0.25), at("green", 0.8, 0.55)], "neither"),
        ("aligned", [at("red", 0.3, 0.25), at("green", 0.8, 0.30)], None),  # too close to call
        ("count", [at("red", 0.5, 0.1), at("green", 0.1, 0.9), at("blue", 0.5, 0.9), at("cyan", 0.3, 0.2)], "two"),
        ("odd", [*GRID, at("blue", 0.83, 0.83)], "bottom-right"),
    ],
)  # fmt: skip
def test_answers_worked_out_by_hand(task, sprites, answer):
    asked = TASKS[task].ask(scene(*sprites))
    assert (asked and asked[1]) == answer


def test_the_shortest_way_goes_round_a_wall():
    """The goal lies to the right; walls leave only the way down first."""

    def cell(name, row, column):
        return at(name, (column + 0.5) / 8, (row + 0.5) / 8, 1 / 8)

    walls = [cell("wall", row, 2) for row in range(3)] + [cell("wall", 0, 0)]
    assert TASKS["path"].ask(scene(cell("start", 0, 1), cell("goal", 0, 5), *walls)) == ((), "down")


def test_a_mirror_changes_the_answers_that_it_must(dataset):
    for question in dataset.questions:
        twin = dataset.scenes[question.scene].transformed("hflip")
        asked = TASKS[question.task].ask(twin)
        if question.task == "count":  # left of A becomes right of A
            continue
        assert asked == (question.names, mirrored_answer(question.answer)), question


@pytest.mark.parametrize(
    ("transform", "becomes"),
    [
        ("hflip", {"left": "right", "right": "left"}),
        ("vflip", {"above": "below", "below": "above"}),
        ("rot90", {"left": "below", "below": "right", "right": "above", "above": "left"}),
    ],
)
def test_a_transformed_picture_changes_relations_as_it_must(transform, becomes):
    dataset = make_dataset(60, "objects", "test", 0)
    plain = {q.scene: q for q in dataset.questions if q.task == "relation"}
    transformed = dataset.transformed(transform)
    assert {q.scene for q in transformed.questions} == {*plain}
    for question in transformed.questions:
        before = plain[question.scene]
        assert question.names == before.names and question.answer == becomes.get(before.answer, before.answer)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transformed_scenes_look_transformed(transform):
    """A disc is a disc in any orientation: the picture is that of numpy's flip or rot90."""
    wall = at("wall", 0.5, 0.5, 0.125)
    one = scene(wall, at(DOMAINS["photographs"][0], 0.25, 0.375), at(DOMAINS["photographs"][1], 0.75, 0.25))
    empty, plain, transformed = (
        Album([s]).draw([0], SIZE)[0].astype(int) for s in (scene(wall), one, one.transformed(transform))
    )
    where = [np.nonzero(abs(picture - empty).sum(0) > 20) for picture in (plain, transformed)]
    masks = [np.zeros((SIZE, SIZE), bool) for _ in where]
    for mask, (rows, columns) in zip(masks, where, strict=True):
        mask[rows, columns] = True
    expected = {"hflip": masks[0][:, ::-1], "vflip": masks[0][::-1], "rot90": np.rot90(masks[0])}[transform]
    assert (masks[1] ^ expected).sum() < 0.1 * expected.sum()


# ------------------------------------------------------------------------------------------------------------- balance


def test_every_answer_is_right_equally_often(dataset):
    counts = Counter((q.task, q.answer) for q in dataset.questions)
    for name, task in TASKS.items():
        its = {counts[name, answer] for answer in task.answers}
        assert len(its) == 1, (name, counts)
    asked = {task for task, _ in counts}
    assert all(its > 0.6 * len(dataset.scenes) for its in Counter(q.task for q in dataset.questions).values()), asked


def test_the_words_of_a_question_do_not_tell_the_answer(dataset):
    """The best guess from the words alone is right as often as chance, within three standard errors."""
    by_words: dict[tuple, Counter] = {}
    for q in dataset.questions:
        by_words.setdefault((q.task, q.names), Counter())[q.answer] += 1
    for name, task in TASKS.items():
        half = [(i, q) for i, q in enumerate(dataset.questions) if q.task == name]
        if not half:
            continue
        seen: dict[tuple, Counter] = {}
        for i, q in half:
            if i % 2:
                seen.setdefault(q.names, Counter())[q.answer] += 1
        hits = [q.answer == seen[q.names].most_common(1)[0][0] for i, q in half if not i % 2 and q.names in seen]
        assert np.mean(hits) < task.chance + 3 * (task.chance / len(hits)) ** 0.5


def test_datasets_are_repeatable_and_differ_between_seeds_and_splits():
    one, again = (make_dataset(50, "objects", "train", 4) for _ in range(2))
    assert one == again
    others = make_dataset(50, "objects", "train", 5), make_dataset(50, "objects", "test", 4)
    assert all(one.scenes[0].sprites[0].x != other.scenes[0].sprites[0].x for other in others)


def test_only_the_chosen_domains_are_used():
    data = make_dataset(60, "objects", "train", 0, ("digits",))
    assert {sprite.name for s in data.scenes for sprite in s.sprites} == set(DOMAINS["digits"])


class BagOfPatches(torch.nn.Module):
    """Sees what is in each patch and not where the patch is: a network a patch, the mean, a layer a task."""

    def __init__(self, answers: int) -> None:
        super().__init__()
        self.patch = torch.nn.Sequential(
            torch.nn.Linear(192, 128), torch.nn.GELU(), torch.nn.Linear(128, 64), torch.nn.GELU()
        )
        self.out = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, answers))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = torch.nn.functional.unfold(pixels, 8, stride=8).transpose(1, 2)
        return self.out(self.patch(patches).mean(1))


@functools.cache
def exams(family: str) -> tuple[Exam, Exam]:
    return Exam(make_dataset(1200, family, "train", 0)), Exam(make_dataset(800, family, "test", 0))


@pytest.mark.parametrize("task", some(TASKS, 3))
def test_a_bag_of_patches_is_at_chance(task):
    """Pixel statistics do not tell the answer: what patches without places teach does not carry over to new scenes."""
    accuracy, count = fit(task, lambda q, exam: TASKS[task].answers.index(q.answer))
    chance = TASKS[task].chance
    assert abs(accuracy - chance) < 3.5 * (chance * (1 - chance) / count) ** 0.5


def test_a_bag_of_patches_sees_what_is_there():
    """The same network learns which domain a picture is of: it is at chance for want of places, not of sight."""
    accuracy, _ = fit("relation", lambda q, exam: NAMES.index(exam.dataset.scenes[q.scene].sprites[0].name) // ROLES)
    assert accuracy > 0.75


def fit(task, label) -> tuple[float, int]:
    """A bag of patches trained on the label of each question of a task: accuracy on the test scenes, and how many."""
    torch.manual_seed(0)
    model = BagOfPatches(max(3, len(TASKS[task].answers)))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)

    def data(exam: Exam):
        questions = [q for q in exam.dataset.questions if q.task == task]
        return exam.pictures([q.scene for q in questions], 1.0), torch.tensor([label(q, exam) for q in questions])

    (x, y), (x2, y2) = map(data, exams(TASKS[task].family))
    for _ in range(4):
        for part in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    with torch.no_grad():
        return (model(x2).argmax(1) == y2).float().mean().item(), len(y2)
