# SPDX-License-Identifier: Apache-2.0
"""Scores of images and captions from a two-tower model, each distinct image and caption computed once."""

from __future__ import annotations

import inspect
import string
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .loading import Item, open_image

# SigLIP was trained on captions in lower case, without punctuation, padded to the full length without a mask. Not every
# tokenizer released for it does that: SigLIP 2's in transformers 4 keeps case and punctuation, and most add a mask
# (open_clip's do as here). AIMv2's causal text tower in transformers (4.57 to 5.24) is bidirectional under sdpa if no
# caption of a batch is padded.
SIGLIP = ("siglip", "siglip2")
PADDED = (*SIGLIP, "aimv2")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class ModelError(RuntimeError):
    """A model without scores for images and captions, or with scores that are not numbers."""


class Scorer:
    """Cosine scores of each item: its image with each of its captions, as float32.

    A model without ``get_image_features`` and ``get_text_features`` is asked for ``logits_per_image`` instead.
    """

    def __init__(self, model: nn.Module, processor: Callable[..., Any], batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model, self.processor, self.batch_size = model, processor, batch_size
        self._towers = all(callable(getattr(model, f"get_{x}_features", None)) for x in ("image", "text"))
        forward = inspect.signature(type(model).forward).parameters
        generates = bool(getattr(model, "can_generate", bool)())
        if not self._towers and (generates or not {"pixel_values", "input_ids"} <= set(forward)):
            why = "generates text (lmms-eval measures such models)" if generates else "has no text tower"
            raise ModelError(
                f"{type(model).__name__} {why}: caption choice needs a two-tower model such as CLIP, SigLIP, AltCLIP"
            )
        self._texts: dict[str, Tensor] = {}  # caption -> (features,) float32 of length 1
        self._images: dict[str, Tensor] = {}

    def forget_images(self) -> None:
        """Clear cached images, after the vision tower changed."""
        self._images.clear()

    @torch.no_grad()
    def scores(self, items: Sequence[Item], progress: Callable[[int, int], None] | None = None) -> list[list[float]]:
        """Return one score per caption, in the items' order.

        Raises:
            UserError: an image that cannot be decoded. ModelError: scores that are not finite.
        """
        training = self.model.training
        self.model.eval()
        try:
            return (self._cosines if self._towers else self._logits)(items, progress or (lambda done, total: None))
        finally:
            self.model.train(training)

    def _cosines(self, items: Sequence[Item], progress: Callable[[int, int], None]) -> list[list[float]]:
        captions = dict.fromkeys(caption for item in items for caption in item.captions if caption not in self._texts)
        for batch in _batches(list(captions), self.batch_size):
            self._texts |= zip(batch, self._features("text", self._text(batch)), strict=True)
        images = {item.image_id: item for item in items}
        for batch in _batches([i for i in images if i not in self._images], self.batch_size):
            self._images |= zip(batch, self._features("image", self._pixels([images[i] for i in batch])), strict=True)
            progress(len(self._images), len(images))
        found = []
        for item in items:
            image = self._images[item.image_id]
            found.append([float(image @ self._texts[caption]) for caption in item.captions])
        return _finite(found, items, self.model)

    def _logits(self, items: Sequence[Item], progress: Callable[[int, int], None]) -> list[list[float]]:
        """Return logits of images times captions, batch by batch; a common scale or shift changes no answer."""
        found = []
        for batch in _batches(list(items), self.batch_size):
            captions = list(dict.fromkeys(caption for item in batch for caption in item.captions))
            images = {item.image_id: item for item in batch}
            out = self.model(**self._text(captions), **self._pixels(list(images.values())))
            logits = getattr(out, "logits_per_image", None)
            if not isinstance(logits, Tensor) or logits.shape != (len(images), len(captions)):
                raise ModelError(
                    f"{type(self.model).__name__} takes images and captions but returns no logits_per_image of shape "
                    f"{(len(images), len(captions))}: caption choice needs a two-tower model"
                )
            rows = dict(zip(images, logits.float().cpu(), strict=True))
            found += [[float(rows[item.image_id][captions.index(c)]) for c in item.captions] for item in batch]
            progress(len(found), len(items))
        return _finite(found, items, self.model)

    def _features(self, tower: str, inputs: dict[str, Tensor]) -> Tensor:
        """Return (B, features) float32 on the CPU, of length 1."""
        out = getattr(self.model, f"get_{tower}_features")(**inputs)
        features = out if isinstance(out, Tensor) else getattr(out, "pooler_output", None)  # 5.x returns an output
        if not isinstance(features, Tensor) or features.ndim != 2:
            shape = getattr(features, "shape", None)
            raise ModelError(
                f"{type(self.model).__name__}.get_{tower}_features must give one vector for each {tower}, got "
                f"{type(out).__name__}{f' of shape {tuple(shape)}' if shape is not None else ''}"
            )
        return nn.functional.normalize(features.float().cpu(), dim=-1)

    def _text(self, captions: list[str]) -> dict[str, Tensor]:
        config: Any = getattr(self.model, "config", None)
        family = getattr(config, "model_type", None)
        if family in SIGLIP:
            captions = [caption.lower().translate(_PUNCTUATION) for caption in captions]
        how: dict[str, Any] = {"padding": True}
        if family in PADDED:
            how = {"padding": "max_length", "max_length": config.text_config.max_position_embeddings}
        inputs = self._accepted("text", self.processor(text=captions, return_tensors="pt", truncation=True, **how))
        if family in SIGLIP:
            inputs.pop("attention_mask", None)
        return inputs

    def _pixels(self, items: list[Item]) -> dict[str, Tensor]:
        return self._accepted("image", self.processor(images=[open_image(i) for i in items], return_tensors="pt"))

    def _accepted(self, tower: str, inputs: Any) -> dict[str, Tensor]:
        """Return the part of the processor's output that the method takes, on the model's device and in its dtype."""
        method = getattr(self.model, f"get_{tower}_features") if self._towers else type(self.model).forward
        accepted = inspect.signature(method).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        weight = next(p for p in self.model.parameters() if p.is_floating_point())
        return {
            name: value.to(weight.device, weight.dtype if value.is_floating_point() else None)
            for name, value in dict(inputs).items()
            if takes_all or name in accepted
        }


def _batches(values: list, size: int) -> Iterator[list]:
    return (values[start : start + size] for start in range(0, len(values), size))


def _finite(scores: list[list[float]], items: Sequence[Item], model: nn.Module) -> list[list[float]]:
    for score, item in zip(scores, items, strict=True):
        if not torch.tensor(score).isfinite().all():
            raise ModelError(
                f"{item.record}: {type(model).__name__} gives the scores {score}: is its dtype too narrow?"
            )
    return scores
