# SPDX-License-Identifier: Apache-2.0
"""The models of the study differ in their position encoding only, see what they should, and run the fused kernels."""

from __future__ import annotations

import pytest
import torch

import spatial_pe
from spatial_pe.grid import PatchGrid
from spatial_pe.lab.study import attention_maps, position_encodings
from spatial_pe.lab.study.models import WORDS, Attentive, Batch, Linear, Size, TinyLlava, Tower, probe, question_words
from spatial_pe.lab.study.position_encodings import ENCODINGS, Where
from spatial_pe.lab.study.tasks import TASKS, make_dataset
from spatial_pe.lab.study.train import Exam

SIZE = Size()


def tower(name: str, seed: int = 0) -> Tower:
    torch.manual_seed(seed)
    return Tower(name, SIZE).eval()


def pictures(count: int = 2, side: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def permuted(pixels: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    blocks = torch.nn.functional.unfold(pixels, SIZE.patch, stride=SIZE.patch)[..., order]
    return torch.nn.functional.fold(blocks, pixels.shape[-2:], SIZE.patch, stride=SIZE.patch)


def test_all_start_from_the_same_weights():
    first = dict(tower("none").named_parameters())
    for name in ENCODINGS:
        model = torch.manual_seed(0) and probe(Tower(name, SIZE))
        theirs = dict(model.named_parameters())
        for key, value in first.items():
            assert torch.equal(value, theirs[f"tower.{key}"]), (name, key)
        extra = {key for key in theirs if key.startswith("tower.")} - {f"tower.{key}" for key in first}
        assert all(key.startswith("tower.position.") for key in extra), (name, extra)


@pytest.mark.parametrize("name", ENCODINGS)
def test_only_positions_tell_patches_apart(name):
    """Without an encoding, patches that are moved take their features along; with one, they do not."""
    model, order = tower(name), torch.randperm(64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        plain, moved = model(pictures())[:, order], model(permuted(pictures(), order))
    same = torch.allclose(plain, moved, atol=1e-5)
    assert same == (name == "none")


@pytest.mark.parametrize("name", ["axial", "axial-10000", "mixed", "alibi-2d"])
def test_relative_encodings_do_not_see_a_shift(name):
    """All patches moved on by three: the attention between them is what it was."""
    model = tower(name)
    where = PatchGrid(4, 4).coordinates()
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, 16, SIZE.heads, SIZE.width // SIZE.heads) for _ in range(3))
    outs = []
    for shift in (0.0, 3.0):
        shifted = Where(4, 4, 8)
        moved = where + shift
        how = model.position.layers(_At(shifted, moved), SIZE.depth)[0]
        outs.append(position_encodings.attend((q, k, v), how))
    torch.testing.assert_close(*outs, atol=2e-5, rtol=0)


class _At:
    """A Where with coordinates of one's own."""

    def __init__(self, where: Where, at: torch.Tensor) -> None:
        self.height, self.width, self.trained, self.stretch = where.height, where.width, where.trained, False
        self._at = at

    def coordinates(self) -> torch.Tensor:
        return self._at


@pytest.mark.parametrize("name", [name for name in ENCODINGS if name not in ("alibi-2d",)])
def test_attention_runs_through_the_fused_op(name, monkeypatch):
    calls = []
    fused = position_encodings.rope_attention
    monkeypatch.setattr(position_encodings, "rope_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))
    tower(name)(pictures(1))
    assert len(calls) == SIZE.depth


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("side", [48, 96])
def test_other_sizes(name, side):
    """Stretched coordinates keep the place of patch centres; tables are resized. All encodings serve all sizes."""
    out = tower(name)(pictures(1, side), stretch=True)
    assert out.shape == (1, (side // 8) ** 2, SIZE.width) and out.isfinite().all()
    at = Where(side // 8, side // 8, 8, stretch=True).coordinates()
    centres = (at + 0.5) / 8
    assert torch.allclose(centres, (PatchGrid(side // 8, side // 8).coordinates() + 0.5) / (side // 8))


def test_a_batch_is_answered_like_its_pictures_alone():
    exam = Exam(make_dataset(6, "objects", "test", 0))
    which = exam.asked[:4]
    for model in (probe(tower("axial")), TinyLlava(tower("axial"))):
        model.eval()
        with torch.no_grad():
            together = model(exam.pictures(which, 1.0), exam.batch(which))
            alone = torch.cat([model(exam.pictures([one], 1.0), exam.batch([one])) for one in which])
        finite = together.isfinite()
        assert torch.equal(finite, alone.isfinite())
        torch.testing.assert_close(together[finite], alone[finite], atol=1e-4, rtol=1e-4)
        assert torch.equal(finite, exam.batch(which).choices())


@pytest.mark.parametrize("name", ENCODINGS)
def test_everything_is_made_on_the_device_of_the_model(name):
    """The meta device stands in for a GPU: it refuses to be mixed with the CPU."""
    exam = Exam(make_dataset(3, "objects", "test", 0))
    model, device = probe(tower(name)).to("meta"), torch.device("meta")
    pixels, batch = exam.pictures(exam.asked, 1.5).to(device), exam.batch(exam.asked)
    for stretch in (False, True):
        assert model(pixels, batch.to(device), stretch).device == device
    with pytest.raises(RuntimeError):
        model(pixels, batch)


def test_questions_in_words_say_what_is_asked():
    exam = Exam(make_dataset(4, "objects", "test", 0))
    batch = exam.batch(exam.asked)
    questions = [q for scene in exam.asked for q in exam.by_scene[int(scene)]]
    for row, question in zip(question_words(batch).tolist(), questions, strict=True):
        text = " ".join(WORDS[word] for word in row if word)
        assert text == TASKS[question.task].question.format(*question.names) + " ?"


@pytest.mark.parametrize("head", [Linear(SIZE.width), Attentive(SIZE.width, 2)])
def test_probes_do_not_see_the_order_of_patches(head):
    """So what they know of places is what the tower put into the features."""
    features = torch.randn(2, 64, SIZE.width)
    image, task = torch.tensor([0, 1, 1]), torch.tensor([0, 1, 2])
    order = torch.randperm(64)
    torch.testing.assert_close(head(features, image, task), head(features[:, order], image, task), atol=1e-5, rtol=1e-5)


def test_what_a_tower_looks_at():
    found = attention_maps.attention(tower("learned-large"), pictures())
    assert len(found["distance"]) == SIZE.depth and len(found["distance"][0]) == SIZE.heads
    position = torch.tensor(found["position"])
    assert position.shape == (SIZE.depth, 8, 8)
    torch.testing.assert_close(position.mean((1, 2)), torch.ones(SIZE.depth), atol=1e-3, rtol=0)
    assert found["similarity"][4][4] == pytest.approx(1)
    blind = torch.tensor(attention_maps.attention(tower("none"), pictures())["position"])
    torch.testing.assert_close(blind, torch.ones_like(blind), atol=1e-3, rtol=0)
    assert attention_maps.attention(tower("axial"), pictures())["similarity"] is None


def test_the_mismatched_one_is_no_rotation_and_axial_is():
    """Why the study has it: attention between the same content must depend on the offset alone."""

    def spread(name: str) -> float:
        model = tower(name)
        q = torch.ones(1, 64, SIZE.heads, SIZE.width // SIZE.heads)
        how = model.position.layers(Where(8, 8, 8), SIZE.depth)[0]
        rotated = how(q) if callable(how) else spatial_pe.apply_rotary(q, how)
        scores = torch.einsum("bnhd,bmhd->bhnm", rotated, rotated)[0, 0].reshape(8, 8, 8, 8)
        diagonal = torch.stack([scores[i, i, i + 2, i + 3] for i in range(5)])
        return (diagonal.std() / diagonal.abs().mean()).item()

    assert spread("axial") < 1e-5
    assert spread("mismatched") > 0.01


def test_batches_hold_what_was_asked():
    dataset = make_dataset(3, "objects", "train", 0)
    batch = Batch.of(dataset.questions, {index: index for index in range(3)})
    assert batch.image.tolist() == [q.scene for q in dataset.questions]
    assert batch.choices()[torch.arange(len(batch.answer)), batch.answer].all()
