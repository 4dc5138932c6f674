# SPDX-License-Identifier: Apache-2.0
"""Tasks: questions about scenes, their answers computed from positions, and balanced datasets of both.

A question is a task and up to three names. Its answers are exactly equally frequent in a dataset, names are assigned to
places at random, and the content of a scene does not depend on the answer. So neither the question, nor the content of
the picture, nor any statistic of single patches determines the answer: only positions do.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .scenes import DOMAINS, GROUNDS, LOOKS, Scene, Sprite

Array = np.ndarray
Rng = np.random.Generator
Asked = tuple[tuple[str, ...], str] | None  # the names in the question, and the answer; None: not applicable

PLACES = tuple(f"{row}-{column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right"))


@dataclass(frozen=True)
class Task:
    """``family``: kind of scenes; ``ask``: the names and the
    answer of its question about a scene; ``question``: in words."""

    family: str
    answers: tuple[str, ...]
    ask: Callable[[Scene], Asked]
    question: str

    @property
    def chance(self) -> float:
        return 1 / len(self.answers)


@dataclass(frozen=True)
class Question:
    scene: int
    task: str
    names: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Dataset:
    """``scenes[i]`` has all ``questions`` whose ``scene`` is i."""

    scenes: tuple[Scene, ...]
    questions: tuple[Question, ...]

    def mirrored(self) -> Dataset:
        """Return the twins of all scenes, with the questions whose answer a mirror changes: left and right."""
        swap = {"left": "right", "right": "left"}
        asked = [q for q in self.questions if q.task == "relation" and q.answer in swap]
        questions = tuple(Question(q.scene, q.task, q.names, swap[q.answer]) for q in asked)
        return Dataset(tuple(scene.transformed("hflip") for scene in self.scenes), questions)

    def transformed(self, transform: str) -> Dataset:
        """Return all scenes flipped or rotated, see ``scenes.TRANSFORMS``, with the questions on the relation of two
        things."""
        scenes = tuple(scene.transformed(transform) for scene in self.scenes)
        asked = {q.scene: TASKS[q.task].ask(scenes[q.scene]) for q in self.questions if q.task == "relation"}
        questions = tuple(Question(index, "relation", *its) for index, its in asked.items() if its is not None)
        return Dataset(scenes, questions)


def make_dataset(count: int, family: str, split: str, seed: int, domains: Sequence[str] = tuple(DOMAINS)) -> Dataset:
    """Return ``count`` scenes of a family, each with one question of each of its tasks, from the given domains.

    Every answer of a task is right equally often, exactly; so a few scenes have fewer questions.
    """
    rng = np.random.default_rng([seed, split == "test", list(FAMILIES).index(family)])
    scenes, questions, asked = [], [], Counter[tuple[str, str]]()
    for index in range(count):
        scene, new = _draw(rng, split, index, family, asked, domains)
        scenes.append(scene)
        questions += new
        asked.update((q.task, q.answer) for q in new)
    return Dataset(tuple(scenes), tuple(_even(questions)))


def _draw(
    rng: Rng, split: str, index: int, family: str, asked: Counter, domains: Sequence[str]
) -> tuple[Scene, list[Question]]:
    """Return a scene, with those questions whose answers are not much more frequent than the rarest of their task. The
    best of TRIES, if none qualifies entirely."""
    tasks = {name: task for name, task in TASKS.items() if task.family == family}
    least = {name: min(asked[name, answer] for answer in task.answers) for name, task in tasks.items()}
    best: tuple[Scene, list[Question]] | None = None
    for _ in range(TRIES):
        names = DOMAINS[domains[int(rng.integers(len(domains)))]]
        sprites = FAMILIES[family](rng, names)
        scene = Scene(tuple(sprites), int(rng.integers(GROUNDS)), split)
        questions = [Question(index, name, *its) for name, task in tasks.items() if (its := task.ask(scene))]
        questions = [q for q in questions if asked[q.task, q.answer] <= least[q.task] + SLACK]
        if best is None or len(questions) > len(best[1]):
            best = scene, questions
        if len(questions) == len(tasks):
            break
    assert best is not None
    return best


TRIES, SLACK = 6, 4


def _even(questions: list[Question]) -> Iterator[Question]:
    """Drop the last questions of the answers that are more frequent than the rarest of their task."""
    counts = Counter((q.task, q.answer) for q in questions)
    left = {
        (name, answer): min(counts[name, other] for other in task.answers)
        for name, task in TASKS.items()
        for answer in task.answers
    }
    for question in questions:
        left[question.task, question.answer] -= 1
        if left[question.task, question.answer] >= 0:
            yield question


# ------------------------------------------------------------------------------------------------ families of scenes


LARGE, CELL = 0.16, 1 / 8  # sides of sprites


def _sprite(rng: Rng, name: str, x: float, y: float, side: float) -> Sprite:
    return Sprite(name, int(rng.integers(LOOKS)), float(x), float(y), side)


def _objects(rng: Rng, names: Sequence[str]) -> list[Sprite]:
    """Return six things with the six names of a domain, apart. The first two often share a row or a column."""
    places = [rng.uniform(0.1, 0.9, 2).tolist()]
    while len(places) < 6:
        place = rng.uniform(0.1, 0.9, 2).tolist()
        if len(places) == 1 and (axis := rng.integers(3)) < 2:
            place[axis] = places[0][axis]
        if all(max(abs(place[0] - x), abs(place[1] - y)) > 0.17 for x, y in places):
            places.append(place)
    return [_sprite(rng, name, place[0], place[1], LARGE) for name, place in zip(names, places, strict=True)]


CELLS_8 = tuple(itertools.product(range(8), range(8)))
STEPS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}


def _neighbours(cell: tuple[int, int]) -> list[tuple[int, int]]:
    return [(cell[0] + r, cell[1] + c) for r, c in STEPS.values()]


def _odd(rng: Rng, names: Sequence[str]) -> list[Sprite]:
    """Return a 3 x 3 grid of things of one of the first two names, one of them of the other, each slightly off-grid."""
    same, other = rng.permutation(names[:2])
    odd = rng.integers(9)
    sprites = []
    for index in range(9):
        y, x = (np.array(divmod(index, 3)) + 0.5) / 3 + rng.uniform(-0.05, 0.05, 2)
        sprites.append(_sprite(rng, other if index == odd else same, x, y, LARGE))
    return sprites


def _map(rng: Rng, names: Sequence[str]) -> list[Sprite]:
    """Return an 8 x 8 map with 20 walls; the goal is at least four steps from the start, with one best direction."""
    while True:
        cells = [CELLS_8[index] for index in rng.permutation(64)]
        start, goal, walls = cells[0], cells[1], cells[2:22]
        steps = _steps_from(goal, set(walls))
        if steps.get(start, 0) >= 4 and len(_first_steps(start, steps)) == 1:
            break
    marks = [(start, "start"), (goal, "goal"), *((wall, "wall") for wall in walls)]
    return [_sprite(rng, name, (c + 0.5) / 8, (r + 0.5) / 8, CELL) for (r, c), name in marks]


def _steps_from(goal: tuple[int, int], walls: set[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """Return for each cell that can reach the goal its distance in steps."""
    steps, queue = {goal: 0}, deque([goal])
    while queue:
        cell = queue.popleft()
        for near in _neighbours(cell):
            if near in CELLS_8 and near not in walls and near not in steps:
                steps[near] = steps[cell] + 1
                queue.append(near)
    return steps


def _first_steps(start: tuple[int, int], steps: dict[tuple[int, int], int]) -> list[str]:
    """Return the directions in which a shortest path starts."""
    ahead = {name: (start[0] + r, start[1] + c) for name, (r, c) in STEPS.items()}
    return [name for name, cell in ahead.items() if steps.get(cell) == steps[start] - 1]


FAMILIES: dict[str, Callable[[Rng, Sequence[str]], list[Sprite]]] = {
    "objects": _objects,
    "odd": _odd,
    "map": _map,
}


# ------------------------------------------------------------------------------------------------------- questions


def _ask_relation(scene: Scene) -> Asked:
    a, b = scene.sprites[:2]
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > 1.5 * abs(dy):
        return (a.name, b.name), "left" if dx < 0 else "right"
    if abs(dy) > 1.5 * abs(dx):
        return (a.name, b.name), "above" if dy < 0 else "below"
    return None


def _ask_place(scene: Scene) -> Asked:
    a = scene.sprites[0]
    if min(abs(z - edge) for z in (a.x, a.y) for edge in (1 / 3, 2 / 3)) < 0.03:
        return None
    return (a.name,), PLACES[3 * int(3 * a.y) + int(3 * a.x)]


def _ask_nearer(scene: Scene) -> Asked:
    a, b, c = scene.sprites[:3]
    to_b, to_c = (float(np.hypot(a.x - o.x, a.y - o.y)) for o in (b, c))
    if max(to_b, to_c) < 1.3 * min(to_b, to_c):
        return None
    return (a.name, b.name, c.name), "first" if to_b < to_c else "second"


def _ask_aligned(scene: Scene) -> Asked:
    a, b = scene.sprites[:2]
    dx, dy = abs(a.x - b.x), abs(a.y - b.y)
    if min(dx, dy) < 1e-9:
        return (a.name, b.name), "row" if dy < dx else "column"
    return ((a.name, b.name), "neither") if min(dx, dy) > 0.08 else None


def _ask_count(scene: Scene) -> Asked:
    a = scene.sprites[0]
    return (a.name,), NUMBERS[sum(other.x < a.x - 1e-9 for other in scene.sprites)]


def _ask_odd(scene: Scene) -> Asked:
    counts = Counter(sprite.name for sprite in scene.sprites)
    odd = next(sprite for sprite in scene.sprites if counts[sprite.name] == 1)
    return (), PLACES[3 * int(3 * odd.y) + int(3 * odd.x)]


def _ask_path(scene: Scene) -> Asked:
    cells: dict[str, list[tuple[int, int]]] = {"start": [], "goal": [], "wall": []}
    for sprite in scene.sprites:
        cells[sprite.name].append((round(8 * sprite.y - 0.5), round(8 * sprite.x - 0.5)))
    steps = _steps_from(cells["goal"][0], set(cells["wall"]))
    return (), _first_steps(cells["start"][0], steps)[0]


NUMBERS = ("none", "one", "two", "three", "four", "five")
TASKS = {
    "relation": Task("objects", ("left", "right", "above", "below"), _ask_relation, "where is {0} from {1}"),
    "place": Task("objects", PLACES, _ask_place, "where in the picture is {0}"),
    "nearer": Task("objects", ("first", "second"), _ask_nearer, "which is nearer to {0} , {1} or {2}"),
    "aligned": Task("objects", ("row", "column", "neither"), _ask_aligned, "what do {0} and {1} share"),
    "count": Task("objects", NUMBERS, _ask_count, "how many things lie left of {0}"),
    "odd": Task("odd", PLACES, _ask_odd, "where is the odd one out"),
    "path": Task("map", tuple(STEPS), _ask_path, "which way leads to the goal"),
}
ANSWERS = tuple(dict.fromkeys(answer for task in TASKS.values() for answer in task.answers))
