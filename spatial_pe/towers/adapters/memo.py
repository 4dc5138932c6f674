# SPDX-License-Identifier: Apache-2.0
"""What is made from a tensor once per forward and not once per layer: all layers get the same cos, the same mask."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_entries: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # an entry goes when its tensor does


def once_per_forward(key: Tensor, others: tuple[Tensor, ...], detail: Hashable, make: Callable[[], Any]) -> Any:
    """make(), or what it returned for the very same tensors with the same contents and detail. 3 us.

    What make() returns must not hold ``key`` or a view of it: it would keep its own entry alive.
    """
    state = (detail, torch.is_inference_mode_enabled(), *map(_version, (key, *others)))
    entry = _entries.get(key)
    if entry is not None:
        refs, known, value = entry
        if known == state and len(refs) == len(others) and all(ref() is x for ref, x in zip(refs, others, strict=True)):
            return value
    value = make()
    _entries[key] = (tuple(map(weakref.ref, others)), state, value)
    return value


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version
