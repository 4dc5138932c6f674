# SPDX-License-Identifier: Apache-2.0
"""The weights of added encodings in a checkpoint: read, and copied into a patched model.

transformers' own ``from_pretrained`` leaves them out: the model attends as if it had never been patched. ``patch`` then
finds them by the folder that the model was loaded from, or refuses (``Lost``).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..encodings import AxialRoPE, MixedRoPE, at_least_float32
from .config_entry import MARK, NOTE, noted
from .fused_attention import FusedAttention
from .options import PatchOptions

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Lost:
    """A tower that was saved with an added encoding and loaded without it.

    entry: that of its config, which says so. path: what it was loaded from. loaded_by: the name of its class.
    """

    tower: nn.Module
    entry: dict[str, Any]
    path: str
    loaded_by: str

    def remember(self) -> None:
        """Write the entry again, after ``unpatch``."""
        setattr(self.tower.config, NOTE, self.entry)

    def is_of(self, options: PatchOptions) -> bool:
        """Return whether these options add the saved encoding."""
        return {**self.entry, "backend": None} == {**options.to_config(), "backend": None}

    def tensors(self) -> dict[str, Tensor] | None:
        """Return the saved tensors of encodings: none in a checkpoint that was written without a patch; None if it
        cannot be read any more."""
        try:
            return saved_tensors(self.path, {"local_files_only": True})
        except (ImportError, OSError, ValueError):
            return None

    def __str__(self) -> str:
        rope = self.entry.get("rope")
        kind = rope["class"].rpartition(".")[2] if isinstance(rope, dict) else rope or self.entry.get("legacy")
        start = self.entry.get("start")
        again = f"patch it as it was (rope={rope!r}, start={start!r}), " if isinstance(rope, str) else ""
        return (
            f"{self.path} was saved with a RoPE added ({kind}, start={start}), which {self.loaded_by}.from_pretrained "
            f"leaves out. Load it with spatial_pe.from_pretrained({self.loaded_by}, {self.path!r}), {again}or start "
            "anew: spatial_pe.unpatch(model)"
        )


def lost_encodings(model: nn.Module) -> list[Lost]:
    """Return the towers whose config says that an encoding was added, while their modules are not patched. A model that
    was made from a config alone was not loaded, and has lost nothing."""
    found = []
    for tower in noted(model):
        entry = getattr(tower.config, NOTE)
        patched = any(isinstance(module, FusedAttention) for module in tower.modules())
        loaded = [holder for holder in (model, tower) if getattr(holder, "name_or_path", "")]
        if loaded and not patched and isinstance(entry, dict) and (entry.get("rope") or entry.get("legacy")):
            found.append(Lost(tower, entry, str(loaded[0].name_or_path), type(loaded[0]).__name__))
    return found


def added_encodings(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return {name in the state dict: (attention module, name inside of it)} of all tensors of added encodings."""
    return {
        f"{name}.{key}" if name else key: (module, key)
        for name, module in model.named_modules()
        if isinstance(module, FusedAttention) and module._spatial_pe.added
        for key in (MARK, *(f"rope.{key}" for key in module.rope.state_dict()))  # type: ignore[union-attr]
    }


def fill(wanted: dict[str, tuple[nn.Module, str]], saved: dict[str, Tensor], path: str) -> None:
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


def saved_tensors(path: str, where: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of the checkpoint that belong to added encodings."""
    from transformers.utils import cached_file

    def find(name: str) -> str | None:
        return cached_file(path, name, _raise_exceptions_for_missing_entries=False, **where)

    main = next((file for file in map(find, _WEIGHTS) if file is not None), None)
    if main is None:
        raise ValueError(f"{path} holds none of {', '.join(_WEIGHTS)}")
    if main.endswith(".json"):
        index = json.loads(Path(main).read_text())["weight_map"]
        names = sorted({file for key, file in index.items() if is_ours(key)})
        files = [str(find(name)) for name in names]
    else:
        files = [main]
    tensors: dict[str, Tensor] = {}
    for file in files:
        if file.endswith(".safetensors"):
            from safetensors import safe_open

            with safe_open(file, framework="pt") as opened:
                tensors |= {key: opened.get_tensor(key) for key in opened.keys() if is_ours(key)}  # noqa: SIM118
        else:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
            tensors |= {key: value for key, value in loaded.items() if is_ours(key)}
    return tensors


def is_ours(key: str) -> bool:
    return ".rope." in f".{key}" or key.endswith(MARK)
