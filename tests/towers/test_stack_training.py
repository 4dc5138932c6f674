# SPDX-License-Identifier: Apache-2.0
"""A patched tower learns what it would: loss curves, Trainer."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, outputs, randn
from stack import EPS, SMALL, attentions
from torch import Tensor, nn

from spatial_pe.towers import patch

#
# Rounding differences grow as training goes on, by a factor that no one can know beforehand: it is measured. The
# unpatched model is trained again from weights that are one float32 epsilon off, in two random directions. That is
# less than what any other attention kernel changes in each step, so whatever moves the losses and weights not much
# further is rounding and no mistake.

FEW = 4


STEPS = 20


def nudge(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + EPS * (2 * torch.randint(2, p.shape, generator=generator) - 1))


def curve(name: str, prepare=lambda model: None) -> dict[str, Tensor]:
    """The loss of each step, and the parameters afterwards."""
    family = FAMILIES[name]
    model, inputs = family.make().train(), family.inputs()
    prepare(model)
    # eps: the gradient of a key bias without RoPE is 0 but for rounding, and Adam's default would make of its sign a
    # full step
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step)  # DINOv3 jitters its coordinates in training
        found = outputs(model, inputs)
        loss = sum((x - randn(*x.shape, seed=7 + i)).square().mean() for i, x in enumerate(found))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().double())
    return {"loss": torch.stack(losses)} | {key: p.detach().double() for key, p in model.named_parameters()}


def distances(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == expected.keys()
    return {key: (found[key] - value).norm().item() for key, value in expected.items()}


def allowed_by_rounding(make, expected: dict[str, Tensor]) -> dict[str, float]:
    """make(seed): the same training from nudged weights."""
    nudged = [distances(make(seed), expected) for seed in (1, 2)]
    return {key: FEW * max(row[key] for row in nudged) for key in expected}


@pytest.mark.parametrize("name", SMALL)
def test_loss_curves(name, calls):
    expected = curve(name)
    allowed = allowed_by_rounding(lambda seed: curve(name, lambda model: nudge(model, seed)), expected)
    assert not calls
    far = distances(curve(name, patch), expected)
    assert len(calls) >= STEPS * FAMILIES[name].layers
    assert expected["loss"][-1] < 0.7 * expected["loss"][0]  # it learns
    assert not {key: (far[key], allowed[key]) for key in far if not far[key] <= allowed[key]}


def test_loss_curves_notice_a_small_mistake():
    """A softmax scale that is wrong by 200 epsilons (2e-5) is seen in the losses and in most parameters."""

    def faulty(model):
        for module in attentions(model, "clip"):
            module.scale *= 1 + 200 * EPS

    expected = curve("clip")
    allowed = allowed_by_rounding(lambda seed: curve("clip", lambda model: nudge(model, seed)), expected)
    far = distances(curve("clip", faulty), expected)
    assert far["loss"] > allowed["loss"]
    assert sum(far[key] > allowed[key] for key in far) > len(far) / 2


class Classifier(nn.Module):
    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower, self.head = tower, nn.Linear(tower.config.hidden_size, 3)

    def gradient_checkpointing_enable(self, **kwargs) -> None:
        self.tower.gradient_checkpointing_enable(**kwargs)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.tower(pixel_values).last_hidden_state.mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def trained_by_trainer(name, folder, prepare=lambda model: None, checkpointing=True) -> dict[str, Tensor]:
    """The loss of each of three steps, and the parameters afterwards."""
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    model = Classifier(FAMILIES[name].make())
    prepare(model)
    data = [{"pixel_values": randn(3, 32, 32, seed=i), "labels": i % 3} for i in range(6)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        adam_epsilon=1e-4,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    losses = []
    model.register_forward_hook(lambda module, args, output: losses.append(output["loss"].detach().double()))
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    return {"loss": torch.stack(losses)} | {key: p.detach().double() for key, p in model.named_parameters()}


@pytest.mark.parametrize("name", [pytest.param("clip", marks=pytest.mark.slow), "dinov3"])
def test_trainer_with_gradient_checkpointing(name, calls, tmp_path):
    pytest.importorskip("accelerate")
    expected = trained_by_trainer(name, tmp_path)
    allowed = allowed_by_rounding(
        lambda seed: trained_by_trainer(name, tmp_path, lambda model: nudge(model, seed)), expected
    )
    far = distances(trained_by_trainer(name, tmp_path, patch), expected)
    # three steps, forward and again in backward, besides the proof's calls
    assert len(calls) >= 2 * 3 * FAMILIES[name].layers and len(expected["loss"]) == 3
    assert not {key: (far[key], allowed[key]) for key in far if not far[key] <= allowed[key]}


def test_trainer_trains_and_saves_an_added_encoding(tmp_path):
    """With gradient checkpointing what is learned without it, and the file has it."""
    pytest.importorskip("accelerate")
    safetensors = pytest.importorskip("safetensors.torch")

    def with_rope(model):
        patch(model, rope="mixed")

    def with_rope_nudged(seed):
        def prepare(model):
            patch(model, rope="mixed")
            nudge(model, seed)

        return trained_by_trainer("clip", tmp_path, prepare, checkpointing=False)

    expected = trained_by_trainer("clip", tmp_path, with_rope, checkpointing=False)
    allowed = allowed_by_rounding(with_rope_nudged, expected)
    found = trained_by_trainer("clip", tmp_path, with_rope)
    far = distances(found, expected)
    assert not {key: (far[key], allowed[key]) for key in far if not far[key] <= allowed[key]}
    saved = safetensors.load_file(tmp_path / "saved" / "model.safetensors")
    encodings = [key for key in saved if ".rope." in key]
    assert len(encodings) == FAMILIES["clip"].layers
    assert all(saved[key].any() and torch.equal(saved[key].double(), found[key]) for key in encodings)
