# SPDX-License-Identifier: Apache-2.0
"""lmms-eval's LLaVA models, with the vision tower patched on loading."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lmms_eval.models.chat.llava_hf import LlavaHf as LlavaHfChat
from lmms_eval.models.simple.llava_hf import LlavaHf, model_map
from loguru import logger

from ...ops.select import check_backend
from ...towers import from_pretrained, patch
from ...towers.config_entry import NOTE
from ...towers.fused_attention import FusedAttention
from ...towers.options import PatchOptions


class Patched:
    """Mixin for lmms-eval's classes: the arguments of ``spatial_pe.patch``, and loading of saved patched models.

    Args:
        pretrained: a directory or a repository. A model that was saved patched is loaded as it was saved
            (``spatial_pe.from_pretrained``).
        rope: "axial", "mixed", or "none": the same function as before, by the fused kernels.
        start, keep_absolute, legacy: see ``spatial_pe.patch``.
        backend: see ``spatial_pe.patch``; for a model that was saved patched, replaces the saved one.
        kwargs: for lmms-eval's class (device, dtype, batch_size, revision, …).

    Raises:
        ValueError: a wrong argument (before anything is loaded), or one of ``patch`` for a model saved patched.
    """

    def __init__(
        self,
        pretrained: str = "llava-hf/llava-1.5-7b-hf",
        *,
        rope: str | None = None,
        start: str = "identity",
        keep_absolute: bool = True,
        legacy: str | float | None = None,
        backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        options = _options(rope, start, keep_absolute, legacy)
        if backend is not None:
            check_backend(backend)
        with _patched_when_loaded(options, backend):
            super().__init__(pretrained=pretrained, **kwargs)  # type: ignore[call-arg]
        if not any(isinstance(module, FusedAttention) for module in self.model.modules()):  # type: ignore[attr-defined]
            raise RuntimeError(
                "the tower is not patched: this lmms-eval loads LLaVA differently from 0.7.3 "
                "(pip install lmms-eval==0.7.3)"
            )


class LlavaHfSpatialPE(Patched, LlavaHf):
    """lmms-eval's ``llava_hf`` with ``--force_simple``: the prompt is made from a task's text."""


class LlavaHfSpatialPEChat(Patched, LlavaHfChat):
    """lmms-eval's ``llava_hf``: the prompt is made by the processor's chat template."""


# ------------------------------------------------------------------------------------------------------------ loading


def _options(rope: str | None, start: str, keep_absolute: bool, legacy: str | float | None) -> PatchOptions:
    if not isinstance(keep_absolute, bool):
        raise ValueError(f"keep_absolute must be True or False, got {keep_absolute!r}")
    rope = None if rope in ("none", "None") else rope
    options = PatchOptions(
        rope, start, keep_absolute, None if legacy is None else str(legacy)
    )  # 2601.09954 is parsed as float
    options.check()
    if not options.adds and options != PatchOptions():
        raise ValueError(
            f"start={start!r}, keep_absolute={keep_absolute} are for a RoPE that is added: pass rope=axial"
        )
    return options


@contextmanager
def _patched_when_loaded(options: PatchOptions, backend: str | None) -> Iterator[None]:
    """Patch inside of lmms-eval's constructor, before it wraps the model for data parallelism and sharding."""
    classes = dict(model_map)
    model_map.update({name: _Loader(cls, options, backend) for name, cls in classes.items()})
    try:
        yield
    finally:
        model_map.update(classes)


class _Loader:
    """Replacement of a transformers class in lmms-eval's table, which only calls ``from_pretrained``."""

    def __init__(self, cls: Any, options: PatchOptions, backend: str | None) -> None:
        self.cls, self.options, self.backend = cls, options, backend

    def from_pretrained(self, path: str, **kwargs: Any) -> Any:
        options = self.options
        kwargs["device_map"] = kwargs.get("device_map") or None  # lmms-eval's "" is an error for transformers 5
        config = self.cls.config_class.from_pretrained(path, revision=kwargs.get("revision"))
        notes = list(_notes(config))
        if not notes:
            model = self.cls.from_pretrained(path, **kwargs)
            report = patch(
                model,
                rope=options.rope,
                start=options.start,
                keep_absolute=options.keep_absolute,
                legacy=options.legacy,
                backend=self.backend or "auto",
            )
            logger.info(f"{path}:\n{report}")
            return model
        if options != PatchOptions():
            raise ValueError(
                f"{path} was saved patched ({PatchOptions.from_config(notes[0])}) and is loaded as it was: leave out "
                f"rope, start, keep_absolute and legacy, got {options}"
            )
        for note in notes:
            note["backend"] = self.backend or note["backend"]
        return from_pretrained(self.cls, path, config=config, **kwargs)


def _notes(config: Any) -> Iterator[dict[str, Any]]:
    """Yield the entries of ``patch`` in a config and in those inside it (``vision_config``)."""
    for name, value in list(vars(config).items()):
        if name == NOTE:
            yield value
        elif hasattr(value, "to_dict"):
            yield from _notes(value)
