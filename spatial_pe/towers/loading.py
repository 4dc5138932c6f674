# SPDX-License-Identifier: Apache-2.0
"""from_pretrained: load a patched model from a directory that save_pretrained wrote."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from .config_entry import NOTE, noted
from .options import PatchOptions
from .patch import apply
from .saved_encodings import added_encodings, fill, is_ours, saved_tensors

_WHERE = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def from_pretrained(cls: Any, path: str | Path, *args: Any, rope: nn.Module | None = None, **kwargs: Any) -> Any:
    """Load a patched model that was saved with ``save_pretrained``: patched the same way, the same values bit for bit.

    Args:
        cls: the transformers class to load with, e.g. AutoModelForImageTextToText.
        path: a directory, or the name of a repository.
        args, kwargs: for ``cls.from_pretrained``.
        rope: replaces an encoding that config.json can only name (a module from outside of spatial_pe).

    Returns:
        The model, in eval mode as transformers returns it. A position embedding that was left out
        (``keep_absolute=False``) was saved as zeros: ``unpatch`` gives zeros too.

    Raises:
        ValueError: it holds no patched model, or the weights of an added encoding are missing.
    """
    path = str(path)
    with _quiet():
        model, info = cls.from_pretrained(path, *args, output_loading_info=True, **kwargs)
    towers = noted(model)
    name = getattr(cls, "__name__", str(cls))
    if not towers:
        raise ValueError(
            f"{path} holds no patched model: its config.json has no entry {NOTE!r}. Load it with "
            f"{name}.from_pretrained and call spatial_pe.patch(model)"
        )
    for tower in towers:
        note = getattr(tower.config, NOTE)
        options, embed = PatchOptions.from_config(note, rope), note.get("patch_embed", True)
        apply(tower, options, note["backend"], verify=True, patch_embed=embed)
    if encodings := added_encodings(model):
        fill(encodings, saved_tensors(path, {k: v for k, v in kwargs.items() if k in _WHERE}), path)
    _warn_of_others(info, name, path)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' report of our tensors as unexpected."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _warn_of_others(info: Any, name: str, path: str) -> None:
    """Repeat transformers' warnings, without our tensors."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = info.get(kind, ()) if isinstance(info, dict) else getattr(info, kind, ())
        others = sorted(str(key) for key in keys if not is_ours(str(key)))
        if others:
            shown = ", ".join(others[:5]) + (", …" if len(others) > 5 else "")
            warnings.warn(f"{name} from {path}: {kind.replace('_', ' ')}: {shown}", stacklevel=3)
