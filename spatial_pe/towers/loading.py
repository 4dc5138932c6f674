# SPDX-License-Identifier: Apache-2.0
"""from_pretrained: load a patched model from a directory that save_pretrained wrote."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..encodings import AxialRoPE, MixedRoPE, at_least_float32
from .config_entry import MARK, NOTE, noted
from .fused_attention import FusedAttention
from .options import PatchOptions
from .patch import apply

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
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
        apply(tower, PatchOptions.from_config(note, rope), note["backend"], verify=True)
    encodings: dict[str, tuple[nn.Module, str]] = {
        f"{name}.{key}" if name else key: (module, key)
        for name, module in model.named_modules()
        if isinstance(module, FusedAttention) and module._spatial_pe.added
        for key in (MARK, *(f"rope.{key}" for key in module.rope.state_dict()))  # type: ignore[union-attr]
    }
    if encodings:
        _fill(encodings, _tensors(path, {k: v for k, v in kwargs.items() if k in _WHERE}), path)
    _warn_of_others(info, name, path)
    return model


def _fill(wanted: dict[str, tuple[nn.Module, str]], saved: dict[str, Tensor], path: str) -> None:
    """Copy each tensor of an encoding from the saved one of the same name, or, if transformers renames, the nearest."""
    taken: set[str] = set()
    for name, (module, key) in wanted.items():
        ends = [other for other in saved if other.endswith(key) and other not in taken]
        best = max(ends, key=lambda other: _common_end(name, other), default=None)
        if best is None:
            raise ValueError(
                f"{path} has no weights for {name}, though its config.json says that a RoPE was added: it was saved "
                "without them (by a model that shares its config with a patched one, or by an adapter: add "
                'modules_to_save=["rope"])'
            )
        taken.add(best)
        where, _, last = key.rpartition(".")
        holder, value = module.get_submodule(where), saved[best]
        old = getattr(holder, last)
        if old.shape != value.shape:
            raise ValueError(f"{path} has {best} of shape {tuple(value.shape)}, {name} is {tuple(old.shape)}")
        if isinstance(holder, AxialRoPE | MixedRoPE):  # earlier versions cast, and saved, them with their model
            value = at_least_float32(value)
        old.data = value.to(old.device)


def _common_end(a: str, b: str) -> int:
    count = 0
    for x, y in zip(reversed(a.split(".")), reversed(b.split(".")), strict=False):
        if x != y:
            break
        count += 1
    return count


def _tensors(path: str, where: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of the checkpoint that belong to added encodings."""
    from transformers.utils import cached_file

    def find(name: str) -> str | None:
        return cached_file(path, name, _raise_exceptions_for_missing_entries=False, **where)

    main = next((file for file in map(find, _WEIGHTS) if file is not None), None)
    if main is None:
        raise ValueError(f"{path} holds none of {', '.join(_WEIGHTS)}")
    if main.endswith(".json"):
        index = json.loads(Path(main).read_text())["weight_map"]
        names = sorted({file for key, file in index.items() if _is_ours(key)})
        files = [str(find(name)) for name in names]
    else:
        files = [main]
    tensors: dict[str, Tensor] = {}
    for file in files:
        if file.endswith(".safetensors"):
            from safetensors import safe_open

            with safe_open(file, framework="pt") as opened:
                tensors |= {key: opened.get_tensor(key) for key in opened.keys() if _is_ours(key)}  # noqa: SIM118
        else:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
            tensors |= {key: value for key, value in loaded.items() if _is_ours(key)}
    return tensors


def _is_ours(key: str) -> bool:
    return ".rope." in f".{key}" or key.endswith(MARK)


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
        others = sorted(str(key) for key in keys if not _is_ours(str(key)))
        if others:
            shown = ", ".join(others[:5]) + (", …" if len(others) > 5 else "")
            warnings.warn(f"{name} from {path}: {kind.replace('_', ' ')}: {shown}", stacklevel=3)
